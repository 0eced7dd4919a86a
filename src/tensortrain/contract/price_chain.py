"""What the plans of a chain are predicted to cost.

Merging neighbouring cores before the sweep trades flops for fewer and larger products. The cost of a
step depends only on the range of cores it takes, and on whether the step before left a copy undone, so
the best set of merges is a shortest path over the bonds: O(d^2) predictions instead of 2^(d-1) plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import torch

from tensortrain.contract.chain_plan import ChainPlan, Direction, Form, PlanKind, Step
from tensortrain.contract.cost import CostModel
from tensortrain.contract.merge import Merge, merge_order, run_numel
from tensortrain.contract.shape import ChainShape
from tensortrain.contract.slices import modes_at_a_time

__all__ = ["ChainPricer", "Path"]

# Calls of about the price of a small operation that go with each product: views of the state before
# and after it, and their backward nodes when training.
_VIEW_CALLS = 4
_VIEW_CALLS_TRAINING = 16
_VIEW_CALLS_OF_KERNELS = 1
_VIEW_CALLS_TRAINING_OF_KERNELS = 5

# Small layers run on plain memory by one thread, one call of BLAS after the other (system/native/small.h): up to so
# many flops and numbers. Costs are in calls of a small operation and were fitted to some 400 plans of 60 layers.
_SMALL_FLOPS, _SMALL_NUMBERS = 4_000_000, 2**19
_SMALL_RATE, _SMALL_RATE_TRAINING = 0.65, 0.4  # of the rate at which one thread multiplies large matrices
_VECTOR_BYTES = 64  # narrower columns take as long
_STEP_CALLS, _STEP_CALLS_TRAINING = 0.05, 1.2
_PRODUCT_CALLS, _PRODUCT_CALLS_TRAINING = 0.12, 0.25
_MERGE_CALLS = 3.1
_CALLS_A_COPIED_NUMBER = 2.7e-4


@dataclass(frozen=True)
class _Product:
    """A weight ``rows x columns`` times every ``columns x width`` matrix of ``lead``."""

    lead: int
    rows: int
    columns: int
    width: int
    batched: bool

    @property
    def gemm(self) -> tuple[int, int, int, int]:
        """Batch, m, n, k of the call: either a batch, or one product with the weight on the right."""
        if self.batched:
            return self.lead, self.rows, self.width, self.columns
        return 1, self.lead * self.width, self.rows, self.columns

    @property
    def flops(self) -> int:
        return 2 * self.lead * self.rows * self.columns * self.width

    @property
    def out_numel(self) -> int:
        return self.lead * self.rows * self.width

    @property
    def operand_numel(self) -> int:
        return self.lead * self.columns * self.width

    @property
    def numel(self) -> int:
        """Entries read and written."""
        return self.out_numel + self.operand_numel + self.rows * self.columns

    @property
    def weight_grad_numel(self) -> int:
        return self.rows * self.columns * (self.lead if self.batched else 1)


@dataclass(frozen=True)
class Path:
    """Steps from the first bond of a sweep to some bond, and whether a transposed copy is pending."""

    seconds: float
    steps: tuple[Step, ...]
    pending_bytes: int
    has_merge: bool


@dataclass(frozen=True)
class ChainPricer:
    """Prices the plans of one chain."""

    shape: ChainShape
    batch: int
    dtype: torch.dtype
    device_type: str
    training: bool
    model: CostModel
    by_kernels: bool = False
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # prices that many plans share

    forces: ClassVar[tuple[str, ...]] = ("left-to-right", "right-to-left", "merged", "dense", "factorized")

    @property
    def views_s(self) -> float:
        """The calls that go with each product."""
        if self.by_kernels:
            calls = _VIEW_CALLS_TRAINING_OF_KERNELS if self.training else _VIEW_CALLS_OF_KERNELS
        else:
            calls = _VIEW_CALLS_TRAINING if self.training else _VIEW_CALLS
        return calls * self.model.overhead_s

    @property
    def entry_s(self) -> float:
        """What a call costs beside its products: entering a plan, and at training the way back through autograd."""
        if not self.model.gemm_table:
            return 0.0  # the constants are not those of a machine
        return self.model.overhead_s + (self.model.backward_s if self.training else 0.0)

    def factorized(self, force: str | None) -> Iterator[ChainPlan]:
        """The best plans of each direction that ``force`` admits, one for every number of steps."""
        directions: tuple[Direction, ...] = ("left-to-right", "right-to-left")
        asked = tuple(direction for direction in directions if direction == force)
        found = [(d, path) for d in asked or directions for path in self.paths(d, merges=not asked)]
        if force == "merged":
            found = [entry for entry in found if entry[1].has_merge] or found
        for direction, path in found:
            yield self.finish(direction, path)

    def paths(self, direction: Direction, *, merges: bool) -> list[Path]:
        """Shortest paths over the bonds, the best one for every number of steps."""
        order = self.shape.order
        best: dict[int, dict[tuple[int, bool], Path]] = {0: {(0, False): Path(0.0, (), 0, False)}}
        for done in range(1, order + 1):
            best[done] = {}
            for before in range(done) if merges else (done - 1,):
                span = (before, done) if direction == "left-to-right" else (order - done, order - before)
                if self.may_merge(*span):
                    for path in best[before].values():
                        self.extend(best[done], path, direction, span)
        closed: dict[int, Path] = {}
        for path in best[order].values():
            closing = Path(path.seconds + self.copy_s(path.pending_bytes), path.steps, 0, path.has_merge)
            _keep_better(closed, len(path.steps), closing)
        return list(closed.values())

    def extend(
        self,
        best: dict[tuple[int, bool], Path],
        path: Path,
        direction: Direction,
        span: tuple[int, int],
    ) -> None:
        for step in self.steps(direction, *span, path.pending_bytes):
            pending = 2 * step.state_bytes if step.kind == "copied" else 0
            has_merge = path.has_merge or span[1] - span[0] > 1
            longer = Path(path.seconds + step.predicted_s, (*path.steps, step), pending, has_merge)
            _keep_better(best, (len(longer.steps), pending > 0), longer)

    def may_merge(self, start: int, stop: int) -> bool:
        """Leaves out merges of about the dense weight's size: a dense plan under another name."""
        if stop - start == 1:
            return True
        merged = run_numel(self.shape, start, stop)
        parts = sum(run_numel(self.shape, k, k + 1) for k in range(start, stop))
        shrinks = merged <= parts and stop - start < self.shape.order  # ranks above the feasible
        return shrinks or 2 * merged <= self.shape.dense_numel

    def steps(self, direction: Direction, start: int, stop: int, pending_bytes: int) -> list[Step]:
        """The forms in which one range of cores can be contracted, priced once for all plans that hold it."""
        key = (direction, start, stop, pending_bytes)
        if key not in self.known:
            self.known[key] = list(self._steps(*key))
        steps: list[Step] = self.known[key]
        return steps

    def _steps(self, direction: Direction, start: int, stop: int, pending_bytes: int) -> Iterator[Step]:
        """The forms in which one range of cores can be contracted.

        Args:
            pending_bytes: Moved by the copy that the step before left undone.
        """
        chain = self.shape
        out, mode = prod(chain.out_modes[start:stop]), prod(chain.in_modes[start:stop])
        left, right = chain.ranks[start], chain.ranks[stop]
        if direction == "right-to-left":
            lead, width = prod(chain.in_modes[:start]), prod(chain.out_modes[stop:])
            rows, rank = left * out, right
        else:
            lead, width = prod(chain.out_modes[:start]), prod(chain.in_modes[stop:])
            rows, rank = out * right, left
        lead *= self.batch
        layout_bytes = self.layout_bytes(direction, start, stop)
        forms: tuple[Form, ...] = ("linear",) if width == 1 else ("batched", "copied")
        for kind in forms:
            # A copied step moves its state once, whether or not a copy is pending.
            copied = 2 * self.dtype.itemsize * lead * mode * rank * width if kind == "copied" else pending_bytes
            product = _Product(lead, rows, mode * rank, width, batched=kind == "batched")
            yield self.step(kind, (start, stop), (mode, rank), product, copied, layout_bytes)

    def step(
        self,
        kind: Form,
        span: tuple[int, int],
        contracted: tuple[int, int],
        product: _Product,
        copied_bytes: int,
        layout_bytes: int,
    ) -> Step:
        item, passes = self.dtype.itemsize, 3 if self.training else 1
        if self.is_small(product):
            prepare_s = self.small_merge_s(*span) if self.training else 0.0
            product_s = self.small_product_s(product, is_copied=kind == "copied")
        else:
            prepare_s = self.merge_s(*span) + 2 * self.copy_s(layout_bytes) if self.training else 0.0
            copies_s = self.copy_s(copied_bytes) * (2 if self.training else 1)
            product_s = self.product_s(product) + copies_s + self.views_s
        batch, m, n, k = product.gemm
        return Step(
            *span,
            kind,
            *contracted,
            batch=batch,
            m=m,
            k=k,
            n=n,
            flops=passes * product.flops + (self.merge_flops(*span) if self.training else 0),
            moved_bytes=passes * item * product.numel + copied_bytes * (2 if self.training else 1),
            predicted_s=product_s + prepare_s,
            state_bytes=item * product.out_numel,
            extra_bytes=copied_bytes // 2,
            weight_grad_bytes=item * product.weight_grad_numel if self.training else 0,
            merge_s=prepare_s,
        )

    def product_s(self, product: _Product) -> float:
        """One product, and the two of its backward pass when training."""
        batch, m, n, k = product.gemm
        seconds = self.gemm_s(m, n, k, batch, product.batched)
        if not self.training:
            return seconds
        if not product.batched:
            return seconds + self.gemm_s(m, k, n) + self.gemm_s(n, k, m)
        return seconds + self.gemm_s(k, n, m, batch, True) + self.shared_grad_s(product)

    def shared_grad_s(self, product: _Product) -> float:
        """The gradient of a weight that is shared by a batch: a batch of products and their sum, or, where that moves
        less, one product of the operands laid side by side."""
        batch, m, n, k = product.gemm
        if batch == 1:
            return self.gemm_s(m, k, n)
        if self.by_kernels and m * k > (m + k) * n:
            moved = 2 * self.dtype.itemsize * batch * n
            return self.copy_s(moved * m) + self.copy_s(moved * k) + self.gemm_s(m, k, n * batch)
        summed = self.model.stream_s(self.dtype.itemsize * product.weight_grad_numel)
        return self.gemm_s(m, k, n, batch, True) + summed

    def is_small(self, product: _Product) -> bool:
        """Whether the kernels take a step of a small layer, of which there is a price of its own.

        Not at inference on the whole weight: that is the product of a dense layer.
        """
        return (
            self.by_kernels
            and (self.training or product.rows < self.shape.out_features or product.columns < self.shape.in_features)
            and bool(self.model.gemm_table)
            and self.dtype in (torch.float32, torch.float64)
            and product.flops <= _SMALL_FLOPS
            and max(product.out_numel, product.operand_numel) <= _SMALL_NUMBERS
            and self.batch * max(self.shape.in_features, self.shape.out_features) <= _SMALL_NUMBERS
        )

    def small_product_s(self, product: _Product, *, is_copied: bool) -> float:
        """A product on plain memory, its copies, and at training the two products that lead back."""
        _, m, n, k = product.gemm
        calls = _STEP_CALLS_TRAINING if self.training else _STEP_CALLS
        n_products = product.lead if product.batched else 1
        calls += n_products * (_PRODUCT_CALLS_TRAINING if self.training else _PRODUCT_CALLS)
        if is_copied:
            calls += _CALLS_A_COPIED_NUMBER * (product.operand_numel + product.out_numel)
        flops = 2.0 * n_products * m * k * self.whole_vectors(n)
        if self.training:
            flops += 2.0 * n_products * (k * m * self.whole_vectors(n) + m * n * self.whole_vectors(k))
        return calls * self.model.overhead_s + flops / self.small_flops_s

    def small_merge_s(self, start: int, stop: int) -> float:
        return sum(
            _MERGE_CALLS * self.model.overhead_s + 6.0 * one.m * one.n * one.k / self.small_flops_s
            for one in self.merges(start, stop)
        )

    @property
    def small_flops_s(self) -> float:
        """Rate of one thread at small products."""
        share = _SMALL_RATE_TRAINING if self.training else _SMALL_RATE
        return share * self.model.gemm_flops_s * self.model._dtype_rate(self.dtype) / torch.get_num_threads()

    def whole_vectors(self, n: int) -> int:
        lanes = _VECTOR_BYTES // self.dtype.itemsize
        return -(-n // lanes) * lanes

    def gemm_s(self, m: int, n: int, k: int, batch: int = 1, batched: bool = False) -> float:
        return self.model.gemm_s(m, n, k, batch=batch, batched=batched, dtype=self.dtype)

    def copy_s(self, n_bytes: int) -> float:
        return self.model.copy_s(n_bytes) if n_bytes else 0.0

    def layout_bytes(self, direction: Direction, start: int, stop: int) -> int:
        """Moved to lay a core out as a matrix: nothing leftward, where it lies that way in memory."""
        if direction == "right-to-left":
            return 0
        return 2 * self.dtype.itemsize * run_numel(self.shape, start, stop)

    def merges(self, start: int, stop: int) -> tuple[Merge, ...]:
        return merge_order(self.shape.core_shapes[start:stop])

    def merge_s(self, start: int, stop: int) -> float:
        """Merging a range of cores and taking the gradient through it."""
        if ("merge", start, stop) in self.known:
            return float(self.known["merge", start, stop])
        seconds = 0.0
        for step in self.merges(start, stop):
            m, n, k = step.m, step.n, step.k
            seconds += self.gemm_s(m, n, k) + self.gemm_s(m, k, n) + self.gemm_s(k, n, m)
            seconds += 2 * self.copy_s(2 * self.dtype.itemsize * m * n)
            seconds += self.views_s
        self.known["merge", start, stop] = seconds
        return seconds

    def merge_flops(self, start: int, stop: int) -> int:
        if ("flops", start, stop) not in self.known:
            flops = sum(3 * 2 * step.m * step.n * step.k for step in self.merges(start, stop))
            self.known["flops", start, stop] = flops
        return int(self.known["flops", start, stop])

    def dense_layer(self) -> tuple[int, float]:
        """Flops and seconds of a plain dense layer."""
        m, n = self.shape.out_features, self.shape.in_features
        product = _Product(self.batch, m, n, 1, batched=False)
        # It is called, and led back through, as a plan is.
        return product.flops * (3 if self.training else 1), self.entry_s + self.product_s(product)

    def sliced(self) -> Iterator[ChainPlan]:
        """Build the weight slice by slice, of two halves that meet at the bond where that costs least."""
        if self.shape.order > 1:
            slicers = [Slicer(self, bond) for bond in range(1, self.shape.order)]
            yield min(slicers, key=lambda slicer: slicer.seconds).plan()

    def dense(self) -> ChainPlan:
        """Build the weight and apply it; at inference the weight is kept."""
        chain, whole = self.shape, (0, self.shape.order)
        product = _Product(self.batch, chain.out_features, chain.in_features, 1, batched=False)
        step = self.step("linear", whole, (chain.in_features, 1), product, 0, 0)
        # Without views around it, the call is that of a dense layer.
        views_s = 0.0 if self.is_small(product) else self.views_s
        step = replace(step, predicted_s=step.predicted_s - views_s)
        weight_bytes = self.dtype.itemsize * chain.dense_numel
        # In training the weight, its gradient, and that gradient sorted by cores are alive together.
        peak_bytes = weight_bytes * (3 if self.training and chain.order > 1 else 1)
        return self.plan("dense", None, (step,), weight_bytes, peak_bytes)

    def finish(self, direction: Direction, path: Path) -> ChainPlan:
        layouts = [self.layout_bytes(direction, step.start, step.stop) // 2 for step in path.steps]
        prepared = sum(
            self.dtype.itemsize * run_numel(self.shape, step.start, step.stop)
            for step, layout in zip(path.steps, layouts, strict=True)
            if layout or step.stop - step.start > 1
        )
        workspace = _training_bytes(path.steps) + prepared if self.training else _inference_bytes(path.steps)
        kind = "merged" if path.has_merge else direction
        plan = self.plan(kind, direction, path.steps, prepared, prepared + workspace)
        return replace(plan, predicted_s=self.entry_s + path.seconds)  # with the copy that the last step leaves

    def plan(
        self,
        kind: PlanKind,
        direction: Direction | None,
        steps: tuple[Step, ...],
        prepared_bytes: int,
        peak_bytes: int,
    ) -> ChainPlan:
        dense_flops, dense_s = self.dense_layer()
        return ChainPlan(
            shape=self.shape,
            batch=self.batch,
            dtype=self.dtype,
            device_type=self.device_type,
            training=self.training,
            kind=kind,
            direction=direction,
            groups=tuple(sorted((step.start, step.stop) for step in steps)),
            steps=steps,
            flops=sum(step.flops for step in steps),
            moved_bytes=sum(step.moved_bytes for step in steps),
            peak_bytes=peak_bytes,
            prepared_bytes=prepared_bytes,
            predicted_s=self.entry_s + sum(step.predicted_s for step in steps),
            dense_flops=dense_flops,
            dense_s=dense_s,
        )


@dataclass(frozen=True)
class Slicer:
    """Prices a plan that builds the weight slice by slice, of two halves that meet at a bond."""

    pricer: ChainPricer
    bond: int

    @property
    def out_modes(self) -> tuple[int, int]:
        modes = self.pricer.shape.out_modes
        return prod(modes[: self.bond]), prod(modes[self.bond :])

    @property
    def in_modes(self) -> tuple[int, int]:
        modes = self.pricer.shape.in_modes
        return prod(modes[: self.bond]), prod(modes[self.bond :])

    @property
    def n_modes(self) -> int:
        """First output modes of one slice."""
        columns, itemsize = self.pricer.shape.in_features, self.pricer.dtype.itemsize
        return min(self.out_modes[0], modes_at_a_time(self.out_modes[1], columns, itemsize))

    @property
    def seconds(self) -> float:
        n_slices = -(-self.out_modes[0] // self.n_modes)
        each = self.making_s + self.product_s + 4 * self.pricer.views_s
        return n_slices * each + self.halves_s

    @property
    def halves_s(self) -> float:
        pricer, last = self.pricer, self.pricer.shape.order
        return pricer.merge_s(0, self.bond) + pricer.merge_s(self.bond, last) if pricer.training else 0.0

    @property
    def making_s(self) -> float:
        """One slice; at training it is made twice, and two products lead back to the halves."""
        gemm_s = self.pricer.gemm_s
        m, n, k = self.n_modes * self.in_modes[0], self.out_modes[1] * self.in_modes[1], self.rank
        if not self.pricer.training:
            return gemm_s(m, n, k) + self.sorting_s
        return 2 * gemm_s(m, n, k) + gemm_s(m, k, n) + gemm_s(k, n, m) + 3 * self.sorting_s

    @property
    def sorting_s(self) -> float:
        is_sorted = self.in_modes[0] == 1 or self.out_modes[1] == 1
        return 0.0 if is_sorted else self.pricer.copy_s(2 * self.slice_bytes)

    @property
    def product_s(self) -> float:
        """The rows times one slice."""
        gemm_s, batch = self.pricer.gemm_s, self.pricer.batch
        rows, columns = self.n_modes * self.out_modes[1], self.pricer.shape.in_features
        seconds = gemm_s(batch, rows, columns)
        if self.pricer.training:
            seconds += gemm_s(batch, columns, rows) + gemm_s(rows, columns, batch)
        return seconds

    @property
    def rank(self) -> int:
        return self.pricer.shape.ranks[self.bond]

    @property
    def slice_bytes(self) -> int:
        return self.pricer.dtype.itemsize * self.n_modes * self.out_modes[1] * self.pricer.shape.in_features

    def plan(self) -> ChainPlan:
        pricer, chain, seconds = self.pricer, self.pricer.shape, self.seconds
        product = _Product(pricer.batch, chain.out_features, chain.in_features, 1, batched=False)
        step = pricer.step("linear", (0, chain.order), (chain.in_features, 1), product, 0, 0)
        flops = step.flops + 2 * self.rank * chain.dense_numel * (4 if pricer.training else 1)
        making_s = seconds - self.product_s * -(-self.out_modes[0] // self.n_modes)
        step = replace(step, flops=flops, predicted_s=seconds, merge_s=making_s if pricer.training else 0.0)
        halves = (0, self.bond), (self.bond, chain.order)
        prepared = pricer.dtype.itemsize * sum(run_numel(chain, *half) for half in halves if half[1] - half[0] > 1)
        plan = pricer.plan("sliced", None, (step,), prepared, prepared + 2 * self.slice_bytes)
        return replace(plan, groups=halves)


def _keep_better(best: dict, key: object, path: Path) -> None:
    if key not in best or path.seconds < best[key].seconds:
        best[key] = path


def _inference_bytes(steps: Sequence[Step]) -> int:
    """Most bytes of states alive at once; the first one read is the input, the last the output."""
    before = [0, *(step.state_bytes for step in steps[:-1])]
    after = [*(step.state_bytes for step in steps[:-1]), 0]
    return max(old + step.extra_bytes + new for old, step, new in zip(before, steps, after, strict=True))


def _training_bytes(steps: Sequence[Step]) -> int:
    """All states, which backward needs, and the largest temporary gradient."""
    saved = sum(step.extra_bytes for step in steps) + sum(step.state_bytes for step in steps[:-1])
    return saved + max(step.weight_grad_bytes + step.state_bytes for step in steps)
