"""What kind of output a model has and how its labels are read: decided once, from one batch, and printed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.errors import KindError, TTError
from tensortrain.train.batches import failed_on_batch, read_batch, signature_of, some_of, tensors_in
from tensortrain.train.outputs import Output, judged_outputs

__all__ = ["Task", "TaskName", "check_task_name", "decide_task", "label_loss", "own_loss", "task_of_outputs"]

TaskName = Literal["classify", "multi-label", "regress", "causal-lm", "seq2seq", "embed"]
Labels = Literal["none", "own", "classes", "shares", "several", "values", "next", "shifted"]

IGNORED = -100  # the class number that torch and transformers pass over
_SAME = 0.9  # share of labels that equal the input from which on they are the input, not yet shifted
_FEW = 2  # examples
_BEYOND_CHANCE = 1.0  # nats above those of a guess at which the original itself contradicts the labels

_LABELS_IN_WORDS: dict[Labels, str] = {
    "none": "no labels used",
    "own": "the model's own loss on its labels",
    "classes": "labels are class numbers",
    "shares": "labels are shares of each class",
    "several": "labels say yes or no",
    "values": "labels are values",
    "next": "labels are the next tokens",
    "shifted": "labels are the input's tokens, shifted by one",
}


@dataclass(frozen=True)
class Task:
    """What a model gives and how it learns.

    Attributes:
        kind: See ``TaskName``.
        outputs: Names of the tensors that count, see ``named_tensors``.
        main: The one that labels and class probabilities are about.
        class_axis: Of the main output: the axis that the classes lie along.
        labels: How labels are used.
        with_labels: The labels go into the model, which makes its inputs or its own loss from them.
        probabilities: The main output holds probabilities rather than logits.
        random: The model draws random numbers when it is evaluated, such as a variational autoencoder.
        notes: What the user should know.
    """

    kind: TaskName
    outputs: tuple[str, ...] = ("",)
    main: str = ""
    class_axis: int = -1
    labels: Labels = "none"
    with_labels: bool = False
    probabilities: bool = False
    random: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(name or "the output" for name in self.outputs) or "none (whole numbers alone)"
        return f"task {self.kind} ({_LABELS_IN_WORDS[self.labels]}); outputs that count: {names}"

    @property
    def fingerprint(self) -> str:
        return f"{self.kind} {self.outputs} {self.main!r} {self.class_axis} {self.labels} {self.with_labels}"

    @property
    def softmax(self) -> bool:
        """Whether the main output is compared as class probabilities."""
        return self.kind in ("classify", "causal-lm", "seq2seq")


def check_task_name(task: str | None) -> None:
    """Raise ``KindError`` for a name that is no task."""
    if task is not None and task not in get_args(TaskName):
        raise KindError(
            f"a task must be known: task has {task!r}, expected one of {', '.join(get_args(TaskName))} or None. "
            "Choose one of these."
        )


def decide_task(model: nn.Module, batch: Any, *, task: TaskName | None = None, output: Output | None = None) -> Task:
    """Find out from one batch what a model gives and how its labels are to be read.

    Runs the model twice; without labels on a few of the examples.

    A named ``task`` is taken; else labels decide by their dtype and shape, and without labels the model's own class
    and configuration, as transformers' have them. What stays open is matched value by value ("regress"), which is
    right for logits too.

    Raises:
        KindError: ``task`` is not known, or the model gives no tensor.
        DataError: The model does not run on the batch.
    """
    check_task_name(task)
    batch, tensors, result, with_labels = _run_once(model, batch, output)
    if not tensors:
        return Task(task or "classify", outputs=())
    labels = read_batch(model, batch).labels
    main = _main_output(tensors, labels)
    found = Task(task or "regress", tuple(tensors), main, with_labels=with_labels)
    if task in ("causal-lm", "seq2seq"):  # a word's chances lie along the last axis, (b, t, c)
        found = replace(found, class_axis=max(0, tensors[main].ndim - 1))
    if task is None:
        found = _by_model(model, found, tensors[main])
    found = _by_labels(model, found, tensors[main], batch, labels, named=task is not None)
    if with_labels and own_loss(result) is not None:
        found = replace(found, labels="own")
    found = _by_values(found, tensors[main], named=task is not None)
    again = judged_outputs(model, batch, output, with_labels=with_labels)[0]
    found = replace(found, random=any(not _alike(y, again[name]) for name, y in tensors.items()))
    return _without_foreign_labels(found, tensors[main], labels, result)


def task_of_outputs(model: nn.Module, batch: Any, tensors: Mapping[str, Tensor], labels: Any) -> Task:
    """The reading of somebody who asked for class probabilities and said no more: labels and shapes decide."""
    main = _main_output(tensors, labels)
    task = Task("classify", tuple(tensors), main)
    return _by_labels(model, task, tensors[main], batch, labels, named=False)


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _run_once(model: nn.Module, batch: Any, output: Output | None) -> tuple[Any, dict[str, Tensor], Any, bool]:
    """What was run, and what ``_tried`` gives: without labels a few examples show it, where the model takes them."""
    few = some_of(batch, _FEW) if read_batch(model, batch).labels is None else batch
    if few is not batch:
        with contextlib.suppress(Exception):
            return few, *_tried(model, few, output)
    return batch, *_tried(model, batch, output)


def _tried(model: nn.Module, batch: Any, output: Output | None) -> tuple[dict[str, Tensor], Any, bool]:
    """One forward pass, and whether the labels went into it."""
    known = signature_of(model)
    has_labels = read_batch(model, batch).labels is not None
    first = has_labels and known.label_name is not None and not callable(output)
    try:
        return *judged_outputs(model, batch, output, with_labels=first), first
    except TTError:
        raise
    except Exception as error:
        try:
            if has_labels and not callable(output):
                return *judged_outputs(model, batch, output, with_labels=not first), not first
        except Exception:
            pass
        raise failed_on_batch(model, batch, error) from error


def own_loss(result: Any) -> Tensor | None:
    """The loss that a model returned with its outputs, None where it returned none."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if loss is None and isinstance(result, tuple):
        loss = next((value for value in result if isinstance(value, Tensor) and value.ndim == 0), None)
    is_loss = isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()
    return loss.reshape(()) if is_loss else None  # type: ignore[union-attr]


