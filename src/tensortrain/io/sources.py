"""Where a model's class is known from: the package's registry or transformers. Nothing else is named."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from tensortrain import networks
from tensortrain.errors import CheckpointError, OptionalDependencyError, TTError
from tensortrain.io.hidden import keeps_meta_tensors

__all__ = ["build_empty", "build_from_source", "describe_source"]

Factory = Callable[[], nn.Module]

# Entries of a transformers config that can make it fetch and run code, or wrap weights in another library.
_NOT_KEPT = re.compile(r"implementation|auto_map|quantization_config|custom_pipelines|_name_or_path")


_LAYER_MODULES = ("torch.nn.", "transformers.pytorch_utils", "tensortrain.nn.")
# A constructor makes some ten calls for each tensor, and dense weights are larger than what the checkpoint has of them.
_CALLS_PER_TENSOR, _MOST_CALLS = 60, 3000
_DENSE_PER_BYTE, _MOST_BYTES = 64, 2**30
_LAYERS = re.compile(r"layers?$|^depths?$")
_COUNT = re.compile(r"^(num|n)_|layers|labels|depth|blocks|experts|hidden$")
_MOST_COUNTED, _LARGEST_NUMBER = 1_000_000, 2**53


def describe_source(model: nn.Module) -> dict[str, Any] | None:
    """Say how to build a model of this class anew, None where only the caller can."""
    known = networks.describe(model)
    if known is not None:
        return {"registry": known["name"], "kwargs": known["kwargs"]}
    transformers = sys.modules.get("transformers")  # a model of theirs cannot exist before the import
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        return None
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {"transformers": name, "config": _harmless(config)}


def _source_factory(source: dict[str, Any] | None, *, where: str) -> Factory:
    """Return what builds the model that a recipe names.

    Raises:
        CheckpointError: The recipe names none, or one that is not known.
        OptionalDependencyError: It needs transformers, which is not installed.
    """
    if source is None:
        raise CheckpointError(
            f"a model of no known name must be given: {where} has no source, expected a registered or a "
            "transformers model. Pass model=, a module or a function that builds one (on the command line: "
            "package.module:function --weights FOLDER)."
        )
    name, kwargs = source.get("registry"), source.get("kwargs")
    if isinstance(name, str) and isinstance(kwargs, dict):
        return partial(networks.build, name, **kwargs)
    name, config = source.get("transformers"), source.get("config")
    if isinstance(name, str) and isinstance(config, dict):
        cls = _transformers_class(name, where)
        return lambda: cls(cls.config_class.from_dict(_harmless(config)))
    raise CheckpointError(
        f"a recipe must name its model in a known way: {where} has the source {source!r:.80}, expected "
        "'registry' with 'kwargs' or 'transformers' with 'config'. Save the model again, or pass model=."
    )


def build_empty(factory: Factory, *, where: str) -> nn.Module:
    """Build a model without memory for the weights of torch's layers, where its constructor can do with that.

    Whatever else the constructor makes is real. One that needs the weights' numbers, or keeps something that it
    computes from them, runs a second time as it is.

    Raises:
        CheckpointError: The constructor fails, or gives no module.
    """
    try:
        with _WeightsOnMeta():
            model = factory()
        if isinstance(model, nn.Module) and not keeps_meta_tensors(model):
            return model
    except Exception:  # the second attempt tells whether the constructor or the meta device failed
        pass
    return _build(factory, where)


def build_from_source(source: dict[str, Any] | None, *, where: str, n_tensors: int, n_bytes: int) -> nn.Module:
    """Build the model that a recipe names, without memory for its weights where that is possible.

    A file is not trusted with what it names: sizes without bounds are refused, and building stops where it makes
    far more than the checkpoint has tensors for.

    Raises:
        CheckpointError: The recipe names no model, or one that is not known or does not build.
        OptionalDependencyError: It needs transformers, which is not installed.
    """
    _check_numbers(source, where, n_tensors)
    factory = _source_factory(source, where=where)
    try:
        with torch.device("meta"), _Meter(n_tensors, n_bytes):
            model = factory()
        if isinstance(model, nn.Module) and not keeps_meta_tensors(model):
            return model
    except _TooMuchError as error:
        raise _too_much(where, error) from error
    except Exception:
        pass
    try:
        with _Meter(n_tensors, n_bytes):
            return _build(factory, where)
    except _TooMuchError as error:
        raise _too_much(where, error) from error


def _build(factory: Factory, where: str) -> nn.Module:
    try:
        model = factory()
    except TTError as error:
        raise CheckpointError(f"a model must be buildable: {where} has arguments that fail. {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"a model must be buildable: {where} has a constructor that raises {type(error).__name__} "
            f"({error!s:.400}). Pass model=, a module of the right class."
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"a factory must return a module: {where} has {type(model).__name__}, expected torch.nn.Module. "
            "Return the model from the function."
        )
    return model


class _WeightsOnMeta(TorchFunctionMode):
    """Tensors that torch's own layers make in their constructors get no memory; everybody else's are real.

    Helper tensors, those in caches of the caller's functions included, are then as they should be.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            maker = sys._getframe(1).f_globals.get("__name__", "")
            if maker.startswith(_LAYER_MODULES):
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class _TooMuchError(BaseException):
    """Not an Exception, so that no constructor takes it for a reason to try something else."""


