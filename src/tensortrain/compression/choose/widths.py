"""Widths that hidden units may be narrowed to: entries on the menus of the layers around them, taken together.

Narrowing pays from the first unit on, where factoring begins to pay at half of the ranks: a share k of the units costs
a share k of the parameters, and leaves dense layers, which are faster by themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.formats.narrowing import Narrowing, narrowing, shrunk
from tensortrain.system.parking import let_go

__all__ = ["JointWidths", "Width", "Widths", "channel_gram", "disjoint", "widths_of"]

_MOST_WIDTHS = 64
_MOST_BLOCKS = 64  # in which units go, each a step over the whole moment
_ROUND = 8  # products of matrices run best at multiples of this
# Channels that a convolution takes at once. 31 of 32 take up to 1.25 times as long as all (depthwise between two maps,
# one example), 60 of 64 as long as all; 48 of 64 take 0.8 times as long.
_LANES = 16

Members: TypeAlias = Mapping[str, FoundLayer]


@dataclass(frozen=True)
class Width:
    """One width, for one of the layers around some hidden units.

    Attributes:
        n_units: How many remain.
        share: Of the units, and so of the layer's parameters and time.
        n_params: What the layer's weight has then; of the first maker less what goes beside the weights of all.
        error: Squared error of the reader's output, relative; 0 for the makers, whose outputs stay as they are.
        reads: Whether the layer reads the units.
        judges: Whether errors are told at the layer though it reads none of them, as at the keys of attention.
        time: Share of the layer's time, where that is another one than of the units.
        index_bytes: What the layer keeps beside its parameters.
        with_bias: ``n_params`` is less by what goes of the layer's own bias, and by nothing else beside its weight.
    """

    n_units: int
    share: float
    n_params: int
    error: float = 0.0
    reads: bool = False
    judges: bool = False
    time: float | None = None
    index_bytes: int = 0
    with_bias: bool = False

    @property
    def seconds(self) -> float:
        """Share of the time that the layer takes as it is."""
        return self.share if self.time is None else self.time


class _Group(Protocol):
    """Layers that are narrowed together."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def reader(self) -> str: ...


