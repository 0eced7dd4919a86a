"""What ``search="structure"`` looks through beside the usual menu: further mode shapes, and orders of the channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tensortrain.formats import RankPoint, Weighting, WeightShape, get_format, suggest_modes, suggest_padded_modes
from tensortrain.formats.chain import ChainFormat
from tensortrain.formats.channel_order import NATURAL, ChannelOrder, search_order

__all__ = ["Arrangement", "Search", "better_order", "more_arrangements"]

Search = Literal["structure"]
Modes = tuple[int, ...]
Arrangement = tuple[Modes, Modes, ChannelOrder]  # output modes, input modes, where the channels stand
_SMALL = (4, 8)  # last modes of trains that share blocks of so many channels
_AT = 0.6  # predicted error at which an order is sought; it serves all ranks
_WORTHWHILE = 0.98  # of the error: gathers take time


def more_arrangements(weight: WeightShape, structure: Sequence[int] | None) -> Iterator[Arrangement]:
    """Further mode shapes of a train for one group of a weight.

    Args:
        structure: How the inputs of a linear layer are made up, such as (channels, height, width).
    """
    if weight.kind == "linear":
        yield from ((outs, ins, NATURAL) for outs, ins in _linear(weight.out_features, weight.in_features))
        yield from _last_axes_first(weight, structure)
    elif weight.kind == "conv":
        for d in (2, 3):
            yield suggest_modes(weight.out_features, d), suggest_modes(weight.in_features, d), NATURAL
    else:
        for d in (2, 4):
            words = suggest_padded_modes(weight.in_features, d)
            yield suggest_modes(weight.out_features, d)[::-1], words, NATURAL
            yield (*(1 for _ in words), weight.out_features), (*words, 1), NATURAL


def _linear(m: int, n: int) -> Iterator[tuple[Modes, Modes]]:
    for d in (2, 3, 4):
        yield suggest_modes(m, d), suggest_modes(n, d)
        yield suggest_modes(m, d)[::-1], suggest_modes(n, d)
    for small in _SMALL:
        if m % small == 0 and n % small == 0:
            yield (m // small, small), (n // small, small)
            yield (small, m // small), (small, n // small)
        if n % small == 0:
            yield (m, 1), (n // small, small)
        if m % small == 0:
            yield (m // small, small), (n, 1)
    outs = suggest_modes(m, 2)
    yield (1, *outs), (n, 1, 1)  # low rank whose output factor is a train


def _last_axes_first(weight: WeightShape, structure: Sequence[int] | None) -> Iterator[Arrangement]:
    """Flattened maps with their positions in front of their channels."""
    given = tuple(int(k) for k in structure or () if k > 1)
    if len(given) < 2 or math.prod(given) != weight.in_features:
        return
    numbers = torch.arange(weight.in_features).reshape(given)
    order = ChannelOrder.of(None, numbers.movedim(0, -1).flatten().tolist())
    for channels in ((given[0],), suggest_modes(given[0], 2)):
        for ins in ((*given[1:], *channels), (math.prod(given[1:]), *channels)):
            yield (*(1 for _ in ins), weight.out_features), (*ins, 1), order


def better_order(points: Sequence[RankPoint], dense: Tensor, weighting: Weighting) -> ChannelOrder:
    """An order of a linear weight's channels that lowers a train's error, or that which they have.

    Args:
        points: Of the train's rank path; the order is sought at one of them.
    """
    point = min(points, key=lambda one: abs(one.rel_error - _AT))
    spec, fmt = point.spec, get_format(point.spec.format)
    outputs, inputs = (sum(mode > 1 for mode in modes) > 1 for modes in (spec.out_modes, spec.in_modes))
    if not _can_move(fmt, spec.weight, spec.out_modes, spec.in_modes) or not (outputs or inputs):
        return NATURAL

    def made(matrix: Tensor, weighed: Weighting) -> Tensor:
        assert isinstance(fmt, ChainFormat)
        return fmt.roughly(matrix, spec, weighed)

    found = search_order(dense, weighting.checked(spec.weight), made, outputs=outputs, inputs=inputs)
    return found.order if found.rel_error < _WORTHWHILE * found.before else NATURAL


def _can_move(fmt: Any, weight: WeightShape, outs: Modes, ins: Modes) -> bool:
    """Only linear layers gather; and padded modes would have to be gathered around."""
    exact = math.prod(outs) == weight.out_features and math.prod(ins) == weight.in_features
    return isinstance(fmt, ChainFormat) and weight.kind == "linear" and exact
