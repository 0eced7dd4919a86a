"""Whole attention heads of a model: which outputs of which layers make a head, and who reads it.

A head depends on its own queries, keys and values alone; grouped ones share keys and values, and go together. Layers
that make or read heads stay plain and dense without some of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from tensortrain.compression.survey.heads import AttentionHeads, Place, heads_of, touched
from tensortrain.compression.survey.hidden import Run, Trace, traced

__all__ = ["Rows", "WholeHeads", "find_whole_heads"]


@dataclass(frozen=True)
class Rows:
    """Outputs of a layer that belong to heads: of each group a few in a row.

    Attributes:
        maker: Name of the layer.
        start, step: Where those of the first group begin, and from one to the next.
        width: How many of a group.
    """

    maker: str
    start: int
    step: int
    width: int

    def of(self, group: int) -> range:
        """Numbers of the outputs that belong to a group."""
        start = self.start + group * self.step
        return range(start, start + self.width)


@dataclass(frozen=True)
class WholeHeads:
    """Groups of attention heads that can be taken out of the layers around them.

    Attributes:
        rows: Where queries, keys and values of the groups are made.
        reader: Name of the layer that reads the heads' outputs.
        n_groups: Heads of keys and values.
        per_group: Heads of queries that share one of these.
        size: Numbers of a head.
    """

    rows: tuple[Rows, ...]
    reader: str
    n_groups: int
    per_group: int
    size: int

    @property
    def makers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.maker for one in self.rows))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.makers, self.reader)

    @property
    def n_read(self) -> int:
        """Numbers that the reader reads."""
        return self.n_groups * self.per_group * self.size

    def read(self, groups: Sequence[int]) -> list[int]:
        """Where some groups stand among the reader's inputs."""
        width = self.per_group * self.size
        return [k for group in groups for k in range(group * width, (group + 1) * width)]

    def made(self, maker: str, n_outputs: int, groups: Sequence[int]) -> list[int]:
        """Outputs of a layer that remain with some groups, those that belong to no head among them."""
        of_heads = {k for one in self._rows_of(maker) for group in range(self.n_groups) for k in one.of(group)}
        kept = {k for one in self._rows_of(maker) for group in groups for k in one.of(group)}
        return [k for k in range(n_outputs) if k in kept or k not in of_heads]

    def _rows_of(self, maker: str) -> Iterator[Rows]:
        return (one for one in self.rows if one.maker == maker)


def find_whole_heads(model: nn.Module, run: Run, *, training: bool = False) -> list[WholeHeads]:
    """The groups of attention heads of a model as far as gradients tell; try them on a batch.

    Args, Cost: as ``find_hidden_units``; one backward pass more for each head.
    """
    with traced(model, run, training=training) as trace:
        found = (_whole(trace, heads) for name in trace.order for heads in heads_of(trace, name))
        return [one for one in found if one is not None]


def _whole(trace: Trace, heads: AttentionHeads) -> WholeHeads | None:
    if heads.kind != "values" or heads.n_groups < 2:
        return None
    groups = [_places(trace, heads, group) for group in range(heads.n_groups)]
    names = [name for name in trace.leaves if any(name == place[0] for place in groups[0])]
    if len(set().union(*groups)) != sum(map(len, groups)) or any(name in trace.twice for name in names):
        return None
    rows = [one for name in names for one in _rows(name, groups)]
    if sum(one.width for one in rows) != len(groups[0]):
        return None
    return WholeHeads(tuple(rows), heads.reader, heads.n_groups, heads.per_group, heads.size)


def _places(trace: Trace, heads: AttentionHeads, group: int) -> set[Place]:
    """All outputs of layers that the heads of a group depend on."""
    found = {(heads.maker, k) for k in heads.made(group)}
    for head in range(group * heads.per_group, (group + 1) * heads.per_group):
        found |= touched(trace, trace.inputs[heads.reader], head * heads.size)
    return found


def _rows(maker: str, groups: Sequence[set[Place]]) -> list[Rows]:
    """How those of one layer lie, if alike for all groups."""
    runs = [_runs(sorted(k for name, k in places if name == maker)) for places in groups]
    found = []
    for first, second in zip(runs[0], runs[1], strict=False):
        one = Rows(maker, first.start, second.start - first.start, len(first))
        if one.step >= one.width and all(one.of(g) in own for g, own in enumerate(runs)):
            found.append(one)
    return found


def _runs(numbers: Sequence[int]) -> list[range]:
    """Rising numbers as ranges."""
    pieces = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    together = [[number for _, number in piece] for _, piece in pieces]
    return [range(piece[0], piece[-1] + 1) for piece in together]
