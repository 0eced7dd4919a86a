"""The one reading of a batch: what of it goes into the model, and what are its labels.

Training, healing, calibration, measuring and the losses of this package all go by this table; a loss of one's own gets
the batch as the data gives it.

=====================================  ==========================================  =================
batch                                  what the model is called with               labels
=====================================  ==========================================  =================
tensor, dataclass, ``PackedSequence``  the object, as it is                        none
named tuple                            the tuple, as it is; where the model fails   its label field
                                       on that, as an ordinary tuple
mapping                                its entries as keywords, labels left out    its label entry
``(x,)``                               ``x``                                       none
``(x, y)``                             ``x``                                       ``y``
``(x, m, y)``                          ``x, m`` where two inputs may be given      ``y``
``((a, b), y)``                        ``a, b`` where two inputs are required      ``y``
``(a, b, y)``                          ``a, b`` where two inputs are required      ``y``
``(a, b)``                             both, where two inputs are required         none
=====================================  ==========================================  =================

"Required" are the positional parameters of ``forward`` without a default. A label entry or field is one named
``labels``, ``label``, ``targets`` or ``target``. A batch has as many examples as the first axis of its first tensor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence as _PackedSequence

from tensortrain.errors import DataError, TTError

__all__ = [
    "Parts",
    "device_of",
    "failed_on_batch",
    "length_of",
    "map_tensors",
    "n_examples",
    "no_batches",
    "opened",
    "read_batch",
    "run",
    "run_somehow",
    "some_of",
    "take",
    "tensors_in",
    "to_device",
]

LABEL_NAMES = ("labels", "label", "targets", "target")
_MAYBE_LABELS = (*LABEL_NAMES, "y")  # as a parameter of forward, where it has a default
_CONTAINERS = (Mapping, tuple, list)


@dataclass(frozen=True)
class Parts:
    """A batch taken apart: ``model(*args, **kwargs)`` and the labels, which may be of any kind or None."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Any = None


@dataclass(frozen=True)
class Signature:
    """What a model's ``forward`` takes.

    Attributes:
        required: Positional parameters without a default.
        positional: All positional parameters but one for labels.
        names: All named parameters.
        label_name: The one that takes labels, such as ``labels`` of transformers or ``targets=None``.
        label_required: It has no default.
    """

    required: int = 1
    positional: int = 1
    names: tuple[str, ...] = ()
    label_name: str | None = None
    label_required: bool = False


def signature_of(model: nn.Module) -> Signature:
    """Read the signature of ``forward``, through the wrappers of torch."""
    try:
        parameters = list(inspect.signature(getattr(_unwrapped(model), "forward", model)).parameters.values())
    except (TypeError, ValueError):  # code that is not Python
        return Signature()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    label = next((p for p in named if _takes_labels(p)), None)
    positional = [p for p in named if p.kind is not p.KEYWORD_ONLY and p is not label]
    return Signature(
        required=sum(p.default is p.empty for p in positional),
        positional=len(positional),
        names=tuple(p.name for p in named),
        label_name=None if label is None else label.name,
        label_required=label is not None and label.default is label.empty,
    )


def _takes_labels(parameter: inspect.Parameter) -> bool:
    if parameter.default is parameter.empty:
        return parameter.name == "labels"
    return parameter.name in _MAYBE_LABELS


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", None)
    if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def read_batch(model: nn.Module, batch: Any, *, with_labels: bool = False) -> Parts:
    """Take a batch apart by the table of this module.

    Args:
        with_labels: Hand the labels to the model as well, under the name its ``forward`` has for them.
    """
    known = signature_of(model)
    parts = _parts(tuple(batch) if _is_named_tuple(batch) and model in _TAKES_PLAIN_TUPLES else batch, known)
    if not with_labels or parts.labels is None:
        return parts
    return dataclasses.replace(parts, kwargs={**parts.kwargs, known.label_name or "labels": parts.labels})


def _parts(batch: Any, known: Signature) -> Parts:
    if isinstance(batch, Mapping):
        return _parts_of_mapping(batch, known)
    if not isinstance(batch, (tuple, list)) or hasattr(batch, "_fields"):  # PackedSequence too
        return Parts((batch,), labels=_label_field(batch))
    if not batch:
        raise DataError("a batch must hold something: found an empty list. Leave empty batches out of the data.")
    return _parts_of_tuple(batch, known)


def _parts_of_mapping(batch: Mapping[str, Any], known: Signature) -> Parts:
    name = next((n for n in LABEL_NAMES if n in batch and (n == known.label_name or n not in known.names)), None)
    if name is None and known.label_name in batch:
        name = known.label_name
    labels = None if name is None else batch[name]
    return Parts(kwargs={key: value for key, value in batch.items() if key != name}, labels=labels)


def _parts_of_tuple(batch: Sequence[Any], known: Signature) -> Parts:
    needed, first = known.required, batch[0]
    if len(batch) == 1:
        return Parts((first,))
    if len(batch) > max(2, needed + 1) and known.positional >= len(batch) - 1:  # lengths, a mask between x and y
        return Parts(tuple(batch[:-1]), labels=batch[-1])
    if needed < 2:
        return Parts((first,), labels=batch[1])
    if len(batch) <= needed:
        inner = len(batch) == 2 and isinstance(first, (tuple, list)) and not hasattr(first, "_fields")
        if inner and len(first) == needed:
            return Parts(tuple(first), labels=batch[1])
        return Parts(tuple(batch))
    return Parts(tuple(batch[:needed]), labels=batch[needed])


def _label_field(batch: Any) -> Any:
    return next((getattr(batch, name) for name in LABEL_NAMES if _has_field(batch, name)), None)


