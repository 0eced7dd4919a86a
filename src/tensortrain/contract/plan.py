"""A contraction plan: what it costs, how it prints, how it runs.

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

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract.compiled import compiled
from tensortrain.contract.merge import chain_to_dense, merge_cores
from tensortrain.contract.shape import Chain
from tensortrain.errors import ShapeError
from tensortrain.system.native import (
    library,
)
from tensortrain.system.tracing import is_traced, sizes_of

__all__ = ["ContractionPlan", "Direction", "Form", "Kind", "Step", "linear_product"]

Direction = Literal["left-to-right", "right-to-left"]
Kind = Literal["left-to-right", "right-to-left", "merged", "dense"]
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
        return "[" + " ".join(str(k) for k in range(self.start, self.stop)) + "]"


@dataclass(frozen=True)
class ContractionPlan:
    """How to multiply a batch by a TT-matrix: printable before it is run.

    Args:
        chain: The shapes.
        batch: Rows the plan was made for; it runs with any number.
        dtype, device_type, training: What it was costed for.
        kind: "left-to-right", "right-to-left" (no merges), "merged" or "dense".
        direction: Of the sweep; None for a dense plan.
        groups: Ranges ``(start, stop)`` of cores that are merged, in order; one range for dense.
        steps: The products in order of execution.
        flops: Two per multiply-add; training adds the backward pass and the merges.
        moved_bytes: Bytes read and written.
        peak_bytes: Most memory held besides input, output and cores: prepared weights, and the states
            alive together (all of them in training, where backward needs them).
        prepared_bytes: The part of ``peak_bytes`` that ``prepare`` makes and a layer may keep.
        predicted_s: Seconds of one call; of forward and backward when training. At inference the
            prepared weights count as kept from the call before.
        dense_flops, dense_s: The same for a plain dense layer.
        rows_at_a_time: With kernels and without gradients, about so many rows at a time go through all steps, so that
            states stay in the cache; 0 takes all rows through one step after the other.
    """

    chain: Chain
    batch: int
    dtype: torch.dtype
    device_type: str
    training: bool
    kind: Kind
    direction: Direction | None
    groups: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    flops: int
    moved_bytes: int
    peak_bytes: int
    prepared_bytes: int
    predicted_s: float
    dense_flops: int
    dense_s: float
    rows_at_a_time: int = 0

    @property
    def uses_dense(self) -> bool:
        """Whether the plan builds the dense weight."""
        return self.kind == "dense"

    @property
    def flips(self) -> bool:
        """Whether single products are computed as their transposes."""
        return any(step.kind == "flipped" for step in self.steps)

    def flipped(self) -> ContractionPlan:
        """The same plan with single products computed as their transposes: for a few rows that can be faster."""
        steps = [replace(step, kind="flipped") if step.kind == "linear" else step for step in self.steps]
        return replace(self, steps=tuple(steps))

    def by_parts(self, rows_at_a_time: int) -> ContractionPlan:
        """The same plan, a few rows at a time."""
        return replace(self, rows_at_a_time=rows_at_a_time)

    @property
    def speed_up(self) -> float:
        """Predicted time of a dense layer over that of this plan."""
        return self.dense_s / self.predicted_s

    def prepare(self, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Merge the cores and lay them out as matrices, in order of execution.

        Nothing here depends on the input, so at inference the result may be kept (``WeightCache``)
        while the cores do not change. Cores that are not merged come back as views where they can.

        Raises:
            ShapeError: The cores are not those of ``chain``.
        """
        self._check_cores(cores)
        if self.uses_dense:
            return (chain_to_dense(cores),)
        merged = merge_cores(cores, self.groups)
        if self.direction == "right-to-left":
            return tuple(core.reshape(-1, prod(sizes_of(core)[2:])) for core in reversed(merged))
        return tuple(  # i s, r j
            core.permute(1, 3, 0, 2).reshape(prod(sizes_of(core)[1::2]), -1) for core in merged
        )

    def execute(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        prepared: Sequence[Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply: ``y = x W^T + b``, differentiably; by the kernels where they are built and serve these tensors.

        Args:
            x: ``(..., N)``, any number of leading dimensions, any strides.
            cores: Cores ``(r, i, j, s)`` of ``chain``.
            prepared: What ``prepare(cores)`` gave; None makes it here.
            bias: ``(M,)``.

        Returns:
            Tensor: ``(..., M)``, dtype of the product.

        Raises:
            ShapeError: ``x`` does not end with ``N``, or the cores are not those of ``chain``.

        Example:
            >>> cores = [torch.randn(1, 4, 5, 3), torch.randn(3, 6, 7, 1)]
            >>> plan = plan_chain(Chain.of(cores), batch=2)
            >>> plan.execute(torch.randn(2, 35), cores).shape
            torch.Size([2, 24])
        """
        self._check_input(x)
        y = self._run_compiled(x, cores, prepared, bias)
        if y is not None:
            return y
        weights = self.prepare(cores) if prepared is None else prepared
        if self.uses_dense:
            return linear_product(x, weights[0], bias, flipped=self.flips)
        leftward = self.direction == "right-to-left"
        state = x.reshape(-1, 1, 1) if leftward else x.reshape(-1, 1, self.chain.in_features)
        contract = _step_leftward if leftward else _step_rightward
        for step, weight in zip(self.steps, weights, strict=True):
            state = contract(state, weight, step)
        y = state.reshape(*x.shape[:-1], self.chain.out_features)
        return y if bias is None else y + bias.to(y.dtype)

    def _run_compiled(
        self, x: Tensor, cores: Sequence[Tensor], prepared: Sequence[Tensor] | None, bias: Tensor | None
    ) -> Tensor | None:
        """The product by the kernels; ``None`` where there are none, or they do not serve these tensors."""
        if is_traced():
            return None
        sweep = compiled(self, ready=prepared is not None)
        if sweep is None:
            return None
        y: Tensor | None = library().run(sweep, x, list(cores if prepared is None else prepared), bias)  # type: ignore[union-attr]
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def _check_input(self, x: Tensor) -> None:
        sizes = sizes_of(x)
        if not sizes or sizes[-1] != self.chain.in_features:
            raise ShapeError(
                f"the last size of the input must be in_features: x has shape {sizes}, expected "
                f"(..., {self.chain.in_features}). Reshape the input or plan for its size."
            )

    def _check_cores(self, cores: Sequence[Tensor]) -> None:
        shapes = tuple(sizes_of(core) for core in cores)
        if shapes != self.chain.core_shapes:
            raise ShapeError(
                f"cores must have the planned shapes: cores has {shapes}, expected "
                f"{self.chain.core_shapes}. Make a plan with Chain.of(cores)."
            )

    def __str__(self) -> str:
        return "\n".join(_report(self))


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, flipped: bool = False) -> Tensor:
    """``x W^T + b``; flipped, it is computed as ``W x^T``, which BLAS may do faster for a few rows."""
    if not flipped:
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, x.shape[-1]).t()
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return y.t().contiguous().view(*x.shape[:-1], sizes_of(weight)[0])


# The state between steps is (lead, rows of the last weight, width). After a "copied" step it is a
# transposed view; it is cut into five axes before anything is copied, so that the transpose left over
# and the one that the next step wants become one copy.


def _step_leftward(state: Tensor, weight: Tensor, step: Step) -> Tensor:
    """State ``(b j, s i, p)`` to ``(b, r i, i p)``; ``i p`` are output modes already made."""
    _, rows, p = sizes_of(state)
    i = rows // step.rank
    state = state.reshape(-1, step.mode, step.rank, i, p)
    if step.kind == "batched":
        return _batched(weight, state.reshape(-1, step.mode * step.rank, i * p))
    columns = state.permute(0, 3, 4, 1, 2).reshape(-1, step.mode * step.rank)
    return (
        linear_product(columns, weight, flipped=step.kind == "flipped")
        .reshape(-1, i * p, sizes_of(weight)[0])
        .transpose(1, 2)
    )


def _step_rightward(state: Tensor, weight: Tensor, step: Step) -> Tensor:
    """State ``(b, i r, j p)`` to ``(b i, i s, p)``; ``p`` are input modes still to come."""
    _, rows, columns_left = sizes_of(state)
    i, p = rows // step.rank, columns_left // step.mode
    state = state.reshape(-1, i, step.rank, step.mode, p)
    if step.kind == "batched":
        return _batched(weight, state.reshape(-1, step.rank * step.mode, p))
    columns = state.permute(0, 1, 4, 2, 3).reshape(-1, step.rank * step.mode)
    product = linear_product(columns, weight, flipped=step.kind == "flipped")
    return product.reshape(-1, p, sizes_of(weight)[0]).transpose(1, 2)


def _batched(weight: Tensor, state: Tensor) -> Tensor:
    # bmm reads the expanded weight in place; matmul would fold, and copy, whenever gradients are on.
    return torch.bmm(weight.expand(state.shape[0], -1, -1), state)


def _report(plan: ContractionPlan) -> Iterator[str]:
    chain, phase = plan.chain, "training step" if plan.training else "inference"
    yield (
        f"{chain.in_features} -> {chain.out_features} as {chain.in_modes} -> {chain.out_modes}, "
        f"ranks {chain.ranks}, {chain.n_params} parameters"
    )
    yield f"batch {plan.batch}, {str(plan.dtype).removeprefix('torch.')} on {plan.device_type}, {phase}"
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
