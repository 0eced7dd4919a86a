"""Losses for :func:`tensortrain.train.loop.fit`: callables of (model, batch) that do the forward pass.

How a batch is read stands in ``batches``; what kind of output and labels there are is decided by ``task`` on the first
batch, unless a loss was given one. A loss is None for a batch that has nothing to learn from: no rows, no label that
counts.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.errors import KindError, RankError, ShapeError
from tensortrain.system.finite import finite
from tensortrain.train.batches import n_examples, read_batch, run
from tensortrain.train.outputs import Output, counted, judged_outputs, named_tensors, relative_distance
from tensortrain.train.task import IGNORED, Task, as_logits, label_loss, own_loss, task_of_outputs

__all__ = [
    "ALPHA",
    "TEMPERATURE",
    "Distillation",
    "FeatureFunction",
    "Loss",
    "cross_entropy_loss",
    "distillation_loss",
    "feature_loss",
    "forward",
    "labels_of",
    "logits_of",
    "output_distance",
    "positions",
    "unmasked",
]

Loss = Callable[[nn.Module, Any], "Tensor | None"]
FeatureFunction = Callable[[nn.Module, Any], Tensor]

TEMPERATURE, ALPHA = 2.0, 0.5  # of distillation: of both logits; weight of the original's outputs beside labels
_MASKED_LOGIT = -1e4  # in place of masks: far below every logit, and finite in every dtype


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on the inputs of a batch, leaving its labels out."""
    return run(model, batch)


def labels_of(batch: Any, model: nn.Module | None = None) -> Any:
    """Return the labels of a batch, None when it has none."""
    return read_batch(model if model is not None else nn.Identity(), batch).labels


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the tensor itself, its ``logits``, or its first tensor."""
    tensors = named_tensors(output)
    if not tensors:
        raise KindError(
            f"a classifier must give logits: the model's output has type {type(output).__name__}, expected a "
            "tensor or an object with .logits. For healing pass heal={'loss': 'feature'}, or a loss of your own."
        )
    return tensors.get("logits", next(iter(tensors.values())))


def cross_entropy_loss(*, label_smoothing: float = 0.0) -> Loss:
    """Make the cross entropy of logits and labels as torch's takes them; labels of -100 are passed over.

    Logits are ``(b, c)``, ``(b, c, ..)`` or ``(b, .., c)``, labels class numbers ``(b, ..)`` or shares of each class.

    Args:
        label_smoothing: Share of the label spread over all classes, in ``[0, 1)``.
    """
    _check_share("label_smoothing", label_smoothing)
    return _CrossEntropy(label_smoothing)


def distillation_loss(
    teacher: nn.Module,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    task: Task | None = None,
    output: Output | None = None,
) -> Loss:
    r"""Make Hinton's loss, :math:`\alpha T^2 KL(teacher_T || student_T) + (1 - \alpha) CE`.

    Where the task is no classification, the squared distance of the outputs over the spread of the teacher's stands in
    place of the divergence; outputs beside the main one are always compared that way.

    Args:
        teacher: Gives outputs of the student's shape; it is put into eval mode and gets no gradient.
        alpha: Weight of the soft labels, in ``[0, 1]``; batches without labels use them alone.
        temperature: Divides both logits.
        task: How outputs and labels are read; by default classification along the axis that labels or shape tell.
        output: Which outputs are compared, see ``judged_outputs``; all when None.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531.
    """
    _check_share("alpha", alpha, closed=True)
    if not temperature > 0:
        raise RankError(
            f"a temperature must be positive: temperature has {temperature}, expected more than 0. "
            "Common values are 2 to 6."
        )
    return Distillation(teacher, alpha, temperature, task, output)


def feature_loss(
    teacher: nn.Module, *, output: Output | None = None, kind: Literal["cosine", "mse"] = "cosine"
) -> Loss:
    """Make a loss that draws the student's features to the teacher's; no labels are needed.

    Args:
        teacher: It is put into eval mode and gets no gradient.
        output: What is compared, ``(.., c)``, see ``judged_outputs``; the last hidden states or the model's own outputs
            when None.
        kind: ``"cosine"`` for one minus the mean cosine along the last axis, ``"mse"`` for the mean square.
    """
    if kind not in _FEATURE_DISTANCES:
        raise KindError(
            f"a feature loss must be known: kind has {kind!r}, expected one of {', '.join(_FEATURE_DISTANCES)}. Choose "
            "one of these."
        )
    return _Feature(teacher, output, kind)


@dataclass(frozen=True)
class _CrossEntropy:
    label_smoothing: float

    @property
    def fingerprint(self) -> str:
        return repr(self)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor | None:
        labels = read_batch(model, batch).labels
        if labels is None:
            raise KindError(
                "cross entropy must have labels: the batch has none, expected (x, y) or a dict with 'labels'. Use "
                "distillation_loss or feature_loss for data without labels."
            )
        if n_examples(batch) == 0:
            return None
        tensors, _ = judged_outputs(model, batch)
        task = task_of_outputs(model, batch, tensors, labels)
        if task.labels == "none":
            raise ShapeError(
                f"labels must fit the outputs: labels have {_shape_of(labels)}, the output "
                f"{tuple(tensors[task.main].shape)}, expected numbers of classes or one value for each output. Pass "
                "the labels that torch's cross_entropy takes."
            )
        return label_loss(task, tensors[task.main], labels, self.label_smoothing)


@dataclass(frozen=True)
class Distillation:
    """See :func:`distillation_loss`."""

    teacher: nn.Module
    alpha: float
    temperature: float
    task: Task | None = None
    output: Output | None = None

    @property
    def fingerprint(self) -> str:
        return f"distillation {self.alpha} {self.temperature} {self.task.fingerprint if self.task else ''}"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor | None:
        if n_examples(batch) == 0:
            return None
        student, result, soft, task = self._compare(model, batch)
        labels = _for_autograd(read_batch(model, batch).labels)
        if soft is None or task.labels == "none" or labels is None:
            return soft
        hard = _hard_loss(task, student.get(task.main, next(iter(student.values()))), labels, result)
        return soft if hard is None else self.alpha * soft + (1 - self.alpha) * hard

    def distance(self, model: nn.Module, batch: Any) -> Tensor | None:
        """The part without labels: how far the outputs lie from the teacher's; None where nothing counts."""
        return None if n_examples(batch) == 0 else self._compare(model, batch)[2]

    def _compare(self, model: nn.Module, batch: Any) -> tuple[dict[str, Tensor], Any, Tensor | None, Task]:
        with_labels = self.task is not None and self.task.with_labels
        state = torch.get_rng_state() if self.task is not None and self.task.random else None
        student, result = judged_outputs(model, batch, self.output, with_labels=with_labels)
        with _drawing(state):
            teacher = _without_gradient(self.teacher, batch, self.output, with_labels)
        labels = read_batch(model, batch).labels
        task = self.task or task_of_outputs(model, batch, teacher, labels)
        return student, result, _soft_loss(task, student, teacher, batch, labels, self.temperature), task


