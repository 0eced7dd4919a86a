"""What a format finds for a weight: the cores, the spec that lays them out, and how far they are off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from tensortrain.cores.tolerance import compute_dtype

from .registry import get_format
from .spec import FactorSpec

__all__ = ["Factorization", "Fit", "best", "equal_norms", "fit_groups", "zero_pad"]


@dataclass(frozen=True)
class Fit:
    """Cores together with the spec that lays them out.

    Attributes:
        spec: Format, modes, and the ranks reached.
        cores: Laid out as ``spec.core_shapes``.
        rel_error: Relative error in the norm that was asked for, measured or a bound on it; zero for cores that were
            fitted to nothing else than what they stand for.
    """

    spec: FactorSpec
    cores: tuple[Tensor, ...]
    rel_error: float = 0.0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks reached."""
        return self.spec.ranks

    def to_dense(self) -> Tensor:
        """The dense weight in torch's layout."""
        return get_format(self.spec.format).to_dense(self.cores, self.spec)


Factorization = Fit  # the name that callers of ``Format.factorize`` know
FitOne: TypeAlias = Callable[[Tensor, FactorSpec, "float | None"], Fit]


def best(*fits: Fit) -> Fit:
    """The one of least error, the first of equals."""
    return min(fits, key=lambda fit: fit.rel_error)


def fit_groups(dense: Tensor, spec: FactorSpec, eps: float | None, fit_one: FitOne) -> Fit:
    """Cores of all groups, stacked: with one rank profile, the largest that any of them needs.

    Args:
        fit_one: Finds the cores of one group's weight.
    """
    one = spec.one_group()
    blocks = dense.chunk(spec.weight.groups)
    found = [fit_one(block, one, eps) for block in blocks]
    ranks = tuple(max(column) for column in zip(*(fit.ranks for fit in found), strict=True))
    padded = replace(one, ranks=ranks)
    kept, squared = [], 0.0
    for block, first in zip(blocks, found, strict=True):
        again = first if first.ranks == ranks else fit_one(block, padded, None)
        kept.append(best(again, first))  # more ranks need not mean less error
        squared += kept[-1].rel_error ** 2 * _energy(block)
    total = _energy(dense)
    relative = math.sqrt(squared / total) * (1 + 1e-12) if total > 0 else 0.0  # sums round differently
    alike = [map(zero_pad, fit.cores, padded.core_shapes) for fit in kept]
    return Fit(replace(spec, ranks=ranks), tuple(map(torch.stack, zip(*alike, strict=True))), relative)


def equal_norms(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same product from cores of one Frobenius norm: gradients of a core grow with the norms of the others."""
    norms = [float(core.norm()) for core in cores]
    if min(norms) == 0:
        return list(cores)
    logs = [math.log(norm) for norm in norms]
    mean = sum(logs) / len(logs)
    return [core * math.exp(mean - log) for core, log in zip(cores, logs, strict=True)]


def zero_pad(core: Tensor, shape: Sequence[int]) -> Tensor:
    """A core with zeros at its ends, up to a larger shape."""
    if tuple(core.shape) == tuple(shape):
        return core
    padded = core.new_zeros(tuple(shape))
    padded[tuple(slice(n) for n in core.shape)] = core
    return padded


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype))) ** 2
