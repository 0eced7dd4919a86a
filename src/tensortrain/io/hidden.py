"""Tensors that a module keeps beside its parameters and buffers: in lists, helper objects, closures and the like."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tensortrain.errors import CheckpointError
from tensortrain.nn import CompositeLayer, FactorizedLayer

__all__ = ["check_no_meta", "keeps_meta_tensors"]

_MOST_OBJECTS = 1_000_000  # looked at; some tenths of a second
_REGISTERED = ("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs")
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


def keeps_meta_tensors(model: nn.Module) -> bool:
    """Whether a module has tensors without data that no checkpoint fills, or holds its own ones a second time.

    A parameter on the meta device is replaced when it gets its numbers; a list that holds it keeps the old one.
    """
    return next(_meta_tensors(model), None) is not None


def check_no_meta(model: nn.Module, where: str) -> None:
    """Refuse a model that was given with such tensors.

    Raises:
        CheckpointError: With the place of the first one.
    """
    place = next(_meta_tensors(model), None)
    if place is not None:
        raise CheckpointError(
            f"a model must not keep tensors without data beside its parameters and buffers: {place} is on the meta "
            f"device, and {where} has nothing for it. Pass the class, or a function that builds the model."
        )


def _meta_tensors(model: nn.Module) -> Iterator[str]:
    seen: set[int] = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, (FactorizedLayer, CompositeLayer)):
            recomputed = _recomputed(module)
            for key, value in vars(module).items():
                if key not in _REGISTERED and key not in recomputed:
                    yield from (f"{name}.{key}".lstrip(".") for tensor in _tensors_in(value, seen) if tensor.is_meta)


def _recomputed(module: nn.Module) -> set[str]:
    """Attributes that a hook computes before every call, as weight norm does."""
    hooks = module._forward_pre_hooks.values()
    return {name for hook in hooks if isinstance(name := getattr(hook, "name", None), str)}


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    todo = [value]
    while todo and len(seen) < _MOST_OBJECTS:
        one = todo.pop()
        if isinstance(one, _PLAIN):
            continue
        if isinstance(one, Tensor):  # also one that was seen: its second holder may be the one that matters
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            todo += _parts_of(one)


def _parts_of(one: Any) -> list[Any]:
    """What an object holds, as far as it shows."""
    if isinstance(one, (list, tuple, set, frozenset, deque)):
        return list(one)
    if isinstance(one, Mapping):
        return [*one.keys(), *one.values()]
    if isinstance(one, types.FunctionType):
        return [*_cells(one), *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, (weakref.ref, weakref.ProxyTypes)):
        return []
    return [*getattr(one, "__dict__", {}).values(), *_slots(one)]


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _slots(one: Any) -> Iterator[Any]:
    for cls in type(one).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(cls).get(name), types.MemberDescriptorType):
                yield getattr(one, name, None)
