"""Embeddings: tables, bags, and heads tied to a table."""

from tensortrain._moved import names_of_before
from tensortrain.nn.embedding.layers import Embedding

__all__ = ["Embedding"]

__getattr__ = names_of_before(__name__, "nn.embedding.layers")
