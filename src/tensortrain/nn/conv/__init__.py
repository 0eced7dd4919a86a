"""Convolutions: direct and transposed, on one plan."""

from tensortrain._moved import names_of_before
from tensortrain.nn.conv.layers import Conv1d, Conv2d, Conv3d, ConvLayer

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLayer"]

__getattr__ = names_of_before(__name__, "nn.conv.layers")
