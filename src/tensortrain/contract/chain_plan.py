"""The plan of a chain of cores: a sweep over them, from either end, with some neighbours merged before.

Two sweeps mirror each other, both with the batch first and, in their batched form, without a transpose:

- right to left, state ``(b j_1 .. j_{k-1}, j_k r, i_{k+1} .. i_d)``; the core as it lies in memory,
  ``(r i, j s)``, multiplies every matrix of the batch;
- left to right, state ``(b i_1 .. i_{k-1}, r j_k, j_{k+1} .. j_d)``; the core as ``(i s, r j)``.

A step is one product when its state is one column wide, else a batch of products, or one product
between transposed copies where the matrices of the batch are too thin for batching to pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from torch import Tensor

from tensortrain.contract.compiled import FORMS, Sweep
from tensortrain.contract.execute import sweep
from tensortrain.contract.merge import chain_to_dense, merge_cores, merge_order
from tensortrain.contract.plan import Plan
from tensortrain.contract.shape import ChainShape
from tensortrain.contract.slices import sliced_product
from tensortrain.system.tracing import sizes_of

__all__ = ["ChainPlan", "ContractionPlan", "Direction", "Form", "PlanKind", "Step"]

Direction = Literal["left-to-right", "right-to-left"]
PlanKind = Literal["left-to-right", "right-to-left", "merged", "sliced", "dense"]
Form = Literal["linear", "flipped", "batched", "copied"]


@dataclass(frozen=True)
class Step:
    """One product of the state with the core merged from ``start .. stop``.

    Args:
        start, stop: The range of cores.
        kind: "linear" (one product), "flipped" (the same, computed as its transpose), "batched" (a batch of
            them) or "copied" (one product between transposed copies).
        mode, rank: Sizes of the input mode and of the bond that are contracted.
        batch, m, k, n: ``batch`` products of ``m x k`` by ``k x n``, for the planned batch size.
        flops: Floating-point operations, two per multiply-add; backward included when training.
        moved_bytes: Bytes read and written by products and copies, backward included when training.
        predicted_s: Seconds, backward included when training.
        state_bytes: Size of the state that the step leaves.
        extra_bytes: Most temporary memory besides the two states.
        weight_grad_bytes: Gradient of the weight, before it is summed over the batch; when training.
        merge_s: Seconds of ``predicted_s`` spent on merging the cores; zero at inference.
    """

    start: int
    stop: int
    kind: Form
    mode: int
    rank: int
    batch: int
    m: int
    k: int
    n: int
    flops: int
    moved_bytes: int
    predicted_s: float
    state_bytes: int
    extra_bytes: int
    weight_grad_bytes: int
    merge_s: float

    @property
    def cores(self) -> str:
        """The merged cores, as ``[2 3 4]``."""
        return _bracketed(self.start, self.stop)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Of the weight that ``prepare`` makes for it."""
        return (self.m if self.kind == "batched" else self.n), self.k


