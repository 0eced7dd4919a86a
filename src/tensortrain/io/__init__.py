"""Checkpoints: safetensors and JSON, written whole, read with suspicion, never pickled."""

from tensortrain.io.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
