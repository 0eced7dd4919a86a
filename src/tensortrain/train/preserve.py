"""Running a model without leaving a trace on it, and copying one."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import KindError
from tensortrain.system.copying import copy_model

__all__ = ["checked_copy", "eager", "preserved", "uncompiled"]


@contextlib.contextmanager
def preserved(model: nn.Module, *, as_user_runs_it: bool = False) -> Iterator[None]:
    """Leave modes, attributes, buffers and torch's random numbers as they were, whatever the forward changes.

    Compiled parts run eagerly, so that hooks are seen, and the fused paths of torch's encoders, which go past the
    layers, are off; unless the model shall run as its user runs it.
    """
    devices = [tensor.device for tensor in model.parameters() if tensor.is_cuda][:1]
    before = [_state_of(module) for module in model.modules()]
    with torch.random.fork_rng(devices=devices), contextlib.nullcontext() if as_user_runs_it else eager():
        try:
            yield
        finally:
            for state in before:
                _put_back(*state)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run what ``torch.compile`` made as plain Python, and torch's attention without its fused paths."""
    fast = torch.backends.mha.get_fastpath_enabled()
    compiled = "torch._dynamo" in sys.modules  # importing it for nothing would take seconds
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_MANY = 10_000  # containers that hang on one module

_State = tuple[nn.Module, dict[str, Any], list[tuple[Any, Any]], list[tuple[Tensor, Tensor]]]


def _state_of(module: nn.Module) -> _State:
    attributes = dict(module.__dict__)
    containers = _contents(list(attributes.values()))
    tensors = [*module._buffers.values(), *attributes.values()]
    kept = [(t, t.detach().clone()) for t in tensors if isinstance(t, Tensor) and _can_be_put_back(t)]
    return module, attributes, containers, kept


def _contents(values: list[Any]) -> list[tuple[Any, Any]]:
    """Lists, dicts and sets, and those within them, with copies of what they hold."""
    found: dict[int, tuple[Any, Any]] = {}
    while values and len(found) < _MANY:
        value = values.pop()
        if type(value) in (list, dict, set) and id(value) not in found:
            found[id(value)] = (value, copy.copy(value))
            values += value.values() if isinstance(value, dict) else value
        elif type(value) is tuple:
            values += value
    return list(found.values())


def _can_be_put_back(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_inference())


@torch.no_grad()
def _put_back(
    module: nn.Module, attributes: dict[str, Any], containers: list[Any], tensors: list[tuple[Tensor, Tensor]]
) -> None:
    module.__dict__.clear()
    module.__dict__.update(attributes)
    for container, content in containers:
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.update(content)
    for tensor, value in tensors:  # version counters do not tell: batch norms change statistics past them
        if not torch.equal(tensor, value):
            tensor.copy_(value)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped; the model itself where it was not wrapped."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def checked_copy(model: nn.Module, *, parks: bool = False) -> nn.Module:
    """A copy of its own, see ``copy_model``.

    Raises:
        KindError: Something in the model cannot be copied.
    """
    try:
        return copy_model(model, parks=parks)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise KindError(
            f"a model must be one that can be copied: a deep copy of {type(model).__name__} fails with "
            f"{type(error).__name__}: {reason:.200} Pass inplace=True with heal=False and measure=False, or take out "
            "what cannot be copied."
        ) from error