@dataclass(frozen=True, kw_only=True)
class ChainPlan(Plan):
    """How to multiply a batch by a TT-matrix; see ``Plan``.

    Args:
        shape: The chain.
        kind: "left-to-right", "right-to-left" (no merges), "merged", "dense", or "sliced": the dense weight, built a
            few rows at a time within the call.
        direction: Of the sweep; None for a dense or a sliced plan.
        groups: Ranges ``(start, stop)`` of cores that are merged, in order; one range for dense, two for sliced.
        steps: The products in order of execution; training counts the merges too.
        rows_at_a_time: With kernels and without gradients, about so many rows at a time go through all steps, so that
            states stay in the cache; 0 takes all rows through one step after the other.
    """

    shape: ChainShape
    kind: PlanKind
    direction: Direction | None
    groups: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    rows_at_a_time: int = 0

    @property
    def chain(self) -> ChainShape:
        """The shapes of the cores."""
        return self.shape

    @property
    def flips(self) -> bool:
        return any(step.kind == "flipped" for step in self.steps)

    @property
    def is_sliced(self) -> bool:
        """Whether the dense weight is built slice by slice."""
        return self.kind == "sliced"

    @property
    def state_bytes(self) -> int:
        return 0 if self.uses_dense or self.is_sliced else max(step.state_bytes for step in self.steps)

    @property
    def prepared_key(self) -> Any:
        return "dense" if self.uses_dense else (self.direction, self.groups)  # no direction: halves

    @property
    def course(self) -> Any:
        parts = [self.rows_at_a_time] if self.rows_at_a_time else []
        return self.kind, self.direction, self.groups, [step.kind for step in self.steps], *parts

    @property
    def words(self) -> str:
        parts = f", {self.rows_at_a_time} rows at a time" if self.rows_at_a_time else ""
        return super().words + parts

    @property
    def _way(self) -> str:
        return f"{self.kind} " + "".join(_bracketed(*group) for group in self.groups)

    def flipped(self) -> ChainPlan:
        """The same plan with single products computed as their transposes: for a few rows that can be faster."""
        steps = [replace(step, kind="flipped") if step.kind == "linear" else step for step in self.steps]
        return replace(self, steps=tuple(steps))

    def by_parts(self, rows_at_a_time: int) -> ChainPlan:
        return replace(self, rows_at_a_time=rows_at_a_time)

    def sweep(self, *, ready: bool) -> Sweep | None:
        if self.is_sliced:
            return None
        if self.inside is not None or (ready and self.uses_dense):
            return super().sweep(ready=ready)
        steps = [self._numbers(k, step, ready) for k, step in enumerate(self.steps)]
        shapes = [step.matrix_shape for step in self.steps] if ready else self.chain.core_shapes
        leftward = self.direction != "left-to-right"  # a dense plan is one leftward step
        sizes = self.in_features, self.out_features
        return Sweep(leftward, ready, *sizes, self.rows_at_a_time, steps, [list(shape) for shape in shapes])

    def _numbers(self, k: int, step: Step, ready: bool) -> list[int]:
        contraction = [FORMS.index(step.kind), step.mode, step.rank]
        if ready:
            return [k, k + 1, *contraction]
        merges = merge_order(self.chain.core_shapes[step.start : step.stop])
        return [step.start, step.stop, *contraction, *(at for merge in merges for at in (merge.start, merge.middle))]

    def _prepare_steps(self, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Merge the cores and lay them out as matrices, in order of execution."""
        merged = merge_cores(cores, self.groups)
        if self.is_sliced:
            return tuple(merged)
        if self.direction == "right-to-left":
            return tuple(core.reshape(-1, prod(sizes_of(core)[2:])) for core in reversed(merged))
        return tuple(  # i s, r j
            core.permute(1, 3, 0, 2).reshape(prod(sizes_of(core)[1::2]), -1) for core in merged
        )

    def _dense(self, cores: Sequence[Tensor]) -> Tensor:
        return chain_to_dense(cores)

    def _run(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if not self.is_sliced or self.inside is not None:
            return super()._run(x, weights, bias)
        y = sliced_product(x.reshape(-1, self.in_features), weights[0], weights[1], bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _run_steps(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if self.is_sliced:
            return sliced_product(x.reshape(-1, self.chain.in_features), weights[0], weights[1], None)
        return sweep(x, weights, self.steps, leftward=self.direction == "right-to-left")

    def __str__(self) -> str:
        return "\n".join(_report(self))


ContractionPlan = ChainPlan  # its public name


def _report(plan: ChainPlan) -> Iterator[str]:
    chain = plan.chain
    yield (
        f"{chain.in_features} -> {chain.out_features} as {chain.in_modes} -> {chain.out_modes}, "
        f"ranks {chain.ranks}, {chain.n_params} parameters"
    )
    yield plan._planned_for
    sweep = f", {plan.direction}" if plan.kind == "merged" else ""
    parts = f", {plan.rows_at_a_time} rows at a time" if plan.rows_at_a_time else ""
    yield f"plan: {plan.kind}{sweep}{parts}"
    yield f"  {'cores':<14}{'form':<9}{'batch x (m x k) (k x n)':<32}{'flops':>10}{'moved':>12}{'time':>12}"
    for step in plan.steps:
        shape = f"{step.batch} x ({step.m} x {step.k}) ({step.k} x {step.n})"
        yield (
            f"  {step.cores:<14}{step.kind:<9}{shape:<32}{step.flops:>10.2e}"
            f"{_bytes(step.moved_bytes):>12}{_seconds(step.predicted_s):>12}"
        )
    yield f"  {'total':<55}{plan.flops:>10.2e}{_bytes(plan.moved_bytes):>12}{_seconds(plan.predicted_s):>12}"
    yield f"  {'dense layer':<55}{plan.dense_flops:>10.2e}{'':>12}{_seconds(plan.dense_s):>12}"
    yield f"speed-up: {plan.speed_up:.3g}x predicted, {plan.dense_flops / plan.flops:.3g}x fewer flops"
    yield f"peak: {_bytes(plan.peak_bytes)}, of which prepared weights {_bytes(plan.prepared_bytes)}"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def _seconds(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _bracketed(start: int, stop: int) -> str:
    return "[" + " ".join(map(str, range(start, stop))) + "]"
