"""The plan of a tensor network: products of two operands, those without the rows first and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tensortrain.contract.network import Network
from tensortrain.contract.plan import Plan
from tensortrain.contract.products import Product, run_steps

__all__ = ["NetworkPlan"]


@dataclass(frozen=True, kw_only=True)
class NetworkPlan(Plan):
    """How to multiply a batch by a network; see ``Plan``.

    Args:
        shape: The network.
        kind: "network" or "dense".
        steps: The products in order of execution. Those that do not depend on the rows come first.

    Example:
        >>> cp = Network((("j", "r"), ("i", "r")), ("i",), ("j",), (("i", 5), ("j", 4), ("r", 3)))
        >>> plan = plan_network(cp, batch=2)
        >>> plan.execute(torch.randn(2, 4), [torch.randn(4, 3), torch.randn(5, 3)]).shape
        torch.Size([2, 5])
    """

    shape: Network
    kind: Literal["network", "dense"]
    steps: tuple[Product, ...]

    @property
    def network(self) -> Network:
        """The legs of the cores."""
        return self.shape

    @property
    def prepared_key(self) -> Any:
        return "dense" if self.uses_dense else self.steps

    @property
    def course(self) -> Any:
        return self.kind, [(step.operands, step.equation) for step in self.steps]

    @property
    def _way(self) -> str:
        return "core by core"

    def _prepare_steps(self, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = dict(enumerate(cores, start=1))
        run_steps([step for step in self.steps if 0 not in step.sources], values)
        return tuple(values[k] for k in sorted(values))

    def _dense(self, cores: Sequence[Tensor]) -> Tensor:
        return self.network.to_dense(cores).contiguous()

    def _run_steps(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        network = self.network
        values = {0: x.reshape(-1, *[network.size(leg) for leg in network.in_legs])}
        values.update(zip(self._prepared_numbers(), weights, strict=True))
        run_steps([step for step in self.steps if 0 in step.sources], values)
        return values[self.steps[-1].result]

    def _prepared_numbers(self) -> list[int]:
        left = set(range(1, len(self.network.cores) + 1))
        for step in self.steps:
            if 0 not in step.sources:
                left = left.difference(step.operands) | {step.result}
        return sorted(left)

    def __str__(self) -> str:
        return "\n".join(_report(self))


def _report(plan: NetworkPlan) -> Iterator[str]:
    net = plan.network
    yield f"{net.in_features} -> {net.out_features} by {len(net.cores)} cores, {net.n_params} parameters"
    yield plan._planned_for
    yield f"plan: {'the dense weight, kept' if plan.uses_dense else 'core by core'}"
    for step in plan.steps:
        kept = "" if 0 in step.sources else "  (kept)"
        shape = f"{step.batch} x ({step.m} x {step.k}) ({step.k} x {step.n})"
        yield f"  {step.equation:<24}{shape:<36}{step.flops:>10.2e}{kept}"
    yield f"flops: {plan.flops:,} (dense {plan.dense_flops:,})"
    yield f"predicted: {plan.predicted_s * 1e6:,.0f} us (dense layer {plan.dense_s * 1e6:,.0f} us)"
    yield f"peak: {plan.peak_bytes:,} bytes, of which prepared weights {plan.prepared_bytes:,}"
