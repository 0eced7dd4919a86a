"""Attention heads of a model: which outputs of which layers are their values, keys and queries, and who reads them.

Found by how numbers flow, as hidden units are: attention mixes positions, so that number i of a head's output depends
on number i of its values alone, and on all queries and keys of that head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.hidden import Run, Trace, channel_axis, traced
from tensortrain.formats.rotary_pairs import Pairing

__all__ = ["AttentionHeads", "HeadKind", "Place", "find_heads", "heads_of", "touched"]

HeadKind: TypeAlias = Literal["values", "scores", "halves", "neighbours"]
Place = tuple[str, int]  # a layer, and the number of one of its outputs


@dataclass(frozen=True)
class AttentionHeads:
    """Two layers that meet in the heads of an attention, where they may be taken in any basis.

    Attributes:
        maker, reader: Names of the layers: of the values (perhaps beside keys and queries) and of what reads the
            heads' outputs; where it is scores that count, of the keys and of the queries.
        n_heads: Heads of the reader.
        n_groups: Heads of the maker; each serves ``n_heads / n_groups`` heads in a row.
        size: Numbers of a head.
        start, step: Number of the maker's output where its first head begins, and from one to the next.
        kind: What the heads are made of: values; scores, in any basis; or scores of numbers that positions turn in
            pairs, number i with i + size / 2 ("halves") or the one beside it ("neighbours").
    """

    maker: str
    reader: str
    n_heads: int
    n_groups: int
    size: int
    start: int
    step: int
    kind: HeadKind = "values"

    @property
    def names(self) -> tuple[str, str]:
        return self.maker, self.reader

    @property
    def judged(self) -> str:
        """The layer in whose inputs and outputs errors are told: the reader of values, the keys of scores."""
        return self.reader if self.kind == "values" else self.maker

    @property
    def pairing(self) -> Pairing | None:
        """How positions turn numbers of the heads together, where they do."""
        return self.kind if self.kind in ("halves", "neighbours") else None

    @property
    def per_group(self) -> int:
        return self.n_heads // self.n_groups

    def made(self, group: int) -> range:
        """Where a head of the maker stands among its outputs."""
        start = self.start + group * self.step
        return range(start, start + self.size)

    def read(self, head: int) -> range:
        """Where a head of the reader stands: among its inputs, or the queries among its outputs."""
        return range(head * self.size, (head + 1) * self.size)


def find_heads(model: nn.Module, run: Run, *, training: bool = False) -> list[AttentionHeads]:
    """The attention heads of a model as far as gradients tell, in the order in which they run.

    What is found may still be wrong: the sizes are read off a few numbers of each layer. Try it on a batch. Keys and
    queries are only looked for where they are layers of their own.

    Args, Cost: as ``find_hidden_units``; a few backward passes for each layer that reads heads.
    """
    with traced(model, run, training=training) as trace:
        return [heads for name in trace.order for heads in heads_of(trace, name)]


def heads_of(trace: Trace, reader: str) -> list[AttentionHeads]:
    """The values and the scores of the heads that a layer reads, if it reads any."""
    x = trace.inputs[reader]
    if reader in trace.twice or not x.requires_grad or channel_axis(trace.parts[reader]) != -1 or x.shape[-1] < 2:
        return []
    first, second = touched(trace, x, 0), touched(trace, x, 1)
    shared = first & second
    if not shared or len(first - shared) != 1 or len(second - shared) != 1:
        return []
    (maker, start), (other, following) = (*(first - shared), *(second - shared))
    if maker != other or following != start + 1 or maker in trace.twice:
        return []
    size = next((d for d in _divisors(x.shape[-1]) if d > 1 and not shared <= touched(trace, x, d)), x.shape[-1])
    values = _laid_out(trace, reader, maker, start, size)
    scores = None if values is None else _scores(trace, values, shared)
    return [one for one in (values, scores) if one is not None]


def _scores(trace: Trace, values: AttentionHeads, shared: set[Place]) -> AttentionHeads | None:
    """Keys and queries of the same heads, from the outputs of theirs that all of the first head depends on."""
    names = [name for name in trace.leaves if any(name == place[0] for place in shared)]  # queries come first
    if len(names) != 2 or values.maker in names or any(name in trace.twice for name in names):
        return None
    query, key = names
    for size in (len(shared) // 2, values.size):  # numbers that nothing comes from do not show
        sizes = {query: values.n_heads * size, key: values.n_groups * size}
        first = {(name, k) for name in names for k in range(size)}
        if shared <= first and all(trace.leaves[name].shape[-1] == n for name, n in sizes.items()):
            break
    else:
        return None
    return AttentionHeads(key, query, values.n_heads, values.n_groups, size, 0, size, "scores")


def _laid_out(trace: Trace, reader: str, maker: str, start: int, size: int) -> AttentionHeads | None:
    """How the heads of the values lie among the maker's outputs, from where those of the second and last one are."""
    x = trace.inputs[reader]
    n_heads, n_groups, step = x.shape[-1] // size, 1, size
    if n_heads > 1:
        next_one, last = (_value_of(trace, x, at, maker) for at in (size, x.shape[-1] - size))
        if next_one is None or last is None:
            return None
        step = next_one - start or size
        n_groups = n_heads if next_one != start else (last - start) // size + 1
    fits = start + (n_groups - 1) * step + size <= trace.leaves[maker].shape[-1]
    if not (fits and step >= size and n_groups >= 1 and n_heads % n_groups == 0):
        return None
    return AttentionHeads(maker, reader, n_heads, n_groups, size, start, step)


def _value_of(trace: Trace, x: Tensor, at: int, maker: str) -> int | None:
    """The maker's output that number ``at`` of the reader's input depends on, and its neighbour does not."""
    own = {place for place in touched(trace, x, at) - touched(trace, x, at + 1) if place[0] == maker}
    return own.pop()[1] if len(own) == 1 else None


def touched(trace: Trace, x: Tensor, at: int) -> set[Place]:
    """The outputs of layers that one number of a tensor depends on, at any position."""
    if at >= x.shape[-1]:
        return set()
    chosen = x[..., at]
    total = (chosen * (torch.rand_like(chosen) + 0.5)).sum()
    grads = torch.autograd.grad(total, list(trace.leaves.values()), allow_unused=True, retain_graph=True)
    found = set()
    for (name, leaf), grad in zip(trace.leaves.items(), grads, strict=True):
        if grad is not None and leaf.ndim > 1 and channel_axis(trace.parts[name]) == -1:
            seen = grad.flatten(0, -2).abs().amax(dim=0).nonzero().flatten().tolist()
            found |= {(name, k) for k in seen}
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n) if n % d == 0]
