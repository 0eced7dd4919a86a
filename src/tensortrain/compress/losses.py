"""Losses for :func:`tensortrain.compress.training.fit`: callables of (model, batch) that do the forward pass.

A batch is a tuple ``(x, y)``, a tensor ``x``, or a dict of keyword arguments in the manner of Hugging Face,
whose ``"labels"`` are kept from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.errors import KindError, RankError, ShapeError

Loss = Callable[[nn.Module, Any], Tensor]
FeatureFunction = Callable[[nn.Module, Any], Tensor]


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on the inputs of a batch, leaving its labels out."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch, None when it has none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the tensor itself or its ``logits``."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise KindError(
            f"a classifier must give logits: the model's output has type {type(output).__name__}, expected a "
            "tensor or an object with .logits. For healing pass heal={'loss': 'feature'}, or a loss of your own."
        )
    return logits


def cross_entropy_loss(*, label_smoothing: float = 0.0) -> Loss:
    """Make the cross entropy of logits ``(b, .., c)`` and labels ``(b, ..)``.

    Args:
        label_smoothing: Share of the label spread over all classes, in ``[0, 1)``.
    """
    _check_share("label_smoothing", label_smoothing)
    return _CrossEntropy(label_smoothing)


def distillation_loss(teacher: nn.Module, *, alpha: float = 0.9, temperature: float = 4.0) -> Loss:
    r"""Make Hinton's loss, :math:`\alpha T^2 KL(teacher_T || student_T) + (1 - \alpha) CE`.

    Args:
        teacher: Gives logits of the student's shape; it is put into eval mode and gets no gradient.
        alpha: Weight of the soft labels, in ``[0, 1]``; batches without labels use them alone.
        temperature: Divides both logits.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531.
    """
    _check_share("alpha", alpha, closed=True)
    if not temperature > 0:
        raise RankError(
            f"a temperature must be positive: temperature has {temperature}, expected more than 0. "
            "Common values are 2 to 6."
        )
    return _Distillation(teacher, alpha, temperature)


def feature_loss(
    teacher: nn.Module, *, output: FeatureFunction | None = None, kind: Literal["cosine", "mse"] = "cosine"
) -> Loss:
    """Make a loss that draws the student's features to the teacher's; no labels are needed.

    Args:
        teacher: It is put into eval mode and gets no gradient.
        output: ``(model, batch) -> features (.., c)``, called on both; the model's own output when None.
        kind: ``"cosine"`` for one minus the mean cosine along the last axis, ``"mse"`` for the mean square.
    """
    if kind not in _FEATURE_DISTANCES:
        raise KindError(
            f"a feature loss must be known: kind has {kind!r}, expected one of "
            f"{', '.join(_FEATURE_DISTANCES)}. Choose one of these."
        )
    return _Feature(teacher, output, kind)


@dataclass(frozen=True)
class _CrossEntropy:
    label_smoothing: float

    @property
    def fingerprint(self) -> str:
        return repr(self)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        labels = labels_of(batch)
        if labels is None:
            raise KindError(
                "cross entropy must have labels: the batch has none, expected (x, y) or a dict with "
                "'labels'. "
                "Use distillation_loss or feature_loss for data without labels."
            )
        return _cross_entropy(logits_of(forward(model, batch)), labels, self.label_smoothing)


@dataclass(frozen=True)
class _Distillation:
    teacher: nn.Module
    alpha: float
    temperature: float

    @property
    def fingerprint(self) -> str:
        return f"distillation {self.alpha} {self.temperature}"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        student = logits_of(forward(model, batch))
        teacher = logits_of(_without_gradient(self.teacher, forward, batch))
        _same_shape(student, teacher)
        soft = self.temperature**2 * _kl(student / self.temperature, teacher / self.temperature)
        labels = labels_of(batch)
        if labels is None:
            return soft
        return self.alpha * soft + (1 - self.alpha) * _cross_entropy(student, labels, 0.0)


@dataclass(frozen=True)
class _Feature:
    teacher: nn.Module
    output: FeatureFunction | None
    kind: str

    @property
    def fingerprint(self) -> str:
        return f"feature {self.kind} {getattr(self.output, '__qualname__', None)}"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        features = self.output or _own_features
        student = features(model, batch)
        teacher = _without_gradient(self.teacher, features, batch)
        _same_shape(student, teacher)
        return _FEATURE_DISTANCES[self.kind](student, teacher)


def _own_features(model: nn.Module, batch: Any) -> Tensor:
    output = forward(model, batch)
    hidden = getattr(output, "last_hidden_state", None)
    return logits_of(output) if hidden is None else hidden


def _without_gradient(teacher: nn.Module, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
    if teacher.training:
        teacher.eval()
    with torch.no_grad():
        return function(teacher, batch)


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = F.log_softmax(student.flatten(0, -2), dim=-1)
    return F.kl_div(log_p, F.log_softmax(teacher.flatten(0, -2), dim=-1), log_target=True, reduction="batchmean")


def _cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


_FEATURE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine_distance,
    "mse": F.mse_loss,
}


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student and teacher must agree in shape: the student has {tuple(student.shape)}, expected "
            f"{tuple(teacher.shape)}. Pass the model that the student was compressed from."
        )


def _check_share(name: str, value: float, *, closed: bool = False) -> None:
    if not (0 <= value < 1 or (closed and value == 1)):
        raise RankError(
            f"a share must lie between 0 and 1: {name} has {value}, expected [0, 1{']' if closed else ')'}. "
            f"Choose another {name}."
        )
