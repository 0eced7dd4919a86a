"""Take hidden units out of a model: smaller dense layers, which are faster by themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.errors import ShapeError
from tensortrain.nn import is_transformers_conv1d

__all__ = ["narrow_"]

Undo = Callable[[], None]


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
        bias_shift: Added to the reader's bias, which it gets where it has none.

    Returns:
        A function that puts everything back.

    Raises:
        ShapeError: ``weight`` is not that of the reader with ``k`` inputs.
    """
    reader = model.get_submodule(units.reader)
    _check(reader, units, kept, weight)
    undo = [_remember(model.get_submodule(name)) for name in (*units.makers, *units.between, units.reader)]
    for name in (*units.makers, *units.between):
        _keep_channels(model.get_submodule(name), kept)
    _read_fewer(reader, weight)
    if bias_shift is not None:
        _shift_bias(reader, bias_shift)

    def back() -> None:
        for one in undo:
            one()

    return back


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


def _remember(layer: nn.Module) -> Undo:
    """What puts a layer back: its tensors and the attributes that tell its size."""
    state, parameters, buffers = dict(layer.__dict__), dict(layer._parameters), dict(layer._buffers)

    def back() -> None:
        layer.__dict__.update({name: value for name, value in state.items() if not name.startswith("_")})
        layer._parameters.clear()
        layer._parameters.update(parameters)
        layer._buffers.clear()
        layer._buffers.update(buffers)

    return back


def _keep_channels(layer: nn.Module, kept: Tensor) -> None:
    """Fewer outputs of a layer, or fewer channels of one that works on each by itself."""
    n = len(kept)
    is_conv1d = is_transformers_conv1d(layer)
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None and (parameter.ndim > 0 and parameter.numel() > 1):
            axis = 1 if is_conv1d and name == "weight" else 0
            _put(layer, name, parameter.index_select(axis, kept.to(parameter.device)))
    for name, buffer in list(layer._buffers.items()):
        if buffer is not None and buffer.ndim > 0:
            layer._buffers[name] = buffer.index_select(0, kept.to(buffer.device))
    for attribute in ("out_features", "out_channels", "num_features", "nf"):
        if hasattr(layer, attribute):
            setattr(layer, attribute, n)
    if getattr(layer, "groups", 1) > 1:
        layer.in_channels = layer.groups = n  # type: ignore[assignment]
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        layer.num_parameters = n


def _read_fewer(reader: nn.Module, weight: Tensor) -> None:
    old = _torch_layout(reader)
    new = weight.to(old.device, old.dtype)
    _put(reader, "weight", (new.T if is_transformers_conv1d(reader) else new).contiguous())
    for attribute in ("in_features", "in_channels", "nx"):
        if hasattr(reader, attribute):
            setattr(reader, attribute, weight.shape[1])


def _shift_bias(reader: nn.Module, shift: Tensor) -> None:
    weight: Tensor = reader.weight  # type: ignore[assignment]
    shift = shift.to(weight.device, weight.dtype)
    bias = reader._parameters.get("bias")
    if bias is None:
        reader.register_parameter("bias", nn.Parameter(shift.clone(), requires_grad=weight.requires_grad))
    else:
        _put(reader, "bias", bias + shift)


def _put(layer: nn.Module, name: str, value: Tensor) -> None:
    old = layer._parameters[name]
    assert old is not None
    layer._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
