"""Convolutions: direct and transposed, on one plan."""

from tensortrain.nn.conv.layers import Conv1d, Conv2d, Conv3d, ConvLayer

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLayer"]
