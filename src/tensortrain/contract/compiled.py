"""Contraction plans as the kernels take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tensortrain.system.native.load import library

if TYPE_CHECKING:
    from tensortrain.contract.plan import Plan

__all__ = ["FORMS", "Compiled", "Sweep", "compiled"]

FORMS = ("linear", "flipped", "batched", "copied")  # in the order of sweep.h


class Sweep(NamedTuple):
    """A plan as numbers: what ``make_sweep`` of the kernels takes.

    Args:
        leftward: Whether the last core comes first.
        ready: Whether it runs over ready matrices, not over cores.
        in_features, out_features, rows_at_a_time: As of the plan.
        steps: ``[start, stop, form, mode, rank, start and middle of every merge]``.
        shapes: Of the cores, or of the ready matrices.
    """

    leftward: bool
    ready: bool
    in_features: int
    out_features: int
    rows_at_a_time: int
    steps: list[list[int]]
    shapes: list[list[int]]


class Compiled:
    """What was compiled of one plan, kept beside its fields: part of no comparison, copy or pickle."""

    def __init__(self) -> None:
        self.by_readiness: dict[bool, Any] = {}

    def __reduce__(self) -> tuple[type[Compiled], tuple[()]]:
        return Compiled, ()


def compiled(plan: Plan, *, ready: bool) -> Any | None:
    """The plan as a compiled sweep, over cores or over ready matrices; ``None`` where no kernel runs it. Made once."""
    kernels = library()
    if kernels is None or plan.device_type != "cpu":
        return None
    kept = plan.compiled.by_readiness
    if ready not in kept:
        sweep = plan.sweep(ready=ready)
        kept[ready] = None if sweep is None else kernels.make_sweep(*sweep)
    return kept[ready]