def _main_output(tensors: Mapping[str, Tensor], labels: Any) -> str:
    if "logits" in tensors:
        return "logits"
    if isinstance(labels, Tensor):
        return next(
            (name for name, y in tensors.items() if _axis_of_labels(y, labels) is not None), next(iter(tensors))
        )
    return next(iter(tensors))


def _by_model(model: nn.Module, task: Task, y: Tensor) -> Task:
    """What the class and the configuration of a model of transformers tell."""
    config, name = getattr(model, "config", None), type(model).__name__
    if task.main in ("last_hidden_state", "pooler_output"):
        return replace(task, kind="embed")
    if config is None or not hasattr(config, "model_type"):
        return replace(task, kind="causal-lm", class_axis=2) if _gives_words(model, y) else task
    problem = getattr(config, "problem_type", None)
    if task.main != "logits":
        return task
    if problem == "regression" or (getattr(config, "num_labels", 2) == 1 and "Classification" in name):
        return task
    if problem == "multi_label_classification":
        return replace(task, kind="multi-label")
    if getattr(config, "is_encoder_decoder", False) and ("Conditional" in name or "Seq2Seq" in name):
        return replace(task, kind="seq2seq", class_axis=y.ndim - 1)
    if "CausalLM" in name or "LMHead" in name:
        return replace(task, kind="causal-lm", class_axis=y.ndim - 1)
    words = "PreTraining" in name and y.shape[-1] == getattr(config, "vocab_size", None)
    if "MaskedLM" in name or "Classification" in name or words:
        return replace(task, kind="classify", class_axis=y.ndim - 1)
    if "Segmentation" in name:
        return replace(task, kind="classify", class_axis=1)
    return task


