"""Everything that a model returns: its tensors under names, and how far two sets of them lie apart."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import FilterError, KindError
from tensortrain.system.finite import finite
from tensortrain.train.batches import run

__all__ = [
    "CONSTANT",
    "Output",
    "OutputFunction",
    "check_output",
    "counted",
    "judged_outputs",
    "named_tensors",
    "relative_distance",
    "scale_of",
    "spread",
]

OutputFunction = Callable[[nn.Module, Any], Tensor]
Output = str | int | Callable[..., Any]  # what output= takes

_NOT_JUDGED = ("loss", "past_key_values", "attentions", "cross_attentions", "encoder_attentions", "decoder_attentions")
_KNOWN_FIELDS = ("logits", "last_hidden_state", "pooler_output", "prediction", "sample")
# Masks such as -1e9 lie below this, and below minus so many times the small values of an output.
_LEAST_MASK, _MASKED = -9e3, 1e3
_SAMPLE = 65_536
_TINY = 1e-30
CONSTANT = 1e-12  # of the squares: an output that spreads less about its mean example is the same for all


def named_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output, named by keys, fields and places: ``logits``, ``0``, ``boxes.1``.

    A bare tensor has the name ``""``. Integers, losses (``loss``, and numbers without axes beside other tensors),
    attention maps and key-value caches are left out; complex tensors come as pairs of real numbers.
    """
    found = {name: _as_real(tensor) for name, tensor in _walk(output, "") if _is_number(tensor)}
    with_axes = {name: tensor for name, tensor in found.items() if tensor.ndim}
    return with_axes or found


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, item in _entries(value):
        if key not in _NOT_JUDGED:
            yield from _walk(item, f"{name}.{key}" if name else key)


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [("data", value.data)]
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(k), item) for k, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    if value is None or isinstance(value, (str, bytes, int, float, nn.Module, type)) or callable(value):
        return []
    return _attributes(value)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Of an object of some class: its own tensors, and those that its class names as outputs do."""
    own = getattr(value, "__dict__", {})
    names = [name for name, item in own.items() if isinstance(item, Tensor)]
    names += [name for name in _KNOWN_FIELDS if name not in own and isinstance(getattr(value, name, None), Tensor)]
    return [(name, getattr(value, name)) for name in names]


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _as_real(tensor: Tensor) -> Tensor:
    if tensor.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in tensor.unbind()])
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def judged_outputs(
    model: nn.Module, batch: Any, output: Output | None = None, *, with_labels: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """Run the model; give the tensors that it is judged by, and all that it returned.

    Args:
        output: A name as ``named_tensors`` gives it (or the start of several), a number of an entry, a callable on
            the model's output, or one on ``(model, batch)``, of which nothing else is returned; None for all tensors.

    Raises:
        FilterError: No output has that name.
        KindError: The model gives no tensor of floating-point numbers.
    """
    if callable(output) and _takes_model_and_batch(output):
        return _some(model, named_tensors(output(model, batch))), None
    result = run(model, batch, with_labels=with_labels)
    if callable(output):
        return _some(model, named_tensors(output(result))), result
    tensors = _some(model, named_tensors(result), result)
    return (tensors if output is None else _chosen(tensors, str(output))), result


def _takes_model_and_batch(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) >= 2


def _chosen(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    found = {key: value for key, value in tensors.items() if key == name or key.startswith(f"{name}.")}
    if not found and name.lstrip("-").isdigit() and -len(tensors) <= int(name) < len(tensors):
        key = list(tensors)[int(name)]
        found = {key: tensors[key]}
    if not found:
        raise FilterError(
            f"an output must exist: output has {name!r}, expected one of {', '.join(map(repr, tensors))}. "
            "Choose one of these, or pass a callable on the model's output."
        )
    return found


def _some(model: nn.Module, tensors: dict[str, Tensor], result: Any = None) -> dict[str, Tensor]:
    """The tensors; there may be none where the model gives whole numbers alone, such as the likeliest class."""
    if not tensors and not any(True for _ in _walk(result, "")):
        raise KindError(
            f"a model must give a tensor to be judged by: {type(model).__name__} gives {type(result).__name__}, "
            "expected a tensor, or a container of some. Pass output=, a callable on what the model gives."
        )
    return tensors


def check_output(output: object) -> None:
    """Raise ``KindError`` for what cannot name an output."""
    if output is not None and not isinstance(output, (str, int)) and not callable(output):
        raise KindError(
            f"an output must be named or computed: output has type {type(output).__name__}, expected a name, a number "
            "or a callable. Pass 'logits', 0, or a function of the model's output."
        )


@torch.no_grad()
def counted(y: Tensor) -> Tensor:
    """Which entries of an output count: finite ones that are no masks (-inf, or numbers such as -1e9)."""
    is_finite = finite(y)
    if y.device.type == "cpu" and not bool((y < _LEAST_MASK).any()):  # on other devices a look costs more than the rest
        return is_finite
    sizes = y.detach().abs().flatten()
    sizes = sizes[:: -(-sizes.numel() // _SAMPLE) or 1].float()
    sizes = sizes[torch.isfinite(sizes) & (sizes > 0)]
    if not sizes.numel():
        return is_finite
    small = torch.quantile(sizes, 0.1)
    return is_finite & ~((y < _LEAST_MASK) & (y < -_MASKED * small))


def spread(y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch of an output: squares about the mean example, and squares; in float64."""
    return _spread(y, counted(y))


def _spread(y: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.where(counts, y, 0).detach().double()
    y = y.reshape(y.shape[0], -1) if y.ndim else y.reshape(1, 1)
    about = (y - y.mean(dim=0)).square().sum() if y.numel() else y.new_zeros(())
    return about, y.square().sum()


def relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two outputs over the spread of the teacher's about its mean example."""
    teacher = teacher.detach()
    counts = counted(teacher)
    mask = counts & finite(student)
    scale = _scale(teacher, counts)
    difference = torch.where(mask, student - teacher, 0)
    difference = difference if difference.dtype == torch.float64 else difference.float()
    return difference.square().sum() / scale.to(difference.dtype)


def scale_of(teacher: Tensor) -> Tensor:
    """What the squares of ``relative_distance`` are divided by."""
    return _scale(teacher.detach(), counted(teacher))


def _scale(teacher: Tensor, counts: Tensor) -> Tensor:
    about, square = _spread(teacher, counts)
    scale = torch.where(about > CONSTANT * square, about, square)
    return torch.where(scale > 0, scale, float(max(1, teacher.numel())))
