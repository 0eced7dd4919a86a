"""Block terms: a sum of Tucker decompositions of equal ranks.

Between CP (every term of multilinear rank one) and Tucker (a single term). Source: De Lathauwer, SIAM J. Matrix
Anal. Appl. 30(3), 2008; for layers: Ye et al., CVPR 2018, arXiv:1712.05134.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .fit import zero_pad
from .layout import single_modes
from .multilinear import expand, hooi, mode_spectra, tucker_ranks
from .network import Modes, NetworkFormat
from .registry import register
from .spec import FactorSpec, Kind, Rank, WeightShape
from .tucker import feasible_ranks
from .weighting import PLAIN, Weighting

__all__ = ["BlockTerm"]

_DEFAULT_TERMS = 2
_N_ROUNDS = 30
_TOL = 1e-4  # of the squared error, per round
_SHARES = (0.3, 0.45, 0.65, 0.85)  # of the ranks of a single term, at which more terms are tried


@register
class BlockTerm(NetworkFormat):
    """Terms stacked along a first axis of every core; ranks ``(terms, R_1, .., R_d)`` in the order of ``tucker``.

    A number as rank is the multilinear rank of two terms; a pair is ``(terms, rank)``. Fitted term by term to
    what the other terms leave.

    Example:
        >>> spec = BlockTerm().spec(WeightShape("linear", 64, 64), rank=(3, 2), out_modes=(8, 8), in_modes=(8, 8))
        >>> spec.ranks, spec.n_params == 3 * (2**4 + 4 * 8 * 2)
        ((3, 2, 2, 2, 2), True)
    """

    name: ClassVar[str] = "block_term"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "a sum of Tucker decompositions"
    rank_words = "block_term takes (terms, rank), or the terms and then one rank per mode as tucker does"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return single_modes(weight, out_modes, in_modes)

    def spec(
        self,
        weight: WeightShape,
        *,
        rank: Rank,
        out_modes: Sequence[int] | None = None,
        in_modes: Sequence[int] | None = None,
        clip: bool | None = None,
    ) -> FactorSpec:
        if isinstance(rank, Sequence) and not isinstance(rank, str) and len(rank) == 2:
            self.check_kind(weight)
            one = weight.one_group()
            draft = FactorSpec(self.name, one, *self.default_modes(one, out_modes, in_modes), ())
            rank, clip = (rank[0], *(min(rank[1], cap) for cap in self.caps(draft)[1:])), bool(clip)
        return super().spec(weight, rank=rank, out_modes=out_modes, in_modes=in_modes, clip=clip)

    def caps(self, draft: FactorSpec) -> tuple[int, ...]:
        sizes = (*self.out_legs(draft).values(), *self.in_legs(draft).values())
        return (math.prod(sizes), *feasible_ranks(sizes))

    def full_ranks(self, draft: FactorSpec) -> tuple[int, ...]:
        return (1, *self.caps(draft)[1:])

    def rank_caps(self, spec: FactorSpec) -> tuple[int, ...]:
        return (max(1, *spec.ranks[:1]), *self.caps(spec.one_group())[1:])

    def expand_rank(self, rank: int, caps: tuple[int, ...]) -> tuple[int, ...]:
        return (_DEFAULT_TERMS, *(min(rank, cap) for cap in caps[1:]))

    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        return spec.ranks[1:]

    def with_inner(self, spec: FactorSpec, inner: Sequence[int]) -> FactorSpec:
        return replace(spec, ranks=(spec.ranks[0], *inner))

    def core_legs(self, spec: FactorSpec) -> tuple[tuple[str, ...], ...]:
        outs, ins = tuple(self.out_legs(spec)), tuple(self.in_legs(spec))
        core = ("t", *("R" + leg for leg in (*outs, *ins)))
        return (*(("t", leg, "R" + leg) for leg in ins), core, *(("t", leg, "R" + leg) for leg in outs))

    def rank_legs(self, spec: FactorSpec) -> dict[str, int]:
        legs = (*self.out_legs(spec), *self.in_legs(spec))
        return {"t": spec.ranks[0], **{"R" + leg: rank for leg, rank in zip(legs, spec.ranks[1:], strict=True)}}

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        n_out, n_in, terms = len(spec.out_modes), len(spec.in_modes), spec.ranks[0]
        one_term = min(math.prod(spec.ranks[1 : 1 + n_out]), math.prod(spec.ranks[-n_in:]))
        return min(terms * one_term, super().max_matrix_rank(spec))

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        """Those of a single term, whose error bounds that of several."""
        return mode_spectra(self.whitened_tensor(dense, spec, weighting))

    def ranks_within(self, tensor: Tensor, spec: FactorSpec, eps: float) -> tuple[int, ...]:
        """The smallest of: one term, or all terms at some share of its ranks, where that suffices."""
        one = tucker_ranks(mode_spectra(tensor), eps)
        terms, caps = spec.ranks[0], spec.ranks[1:]
        if any(r > cap for r, cap in zip(one, caps, strict=True)):
            return spec.ranks
        best = replace(spec, ranks=(1, *one))
        for share in _SHARES if terms > 1 and eps > 1e-3 else ():
            trial = replace(spec, ranks=(terms, *(max(1, math.ceil(share * r)) for r in one)))
            if trial.n_params >= best.n_params:
                break
            if _block_terms(tensor, trial.ranks)[1] <= eps:
                return trial.ranks
        return best.ranks

    def fit_tensor(self, tensor: Tensor, spec: FactorSpec) -> list[Tensor]:
        terms, _ = _block_terms(tensor, spec.ranks)
        n_out, shapes = len(spec.out_modes), self.group_core_shapes(spec)
        stored = []
        for k, shape in enumerate(shapes):
            parts = [[*factors[n_out:], core, *factors[:n_out]][k] for core, factors in terms]
            stored.append(torch.stack([zero_pad(part, shape[1:]) for part in parts]))
        return stored


def _block_terms(tensor: Tensor, ranks: Sequence[int]) -> tuple[list[tuple[Tensor, list[Tensor]]], float]:
    """Core and factors of every term, and the relative error: each in turn is fitted to what the others leave."""
    n_terms, inner = ranks[0], ranks[1:]
    size = torch.linalg.vector_norm(tensor).clamp_min(1e-300)
    rest, terms = tensor, []
    for _ in range(n_terms):
        terms.append(hooi(rest, inner))
        rest = rest - expand(*terms[-1])
    error = float(torch.linalg.vector_norm(rest) / size)
    for _ in range(_N_ROUNDS if n_terms > 1 else 0):
        for k, (core, factors) in enumerate(terms):
            rest = rest + expand(core, factors)
            terms[k] = hooi(rest, inner, start=factors, n_sweeps=1)
            rest = rest - expand(*terms[k])
        before, error = error, float(torch.linalg.vector_norm(rest) / size)
        if before**2 - error**2 <= _TOL * error**2:
            break
    return terms, error
