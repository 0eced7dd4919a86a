"""Healing: batch-norm statistics anew, then fine-tuning with the original model as teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tensortrain.errors import DataError, KindError

from .losses import Loss, distillation_loss, feature_loss
from .observer import Observer
from .output_weights import OutputFunction
from .training import Evaluate, FitResult, _modes_kept, _total_steps, fit, reestimate_batchnorm_

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

    @property
    def only_statistics(self) -> bool:
        """Whether nothing is trained: batch-norm statistics alone are put right."""
        return self.epochs == 0 or self.steps == 0

    def with_length(self) -> Heal:
        """The same settings, one pass over the data where no length was given."""
        return self if self.epochs is not None or self.steps is not None else replace(self, epochs=1)


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
    check_healing(model, data, settings)
    reestimate_batchnorm_(model, data, n_batches=settings.batchnorm_batches)
    if settings.only_statistics:
        return FitResult([], 0, 0.0)
    with _modes_kept(teacher):  # the losses run it in eval mode
        return _fit(model, teacher, data, settings, output, evaluate, checkpoint, seed, observer)


def check_healing(model: nn.Module, data: Iterable[Any], settings: Heal) -> None:
    """Raise now what would stop the healing later.

    Raises:
        DataError: The data can be read only once, or has no length where epochs are counted.
        KindError: Both epochs and steps are given, or nothing can be trained.
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
