"""Sums of Kronecker products: ``W = A_1 x B_1 + .. + A_r x B_r``.

It is a train of two paired modes, so the best approximation is a truncated SVD of the weight with the entries
of each block in a row (Van Loan and Pitsianis, in Linear Algebra for Large Scale and Real-Time Applications,
1993), and the layer runs as any train does. A convolution keeps its kernel with the first factor: a sum of
small convolutions on blocks of channels, each times a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import ChainShape, ContractionPlan

from .base import Spatial
from .chain import ChainFormat, Modes
from .layout import paired_modes
from .registry import register
from .spec import FactorSpec, Kind, WeightShape

__all__ = ["Kronecker"]


@register
class Kronecker(ChainFormat):
    """``W = sum_k A_k x B_k`` with cores ``(1, m_1, n_1, r)`` and ``(r, m_2, n_2, 1)``; ranks ``(1, r, 1)``.

    The best error at any number of terms. Needs two modes per side.

    Example:
        >>> Kronecker().spec(WeightShape("linear", 12, 20), rank=2, out_modes=(4, 3), in_modes=(5, 4)).core_shapes
        ((1, 4, 5, 2), (2, 3, 4, 1))
    """

    name: ClassVar[str] = "kronecker"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "a sum of Kronecker products of two matrices"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return paired_modes(weight, out_modes, in_modes, order=2)

    def chain_modes(self, spec: FactorSpec) -> tuple[Modes, Modes]:
        first, second = spec.in_modes
        return spec.out_modes, (math.prod(spec.weight.kernel) * first, second)

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        (m1, m2), (n1, n2), rank = spec.out_modes, spec.in_modes, spec.ranks[1]
        return min(m1 * m2, n1 * n2, m1 * n2 * rank, m2 * n1 * rank)

    def n_filters(self, spec: FactorSpec) -> int | None:
        return None

    def channel_chain(self, spec: FactorSpec) -> ChainShape | None:
        return None if math.prod(spec.weight.kernel) > 1 else self.chain(spec)

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        if math.prod(spec.weight.kernel) == 1:
            return super().convolve(x, cores, spec, spatial, plan)
        first, second = cores
        (m1, m2), (n1, n2), rank = spec.out_modes, spec.in_modes, spec.ranks[1]
        b, places = x.shape[0], x.shape[2:]
        y = torch.einsum("bcdp,red->becrp", x.reshape(b, n1, n2, places.numel()), second[..., 0])
        kernel = first.reshape(m1, *spec.weight.kernel, n1, rank)
        kernel = kernel.movedim((-2, -1), (1, 2)).reshape(m1, n1 * rank, *spec.weight.kernel)
        y = spatial(y.reshape(b * m2, n1 * rank, *places), kernel)
        places = y.shape[2:]
        return y.reshape(b, m2, m1, *places).transpose(1, 2).reshape(b, m1 * m2, *places)

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        if math.prod(spec.weight.kernel) == 1:
            return super().conv_work(spec, in_positions, out_positions)
        (m1, m2), (n1, n2), rank = spec.out_modes, spec.in_modes, spec.ranks[1]
        inner, outer = n1 * rank * m2, m1 * m2
        filters = 2 * inner * m1 * math.prod(spec.weight.kernel)
        return [
            (2 * inner * n2 * in_positions, 2 * (n1 * n2 + inner) * in_positions),
            (filters * out_positions, inner * in_positions + outer * out_positions),
            (0, 2 * outer * out_positions),
        ]
