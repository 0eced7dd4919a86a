"""Checkpoints: safetensors and JSON, written whole, read with suspicion, never pickled."""

from tensortrain.io.pretrained import has_source, load_pretrained, save_pretrained

__all__ = ["has_source", "load_pretrained", "save_pretrained"]