class _Meter(TorchDispatchMode):
    """Stops a constructor that makes more, or larger, tensors than a checkpoint can be about."""

    def __init__(self, n_tensors: int, n_bytes: int) -> None:
        super().__init__()
        self.calls_left = _CALLS_PER_TENSOR * n_tensors + _MOST_CALLS
        self.bytes_left = _DENSE_PER_BYTE * n_bytes + _MOST_BYTES

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls_left -= 1
        if isinstance(found, torch.Tensor) and not found.is_meta:
            self.bytes_left -= found.nbytes
        if self.calls_left < 0:
            raise _TooMuchError("more tensors")
        if self.bytes_left < 0:
            raise _TooMuchError("more memory")
        return found


def _too_much(where: str, error: _TooMuchError) -> CheckpointError:
    return CheckpointError(
        f"a recipe must name a model of its own size: the one in {where} needs far {error} than the checkpoint has. "
        "Pass model=, a module of the right class."
    )


def _check_numbers(value: Any, where: str, n_tensors: int, key: str = "") -> None:
    """Refuse numbers and lists over which a constructor would loop for ever."""
    if isinstance(value, dict):
        for name, one in value.items():
            _check_numbers(one, where, n_tensors, name)
    elif isinstance(value, list):
        for one in value:
            _check_numbers(one, where, n_tensors, key)
    too_many = isinstance(value, int) and abs(value) > _most(key, n_tensors)
    if too_many or (isinstance(value, (dict, list, str)) and len(value) > _MOST_COUNTED):
        found = value if isinstance(value, int) else f"{len(value):,} entries"
        raise CheckpointError(
            f"a model must be buildable: {where} has arguments that fail: {key!r:.80} has {found!s:.40}, "
            "which no model has. Save the model again, or pass model=."
        )


def _most(key: str, n_tensors: int) -> int:
    if _LAYERS.search(key):  # each has a tensor; some configs count layers that a small model does not have
        return n_tensors + 1000
    return _MOST_COUNTED if _COUNT.search(key) else _LARGEST_NUMBER


def _transformers_class(name: str, where: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise OptionalDependencyError(
            f"a transformers model needs transformers: {where} has {name!r}, and the package is not "
            "installed. "
            'Install it with pip install "tensortrain[hf]", or pass model=.'
        ) from error
    cls: Any = getattr(transformers, name, None) if re.fullmatch(r"[A-Za-z]\w*", name) else None
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known or cls.config_class is None:
        raise CheckpointError(
            f"a recipe must name a model class of transformers: {where} has {name!r:.60}, expected a subclass of "
            "PreTrainedModel in this release. Update transformers, or pass model=."
        )
    return cls


def _harmless(config: Any) -> Any:
    """The config without entries that could make transformers fetch or run anything."""
    if isinstance(config, dict):
        return {key: _harmless(value) for key, value in config.items() if not _NOT_KEPT.search(key)}
    return [_harmless(value) for value in config] if isinstance(config, list) else config
