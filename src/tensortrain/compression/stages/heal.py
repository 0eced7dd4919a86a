"""Healing: batch-norm statistics anew, then fine-tuning with the original model as teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tensortrain.compression.stages.base import Work, stage
from tensortrain.compression.stages.refit import Refit, refitted
from tensortrain.compression.survey.task import FIRST, task_on_data
from tensortrain.compression.words import in_short
from tensortrain.errors import DataError, KindError, ProcessError, RankError
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.processes import n_processes, together
from tensortrain.train.batches import device_of, length_of, n_examples, take, to_device
from tensortrain.train.batchnorm import reestimate_batchnorm_
from tensortrain.train.evaluation import Evaluate
from tensortrain.train.guard import Guard
from tensortrain.train.held_back import hold_back
from tensortrain.train.joined import mean_buffers_, same_numbers_
from tensortrain.train.loop import FitResult, fit
from tensortrain.train.losses import ALPHA, TEMPERATURE, Loss, distillation_loss, feature_loss
from tensortrain.train.modes import TrainModes
from tensortrain.train.options import total_steps
from tensortrain.train.outputs import Output
from tensortrain.train.preserve import preserved
from tensortrain.train.task import Task

__all__ = ["Heal", "check_healing", "heal_"]

_STREAM_STEPS = 100
# Passes over the data from which healing counts as long; and steps, where values are matched rather than classes: to
# the last digit, which few steps do not make up for.
_LONG, _LONG_STEPS = 3, 500


@dataclass(frozen=True)
class Heal:
    """Settings of the fine-tuning after compression.

    Attributes:
        epochs, steps: How long; give one. ``epochs=0`` re-estimates batch-norm statistics and stops.
        lr, weight_decay, optimizer, schedule, warmup, grad_clip: As ``fit``.
        loss: ``"distill"`` (class probabilities by their divergence at ``temperature``, other outputs by their
            distance, plus labels where there are any), ``"feature"`` (cosine distance of ``output``), or a callable
            ``(model, batch) -> loss``.
        alpha: Weight of the original's outputs in the loss; the labels have the rest.
        batchnorm_batches: Batches for the batch-norm statistics before fine-tuning.
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = 0.05
    grad_clip: float | None = 5.0
    loss: Literal["distill", "feature"] | Loss = "distill"
    alpha: float = ALPHA
    temperature: float = TEMPERATURE
    batchnorm_batches: int = 32

    def __post_init__(self) -> None:
        rates = {"lr": self.lr, "temperature": self.temperature, "grad_clip": self.grad_clip}
        sizes = {"epochs": self.epochs, "steps": self.steps, "weight_decay": self.weight_decay}
        _check_range(rates, lambda value: 0 < value < math.inf, "a positive number")
        _check_range(sizes, lambda value: 0 <= value < math.inf, "0 or more")
        lengths = {"epochs": self.epochs, "steps": self.steps}
        _check_range(lengths, lambda value: value == int(value) and value is not True, "a whole number")
        _check_range({"warmup": self.warmup}, lambda value: 0 <= value < 1, "[0, 1)")
        _check_range({"alpha": self.alpha}, lambda value: 0 <= value <= 1, "[0, 1]")
        _check_range({"batchnorm_batches": self.batchnorm_batches}, lambda value: value >= 1, "1 or more")
        _check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        _check_choice("schedule", self.schedule, ("cosine", "onecycle", "constant"))
        if not callable(self.loss):
            _check_choice("loss", self.loss, ("distill", "feature"))

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Heal:
        """Settings from a mapping of them.

        Raises:
            KindError: A name that is none of the settings.
        """
        known = [each.name for each in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise KindError(
                f"healing must have known settings: heal has {unknown[0]!r}, expected some of {', '.join(known)}. "
                "Check the spelling."
            )
        return cls(**settings)

    @property
    def only_statistics(self) -> bool:
        """Whether nothing is trained: batch-norm statistics alone are put right."""
        return self.epochs == 0 or self.steps == 0

    def with_length(self, data: Iterable[Any]) -> Heal:
        """The same settings; where no length was given one pass over the data, 100 steps of a stream."""
        if self.epochs is not None or self.steps is not None:
            return self
        return replace(self, steps=_STREAM_STEPS) if length_of(data) is None else replace(self, epochs=1)


def _check_range(settings: Mapping[str, Any], holds: Callable[[Any], bool], expected: str) -> None:
    for name, value in settings.items():
        if value is not None and not (isinstance(value, Real) and holds(value)):
            raise RankError(
                f"healing must have sound settings: {name} has {value!r}, expected {expected}. Change {name}."
            )


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise KindError(
            f"healing must have known settings: {name} has {value!r}, expected one of {', '.join(known)}. "
            "Choose one of these."
        )


def heal_(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    settings: Heal | None = None,
    *,
    task: Task | None = None,
    output: Output | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    observer: Observer | None = None,
) -> FitResult:
    """Fine-tune a compressed model in place towards its original.

    Some of the data is held back (one in eight). On it the distance to the original's outputs is measured (with a loss
    of the user's own: that loss). The last state is kept, unless an earlier one was nearer by more than the noise, or
    the last is no nearer than before. A run that goes away from the original from the start is ended; so is one that
    fails half-way or is interrupted by Ctrl-C. ``notes`` of the result say so.

    Args:
        model: Compressed; changed.
        teacher: The original; not changed.
        data: Training batches; the teacher supplies targets, so labels may be missing.
        task: How outputs and labels are read; found out on the first batch when None.
        output: Which outputs count, see ``judged_outputs``.
        checkpoint: File to resume from after a kill; the result is the same to the last bit.

    Of several processes of ``torch.distributed`` each brings data of its own; all take the same steps.

    Returns:
        FitResult: History of losses and figures, notes.

    Raises:
        DataError, KindError: See ``check_healing``; the model was not changed.
    """
    with together():
        settings = (settings or Heal()).with_length(data)
        task = check_healing(teacher, data, settings, task=task, output=output, trained=model)
        loss = _loss(settings, teacher, task, output)
        return _healed(model, teacher, data, settings, loss, evaluate, checkpoint, seed, observer)


def _healed(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    settings: Heal,
    loss: Loss,
    evaluate: Evaluate | None,
    checkpoint: str | Path | None,
    seed: int | None,
    observer: Observer | None,
) -> FitResult:
    """``heal_`` with what was checked."""
    with preserved(teacher):  # the losses run it, in eval mode
        if settings.only_statistics:
            reestimate_batchnorm_(model, data, n_batches=settings.batchnorm_batches)
            mean_buffers_(model)
            return FitResult([], 0, 0.0)
        rest, held, really = hold_back(data, total_steps(data, settings.epochs, settings.steps))
        rest, guard = _guarded(model, data, rest, held, loss, really)
        try:
            with together():
                reestimate_batchnorm_(model, rest, n_batches=settings.batchnorm_batches)
                mean_buffers_(model)
                guard.begin(model)
                result = _fit(model, rest, loss, settings, evaluate, checkpoint, seed, observer, guard)
        except (KeyboardInterrupt, ProcessError) as error:
            if not _is_interrupt(error):
                raise
            guard.failed(error, 0)
            result = FitResult([], 0, 0.0)
        mean_buffers_(model)
        same_numbers_(model)  # where one failed in the middle of a step
        guard.finish(model)
    return replace(result, notes=(*result.notes, *guard.notes))


def _is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, here or in another process."""
    return isinstance(error, KeyboardInterrupt) or getattr(error, "kind", "") == KeyboardInterrupt.__name__


def _guarded(
    model: nn.Module, data: Iterable[Any], rest: Iterable[Any], held: list[Any], loss: Loss, really: bool
) -> tuple[Iterable[Any], Guard]:
    """What to train on and who watches; batches stay whole where their rows turn out to belong together."""
    judge = getattr(loss, "distance", loss)  # labels alone may lead away from the original
    grad = judge is loss
    try:
        return rest, Guard(model, held, judge, held=really, grad=grad)
    except Exception:
        whole = held if really and length_of(rest) != length_of(data) else take(data, 1)
    try:
        return (rest if whole is held else data), Guard(model, whole, judge, held=whole is held, split=False, grad=grad)
    except Exception:
        return data, Guard(model, take(data, 1), judge, held=False, split=False, grad=grad)


def check_healing(
    model: nn.Module,
    data: Iterable[Any],
    settings: Heal,
    *,
    task: Task | None = None,
    output: Output | None = None,
    trained: nn.Module | None = None,
) -> Task | None:
    """Raise now what would stop the healing later. Nothing of the model is changed.

    The loss and its gradient are tried on one batch, with the model as its own teacher.

    Returns:
        The task, found out where none was given; None where nothing will be trained.

    Raises:
        DataError: The data can be read only once, or has no length where epochs are counted.
        KindError: Both epochs and steps are given, nothing can be trained, or the loss does not suit the model.
    """
    settings = settings.with_length(data)
    trained = trained if trained is not None else model
    if isinstance(data, Iterator):
        raise DataError(
            f"data must be re-iterable: healing has a {type(data).__name__} that is used up after one pass, expected a "
            "list or a DataLoader. Pass list(data), or heal=False."
        )
    if total_steps(data, settings.epochs, settings.steps) and not any(p.requires_grad for p in trained.parameters()):
        raise KindError(
            f"a model must have something to heal: {type(model).__name__} has no parameter that requires grad, "
            "expected at least one. Call model.requires_grad_(), or pass heal=False."
        )
    if settings.only_statistics:
        return task
    if any(p.is_inference() for p in trained.parameters()):
        raise KindError(
            f"a model must be one that autograd takes: {type(model).__name__} has parameters that were made in "
            "inference mode. Build or load it outside of torch.inference_mode(), or pass heal=False."
        )
    task = task or task_on_data(model, data, output=output)
    if not task.outputs and not callable(settings.loss):
        raise KindError(
            f"a model must give floating-point numbers to be healed by: {type(model).__name__} gives whole numbers "
            "alone, expected logits or values. Pass heal=False, or output=, a callable (model, batch) -> tensor."
        )
    with preserved(model):
        _try_loss(trained, data, _loss(settings, model, task, output))
    return task


def _try_loss(model: nn.Module, data: Iterable[Any], loss: Loss) -> None:
    """A forward and a backward pass as in training, on the first batch and on one of another size."""
    modes = TrainModes(model)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.inference_mode(False), torch.enable_grad(), preserved(model):
        modes.set()
        for batch in _of_each_size(take(data, 1) if not isinstance(data, (list, tuple)) else data):
            with modes.fitting(batch):
                value = loss(model, to_device(batch, device_of(model)))
            if value is not None and params and value.requires_grad:
                torch.autograd.grad(value, params, allow_unused=True)


def _of_each_size(batches: Iterable[Any]) -> list[Any]:
    sizes: dict[int, Any] = {}
    for batch in batches:
        sizes.setdefault(n_examples(batch), batch)
        if len(sizes) == FIRST:
            break
    return list(sizes.values())


def _fit(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    settings: Heal,
    evaluate: Evaluate | None,
    checkpoint: str | Path | None,
    seed: int | None,
    observer: Observer | None,
    guard: Guard,
) -> FitResult:
    return fit(
        model,
        data,
        loss=loss,
        epochs=settings.epochs,
        steps=settings.steps,
        optimizer=settings.optimizer,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
        warmup=settings.warmup,
        grad_clip=settings.grad_clip,
        evaluate=evaluate,
        checkpoint=checkpoint,
        seed=seed,
        observer=observer or Silent(),
        label="heal",
        monitor=guard,
        joined=n_processes() > 1,
    )


def _loss(settings: Heal, teacher: nn.Module, task: Task | None, output: Output | None) -> Loss:
    if settings.loss == "distill":
        return distillation_loss(
            teacher, alpha=settings.alpha, temperature=settings.temperature, task=task, output=output
        )
    if settings.loss == "feature":
        return feature_loss(teacher, output=output)
    assert callable(settings.loss)
    return settings.loss


def _prepare(work: Work, settings: Heal) -> Work:
    """Raise now what would stop the healing later; tell the planning that it comes."""
    options, data, task = work.options, work.options.data, work.task
    assert data is not None
    if isinstance(data, Iterator) or settings.only_statistics:
        check_healing(work.model, data, settings)  # says what to do with an iterator
    else:
        named = options.task if isinstance(options.task, str) else None  # a Task is work.task already
        task = task or task_on_data(work.model, data, task=named, output=options.output)
        task = check_healing(work.model, data, settings, task=task, output=options.output)
    coming = (_to_come(settings, data, task), work.will_heal)
    return replace(work, task=task, will_heal="long" if "long" in coming else any(coming))


def _to_come(settings: Heal, data: Iterable[Any], task: Task | None) -> bool | Literal["long"]:
    """What the planning may count on."""
    if settings.only_statistics:
        return False
    n_batches, steps = length_of(data), settings.steps or 0
    if settings.epochs is not None:
        steps = settings.epochs * (n_batches or 0)
    enough = task is None or task.softmax or steps >= _LONG_STEPS
    return "long" if n_batches and steps >= _LONG * n_batches and enough else True


@stage(Heal, outcome="healed", prepare=_prepare, needs_data=True, resumes=True)
def _heal(work: Work, settings: Heal) -> Work:
    options = work.options
    assert options.data is not None
    try:
        work = _refitted_first(work, settings)
    except KeyboardInterrupt:
        return work.noted("Healing was interrupted before it began: the model stays as it was cut.")
    result = heal_(
        work.model,
        work.original,
        options.data,
        settings,
        task=work.task,
        output=options.output,
        evaluate=options.evaluate,
        checkpoint=work.checkpoint,
        seed=options.seed,
        observer=options.observer,
    )
    rows = _continued(work.healing, result.history)
    return replace(work, healing=(*work.healing, *rows)).noted(*result.notes)


def _refitted_first(work: Work, settings: Heal) -> Work:
    """What taking out hidden units left, least squares mend better than training; done once."""
    is_done = bool(work.points) and work.points[-1].name == "refitted"
    if work.plan is None or not work.plan.narrowed or settings.only_statistics or is_done:
        return work
    try:
        return refitted(work, Refit())
    except Exception as error:
        return work.noted(f"Refitting was cut short ({in_short(error)}): healing goes on from there.")


def _continued(earlier: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of a healing with their steps counted on from those of an earlier one."""
    start = max((row["step"] for row in earlier if "step" in row), default=0)
    return [{**row, "step": row["step"] + start} if "step" in row else row for row in rows]
