"""Networks that the package itself can name and build."""

from tensortrain.networks.conv_fc import DENSE_RECIPE, ConvFC
from tensortrain.networks.mlp import MLP
from tensortrain.networks.registry import build, describe, names, register

__all__ = ["DENSE_RECIPE", "MLP", "ConvFC", "build", "describe", "names", "register"]
