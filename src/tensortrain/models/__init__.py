"""Networks that the package itself can name and build."""

from tensortrain.models.conv_fc import DENSE_RECIPE, ConvFC
from tensortrain.models.mlp import MLP
from tensortrain.models.registry import build, describe, names, register

__all__ = ["DENSE_RECIPE", "MLP", "ConvFC", "build", "describe", "names", "register"]
