"""Factorize: a plan for the budget, then its layers in place of the dense ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.choose.planner import make_plan
from tensortrain.compression.proof import apply_proven
from tensortrain.compression.stages.base import Work, stage

__all__ = ["Factorize"]


@dataclass(frozen=True)
class Factorize:
    """Replace layers by factorized ones, so that the model fits its budget.

    Attributes:
        plan: A plan made before, in place of a new one.
    """

    plan: CompressionPlan | None = None


@stage(Factorize, outcome="before healing", copies=True)
def _factorize(work: Work, settings: Factorize) -> Work:
    options, plan = work.options, settings.plan
    if plan is None:
        plan = make_plan(work.model, replace(options, will_heal=work.will_heal, task=work.task or options.task))
    model, plan, notes = apply_proven(work.model, plan, inplace=options.inplace, observer=options.observer)
    return replace(work, model=model, plan=plan, is_own=True).noted(*notes)
