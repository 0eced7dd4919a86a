"""Factorized layers: ``tensortrain.nn.X`` stands wherever ``torch.nn.X`` stood."""

from tensortrain.formats import search_modes, suggest_modes

from . import functional
from .attention import MultiheadAttention
from .base import FactorizedLayer
from .composite import CompositeLayer, CompositePlan
from .conv import Conv1d, Conv2d, Conv3d, ConvLayer
from .conv_plan import ConvPlan, LookupPlan
from .conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .counterparts import COUNTERPARTS, counterpart, dense_twin, is_transformers_conv1d
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
    "counterpart",
    "dense_norm",
    "dense_twin",
    "functional",
    "is_transformers_conv1d",
    "orthogonal",
    "param_groups",
    "rank_lasso",
    "search_modes",
    "suggest_modes",
    "tensor_dropout",
    "tied_head",
]
