"""Factorize: a plan for the budget, then its layers in place of the dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tensortrain.compression.choose.candidates import factoring
from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.choose.planner import make_plan
from tensortrain.compression.proof import apply_proven
from tensortrain.compression.report.alone import losses_alone
from tensortrain.compression.stages.base import Work, stage
from tensortrain.compression.surgery import to_dense_
from tensortrain.compression.words import named
from tensortrain.nn import FactorizedLayer, TiedHead
from tensortrain.system.offloading import bring_back, clear_away, is_offloaded, let_go_of_weights, weights_offloaded
from tensortrain.system.parking import memory_reused

__all__ = ["Factorize"]


@dataclass(frozen=True)
class Factorize:
    """Replace layers by factorized ones, so that the model fits its budget.

    What an earlier ``Factorize`` of the same work replaced is planned again, from the dense weights that its layers
    stand for by then: these hold all that was learnt, a form of the same format and smaller ranks is on their menu (the
    decomposition of a train's dense weight is the truncation of the train), and so is every other format.

    Attributes:
        plan: A plan made before, in place of a new one.
        way: How much of the way to the budget is gone, in equal ratios: with 0.5 of a budget of 16x, 4x. Before its
            end no hidden units are taken out.
    """

    plan: CompressionPlan | None = None
    way: float = 1.0


@stage(Factorize, outcome="before healing", copies=True)
def _factorize(work: Work, settings: Factorize) -> Work:
    if not work.options.inplace:
        with memory_reused(work.model.parameters()):
            return _planned(work, settings)
    with (
        memory_reused(work.model.parameters()),
        weights_offloaded(work.model, but_not=_is_factorized, after_use=_drop_derived),
    ):
        done = _planned(work, settings)
        for module in done.model.modules():
            if isinstance(module, FactorizedLayer):
                module.clear_cache()  # made on the way: copies of cores, which are about to move
        bring_back(done.model)
    return done


def _is_factorized(module: nn.Module) -> bool:
    return isinstance(module, FactorizedLayer)


def _drop_derived(module: nn.Module) -> None:
    """Of a new layer that lies in files, drop what a run has made of its cores: of all layers it would be a model."""
    layer = module.embedding if isinstance(module, TiedHead) else module
    if isinstance(layer, FactorizedLayer) and is_offloaded(layer):
        layer.clear_cache()
        let_go_of_weights(layer)


def _planned(work: Work, settings: Factorize) -> Work:
    if settings.plan is not None:
        return _applied(work, settings.plan)
    is_turn = settings.way < 1 or work.plan is not None
    work = replace(work, model=_dense_again(work))
    options = replace(work.options, will_heal=work.will_heal, task=work.task or work.options.task, way=settings.way)
    if is_turn:  # every turn is to find a model of the sizes that its budget is told by
        options = replace(options, formats=factoring(options.formats))
    plan = make_plan(work.model, options)
    done = _applied(work, plan)
    refused = _left_dense(plan, done.plan)
    if refused:  # their share is spent on the others, or the budget is found to be out of reach
        plan = make_plan(work.model, replace(options, exclude=[*_patterns(options.exclude), *refused]))
        work = work.noted(f"The model does not run without its own {named(refused)}: left dense.")
        done = _applied(work, plan)
    if done.plan is not None and done.plan.calibration is not None:
        done.plan.calibration.forget_derived()
    if settings.way < 1:
        done = done.noted(f"On the way: {plan.params_after:,} parameters ({plan.budget}).")
    return done


def _applied(work: Work, plan: CompressionPlan) -> Work:
    options = work.options
    before = work.original if options.inplace else work.model
    model, plan, notes = apply_proven(work.model, plan, inplace=options.inplace, observer=options.observer)
    is_first = work.plan is None or not options.inplace  # else what was cut is gone
    losses: dict[str, float] = {}
    if options.measure and is_first:
        if any(map(is_offloaded, model.modules())):
            clear_away()
        losses = losses_alone(before, model, plan, options.output, work.task or options.task)
    return replace(work, model=model, plan=plan, is_own=True, losses=losses).noted(*notes)


def _left_dense(plan: CompressionPlan, applied: CompressionPlan | None) -> list[str]:
    """Layers of a plan that the model turned out to need as they are."""
    assert applied is not None
    pairs = zip(plan.layers, applied.layers, strict=True)
    return [before.name for before, after in pairs if before.format != "dense" and after.format == "dense"]


def _patterns(given: Sequence[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _dense_again(work: Work) -> nn.Module:
    """The model with torch's layers where an earlier stage put others; what the user had factorized stays."""
    if work.plan is None:
        return work.model
    return to_dense_(work.model, only=[name for layer in work.plan.layers if layer.spec for name in layer.names])
