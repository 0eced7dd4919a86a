"""Tensor train over separate modes: one core per output mode, then one per input mode.

The format of small adapters: fewer parameters than a TT-matrix of the same rank, and of less matrix rank, since
everything passes through the one bond between the outputs and the inputs. A convolution puts its kernel
positions first. Source: LoRETTA, arXiv:2402.11417; TT-LoRA, arXiv:2408.01008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .chain import ChainFormat, Modes
from .layout import separate_modes
from .registry import register
from .spec import Bond, FactorSpec, Kind, WeightShape

__all__ = ["TTSeparate"]


@register
class TTSeparate(ChainFormat):
    """``W[i, j] = G_1[i_1] .. G_d[i_d] G_{d+1}[j_1] .. G_{2d}[j_d]``; cores ``(r, n, s)``, ranks ``(1, r_1, .., 1)``.

    Source: Yang et al., NAACL 2024, arXiv:2402.11417.

    Example:
        >>> TTSeparate().spec(WeightShape("linear", 64, 768), rank=5, out_modes=(8, 8), in_modes=(8, 8, 12)).n_params
        700
    """

    name: ClassVar[str] = "tt_separate"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "tensor train over output modes, then input modes"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return separate_modes(weight, out_modes, in_modes)

    def chain_modes(self, spec: FactorSpec) -> tuple[Modes, Modes]:
        n = self.n_spatial(spec)
        outs = (*(1,) * n, *spec.out_modes, *(1 for _ in spec.in_modes))
        ins = (*(math.prod(spec.weight.kernel),) * n, *(1 for _ in spec.out_modes), *spec.in_modes)
        return outs, ins

    def n_spatial(self, spec: FactorSpec) -> int:
        return 1 if math.prod(spec.weight.kernel) > 1 else 0

    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        return tuple((r, m * n, s) for r, m, n, s in self.chain(spec).core_shapes)

    def bonds(self, spec: FactorSpec) -> tuple[Bond, ...]:
        return tuple(((k, 2), (k + 1, 0)) for k in range(len(spec.core_shapes) - 1))

    def to_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> list[Tensor]:
        shapes = self.chain(spec.one_group()).core_shapes
        return [core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)]

    def from_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> tuple[Tensor, ...]:
        return tuple(core.flatten(1, 2) for core in cores)