G = TypeVar("G", bound=_Group)
O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class JointWidths(ABC, Generic[G, O]):
    """All widths that some layers can be narrowed to together.

    Attributes:
        group: The layers, and what they meet in.
        order: What goes first, and what every width costs.
        menus: By layer name: the widths, in the same order for all.
    """

    group: G
    order: O
    menus: Mapping[str, tuple[Width, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.group.names

    @property
    def reader(self) -> str:
        """The layer by whose entry a width is told from other forms."""
        return self.group.reader

    @abstractmethod
    def kept(self, n_units: int) -> tuple[Any, ...]:
        """What is best kept at a width."""


@dataclass(frozen=True)
class Widths(JointWidths[HiddenUnits, Narrowing]):
    """All widths of some hidden units.

    Attributes:
        n_between: Numbers that the layers between hold for all units.
    """

    n_between: int = 0

    def kept(self, n_units: int) -> tuple[int, ...]:
        """Numbers of the units that are best kept."""
        return tuple(self.order.kept(n_units).tolist())


def disjoint(found: Sequence[HiddenUnits], layers: Members, moments: Mapping[str, LayerMoments]) -> list[HiddenUnits]:
    """The hidden units around layers that may be changed; of those that share a layer, the ones with most parameters.

    Args:
        layers: That may be changed, by name.
        moments: Of their inputs; a reader of which none are known cannot be fitted anew.
    """
    fit = [
        units
        for units in found
        if units.n_units > 1
        and all(name in layers for name in (*units.makers, units.reader))
        and units.reader in moments
        and moments[units.reader].gram is not None
    ]
    taken: set[str] = set()
    kept = []
    for units in sorted(fit, key=lambda one: -sum(layers[n].weight.n_params for n in (*one.makers, one.reader))):
        names = {*units.makers, units.reader}
        if not names & taken:
            taken |= names
            kept.append(units)
    return kept


def widths_of(
    model: nn.Module, units: HiddenUnits, layers: Members, moments: LayerMoments, *, allow_slower: bool
) -> Widths:
    """What every width of some hidden units costs and loses.

    Args:
        moments: Of the reader's inputs.
        allow_slower: Also those at which convolutions take as long as at a larger one, or longer.

    Cost: O(n^3 + m n^2) flops for n units that m outputs are made of.
    """
    reader = layers[units.reader]
    gram = shrunk(channel_gram(reader, moments).to(reader.kernel.device), moments.outside)
    let_go(moments.gram)
    outputs = moments.output_gram
    outputs = torch.diag(outputs) if outputs is not None and outputs.ndim == 1 else outputs
    outputs = None if outputs is None else shrunk(outputs)
    block = max(_ROUND, -(-units.n_units // _MOST_BLOCKS))
    rows, moment = reader.kernel, [gram]
    del gram  # it is as large as the layer, and goes as soon as it is not needed
    order = narrowing(rows, moment.pop(), outputs, block=block)
    n_between = sum(p.numel() for name in units.between for p in model.get_submodule(name).parameters(recurse=False))
    biases = sum(p.numel() for name in units.makers for p in _beside_weight(layers[name]))
    lanes = _lanes(reader, units.n_units)
    widths = _widths(units.n_units, 1 if allow_slower else lanes)
    menus = {name: tuple(_width(k, units, layers[name], order, lanes) for k in widths) for name in units.makers[1:]}
    first, last = units.makers[0], units.reader
    menus[first] = tuple(_width(k, units, layers[first], order, lanes, beside=n_between + biases) for k in widths)
    menus[last] = tuple(_width(k, units, reader, order, lanes, reads=True) for k in widths)
    return Widths(units, order, menus, n_between)


def channel_gram(reader: FoundLayer, moments: LayerMoments) -> Tensor:
    """Second moment of the channels that a layer reads, ``(n, n)``; of a convolution, over the positions of a patch."""
    gram = moments.gram
    assert gram is not None
    if reader.weight.fan_in != reader.weight.in_features:
        gram = moments.weighting.of_channels(reader.weight)[0]
    return torch.diag(gram) if gram.ndim == 1 else gram


def _lanes(reader: FoundLayer, n_units: int) -> int:
    """How many of the units a layer takes in the time of one."""
    if reader.weight.kind != "conv" or n_units <= _ROUND:  # of so few channels the call itself takes longest
        return 1
    return _LANES if n_units > _LANES else _ROUND


def _widths(n: int, lanes: int) -> list[int]:
    """What may remain of n units.

    Args:
        lanes: All widths but the least are multiples of it.
    """
    step = max(1, -(-n // _MOST_WIDTHS))
    if n >= _ROUND * _MOST_WIDTHS // 4:
        step = -(-step // _ROUND) * _ROUND
    step = -(-step // lanes) * lanes
    least = [_ROUND] if lanes > _ROUND else []
    return [*least, *range(step, n, step)]


def _width(
    k: int,
    units: HiddenUnits,
    layer: FoundLayer,
    order: Narrowing,
    lanes: int,
    *,
    beside: int = 0,
    reads: bool = False,
) -> Width:
    n = units.n_units
    n_params = layer.weight.n_params * k // n - beside * (n - k) // n
    worst = float(order.losses[-1])
    error = order.loss(k) / worst if reads and worst > 0 else 0.0
    time = min(1.0, -(-k // lanes) * lanes / n) if lanes > 1 else None
    return Width(k, k / n, n_params, error, reads, time=time)


def _beside_weight(layer: FoundLayer) -> list[nn.Parameter]:
    """A layer's parameters for its outputs that are not its weight: the bias."""
    return [p for name, p in layer.module._parameters.items() if p is not None and name != "weight"]
