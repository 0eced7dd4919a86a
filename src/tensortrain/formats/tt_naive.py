"""Tensor train of the kernel as it lies: one mode per kernel axis, one for input and one for output channels.

The baseline that arXiv:1611.03214 calls naive: ``K(x, y, c, s) = G_1[x] G_2[y] G_3[c] G_4[s]``. The channel
cores hold nearly all parameters, so it is little more than a low-rank channel map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from .chain import ChainFormat, Modes
from .checks import check_modes
from .registry import register
from .spec import FactorSpec, Kind, WeightShape

__all__ = ["TTNaive"]


@register
class TTNaive(ChainFormat):
    """``K[s, c, x, y] = G_1[x] G_2[y] G_3[c] G_4[s]``; ranks ``(1, r_1, .., 1)``.

    Source: Garipov et al., arXiv:1611.03214, section 3.
    """

    name: ClassVar[str] = "tt_naive"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"conv"})
    description: ClassVar[str] = "tensor train over kernel axes, input channels, output channels"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        # The naive train does not split the channels: there is nothing to choose.
        outs = check_modes(out_modes or (weight.out_features,), weight.out_features, "out_modes")
        ins = check_modes(in_modes or (weight.in_features,), weight.in_features, "in_modes")
        return outs, ins

    def chain_modes(self, spec: FactorSpec) -> tuple[Modes, Modes]:
        outs = (*(1 for _ in spec.weight.kernel), *(1 for _ in spec.in_modes), *spec.out_modes)
        ins = (*spec.weight.kernel, *spec.in_modes, *(1 for _ in spec.out_modes))
        return outs, ins

    def n_spatial(self, spec: FactorSpec) -> int:
        return len(spec.weight.kernel)
