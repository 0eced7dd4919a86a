"""After the swap one batch proves that the model runs, and that its new layers do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tensortrain.compression.choose.plan import CompressionPlan, Group, n_saved
from tensortrain.compression.config import config_notes
from tensortrain.compression.surgery import apply_plan_
from tensortrain.compression.survey.runs import layers_that_run
from tensortrain.compression.words import in_short
from tensortrain.errors import KindError
from tensortrain.system.observer import Observer
from tensortrain.train.batches import run
from tensortrain.train.preserve import checked_copy, preserved

__all__ = ["apply_proven"]


def apply_proven(
    model: nn.Module, plan: CompressionPlan, *, inplace: bool, observer: Observer, parks: bool = False
) -> tuple[nn.Module, CompressionPlan, list[str]]:
    """Apply a plan to the model or a copy, and run the first batch of its calibration, if there is one.

    Layers of which the model makes a use that their new forms cannot serve (it reads ``_parameters``, it asks for the
    class) stay as they are; of a model that is changed in place they are an error, which the caller undoes.

    Args:
        parks: Large tensors of a copy lie in files.

    Returns:
        The compressed model, the plan as it was applied, and notes.

    Raises:
        KindError: The model does not run with its new layers.
    """
    names = [layer.name for layer in plan.layers if layer.spec is not None]
    ran = _ran(model, plan, names) if inplace else None  # of a copy it is looked at where it decides
    compressed = apply_plan_(model if inplace else checked_copy(model, parks=parks), plan, observer=observer)
    seen, error = _seen(compressed, plan, names)
    if error is None:
        return compressed, plan, [*_idle(model, plan, names, ran, seen), *config_notes(compressed)]
    culprits = [] if inplace else [name for name in names if _fails_alone(model, plan, name)]
    stuck = [] if inplace else [one for one in plan.groups if _fails_narrowed(model, plan, one)]
    if len(culprits) + len(stuck) in (0, len(names) + len(plan.groups)):
        raise _does_not_run(error, culprits)
    plan = _without(plan, [*culprits, *(name for one in stuck for name in one.names)], error)
    compressed = apply_plan_(checked_copy(model, parks=parks), plan, observer=observer)
    names = [name for name in names if name not in culprits]
    seen, error = _seen(compressed, plan, names)
    if error is not None:
        raise _does_not_run(error, culprits)
    return compressed, plan, [*_idle(model, plan, names, ran, seen), *config_notes(compressed)]


def _once(model: nn.Module, plan: CompressionPlan) -> None:
    assert plan.calibration is not None
    with preserved(model):
        model.eval()
        run(model, plan.calibration.batches[0], with_labels=plan.calibration.with_labels)


def _has_batch(plan: CompressionPlan) -> bool:
    return plan.calibration is not None and bool(plan.calibration.batches)


def _ran(model: nn.Module, plan: CompressionPlan, names: Sequence[str]) -> set[str]:
    return layers_that_run(model, names, lambda net: _once(net, plan)) if _has_batch(plan) else set()


def _seen(compressed: nn.Module, plan: CompressionPlan, names: Sequence[str]) -> tuple[set[str], Exception | None]:
    """Which of the layers run on the first batch, and what keeps the model from running."""
    if not _has_batch(plan):
        return set(names), None
    try:
        return layers_that_run(compressed, names, lambda net: _once(net, plan)), None
    except Exception as error:
        return set(), error


def _fails_alone(model: nn.Module, plan: CompressionPlan, name: str) -> bool:
    layers = tuple(layer for layer in plan.layers if layer.name == name)
    alone = replace(plan, layers=layers).with_groups(())
    return _seen(apply_plan_(checked_copy(model), alone), plan, [])[1] is not None


def _fails_narrowed(model: nn.Module, plan: CompressionPlan, one: Group) -> bool:
    alone = replace(plan, layers=()).with_groups([one])
    return _seen(apply_plan_(checked_copy(model), alone), plan, [])[1] is not None


def _without(plan: CompressionPlan, culprits: Sequence[str], error: Exception) -> CompressionPlan:
    """The plan with some layers left dense."""
    why = f"the model does not run with another layer in its place ({in_short(error)})"
    layers = [layer.left_dense(why) if layer.name in culprits else layer for layer in plan.layers]
    small = plan.with_groups([one for one in plan.groups if not set(one.names) & set(culprits)])
    after = plan.params_before - n_saved(layers, small.narrowed)
    note = f"The model does not run without its own {', '.join(map(repr, culprits))} ({in_short(error)}): left dense, "
    note += "so the budget may be missed. Leave them out with exclude= to spend it on the others."
    return replace(small, layers=tuple(layers), params_after=after, notes=(*plan.notes, note))


def _idle(
    model: nn.Module, plan: CompressionPlan, names: Sequence[str], ran: set[str] | None, seen: set[str]
) -> list[str]:
    """A note on layers that ran before the swap and do not after it.

    Args:
        ran: Which ran before it; None where the model, as it was, can still be asked.
    """
    if ran is None:
        ran = _ran(model, plan, names) if set(names) - seen else set()
    idle = [name for name in names if name in ran and name not in seen]
    if not idle:
        return []
    shown = ", ".join(map(repr, idle[:8]))
    return [
        f"New layers that the model does not call: {shown}. Its code reaches the old ones, or the weights, by another "
        "way; if it is the old ones, leave them out with exclude=."
    ]


def _does_not_run(error: Exception, culprits: Sequence[str]) -> KindError:
    named = f" ({', '.join(map(repr, culprits[:8]))})" if culprits else ""
    return KindError(
        f"a compressed model must run: with its new layers{named} it fails on the first batch with {in_short(error)}. "
        "Leave out with exclude= the layers whose class or parameters its code looks at."
    )
