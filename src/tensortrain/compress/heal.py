"""Healing: batch-norm statistics anew, then fine-tuning with the original model as teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tensortrain.errors import DataError, KindError, RankError

from .losses import Loss, distillation_loss, feature_loss
from .observer import Observer
from .output_weights import OutputFunction
from .training import (
    Evaluate,
    FitResult,
    _device_of,
    _modes_kept,
    _to_device,
    _total_steps,
    fit,
    reestimate_batchnorm_,
)

__all__ = ["Heal", "check_healing", "heal_"]


@dataclass(frozen=True)
class Heal:
    """Settings of the fine-tuning after compression.

    Attributes:
        epochs, steps: How long; give one. ``epochs=0`` re-estimates batch-norm statistics and stops.
        lr, weight_decay, optimizer, schedule, warmup, grad_clip: As ``fit``.
        loss: ``"distill"`` (logits: KL at ``temperature`` plus labels where there are any), ``"feature"``
            (cosine distance of ``output``), or a callable ``(model, batch) -> loss``.
        alpha: Share of the teacher's word against the labels'.
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
    alpha: float = 0.5
    temperature: float = 2.0
    batchnorm_batches: int = 32

    def __post_init__(self) -> None:
        rates = {"lr": self.lr, "temperature": self.temperature, "grad_clip": self.grad_clip}
        sizes = {"epochs": self.epochs, "steps": self.steps, "weight_decay": self.weight_decay}
        _check_range(rates, lambda value: 0 < value < math.inf, "a positive number")
        _check_range(sizes, lambda value: 0 <= value < math.inf, "0 or more")
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

    def with_length(self) -> Heal:
        """The same settings, one pass over the data where no length was given."""
        return self if self.epochs is not None or self.steps is not None else replace(self, epochs=1)


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
    output: OutputFunction | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    observer: Observer | None = None,
) -> FitResult:
    """Fine-tune a compressed model in place towards its original.

    Args:
        model: Compressed; changed.
        teacher: The original; not changed.
        data: Training batches; the teacher supplies targets, so labels may be missing.
        output: ``(model, batch) -> features`` for ``loss="feature"``.
        checkpoint: File to resume from after a kill; the result is the same to the last bit.

    Returns:
        FitResult: History of losses and figures.

    Raises:
        DataError, KindError: See ``check_healing``; the model was not changed.
    """
    settings = (settings or Heal()).with_length()
    check_healing(model, data, settings, output=output)
    reestimate_batchnorm_(model, data, n_batches=settings.batchnorm_batches)
    if settings.only_statistics:
        return FitResult([], 0, 0.0)
    with _modes_kept(teacher):  # the losses run it in eval mode
        return _fit(model, teacher, data, settings, output, evaluate, checkpoint, seed, observer)


def check_healing(
    model: nn.Module, data: Iterable[Any], settings: Heal, *, output: OutputFunction | None = None
) -> None:
    """Raise now what would stop the healing later.

    The loss is tried on one batch, with the model as its own teacher.

    Raises:
        DataError: The data can be read only once, or has no length where epochs are counted.
        KindError: Both epochs and steps are given, nothing can be trained, or the loss does not suit the model.
    """
    settings = settings.with_length()
    if isinstance(data, Iterator):
        raise DataError(
            f"data must be re-iterable: healing has a {type(data).__name__} that is used up after one pass, expected a "
            "list or a DataLoader. Pass list(data), or heal=False."
        )
    if _total_steps(data, settings.epochs, settings.steps) and not any(p.requires_grad for p in model.parameters()):
        raise KindError(
            f"a model must have something to heal: {type(model).__name__} has no parameter that requires grad, "
            "expected at least one. Call model.requires_grad_(), or pass heal=False."
        )
    if not settings.only_statistics:
        _try_loss(model, data, _loss(settings, model, output))


def _try_loss(model: nn.Module, data: Iterable[Any], loss: Loss) -> None:
    """One forward pass; the caller's random numbers and the model's modes stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _modes_kept(model):
        model.eval()
        for batch in data:
            loss(model, _to_device(batch, _device_of(model)))
            break


def _fit(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    settings: Heal,
    output: OutputFunction | None,
    evaluate: Evaluate | None,
    checkpoint: str | Path | None,
    seed: int | None,
    observer: Observer | None,
) -> FitResult:
    return fit(
        model,
        data,
        loss=_loss(settings, teacher, output),
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
        observer=observer,
        label="heal",
    )


def _loss(settings: Heal, teacher: nn.Module, output: OutputFunction | None) -> Loss:
    if settings.loss == "distill":
        return distillation_loss(teacher, alpha=settings.alpha, temperature=settings.temperature)
    if settings.loss == "feature":
        return feature_loss(teacher, output=output)
    assert callable(settings.loss)
    return settings.loss
