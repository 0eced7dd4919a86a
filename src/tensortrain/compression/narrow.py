"""Take hidden units out of a model: smaller dense layers, which are faster by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensortrain.compression.made_up import Statistic, make_up
from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.compression.survey.layers import FoundLayer, part_of
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.errors import ShapeError
from tensortrain.formats.narrowing import refitted, shrunk
from tensortrain.nn import is_transformers_conv1d
from tensortrain.system.offloading import is_offloaded, offload
from tensortrain.system.parking import let_go

__all__ = [
    "SIZES",
    "Fitted",
    "Undo",
    "all_or_none",
    "check_between",
    "check_units",
    "fitted",
    "keep_channels",
    "narrow_",
    "put",
    "read_fewer",
    "remember",
    "resize",
]

Undo = Callable[[], None]

_MADE = ("out_features", "out_channels", "num_features", "nf", "num_parameters")
_READ = ("in_features", "in_channels", "nx")
SIZES = (*_MADE, *_READ, "groups", "hidden_size", "input_size")  # attributes of layers that narrowing changes


@torch.no_grad()
def narrow_(
    model: nn.Module, units: HiddenUnits, kept: Tensor, weight: Tensor, bias_shift: Tensor | None = None
) -> Undo:
    """Leave only some hidden units in a model, in place.

    Layers stay the objects that they are, with their hooks and names; their parameters are new ones.

    Args:
        units: As ``find_hidden_units`` gave them.
        kept: Numbers of the units that remain, ``(k,)``.
        weight: Of the reader for these, in the layout of ``torch.nn.Linear`` or of its convolution.
        bias_shift: Added to the reader's bias.

    Returns:
        A function that puts everything back.

    Raises:
        ShapeError: ``weight`` is not that of the reader with ``k`` inputs.
    """
    reader = model.get_submodule(units.reader)
    _check(reader, units, kept, weight)
    undo = [remember(model.get_submodule(name)) for name in (*units.makers, *units.between, units.reader)]
    parts = [model.get_submodule(name) for name in (*units.makers, *units.between)]
    offloaded = [one for one in (*parts, reader) if is_offloaded(one)]
    for part in parts:
        keep_channels(part, kept, units.n_units)
    read_fewer(reader, weight)
    if bias_shift is not None:
        old = reader.bias
        assert isinstance(old, Tensor)
        put(reader, "bias", old + bias_shift.to(old.device, old.dtype))
    for one in offloaded:  # where its weight was, the new one goes too
        offload(one)

    def back() -> None:
        for one in undo:
            one()

    return back


@dataclass(frozen=True)
class Fitted:
    """What a model needs to do with fewer hidden units.

    Attributes:
        weight: Of the reader, fitted anew for the units that remain.
        bias_shift: For its bias; None where that stays.
        statistics: Of a batch norm after it, with their new values.
    """

    units: HiddenUnits
    kept: Tensor
    weight: Tensor
    bias_shift: Tensor | None
    statistics: list[Statistic]


@torch.no_grad()
def fitted(
    model: nn.Module, units: HiddenUnits, kept: Sequence[int], layers: Mapping[str, FoundLayer], moments: LayerMoments
) -> Fitted:
    """The reader of some hidden units, fitted to its old outputs from those that remain; nothing is changed.

    Args:
        layers: Of the model, by name.
        moments: Of what the reader was given; without them its weight for the units that remain is kept as it is.

    Raises:
        ShapeError: The model lacks one of the layers, or has other sizes.
    """
    check_units(units, layers)
    reader = layers[units.reader]
    old = reader.kernel.flatten(1)
    places = torch.arange(old.shape[1], device=old.device).reshape(units.n_units, -1)[list(kept)].flatten()
    gram = moments.gram
    if gram is None or gram.ndim == 1:
        new = old[:, places].clone()
    else:
        moment = shrunk(gram.to(old.device), moments.outside)
        let_go(gram)
        new = refitted(old, moment, places)
        del moment
    shift: Tensor | None = None
    statistics: list[Statistic] = []
    if moments.mean is not None:
        wide = torch.zeros_like(old).index_copy_(1, places, new)
        has_bias = reader.module._parameters.get("bias") is not None
        shift, statistics = make_up(model, old, wide, moments, has_bias=has_bias)
        shift = shift if has_bias else None
    moments.forget_derived()
    shape = (old.shape[0], len(kept), *reader.kernel.shape[2:])
    return Fitted(units, torch.tensor(list(kept)), new.reshape(shape), shift, statistics)


@contextmanager
def all_or_none() -> Iterator[list[Undo]]:
    """A list for what takes changes back, which is done where an error comes."""
    undo: list[Undo] = []
    try:
        yield undo
    except BaseException:
        for back in reversed(undo):
            back()
        raise


def check_units(units: HiddenUnits, layers: Mapping[str, FoundLayer]) -> None:
    """Raise ``ShapeError`` where a model lacks one of the layers around some units, or has other sizes."""
    for name in (*units.makers, units.reader):
        found = layers[name].weight if name in layers else None
        n = None if found is None else found.in_features if name == units.reader else found.out_features
        if n != units.n_units:
            where = "lacks it" if n is None else f"has {n}"
            raise ShapeError(
                f"a plan must fit its model: it counts {units.n_units} hidden units at layer {name!r}, the model "
                f"{where}. Plan again on this model. Nothing was changed."
            )


def check_between(model: nn.Module, units: HiddenUnits) -> None:
    """Raise ``ShapeError`` where a layer between holds other than one number, or filter, for each unit."""
    for name in units.between:
        layer = part_of(model, name)
        held = [] if layer is None else [p for p in layer._parameters.values() if p is not None and p.numel() > 1]
        if layer is None or any(p.shape[0] != units.n_units for p in held):
            where = "lacks it" if layer is None else f"has a {type(layer).__name__} of other sizes"
            raise ShapeError(
                f"a plan must fit its model: it counts {units.n_units} hidden units at layer {name!r}, the model "
                f"{where}. Plan again on this model. Nothing was changed."
            )


def _check(reader: nn.Module, units: HiddenUnits, kept: Tensor, weight: Tensor) -> None:
    own = _torch_layout(reader).shape
    wanted = (own[0], len(kept), *own[2:])
    if tuple(weight.shape) != wanted:
        raise ShapeError(
            f"the weight of a layer that reads {len(kept)} units must have the shape {wanted}: {units.reader} was "
            f"given {tuple(weight.shape)}. Fit it for the units that remain."
        )


def _torch_layout(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if is_transformers_conv1d(layer) else weight


def remember(layer: nn.Module) -> Undo:
    """What puts a layer back: its tensors and the attributes that tell its size."""
    state, parameters, buffers = dict(layer.__dict__), dict(layer._parameters), dict(layer._buffers)

    def back() -> None:
        for name in [name for name in layer.__dict__ if name not in state]:
            del layer.__dict__[name]
        layer.__dict__.update({name: value for name, value in state.items() if not name.startswith("_")})
        layer._parameters.clear()
        layer._parameters.update(parameters)
        layer._buffers.clear()
        layer._buffers.update(buffers)

    return back


def keep_channels(layer: nn.Module, kept: Tensor, before: int) -> None:
    """Fewer outputs of a layer, or fewer channels of one that works on each by itself."""
    n = len(kept)
    is_conv1d = is_transformers_conv1d(layer)
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None and (parameter.ndim > 0 and parameter.numel() > 1):
            axis = 1 if is_conv1d and name == "weight" else 0
            put(layer, name, parameter.index_select(axis, kept.to(parameter.device)))
    for name, buffer in list(layer._buffers.items()):
        if buffer is not None and buffer.ndim > 0:
            layer._buffers[name] = buffer.index_select(0, kept.to(buffer.device))
    sizes = [size for size in _MADE if getattr(layer, size, 0) == before]
    if getattr(layer, "groups", 1) > 1:  # a depthwise convolution
        sizes += ["in_channels", "groups"]
    resize(layer, sizes, n)


def resize(layer: nn.Module, sizes: Sequence[str], n: int) -> None:
    """Another size under some names, and a note of what it was when the model was built, for checkpoints."""
    known: dict[str, int] = vars(layer).get("narrowed_from", {})
    vars(layer)["narrowed_from"] = {size: getattr(layer, size) for size in sizes} | known
    for size in sizes:
        setattr(layer, size, n)


def read_fewer(reader: nn.Module, weight: Tensor) -> None:
    """Another weight with fewer inputs, in the layout of ``torch.nn.Linear`` or of the layer's convolution."""
    old = _torch_layout(reader)
    new = weight.to(old.device, old.dtype)
    put(reader, "weight", (new.T if is_transformers_conv1d(reader) else new).contiguous())
    resize(reader, [size for size in _READ if hasattr(reader, size)], weight.shape[1])


def put(layer: nn.Module, name: str, value: Tensor) -> None:
    """Another parameter under a name, trained where the old one was."""
    old = layer._parameters[name]
    assert old is not None
    layer._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