def _gives_words(model: nn.Module, y: Tensor) -> bool:
    """Whether an output (b, t, c) has one entry for each row of an embedding, as language models have."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return y.ndim == 3 and any(table.num_embeddings == y.shape[2] > 2 for table in tables)


def _by_labels(model: nn.Module, task: Task, y: Tensor, batch: Any, labels: Any, *, named: bool) -> Task:
    if not isinstance(labels, Tensor):
        if labels is not None and not task.with_labels:
            kind = type(labels).__name__
            task = replace(task, notes=(f"Labels of type {kind} are not used: the original's outputs alone teach.",))
        return replace(task, class_axis=task.class_axis if task.class_axis >= 0 else _default_axis(y, named=named))
    axis = _axis_of_labels(y, labels)
    if axis is not None and (not named or task.softmax):
        kind = task.kind if task.kind in ("causal-lm", "seq2seq", "classify") else "classify"
        return _language(model, replace(task, kind=kind, labels="classes", class_axis=axis), batch, labels)
    return _by_values_of_labels(task, y, labels, named=named)


def _by_values_of_labels(task: Task, y: Tensor, labels: Tensor, *, named: bool) -> Task:
    """Labels as large as the output: shares of classes, yes or no, or values."""
    task = replace(task, class_axis=_default_axis(y, named=named) if task.class_axis < 0 else task.class_axis)
    if labels.numel() != y.numel() or labels.is_complex():
        note = f"Labels of shape {tuple(labels.shape)} do not fit the output {tuple(y.shape)} and are not used."
        return task if task.with_labels else replace(task, notes=(*task.notes, note))
    values = labels.double()
    inside = bool(((values >= 0) & (values <= 1)).all())
    sums = values.reshape(y.shape).sum(dim=task.class_axis) if y.ndim > 1 and y.shape[task.class_axis] > 1 else None
    whole = bool((values == values.round()).all())
    if task.kind == "classify" or (not named and inside and sums is not None and _all_one(sums)):
        return replace(task, kind="classify", labels="shares")
    if task.kind == "multi-label" or (not named and inside and whole and task.kind != "embed"):
        return replace(task, kind="multi-label", labels="several")
    return replace(task, labels="values")


def _all_one(sums: Tensor) -> bool:
    return bool(((sums - 1).abs() < 1e-3).all())


def _axis_of_labels(y: Tensor, labels: Tensor) -> int | None:
    """The axis that the classes lie along, where labels are numbers of classes; None where they are something else."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or y.ndim < 1:
        return None
    shape = tuple(labels.shape)
    if y.ndim == 2 and shape == (y.shape[0], 1):
        shape = shape[:1]
    ranks = [y.ndim - 1, 1] if y.ndim <= 3 else [1, y.ndim - 1]
    fits = [k for k in ranks if 0 < k < y.ndim and shape == (*y.shape[:k], *y.shape[k + 1 :]) and y.shape[k] > 1]
    return next((k for k in fits if _mostly_below(labels, y.shape[k])), None)


def _mostly_below(labels: Tensor, n: int) -> bool:
    """Whether most labels are numbers of n classes; others, such as -1 and 255, say that nothing is known."""
    said = labels[labels != IGNORED]
    return not said.numel() or 2 * int(((said >= 0) & (said < n)).sum()) > said.numel()


def _default_axis(y: Tensor, *, named: bool) -> int:
    """Class axis 1 as in torch; the last one of sequences (b, t, c), unless classes were named."""
    if y.ndim <= 1:
        return max(0, y.ndim - 1)
    return 1 if y.ndim != 3 or named else 2


def _language(model: nn.Module, task: Task, batch: Any, labels: Tensor) -> Task:
    """Labels of a language model are the input itself or the token that follows."""
    own, counts = _same_shape_input(model, batch, labels), labels != IGNORED
    if own is None or not bool(counts.any()):
        return task
    if _agree(own, labels, counts) > _SAME:
        return replace(task, kind="causal-lm" if task.kind == "classify" else task.kind, labels="shifted")
    if labels.shape[-1] > 1 and _agree(own[..., 1:], labels[..., :-1], counts[..., :-1]) > _SAME:
        return replace(task, kind="causal-lm" if task.kind == "classify" else task.kind, labels="next")
    return task


def _agree(a: Tensor, b: Tensor, counts: Tensor) -> float:
    n = int(counts.sum())
    return float(((a == b) & counts).sum()) / n if n else 0.0


def _same_shape_input(model: nn.Module, batch: Any, labels: Tensor) -> Tensor | None:
    if labels.ndim < 2:
        return None
    parts = read_batch(model, batch)
    inputs = tensors_in([list(parts.args), dict(parts.kwargs)])
    same = [t for t in inputs if t.shape == labels.shape and not t.is_floating_point() and t.dtype != torch.bool]
    return max(same, key=lambda t: int(t.max()), default=None) if labels.numel() else None  # not the mask


