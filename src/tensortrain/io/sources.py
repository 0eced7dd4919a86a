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

from tensortrain import models
from tensortrain.errors import CheckpointError, OptionalDependencyError, TTError

__all__ = ["build_empty", "describe_source", "source_factory"]

Factory = Callable[[], nn.Module]

# Entries of a transformers config that can make it fetch and run code, or wrap weights in another library.
_NOT_KEPT = re.compile(r"implementation|auto_map|quantization_config|custom_pipelines|_name_or_path")


def describe_source(model: nn.Module) -> dict[str, Any] | None:
    """Say how to build a model of this class anew, None where only the caller can."""
    known = models.describe(model)
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


def source_factory(source: dict[str, Any] | None, *, where: str) -> Factory:
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
        return partial(models.build, name, **kwargs)
    name, config = source.get("transformers"), source.get("config")
    if isinstance(name, str) and isinstance(config, dict):
        cls = _transformers_class(name, where)
        return lambda: cls(cls.config_class.from_dict(_harmless(config)))
    raise CheckpointError(
        f"a recipe must name its model in a known way: {where} has the source {source!r:.80}, expected "
        "'registry' with 'kwargs' or 'transformers' with 'config'. Save the model again, or pass model=."
    )


def build_empty(factory: Factory, *, where: str) -> nn.Module:
    """Build a model without memory for its weights, where its constructor can do with that.

    A constructor that needs real numbers, or keeps some outside parameters and buffers, runs a second time
    as it is.

    Raises:
        CheckpointError: The constructor fails, or gives no module.
    """
    try:
        with torch.device("meta"):
            model = factory()
        if isinstance(model, nn.Module) and not _keeps_meta_attributes(model):
            return model
    except Exception:  # the second attempt tells whether the constructor or the meta device failed
        pass
    try:
        model = factory()
    except TTError as error:
        raise CheckpointError(f"a model must be buildable: {where} has arguments that fail. {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"a model must be buildable: {where} has a constructor that raises {type(error).__name__} "
            f"({error}). Pass model=, a module of the right class."
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"a factory must return a module: {where} has {type(model).__name__}, expected torch.nn.Module. "
            "Return the model from the function."
        )
    return model


def _keeps_meta_attributes(model: nn.Module) -> bool:
    """Whether a module has tensors that no checkpoint can fill: neither parameter nor buffer."""
    return any(
        isinstance(value, torch.Tensor) and value.is_meta
        for module in model.modules()
        for value in vars(module).values()
    )


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
            f"a recipe must name a model class of transformers: {where} has {name!r:.60}, expected a "
            "subclass of "
            "PreTrainedModel in this release. Update transformers, or pass model=."
        )
    return cls


def _harmless(config: Any) -> Any:
    """The config without entries that could make transformers fetch or run anything."""
    if isinstance(config, dict):
        return {key: _harmless(value) for key, value in config.items() if not _NOT_KEPT.search(key)}
    return [_harmless(value) for value in config] if isinstance(config, list) else config
