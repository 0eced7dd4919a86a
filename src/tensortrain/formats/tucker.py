"""Tucker: a small dense core and one factor per mode, kernel positions included.

``W[i, j] = sum core[a_1 .. a_d, c, b_1 .. b_e] prod_k O_k[i_k, a_k] X[x, c] prod_k I_k[j_k, b_k]``. With one
mode for the channels on either side a convolution is a channel map, a small convolution, a channel map.
Sources: Tucker, Psychometrika 31, 1966; for layers: Kim et al., ICLR 2016, arXiv:1511.06530.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import ContractionPlan

from .base import Spatial, pointwise
from .fit import zero_pad
from .layout import single_modes
from .multilinear import hooi, mode_spectra, tucker_ranks
from .network import Modes, NetworkFormat
from .registry import register
from .spec import FactorSpec, Kind, WeightShape
from .weighting import PLAIN, Weighting

__all__ = ["Tucker", "feasible_ranks"]


@register
class Tucker(NetworkFormat):
    """Core and factors; ranks in the order output modes, kernel positions (if any), input modes.

    Stored: input factors ``(n, R)``, core ``(*R_out, *R_in)``, output factors. By default a convolution has one
    mode per side, other layers have several.

    Example:
        >>> Tucker().spec(WeightShape("conv", 128, 64, (3, 3)), rank=(30, 9, 20)).core_shapes
        ((9, 9), (64, 20), (30, 9, 20), (128, 30))
    """

    name: ClassVar[str] = "tucker"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "small core and one factor per mode"
    rank_words = "tucker takes one rank per output mode, one for the kernel if it has positions, one per input mode"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return single_modes(weight, out_modes, in_modes)

    def caps(self, draft: FactorSpec) -> tuple[int, ...]:
        return feasible_ranks((*self.out_legs(draft).values(), *self.in_legs(draft).values()))

    def core_legs(self, spec: FactorSpec) -> tuple[tuple[str, ...], ...]:
        outs, ins = tuple(self.out_legs(spec)), tuple(self.in_legs(spec))
        core = tuple("R" + leg for leg in (*outs, *ins))
        return (*((leg, "R" + leg) for leg in ins), core, *((leg, "R" + leg) for leg in outs))

    def rank_legs(self, spec: FactorSpec) -> dict[str, int]:
        legs = (*self.out_legs(spec), *self.in_legs(spec))
        return {"R" + leg: rank for leg, rank in zip(legs, spec.ranks, strict=True)}

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        n_out, n_in = len(spec.out_modes), len(spec.in_modes)
        return min(math.prod(spec.ranks[:n_out]), math.prod(spec.ranks[-n_in:]), super().max_matrix_rank(spec))

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        return mode_spectra(self.whitened_tensor(dense, spec, weighting))

    def ranks_within(self, tensor: Tensor, spec: FactorSpec, eps: float) -> tuple[int, ...]:
        return tuple(map(min, tucker_ranks(mode_spectra(tensor), eps), spec.ranks))

    def fit_tensor(self, tensor: Tensor, spec: FactorSpec) -> list[Tensor]:
        core, factors = hooi(tensor, spec.ranks)
        n_out = len(spec.out_modes)
        found = [*factors[n_out:], core, *factors[:n_out]]
        shapes = self.group_core_shapes(spec)
        return [zero_pad(one, shape) for one, shape in zip(found, shapes, strict=True)]

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        if not _has_single_modes(spec):
            return super().convolve(x, cores, spec, spatial, plan)
        kernel = cores[-2]  # s c when there is one position, else s x c
        if "x" in self.in_legs(spec):
            kernel = torch.einsum("sac,xa->scx", kernel, cores[0])
        kernel = kernel.reshape(*kernel.shape[:2], *spec.weight.kernel)
        return pointwise(spatial(pointwise(x, cores[-3].T), kernel), cores[-1])

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        if not _has_single_modes(spec):
            return super().conv_work(spec, in_positions, out_positions)
        weight, r_out, r_in = spec.weight.one_group(), spec.ranks[0], spec.ranks[-1]
        c, s, k = weight.in_features, weight.out_features, math.prod(weight.kernel)
        return [
            (2 * c * r_in * in_positions, (c + r_in) * in_positions),
            (2 * r_in * r_out * k * out_positions, r_in * in_positions + r_out * out_positions),
            (2 * r_out * s * out_positions, (r_out + s) * out_positions),
        ]


def feasible_ranks(sizes: Sequence[int]) -> tuple[int, ...]:
    """Largest multilinear ranks: a mode, or the product of all others where that is less."""
    total = math.prod(sizes)
    return tuple(min(n, total // n) for n in sizes)


def _has_single_modes(spec: FactorSpec) -> bool:
    return len(spec.out_modes) == len(spec.in_modes) == 1