@dataclass(frozen=True)
class _Feature:
    teacher: nn.Module
    output: Output | None
    kind: str

    @property
    def fingerprint(self) -> str:
        return f"feature {self.kind} {getattr(self.output, '__qualname__', self.output)}"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor | None:
        if n_examples(batch) == 0:
            return None
        student = _features(judged_outputs(model, batch, self.output)[0], self.output)
        teacher = _features(_without_gradient(self.teacher, batch, self.output), self.output)
        losses = []
        for name, target in teacher.items():
            _same_shape(student[name], target)
            losses.append(_FEATURE_DISTANCES[self.kind](student[name], target))
        return torch.stack(losses).mean()


def _features(tensors: dict[str, Tensor], output: Output | None) -> dict[str, Tensor]:
    hidden = tensors.get("last_hidden_state")
    return tensors if output is not None or hidden is None else {"last_hidden_state": hidden}


def _without_gradient(
    teacher: nn.Module, batch: Any, output: Output | None, with_labels: bool = False
) -> dict[str, Tensor]:
    if teacher.training:
        teacher.eval()
    with torch.no_grad():
        return judged_outputs(teacher, batch, output, with_labels=with_labels)[0]


@contextlib.contextmanager
def _drawing(state: Tensor | None) -> Iterator[None]:
    """Draw the random numbers that came after a state, and go on afterwards as if none had been drawn."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def output_distance(
    task: Task, student: dict[str, Tensor], teacher: dict[str, Tensor], batch: Any, labels: Any
) -> Tensor | None:
    """How far outputs lie from a teacher's, as the loss of healing without labels has it, at temperature one."""
    return _soft_loss(task, student, teacher, batch, labels, 1.0)


def _soft_loss(
    task: Task, student: dict[str, Tensor], teacher: dict[str, Tensor], batch: Any, labels: Any, temperature: float
) -> Tensor | None:
    """Sum over the outputs: divergence of the main one's probabilities, relative distance of all others."""
    losses = []
    for name, target in teacher.items():
        own = student.get(name)
        if own is None:  # some give more in train mode, such as an auxiliary head
            own = next((y for y in student.values() if y.shape == target.shape), None)
        if own is None:
            raise _missing_output(name)
        _same_shape(own, target)
        mask = positions(task, name, target, batch, labels)
        if mask is not None and not bool(mask.any()):
            continue
        if name == task.main and task.softmax:
            losses.append(_kl(task, own, target, mask, temperature))
        elif name == task.main and task.kind == "multi-label":
            losses.append(_binary_kl(task, own, target, temperature))
        else:
            losses.append(
                relative_distance(own, target) if mask is None else relative_distance(own[mask], target[mask])
            )
    return functools.reduce(torch.add, losses) if losses else None


