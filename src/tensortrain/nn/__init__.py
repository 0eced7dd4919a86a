"""Factorized layers: ``tensortrain.nn.X`` stands wherever ``torch.nn.X`` stood."""

from tensortrain.formats import search_modes, suggest_modes
from tensortrain.nn.adaptive.evbmf import evbmf
from tensortrain.nn.adaptive.gates import RankGates
from tensortrain.nn.adaptive.growth import grow_ranks_
from tensortrain.nn.adaptive.priors import RankPrior
from tensortrain.nn.adaptive.prune import prune_ranks_
from tensortrain.nn.adaptive.svgd import SVGD
from tensortrain.nn.attention.multihead import MultiheadAttention
from tensortrain.nn.attention.transformer import TransformerEncoderLayer
from tensortrain.nn.conv.layers import Conv1d, Conv2d, Conv3d, ConvLayer
from tensortrain.nn.conv.plan import ConvPlan, LookupPlan
from tensortrain.nn.conv.transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from tensortrain.nn.embedding.bag import EmbeddingBag
from tensortrain.nn.embedding.layers import Embedding
from tensortrain.nn.embedding.tied import TiedHead, tied_head
from tensortrain.nn.recurrent.cells import GRUCell, LSTMCell, RNNCell
from tensortrain.nn.recurrent.layers import GRU, LSTM, RNN
from tensortrain.nn.shaping.orthogonal import orthogonal
from tensortrain.nn.shaping.param_groups import param_groups
from tensortrain.nn.shaping.regularize import balance_, dense_norm, rank_lasso, tensor_dropout

from . import functional
from .base import FactorizedLayer
from .composite import CompositeLayer, CompositePlan
from .counterparts import COUNTERPARTS, counterpart, dense_twin, is_transformers_conv1d
from .linear import Linear
from .partial import PartialLinear

__all__ = [
    "COUNTERPARTS",
    "GRU",
    "LSTM",
    "RNN",
    "SVGD",
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
    "PartialLinear",
    "RNNCell",
    "RankGates",
    "RankPrior",
    "TiedHead",
    "TransformerEncoderLayer",
    "balance_",
    "counterpart",
    "dense_norm",
    "dense_twin",
    "evbmf",
    "functional",
    "grow_ranks_",
    "is_transformers_conv1d",
    "orthogonal",
    "param_groups",
    "prune_ranks_",
    "rank_lasso",
    "search_modes",
    "suggest_modes",
    "tensor_dropout",
    "tied_head",
]
