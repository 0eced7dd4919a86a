"""Tensor ring over paired modes: a train whose first and last bond are one, of any rank.

``W[i, j] = tr G_1[i_1, j_1] .. G_d[i_d, j_d]``. A convolution has a core of its own for kernel positions, as in
the train. Source: Zhao et al., arXiv:1606.05535; for layers: Wang et al., CVPR 2018, arXiv:1802.09052.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.cores.linalg import cut_basis
from tensortrain.tensor import max_ranks, tt_svd, unfolding_spectra

from .als import alternate
from .fit import zero_pad
from .layout import paired_modes
from .network import Modes, NetworkFormat
from .registry import register
from .spec import FactorSpec, Kind, WeightShape
from .weighting import PLAIN, Weighting

__all__ = ["Ring"]

_N_SWEEPS = 40
_LARGEST_NORMAL = 600  # side of the normal equations of a core, r_{k-1} r_k, up to which fits are refined


@register
class Ring(NetworkFormat):
    """Cores ``(r_{k-1}, m_k, n_k, r_k)`` closed to a ring; ranks ``(r_0, .., r_{d-1})``, with ``r_d = r_0``.

    With ``r_0 = 1`` it is the train, which is how weights are made exact. At given ranks the fit starts from
    successive SVDs, of the train and of the ring, and is refined by alternating least squares.

    Example:
        >>> Ring().spec(WeightShape("linear", 64, 64), rank=(2, 3), out_modes=(8, 8), in_modes=(8, 8)).core_shapes
        ((2, 8, 8, 3), (3, 8, 8, 2))
    """

    name: ClassVar[str] = "ring"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "tensor ring over paired input and output modes"
    rank_words = "ring takes one rank per core, the closing one first"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return paired_modes(weight, out_modes, in_modes)

    def caps(self, draft: FactorSpec) -> tuple[int, ...]:
        sizes = self._sizes(draft)
        closing = 1 if len(sizes) == 1 else min(sizes[0], sizes[-1])
        return (closing, *max_ranks(sizes)[1:-1])

    def full_ranks(self, draft: FactorSpec) -> tuple[int, ...]:
        return (1, *max_ranks(self._sizes(draft))[1:-1])

    def rank_caps(self, spec: FactorSpec) -> tuple[int, ...]:
        return self.caps(spec.one_group())

    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        return spec.ranks[1:]

    def with_inner(self, spec: FactorSpec, inner: Sequence[int]) -> FactorSpec:
        return replace(spec, ranks=(spec.ranks[0], *inner))

    def core_legs(self, spec: FactorSpec) -> tuple[tuple[str, ...], ...]:
        d = len(spec.in_modes)
        cores = [(f"o{k}", f"i{k}") for k in range(1, d + 1)]
        modes: list[tuple[str, ...]] = [("x",), *cores] if "x" in self.in_legs(spec) else [*cores]
        bonds = [f"r{k}" for k in range(len(modes))]
        if len(modes) == 1:
            return (("r0", *modes[0]),)  # a single core has no bond to close
        return tuple((bonds[k], *legs, bonds[(k + 1) % len(modes)]) for k, legs in enumerate(modes))

    def rank_legs(self, spec: FactorSpec) -> dict[str, int]:
        return {f"r{k}": rank for k, rank in enumerate(spec.ranks)}

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        """Those of the train, for the ranks that the two formats share."""
        return unfolding_spectra(self._paired(self.whitened_tensor(dense, spec, weighting), spec))

    def ranks_within(self, tensor: Tensor, spec: FactorSpec, eps: float) -> tuple[int, ...]:
        train = tt_svd(self._paired(tensor, spec), eps=eps, max_rank=spec.ranks[1:]).value
        if train.ranks[1:-1] == spec.ranks[1:]:
            return spec.ranks  # at its caps, where the closing rank may help
        return (1, *train.ranks[1:-1])

    def fit_tensor(self, tensor: Tensor, spec: FactorSpec) -> list[Tensor]:
        paired, shapes = self._paired(tensor, spec), self.network(spec).core_shapes
        train = [core.double() for core in tt_svd(paired, eps=0.0, max_rank=spec.ranks[1:]).value.cores]
        found = [self._stored(train, shapes)]
        if spec.ranks[0] == 1 or len(shapes) == 1:
            return found[0]
        found.append(self._stored(_ring_svd(paired, spec.ranks), shapes))
        network = self.network(spec)
        refine = max(r * s for r, s in zip(spec.ranks, (*spec.ranks[1:], spec.ranks[0]), strict=True))
        n_sweeps = _N_SWEEPS if refine <= _LARGEST_NORMAL else 0
        results = [alternate(network, tensor, _stirred(cores), n_sweeps=n_sweeps) for cores in found]
        results.append(alternate(network, tensor, found[0], n_sweeps=0))
        return min(results, key=lambda one: one[1])[0]

    def _sizes(self, spec: FactorSpec) -> tuple[int, ...]:
        positions = math.prod(spec.weight.kernel)
        pairs = [m * n for m, n in zip(spec.out_modes, spec.in_modes, strict=True)]
        return (positions, *pairs) if positions > 1 else tuple(pairs)

    def _paired(self, tensor: Tensor, spec: FactorSpec) -> Tensor:
        """``(x, o_1 i_1, .., o_d i_d)`` from ``(*out_legs, *in_legs)``."""
        d, first = len(spec.out_modes), tensor.ndim - len(spec.in_modes)
        axes = [*range(d, first), *(axis for k in range(d) for axis in (k, first + k))]
        return tensor.permute(axes).reshape(self._sizes(spec))

    def _stored(self, cores: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Cores ``(r, n, s)``, perhaps of smaller ranks, as they are stored; missing ranks are zeros."""
        stored = []
        for core, shape in zip(cores, shapes, strict=True):
            modes = shape[1:-1] if len(shapes) > 1 else shape[1:]
            last = (core.shape[2],) if len(shapes) > 1 else ()
            stored.append(zero_pad(core.reshape(core.shape[0], *modes, *last), shape))
        return stored


def _ring_svd(paired: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Successive SVDs: the rank of the first is split between the closing bond and the next one.

    Source: Zhao et al., arXiv:1606.05535, algorithm 1.
    """
    r0, *inner = ranks
    n1, *rest = paired.shape
    u, _, _ = cut_basis(paired.reshape(n1, -1), 0.0, r0 * inner[0])
    first = zero_pad(u, (n1, r0 * inner[0])).reshape(n1, r0, inner[0]).movedim(1, 0)
    remainder = zero_pad(u.T @ paired.reshape(n1, -1), (r0 * inner[0], math.prod(rest)))
    state = remainder.reshape(r0, inner[0], -1).movedim(0, 2)  # r_1, n_2 .. n_d, r_0
    cores = [first]
    for n, rank in zip(rest[:-1], inner[1:], strict=True):
        matrix = state.reshape(state.shape[0] * n, -1)
        u, _, _ = cut_basis(matrix, 0.0, rank)
        cores.append(u.reshape(state.shape[0], n, -1))
        state = u.T @ matrix
    cores.append(state.reshape(state.shape[0], rest[-1], r0))
    return cores


def _stirred(cores: Sequence[Tensor]) -> list[Tensor]:
    """A little noise, without which least squares never leaves the zeros of missing ranks."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(core.shape, generator=generator, dtype=core.dtype).to(core.device) for core in cores]
    return [core + 1e-2 * core.square().mean().sqrt() * one for core, one in zip(cores, noise, strict=True)]
