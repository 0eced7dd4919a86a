"""What the plans of a network are predicted to cost.

The candidates are opt_einsum's orders for this batch and for a single row, the cores one after the other from either
end, and the dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tensortrain.contract.cost import CostModel
from tensortrain.contract.network import BATCH, Network
from tensortrain.contract.network_plan import NetworkPlan
from tensortrain.contract.products import Product, contraction, contraction_flops

__all__ = ["NetworkPricer"]

# One einsum of two operands is several calls: views, the product, a view of the result.
_EINSUM_CALLS = 6


@dataclass(frozen=True)
class NetworkPricer:
    """Prices the plans of one network."""

    shape: Network
    batch: int
    dtype: torch.dtype
    device_type: str
    training: bool
    model: CostModel
    by_kernels: bool = False  # none of them multiplies a network

    forces: ClassVar[tuple[str, ...]] = ("factorized", "dense")

    def orders(self) -> Iterator[tuple[Product, ...]]:
        net = self.shape
        inputs, output = ((BATCH, *net.in_legs), *net.cores), (BATCH, *net.out_legs)
        sizes = (*net.sizes, (BATCH, self.batch))
        found = [
            contraction(inputs, output, sizes, "forward"),
            contraction(inputs, output, sizes, "backward"),
            contraction(inputs, output, sizes),
            contraction(inputs, output, sizes, "auto", (*net.sizes, (BATCH, 1))),
        ]
        for steps in dict.fromkeys(found):
            merged = max((step.result_numel for step in steps if 0 not in step.sources), default=0)
            if 2 * merged <= net.dense_numel:
                yield tuple(sorted(steps, key=lambda step: 0 in step.sources))

    def sliced(self) -> Iterator[NetworkPlan]:
        """None: a network has no two halves."""
        return iter(())

    def step_s(self, step: Product) -> float:
        passes, copies = (3, 2) if self.training else (1, 1)
        product_s = self.model.gemm_s(step.m, step.n, step.k, batch=step.batch, dtype=self.dtype)
        moved = self.dtype.itemsize * (step.numel - step.result_numel)
        return passes * (product_s + _EINSUM_CALLS * self.model.overhead_s) + copies * self.model.copy_s(moved)

    def dense_layer(self) -> tuple[int, float]:
        """Flops and seconds of a plain dense layer."""
        b, m, n = self.batch, self.shape.out_features, self.shape.in_features
        seconds = self.model.linear_s(b, m, n, dtype=self.dtype)
        if self.training:
            seconds += self.model.gemm_s(b, n, m, dtype=self.dtype) + self.model.gemm_s(m, n, b, dtype=self.dtype)
        return 2 * b * m * n * (3 if self.training else 1), seconds

    def dense(self) -> NetworkPlan:
        """Build the weight and apply it; at inference the weight is kept."""
        net = self.shape
        flops, seconds = self.dense_layer()
        moved = self.dtype.itemsize * (net.dense_numel + self.batch * (net.in_features + net.out_features))
        weight_bytes = self.dtype.itemsize * net.dense_numel
        if self.training:
            steps = contraction(net.cores, (*net.out_legs, *net.in_legs), net.sizes)
            flops += 3 * contraction_flops(steps)
            seconds += sum(self.step_s(step) for step in steps)
            moved += 3 * self.dtype.itemsize * sum(step.numel for step in steps)
        peak = weight_bytes * (2 if self.training else 1)
        return self.plan("dense", (), flops, moved, peak, weight_bytes, seconds)

    def factorized(self, force: str | None) -> Iterator[NetworkPlan]:
        """The plan of every order; ``force`` has nothing to tell apart here."""
        for steps in self.orders():
            yield self.in_order(steps)

    def in_order(self, steps: tuple[Product, ...]) -> NetworkPlan:
        item, passes = self.dtype.itemsize, 3 if self.training else 1
        counted = [step for step in steps if self.training or 0 in step.sources]
        cores_only = [step for step in steps if 0 not in step.sources]
        consumed = {k for step in cores_only for k in step.operands}
        prepared = item * sum(step.result_numel for step in cores_only if step.result not in consumed)
        states = [item * step.result_numel for step in steps if 0 in step.sources][:-1]
        held = (
            sum(states)
            if self.training
            else max((a + b for a, b in zip([0, *states], states, strict=False)), default=0)
        )
        return self.plan(
            "network",
            steps,
            passes * contraction_flops(counted),
            passes * item * sum(step.numel for step in counted),
            prepared + held,
            prepared,
            sum(self.step_s(step) for step in counted),
        )

    def plan(
        self,
        kind: Literal["network", "dense"],
        steps: tuple[Product, ...],
        flops: int,
        moved_bytes: int,
        peak_bytes: int,
        prepared_bytes: int,
        predicted_s: float,
    ) -> NetworkPlan:
        dense_flops, dense_s = self.dense_layer()
        return NetworkPlan(
            shape=self.shape,
            batch=self.batch,
            dtype=self.dtype,
            device_type=self.device_type,
            training=self.training,
            kind=kind,
            steps=steps,
            flops=flops,
            moved_bytes=moved_bytes,
            peak_bytes=peak_bytes,
            prepared_bytes=prepared_bytes,
            predicted_s=predicted_s,
            dense_flops=dense_flops,
            dense_s=dense_s,
        )
