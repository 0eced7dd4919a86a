"""Torch's layers of several maps, taken apart: the same layer with every map a linear layer of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from tensortrain.errors import KindError
from tensortrain.nn.attention.multihead import MultiheadAttention
from tensortrain.nn.composite import CompositeLayer
from tensortrain.nn.recurrent.cells import Cell, GRUCell, LSTMCell, RNNCell
from tensortrain.nn.recurrent.layers import GRU, LSTM, RNN

__all__ = ["composite_of", "composite_of_class", "fresh_twin", "opened"]

_COMPOSITES: dict[type[nn.Module], Any] = {
    one.dense_type: one for one in (GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, MultiheadAttention)
}


def composite_of(layer: object) -> type[CompositeLayer] | None:
    """Our class for one of torch's layers of several maps; ``None`` for other kinds, subclasses too."""
    return composite_of_class(type(layer))


def composite_of_class(kind: type) -> type[CompositeLayer] | None:
    """The same for layers of a class."""
    found: type[CompositeLayer] | None = _COMPOSITES.get(kind)
    return found


def opened(layer: nn.Module) -> CompositeLayer:
    """The same function of the same numbers, with dense linear layers for maps, on copies of the weights.

    Raises:
        KindError: A layer of another kind.

    Example:
        >>> lstm = nn.LSTM(8, 4)
        >>> [name for name, _ in opened(lstm).named_maps()]
        ['l0.ih', 'l0.hh']
    """
    kind: Any = composite_of(layer)
    if kind is None:
        raise KindError(
            f"only layers of several maps can be opened: found {type(layer).__name__}. Pass a recurrent layer, one of "
            "its cells or a MultiheadAttention of torch."
        )
    found: CompositeLayer
    if kind is MultiheadAttention:
        found = MultiheadAttention.with_dense_maps(layer)
    elif isinstance(layer, nn.RNNBase) or issubclass(kind, Cell):
        found = kind.from_dense(layer, compress="none")
    return found


def fresh_twin(layer: Any) -> nn.Module:
    """A layer of the same kind and arguments as one of torch's, without memory."""
    kind: Any = composite_of(layer)
    arguments = {name: getattr(layer, name) for name in kind.torch_arguments}
    if kind is MultiheadAttention:
        arguments |= {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a dropout without effect
        fresh: nn.Module = type(layer)(**copy.deepcopy(arguments))
        return fresh
