"""Contraction plans as the kernels take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensortrain.contract.merge import merge_order
from tensortrain.system.native.load import library

if TYPE_CHECKING:
    from tensortrain.contract.plan import ContractionPlan, Step

__all__ = ["compiled"]

_FORMS = ("linear", "flipped", "batched", "copied")  # in the order of sweep.h


def compiled(plan: ContractionPlan, *, ready: bool) -> Any | None:
    """The plan as a compiled sweep, over cores or over ready matrices; ``None`` without kernels. Made once."""
    kernels = library()
    if kernels is None or plan.device_type != "cpu":
        return None
    kept = plan.__dict__.setdefault("_compiled", {})  # beside the fields: no part of equality, copies and pickles
    if ready not in kept:
        steps = [_described(k, step, plan, ready) for k, step in enumerate(plan.steps)]
        shapes = [_matrix_shape(step, plan) for step in plan.steps] if ready else plan.chain.core_shapes
        leftward = plan.direction != "left-to-right"  # a dense plan is one leftward step
        sizes = plan.chain.in_features, plan.chain.out_features
        kept[ready] = kernels.make_sweep(leftward, ready, *sizes, plan.rows_at_a_time, steps, [list(s) for s in shapes])
    return kept[ready]


def _described(k: int, step: Step, plan: ContractionPlan, ready: bool) -> list[int]:
    contraction = [_FORMS.index(step.kind), step.mode, step.rank]
    if ready:
        return [k, k + 1, *contraction]
    merges = merge_order(plan.chain.core_shapes[step.start : step.stop])
    return [step.start, step.stop, *contraction, *(at for merge in merges for at in (merge.start, merge.middle))]


def _matrix_shape(step: Step, plan: ContractionPlan) -> tuple[int, int]:
    batched = step.kind == "batched"
    return (step.m if batched else step.n), step.k
