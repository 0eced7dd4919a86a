"""Low rank: two thin matrices, the truncated SVD of the weight.

Stored as torch stores such layers: first the map to ``r`` numbers, then the map to the outputs.

========== ==================== ===========
weight     first core           second core
========== ==================== ===========
linear     (r, N)               (M, r)
conv       (r, C, k_h, k_w)     (S, r)
embedding  (I, r)               (J, r)
========== ==================== ===========

It is the chain with output modes (1, M) and input modes (N, 1), where whitening by the full second moment
of the inputs is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract import ChainShape, ContractionPlan
from tensortrain.contract.hops import ConvNetwork

from .base import Spatial, pointwise
from .chain import ChainFormat, Modes, balance_chain
from .checks import check_modes
from .fit import Fit
from .layout import conv_network
from .registry import register
from .spec import Bond, FactorSpec, Kind, WeightShape
from .weighted_rank import WeightedMatrix
from .weighting import PLAIN, Weighting

__all__ = ["LowRank"]


@register
class LowRank(ChainFormat):
    """``W = outputs @ inputs`` with ``r`` numbers in between; ranks ``(1, r, 1)``. The best error at any rank.

    Example:
        >>> LowRank().spec(WeightShape("linear", 20, 12), rank=3).core_shapes
        ((3, 12), (20, 3))
    """

    name: ClassVar[str] = "low_rank"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    whitens_exactly: ClassVar[bool] = True
    looks_up_by_product: ClassVar[bool] = True
    description: ClassVar[str] = "two thin matrices (truncated SVD)"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        outs = check_modes((math.prod(out_modes or (weight.out_features,)),), weight.out_features, "out_modes")
        ins = check_modes((math.prod(in_modes or (weight.in_features,)),), weight.in_features, "in_modes")
        return outs, ins

    def chain_modes(self, spec: FactorSpec) -> tuple[Modes, Modes]:
        weight = spec.weight.one_group()
        return (1, weight.out_features), (weight.fan_in, 1)

    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        weight, rank = spec.weight.one_group(), spec.ranks[1]
        if weight.kind == "embedding":
            return (weight.in_features, rank), (weight.out_features, rank)
        return (rank, weight.in_features, *weight.kernel), (weight.out_features, rank)

    def bonds(self, spec: FactorSpec) -> tuple[Bond, ...]:
        return (((0, 1 if spec.weight.kind == "embedding" else 0), (1, 1)),)

    def to_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> list[Tensor]:
        first, second = cores
        if spec.weight.kind == "embedding":
            inputs = first
        elif spec.weight.kind == "conv":
            k = len(spec.weight.kernel)
            inputs = first.permute(*range(2, 2 + k), 1, 0).reshape(spec.weight.fan_in, -1)
        else:
            inputs = first.T
        return [inputs[None, None], second.T[:, :, None, None]]

    def from_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> tuple[Tensor, ...]:
        inputs, outputs = cores[0][0, 0], cores[1][:, :, 0, 0].T
        if spec.weight.kind == "embedding":
            return inputs, outputs
        if spec.weight.kind == "conv":
            k = len(spec.weight.kernel)
            kernel = inputs.reshape(*spec.weight.kernel, spec.weight.in_features, -1)
            return kernel.permute(k + 1, k, *range(k)), outputs
        return inputs.T, outputs

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        if weighting.is_plain:
            return super().spectra(dense, spec)
        return [WeightedMatrix.of(dense, spec.weight, weighting).singular_values()]

    def factorize_group(self, dense: Tensor, spec: FactorSpec, *, eps: float | None, weighting: Weighting) -> Fit:
        if weighting.is_plain or eps is not None:
            return super().factorize_group(dense, spec, eps=eps, weighting=weighting)
        matrix = WeightedMatrix.of(dense, spec.weight, weighting)
        outputs, inputs = matrix.truncated(spec.ranks[1])
        cores = [self._in_chain_order(inputs, spec).T[None, None], outputs.T[:, :, None, None]]
        del outputs, inputs
        found = self._fit(balance_chain(cores, are_own=True), 0.0, spec, dense.dtype)
        return Fit(found.spec, found.cores, matrix.rel_error(*self._factors(found)))

    def _factors(self, found: Fit) -> tuple[Tensor, Tensor]:
        """``(M, r)`` and ``(r, N)``, inputs in torch's order, of what is stored."""
        inputs, outputs = found.cores
        return outputs, inputs.T if found.spec.weight.kind == "embedding" else inputs.flatten(1)

    def _in_chain_order(self, inputs: Tensor, spec: FactorSpec) -> Tensor:
        """Columns as the chain has them, positions of a kernel slowest, from torch's order."""
        weight = spec.weight
        return inputs.unflatten(1, (weight.in_features, -1)).transpose(1, 2).flatten(1) if weight.kernel else inputs

    def channel_chain(self, spec: FactorSpec) -> ChainShape | None:
        return None

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        return pointwise(spatial(x, cores[0]), cores[1])

    def conv_network(self, spec: FactorSpec) -> ConvNetwork:
        weight = spec.weight.one_group()
        axes = (f"x{axis}" for axis in range(len(weight.kernel)))
        sizes = {"o1": weight.out_features, "i1": weight.in_features, "r": spec.ranks[1]}
        return conv_network(weight, [("r", "i1", *axes), ("o1", "r")], sizes)

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        weight, rank = spec.weight.one_group(), spec.ranks[1]
        inner = rank * out_positions
        return [
            (2 * inner * weight.fan_in, weight.in_features * in_positions + inner),
            (2 * inner * weight.out_features, inner + weight.out_features * out_positions),
        ]

    def row_chain(self, spec: FactorSpec) -> ChainShape | None:
        return None  # one product of all rows is faster than one for each

    def lookup(self, ids: Tensor, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        return F.linear(F.embedding(ids, cores[0]), cores[1])
