"""Embeddings: tables, bags, and heads tied to a table."""

from tensortrain.nn.embedding.layers import Embedding

__all__ = ["Embedding"]