def _has_field(batch: Any, name: str) -> bool:
    return hasattr(batch, name) and not isinstance(batch, (Tensor, str))


def run(model: nn.Module, batch: Any, *, with_labels: bool = False) -> Any:
    """Call the model on a batch. It gets copies of the tensors, so that it may write into its input."""
    if _is_named_tuple(batch) and model not in _TAKES_PLAIN_TUPLES and isinstance(model, nn.Module):
        return _run_named_tuple(model, batch, with_labels)
    parts = read_batch(model, batch, with_labels=with_labels)
    with torch.no_grad():
        args, kwargs = map_tensors(_fresh, parts.args), map_tensors(_fresh, dict(parts.kwargs))
    return model(*args, **kwargs)


def run_somehow(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch, with the labels where it does not run without them."""
    try:
        return run(model, batch)
    except Exception as error:
        try:
            return run(model, batch, with_labels=True)
        except Exception:
            raise error from None


# Models that were found not to take a named tuple as it is: their batches are (x, y) with names.
_TAKES_PLAIN_TUPLES: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _is_named_tuple(batch: Any) -> bool:
    return isinstance(batch, tuple) and hasattr(batch, "_fields") and not isinstance(batch, _PackedSequence)


def _run_named_tuple(model: nn.Module, batch: Any, with_labels: bool) -> Any:
    try:
        return model(map_tensors(_fresh, batch))
    except (TypeError, AttributeError):
        _TAKES_PLAIN_TUPLES.add(model)
        try:
            return run(model, batch, with_labels=with_labels)
        except Exception:
            _TAKES_PLAIN_TUPLES.discard(model)
            raise


def _fresh(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided and not tensor.is_nested:
        copied = tensor.detach().clone()
    else:
        copied = tensor.detach()
    return copied.requires_grad_() if tensor.requires_grad and copied.is_floating_point() else copied


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's numbers lie; the CPU where it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in containers, named tuples, packed sequences and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _PackedSequence):
        index = [None if t is None else function(t) for t in (value.sorted_indices, value.unsorted_indices)]
        return type(value)(function(value.data), value.batch_sizes, *index)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _mapped_fields(function, value)
    return value


def _mapped_fields(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    changed = copy.copy(value)
    for each in dataclasses.fields(value):
        if hasattr(value, each.name):  # object's own: the class may be frozen
            object.__setattr__(changed, each.name, map_tensors(function, getattr(value, each.name)))
    return changed


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in reading order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def n_examples(batch: Any) -> int:
    """Size of the first axis of the first tensor; of a packed sequence the number of sequences; 1 without any."""
    if isinstance(batch, _PackedSequence):
        return int(batch.batch_sizes[0]) if batch.batch_sizes.numel() else 0
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, each.name, None) for each in dataclasses.fields(batch)]
    values = batch if isinstance(batch, (tuple, list)) else ()
    return next((n_examples(value) for value in values if _counts(value)), 1)


def some_of(batch: Any, few: int) -> Any:
    """The first few examples of a batch; all of it where its tensors share no first axis to cut along."""
    n, tensors = n_examples(batch), tensors_in(batch)
    if few >= n or not all(tensor.layout is torch.strided and tensor.shape[:1] == (n,) for tensor in tensors):
        return batch
    cut = map_tensors(lambda tensor: tensor[:few], batch)
    return cut if n_examples(cut) == few else batch


def _counts(value: Any) -> bool:
    return isinstance(value, (Tensor, *_CONTAINERS)) or dataclasses.is_dataclass(value)


def length_of(data: Any) -> int | None:
    """Number of batches, None where the data does not tell (a stream, a loader over one)."""
    try:
        return len(data)
    except TypeError:
        return None


@contextlib.contextmanager
def opened(data: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Iterate over data; workers that a loader started for this pass are stopped at the end."""
    kept = getattr(data, "_iterator", None)
    batches = iter(data)
    try:
        yield batches
    finally:
        stop = getattr(batches, "_shutdown_workers", None)
        if callable(stop) and batches is not kept:
            stop()
            if getattr(data, "_iterator", None) is batches:
                data._iterator = None  # type: ignore[attr-defined]


def take(data: Iterable[Any], n: int | None) -> list[Any]:
    """The first ``n`` batches; all when None. A loader's draws leave torch's random numbers as they were."""
    found: list[Any] = []
    with torch.random.fork_rng(devices=[]), opened(data) as batches:
        while n is None or len(found) < n:
            try:
                found.append(next(batches))
            except StopIteration:
                break
    return found


def no_batches(where: str) -> DataError:
    """What to raise where data gives nothing to work on."""
    return DataError(
        f"data must give batches: {where} has none, expected at least one. Pass a re-iterable such as a list "
        "or a DataLoader, not an iterator that is used up."
    )


def failed_on_batch(model: nn.Module, batch: Any, error: Exception) -> Exception:
    """What to raise where a model fails on the first batch: errors of ours as they are, others told in words."""
    if isinstance(error, TTError):
        return error
    parts = read_batch(model, batch)
    given = ", ".join([*map(_in_words, parts.args), *(f"{k}={_in_words(v)}" for k, v in parts.kwargs.items())])
    reason = " ".join(str(error).split())
    return DataError(
        f"a model must run on its data: {type(model).__name__} called with ({given}) fails with "
        f"{type(error).__name__}: {reason:.300} Give batches as (inputs, labels) or as a dict of keywords."
    )


def _in_words(value: Any) -> str:
    return (
        f"{value.dtype} {tuple(value.shape)}".replace("torch.", "")
        if isinstance(value, Tensor)
        else type(value).__name__
    )