def _by_values(task: Task, y: Tensor, *, named: bool) -> Task:
    """Classes need two entries; outputs may be probabilities already."""
    if task.softmax and (y.ndim < 1 or y.shape[task.class_axis] < 2) and not named:
        task = replace(task, kind="regress", labels="own" if task.labels == "own" else "values")
    if not (task.softmax or task.kind == "multi-label") or not y.numel():
        return task
    inside = bool(((y >= 0) & (y <= 1)).all())
    sums_to_one = task.softmax and inside and _all_one(y.double().sum(dim=task.class_axis))
    squashed = task.kind == "multi-label" and inside and y.numel() > 1
    return replace(task, probabilities=sums_to_one or squashed)


def _without_foreign_labels(task: Task, y: Tensor, labels: Any, result: Any) -> Task:
    """Drop labels that the original itself contradicts: they are in another convention or unit than its outputs."""
    if task.labels == "none" or not isinstance(labels, Tensor):
        return task
    loss = own_loss(result) if task.labels == "own" else label_loss(task, y, labels)
    if loss is None or (task.labels == "own" and not task.softmax):
        return task
    if task.labels == "values":
        spread = (labels.double() - labels.double().mean()).square().mean()
        foreign = float(loss.detach()) > 2 * float(spread) + 1e-12 and labels.numel() > 1
    else:
        n_classes = y.shape[task.class_axis] if task.softmax else 2
        foreign = float(loss.detach()) > math.log(max(2, n_classes)) + _BEYOND_CHANCE
    if not foreign:
        return task
    note = (
        f"Labels are not used: the original's own loss on them is {float(loss):.3g}, worse than a guess. "
        "Its outputs alone teach."
    )
    return replace(task, labels="none", notes=(*task.notes, note))


def label_loss(task: Task, y: Tensor, labels: Any, label_smoothing: float = 0.0) -> Tensor | None:
    """Loss of the main output against labels, the mean over those that count; None where none does."""
    if task.labels in ("none", "own") or not isinstance(labels, Tensor) or not labels.numel():
        return None
    if not y.is_floating_point() or y.dtype in (torch.float16, torch.bfloat16):
        y = y.float()
    if task.labels == "values":
        return F.mse_loss(y, labels.to(y.dtype).reshape(y.shape))
    if task.labels == "several":
        return _yes_or_no(task, y, labels)
    rows = as_logits(task, y)
    if task.labels == "shares":
        return F.cross_entropy(
            rows, labels.to(rows.dtype).reshape(y.shape).movedim(task.class_axis, -1).reshape(rows.shape)
        )
    return _class_numbers(task, rows, labels, label_smoothing)


def _yes_or_no(task: Task, y: Tensor, labels: Tensor) -> Tensor | None:
    wanted = labels.to(y.dtype).reshape(y.shape)
    counts = wanted >= 0  # -100, -1: not known
    if not bool(counts.any()):
        return None
    logits = torch.logit(y.clamp(1e-6, 1 - 1e-6)) if task.probabilities else y
    return F.binary_cross_entropy_with_logits(logits[counts], wanted[counts])


def _class_numbers(task: Task, y: Tensor, labels: Tensor, label_smoothing: float) -> Tensor | None:
    labels = labels.long()
    if task.labels == "shifted":  # the last position has no successor; y: rows of (b, t) positions
        y = y.unflatten(0, tuple(labels.shape))[..., :-1, :].flatten(0, -2)
        labels = labels[..., 1:]
    labels = labels.reshape(-1)
    labels = torch.where((labels < 0) | (labels >= y.shape[-1]), IGNORED, labels)
    if not bool((labels != IGNORED).any()):
        return None
    return F.cross_entropy(y, labels, ignore_index=IGNORED, label_smoothing=label_smoothing)


def as_logits(task: Task, y: Tensor) -> Tensor:
    """The main output as logits ``(n, c)``, one row for every position."""
    y = y.movedim(task.class_axis, -1) if y.ndim > 1 else y
    y = y.reshape(-1, y.shape[-1])
    return y.clamp_min(1e-9).log() if task.probabilities else y
