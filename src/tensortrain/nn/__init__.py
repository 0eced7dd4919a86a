"""Factorized layers: ``tensortrain.nn.X`` stands wherever ``torch.nn.X`` stood."""

from torch import nn as _torch_nn

from tensortrain.formats import search_modes, suggest_modes

from . import functional
from .attention import MultiheadAttention
from .base import FactorizedLayer
from .composite import CompositeLayer, CompositePlan
from .conv import Conv1d, Conv2d, Conv3d, ConvLayer
from .conv_plan import ConvPlan, LookupPlan
from .conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .embedding import Embedding
from .embedding_bag import EmbeddingBag
from .linear import Linear
from .orthogonal import orthogonal
from .param_groups import param_groups
from .recurrent import GRU, LSTM, RNN
from .recurrent_cells import GRUCell, LSTMCell, RNNCell
from .regularize import balance_, dense_norm, rank_lasso, tensor_dropout
from .tied import TiedHead, tied_head
from .transformer import TransformerEncoderLayer

# The torch layers that have a factorized twin. Exact types only: a subclass may have a forward of its own.
COUNTERPARTS: dict[type[_torch_nn.Module], type[FactorizedLayer]] = {
    _torch_nn.Linear: Linear,
    _torch_nn.Conv1d: Conv1d,
    _torch_nn.Conv2d: Conv2d,
    _torch_nn.Conv3d: Conv3d,
    _torch_nn.ConvTranspose1d: ConvTranspose1d,
    _torch_nn.ConvTranspose2d: ConvTranspose2d,
    _torch_nn.ConvTranspose3d: ConvTranspose3d,
    _torch_nn.Embedding: Embedding,
    _torch_nn.EmbeddingBag: EmbeddingBag,
}

__all__ = [
    "COUNTERPARTS",
    "GRU",
    "LSTM",
    "RNN",
    "CompositeLayer",
    "CompositePlan",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLayer",
    "ConvPlan",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "EmbeddingBag",
    "FactorizedLayer",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "LookupPlan",
    "MultiheadAttention",
    "RNNCell",
    "TiedHead",
    "TransformerEncoderLayer",
    "balance_",
    "dense_norm",
    "functional",
    "orthogonal",
    "param_groups",
    "rank_lasso",
    "search_modes",
    "suggest_modes",
    "tensor_dropout",
    "tied_head",
]
