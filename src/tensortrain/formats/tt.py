"""Tensor train over paired modes: the format of arXiv:1509.06569 (linear), 1611.03214 (convolution) and
1901.10787 (embedding).

========== ======================= ==========================
weight     output modes            input modes
========== ======================= ==========================
linear     (M_1, .., M_d)          (N_1, .., N_d); either may be padded up
conv       (1, S_1, .., S_d)       (k_h k_w, C_1, .., C_d)
embedding  (J_1, .., J_d)          (I_1, .., I_d), padded up
========== ======================= ==========================

A 1x1 convolution has no spatial core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from .chain import ChainFormat, Modes
from .layout import paired_modes
from .registry import register
from .spec import FactorSpec, Kind, WeightShape

__all__ = ["TT"]


@register
class TT(ChainFormat):
    """``W[i, j] = G_1[i_1, j_1] .. G_d[i_d, j_d]``, first mode slowest; ranks ``(1, r_1, .., 1)``.

    Source: Novikov et al., arXiv:1509.06569; Garipov et al., arXiv:1611.03214; Khrulkov et al., arXiv:1901.10787.

    Example:
        >>> weight = WeightShape("conv", 128, 64, (3, 3))
        >>> TT().spec(weight, rank=20, out_modes=(4, 8, 4), in_modes=(4, 4, 4)).ranks
        (1, 9, 20, 16, 1)
    """

    name: ClassVar[str] = "tt"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "tensor train over paired input and output modes"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return paired_modes(weight, out_modes, in_modes, pads_linear=True)

    def chain_modes(self, spec: FactorSpec) -> tuple[Modes, Modes]:
        if self.n_spatial(spec) == 0:
            return spec.out_modes, spec.in_modes
        return (1, *spec.out_modes), (math.prod(spec.weight.kernel), *spec.in_modes)

    def n_spatial(self, spec: FactorSpec) -> int:
        return 1 if math.prod(spec.weight.kernel) > 1 else 0
