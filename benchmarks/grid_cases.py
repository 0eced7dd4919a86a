"""The random grid: layers of every kind that nobody tuned for, drawn from a seed that is the date of the run.

Sizes are products of random modes, so that every width has modes to factorize into; nothing is rounded to the sizes
that papers and models like.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import conv_cases
import layer_cases

__all__ = ["LookupCase", "RecurrentCase", "draw"]

TARGETS = {"inference": 0.9, "training step": 0.75}


@dataclass(frozen=True)
class LookupCase:
    """Rows of an embedding; ids are drawn with probability 1/k."""

    vocabulary: int
    dim: int
    rank: int
    n_ids: int

    @property
    def name(self) -> str:
        return f"{self.vocabulary:,} x {self.dim}, r {self.rank}, {self.n_ids:,} ids"


@dataclass(frozen=True)
class RecurrentCase:
    """A recurrent layer of one of torch's kinds."""

    kind: str
    n_inputs: int
    n_hidden: int
    rank: int
    n_steps: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.n_inputs} -> {self.n_hidden}, r {self.rank}, {self.n_steps} steps, b {self.batch}"


def draw(kind: str, seed: int, n: int) -> list[Any]:
    """The first ``n`` cases of a kind; more of them begin with the same ones."""
    if kind == "conv":
        return list(conv_cases.random_cases(seed, n))
    source = random.Random(f"{kind} {seed}")
    return [_DRAWS[kind](source) for _ in range(n)]


def _modes(source: random.Random, least: float, most: float, order: int | None = None) -> tuple[int, ...]:
    """Modes whose product lies near a width that is drawn evenly on a logarithmic scale."""
    order = order or source.randint(2, 4)
    width = math.exp(source.uniform(math.log(least), math.log(most)))
    spreads = [source.uniform(0.6, 1.4) for _ in range(order)]
    return tuple(max(2, round(width ** (share / sum(spreads)))) for share in spreads)


def _linear(source: random.Random) -> layer_cases.Case:
    order = source.randint(2, 4)
    in_modes, out_modes = _modes(source, 16, 8192, order), _modes(source, 16, 8192, order)
    rank, batch = source.randint(2, 64), source.choice((1, 1, source.randint(2, 64), 256, source.randint(65, 1024)))
    return layer_cases.Case(in_modes, out_modes, rank, batch, TARGETS)


def _embedding(source: random.Random) -> LookupCase:
    vocabulary = round(math.exp(source.uniform(math.log(1e3), math.log(1e6))))
    dim = math.prod(_modes(source, 32, 768, 3))
    return LookupCase(vocabulary, dim, source.randint(4, 64), 2 ** source.randint(4, 13))


def _recurrent(source: random.Random) -> RecurrentCase:
    return RecurrentCase(
        kind=source.choice(("LSTM", "GRU")),
        n_inputs=math.prod(_modes(source, 32, 2048, 3)),
        n_hidden=math.prod(_modes(source, 32, 512, 3)),
        rank=source.randint(2, 16),
        n_steps=source.randint(8, 64),
        batch=source.choice((1, source.randint(2, 32))),
    )


_DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "linear": _linear,
    "embedding": _embedding,
    "recurrent": _recurrent,
}
