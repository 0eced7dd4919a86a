"""Folders of safetensors and JSON: written whole, read with suspicion, never pickled."""