def _for_autograd(labels: Any) -> Any:
    """Labels that were made in inference mode cannot be saved for a backward pass."""
    return labels.clone() if isinstance(labels, Tensor) and labels.is_inference() else labels


def _hard_loss(task: Task, y: Tensor, labels: Any, result: Any) -> Tensor | None:
    if task.labels == "own":
        loss = own_loss(result)
        counts = not isinstance(labels, Tensor) or labels.is_floating_point() or bool((labels != IGNORED).any())
        return loss if loss is not None and counts and loss.requires_grad == y.requires_grad else None
    if task.labels == "values":  # in units of their own spread, as the distance to the teacher is
        return relative_distance(y, labels.to(y.dtype).reshape(y.shape))
    return label_loss(task, y, labels)


def positions(task: Task, name: str, y: Tensor, batch: Any, labels: Any) -> Tensor | None:
    """Which positions (b, t, ..) of an output count: those that no label and no attention mask takes out."""
    masks = []
    if name == task.main and task.softmax and task.labels != "none" and isinstance(labels, Tensor):
        masks += [mask] if (mask := _labelled(task, y, labels)) is not None else []
    decoded = task.kind == "seq2seq" and not name.startswith("encoder")
    mask_name = "decoder_attention_mask" if decoded else "attention_mask"
    attention = batch.get(mask_name) if isinstance(batch, Mapping) else None
    if isinstance(attention, Tensor) and y.ndim > 2 and attention.shape == y.shape[:2]:
        masks.append(attention.bool())
    if not masks:
        return None
    masks = [mask.to(y.device) for mask in masks]  # which may be another than the data is given on
    return masks[0] if len(masks) == 1 else (masks[0] & masks[1] if masks[0].shape == masks[1].shape else masks[0])


def _labelled(task: Task, y: Tensor, labels: Tensor) -> Tensor | None:
    places = (*y.shape[: task.class_axis], *y.shape[task.class_axis + 1 :])
    if labels.is_floating_point() or labels.numel() != math.prod(places):
        return None
    counts = (labels != IGNORED).reshape(places)
    if task.kind != "causal-lm" or task.labels == "next":
        return counts
    shifted = torch.zeros_like(counts)  # position t is judged by the label of t + 1
    shifted[..., :-1] = counts[..., 1:]
    return shifted


def _kl(task: Task, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """T^2 times the divergence of the student's class probabilities, mean over the positions that count."""
    counts = counted(as_logits(task, teacher))
    rows = [unmasked(as_logits(task, y), counts) for y in (student, teacher)]
    if mask is not None:
        rows = [each[mask.reshape(-1)] for each in rows]
    log_p, log_q = (F.log_softmax(each / temperature, dim=-1) for each in rows)
    return temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def unmasked(logits: Tensor, counts: Tensor) -> Tensor:
    """Logits in float32 at least, the entries that do not count far below all others."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    good = counts & finite(logits)
    if good.device.type == "cpu" and bool(good.all()):  # of a large vocabulary a copy takes much memory
        return logits
    return torch.where(good, logits, _MASKED_LOGIT)


def _binary_kl(task: Task, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence of yes or no, summed over the outputs of an example, mean over examples."""
    counts = counted(teacher)
    s, t = (torch.logit(y.clamp(1e-6, 1 - 1e-6)) if task.probabilities else y for y in (student, teacher))
    s, t = (torch.where(counts, y if y.dtype == torch.float64 else y.float(), 0) / temperature for y in (s, t))
    p = torch.sigmoid(t)
    divergence = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * divergence.sum() / max(1, student.shape[0] if student.ndim else 1)


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


def _missing_output(name: str) -> KindError:
    return KindError(
        f"a model must give the outputs of its original: {name!r} is missing in train mode. Name the outputs that it "
        "always gives with output=."
    )


def _shape_of(labels: Any) -> str:
    return f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"type {type(labels).__name__}"


def _check_share(name: str, value: float, *, closed: bool = False) -> None:
    if not (0 <= value < 1 or (closed and value == 1)):
        raise RankError(
            f"a share must lie between 0 and 1: {name} has {value}, expected [0, 1{']' if closed else ')'}. "
            f"Choose another {name}."
        )
