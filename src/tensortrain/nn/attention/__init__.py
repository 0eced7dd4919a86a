"""Attention and the transformer layers of torch."""

from tensortrain.nn.attention.multihead import MultiheadAttention

__all__ = ["MultiheadAttention"]
