"""The stages of a compression: a type of settings is registered with the function that carries them out.

A new stage is one new file: a frozen dataclass of its settings, and a handler under :func:`stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.options import CompressOptions
from tensortrain.compression.stages.points import Point, point_of
from tensortrain.compression.words import in_short
from tensortrain.errors import KindError
from tensortrain.train.evaluation import evaluate_metric
from tensortrain.train.preserve import checked_copy
from tensortrain.train.task import Task

__all__ = ["Stage", "Work", "prepare_stages", "run_stages", "stage", "stage_of"]


@dataclass(frozen=True)
class Work:
    """What one stage leaves to the next.

    Attributes:
        model: As it is by now. A stage changes it in place, unless it ``copies``.
        original: What it was made from: the teacher, and what is compared with.
        options: What ``compress`` was asked for, the data among it.
        plan: What became of the layers.
        task: How the model is judged, where that is known.
        will_heal: What a planning may count on.
        checkpoint: The file of the stage that runs, for its state.
        is_own: Whether ``model`` is no longer the user's.
        notes: Sentences for the report.
        healing: Rows of losses and figures of what was trained.
        points: The original, and the model after each stage.
        losses: What each new layer was measured to spoil by itself, before any healing.
    """

    model: nn.Module
    original: nn.Module
    options: CompressOptions
    plan: CompressionPlan | None = None
    task: Task | None = None
    will_heal: bool | Literal["long"] = False
    checkpoint: Path | None = None
    is_own: bool = False
    notes: tuple[str, ...] = ()
    healing: tuple[Mapping[str, Any], ...] = ()
    points: tuple[Point, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)

    def noted(self, *notes: str) -> Work:
        """The same work with further sentences for the report."""
        return replace(self, notes=(*self.notes, *notes))


Handler = Callable[[Work, Any], Work]


@dataclass(frozen=True)
class Stage:
    """How the settings of one type are carried out; see :func:`stage`."""

    run: Handler
    outcome: str
    prepare: Handler | None
    needs_data: bool
    resumes: bool
    copies: bool

    def is_idle(self, work: Work) -> bool:
        """Whether it has nothing to work with."""
        return self.needs_data and work.options.data is None


_STAGES: dict[type, Stage] = {}


def stage(
    settings: type,
    *,
    outcome: str,
    prepare: Handler | None = None,
    needs_data: bool = False,
    resumes: bool = False,
    copies: bool = False,
) -> Callable[[Handler], Handler]:
    """Register what carries out settings of a type: ``handler(work, settings) -> work``.

    Args:
        outcome: What the model is called after it, such as ``"healed"``.
        prepare: ``(work, settings) -> work``, called before anything is changed: it raises what would stop the stage
            later, and tells the planning what will come.
        needs_data: It is passed over where no data was given.
        resumes: It keeps its state in ``work.checkpoint`` and goes on from there after a kill.
        copies: It copies ``work.model`` itself and changes the copy, unless ``work.options.inplace``; other stages are
            given a model to change in place.
    """

    def register(handler: Handler) -> Handler:
        _STAGES[settings] = Stage(handler, outcome, prepare, needs_data, resumes, copies)
        return handler

    return register


def stage_of(settings: object) -> Stage:
    """The stage of some settings.

    Raises:
        KindError: Nothing is registered for their type.
    """
    found = next((_STAGES[kind] for kind in type(settings).__mro__ if kind in _STAGES), None)
    if found is None:
        known = ", ".join(kind.__name__ for kind in _STAGES)
        raise KindError(
            f"a stage must be known: stages has {settings!r}, expected some of {known}. Pass settings of one of these, "
            "or register its class with tensortrain.compression.stages.stage."
        )
    return found


def prepare_stages(work: Work, todo: Sequence[Any]) -> Work:
    """Raise what would stop a stage later, before anything is changed."""
    for settings in todo:
        found = stage_of(settings)
        if found.prepare is not None and not found.is_idle(work):
            work = found.prepare(work, settings)
    return work


def run_stages(work: Work, todo: Sequence[Any]) -> Work:
    """Carry out stages one after another; after each the model is sized up and evaluated."""
    files = _files(work.options.checkpoint, todo)
    for settings, file in zip(todo, files, strict=True):
        found = stage_of(settings)
        if found.is_idle(work):
            work = work.noted(f"Nothing was {found.outcome}: no data was given.")
            continue
        if not (found.copies or work.is_own):
            work = replace(work, model=checked_copy(work.model), is_own=True)
        work = _returned(found.run(replace(work, checkpoint=file), settings), settings)
        work = _sized_up(replace(work, is_own=True), found.outcome)
    return work


def _returned(work: object, settings: object) -> Work:
    if not isinstance(work, Work):
        raise KindError(
            f"a stage must return its work: that of {settings!r} gives {type(work).__name__}, expected a Work. Return "
            "work, or dataclasses.replace(work, ..)."
        )
    return work


def _files(checkpoint: str | Path | None, todo: Sequence[Any]) -> list[Path | None]:
    """The first stage that resumes has the user's file, the others numbered ones beside it."""
    files: list[Path | None] = [None] * len(todo)
    if checkpoint is not None:
        path = Path(checkpoint)
        resuming = [k for k, settings in enumerate(todo) if stage_of(settings).resumes]
        for n, k in enumerate(resuming, start=1):
            files[k] = path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}")
    return files


def _sized_up(work: Work, name: str) -> Work:
    """The metric; where it cannot be had any more, a note says so and the work goes on."""
    metric = None
    try:
        metric = evaluate_metric(work.options.evaluate, work.model)
    except (Exception, KeyboardInterrupt) as error:
        work = work.noted(f"The compressed model could not be evaluated ({in_short(error)}).")
    return replace(work, points=(*work.points, point_of(name, work.model, metric)))
