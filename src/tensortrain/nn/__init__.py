"""Factorized layers: ``tensortrain.nn.X`` stands wherever ``torch.nn.X`` stood."""

from torch import nn as _torch_nn

from tensortrain.formats import search_modes, suggest_modes

from . import functional
from .base import FactorizedLayer
from .conv import Conv1d, Conv2d, Conv3d
from .conv_plan import ConvPlan, LookupPlan
from .embedding import Embedding
from .linear import Linear
from .orthogonal import orthogonal
from .param_groups import param_groups
from .regularize import balance_, dense_norm, rank_lasso, tensor_dropout

# The torch layers that have a factorized twin. Exact types only: a subclass may have a forward of its own.
COUNTERPARTS: dict[type[_torch_nn.Module], type[FactorizedLayer]] = {
    _torch_nn.Linear: Linear,
    _torch_nn.Conv1d: Conv1d,
    _torch_nn.Conv2d: Conv2d,
    _torch_nn.Conv3d: Conv3d,
    _torch_nn.Embedding: Embedding,
}

__all__ = [
    "COUNTERPARTS",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvPlan",
    "Embedding",
    "FactorizedLayer",
    "Linear",
    "LookupPlan",
    "balance_",
    "dense_norm",
    "functional",
    "orthogonal",
    "param_groups",
    "rank_lasso",
    "search_modes",
    "suggest_modes",
    "tensor_dropout",
]
