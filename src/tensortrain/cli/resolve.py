"""From words on the command line to a model: a name, an importable function, a checkpoint's folder."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain import networks as models
from tensortrain.cli.hugging_face import is_transformers_folder, load_transformers
from tensortrain.errors import CheckpointError, KindError, ShapeError, TTError
from tensortrain.io import has_source, load_pretrained
from tensortrain.system.observer import Observer

__all__ = ["ResolvedModel", "check_memory", "example_inputs", "input_shape", "resolve_model"]

_TOKENS = 32  # of a language model's random inputs, where no --shape says how many


@dataclass(frozen=True)
class ResolvedModel:
    """A model, what to call it, whether it has weights of its own rather than random ones, and its folder."""

    model: nn.Module
    name: str
    trained: bool
    folder: Path | None = None


def resolve_model(
    text: str,
    weights: Path | None = None,
    *,
    seed: int = 0,
    observer: Observer | None = None,
    like: str | None = None,
) -> ResolvedModel:
    """Build or load the model that a command names; it is in eval mode.

    Args:
        text: A registered name, ``package.module:function``, or a folder that ``save_pretrained`` wrote, this
            package's or transformers'.
        weights: For the first two: a state dict as ``.safetensors`` or ``.pt``, or a checkpoint's folder.
        seed: Of random weights, where there are no others.
        observer: Is told when weights are random.
        like: What another model of the command was named by. Where that is a function, it builds the model of a
            folder whose checkpoint names none.

    Raises:
        KindError: The text names nothing.
        CheckpointError: The weights cannot be read or do not fit.
    """
    folder = Path(text)
    if folder.is_dir() and text not in models.names():
        if weights is not None:
            raise KindError(
                f"a checkpoint has its own weights: {text} is a folder, and --weights has {weights}. "
                "Leave out --weights, or name the model's function in place of the folder."
            )
        return ResolvedModel(_from_folder(folder, like), folder.resolve().name, trained=True, folder=folder)
    factory = _factory(text)
    if weights is not None and weights.is_dir():
        return ResolvedModel(load_pretrained(weights, factory), text, trained=True, folder=weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _call(factory, text)
    if weights is not None:
        _load_weights(model, weights)
    elif observer is not None and text in models.names():
        observer.message(f"{text} has random weights; give trained ones with --weights.")
    return ResolvedModel(model.eval(), text, trained=weights is not None)


def _from_folder(folder: Path, like: str | None) -> nn.Module:
    if is_transformers_folder(folder):
        return load_transformers(folder)
    if like is not None and ":" in like and not has_source(folder):
        return load_pretrained(folder, _factory(like))
    return load_pretrained(folder)


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Shape of one input, where the model is one of the package's."""
    known = models.describe(model)
    if known is None:
        return None
    kwargs = known["kwargs"]
    if "image_size" in kwargs:
        return (kwargs["in_channels"], kwargs["image_size"], kwargs["image_size"])
    return (kwargs["in_features"],) if "in_features" in kwargs else None


def example_inputs(model: nn.Module, shape: str | None, *, batch: int = 1) -> Tensor | None:
    """Random inputs of the shape on the command line, or of the one that the model is known to take.

    A language model gets token ids.

    Args:
        shape: Such as ``"1x28x28"``, without the batch.

    Raises:
        ShapeError: The text is no shape.
    """
    sizes = input_shape(model)
    if shape is not None:
        if not re.fullmatch(r"[0-9]{1,15}([x,][0-9]{1,15})*", shape):
            raise ShapeError(
                f"a shape must be sizes with x between: --shape has {shape!r}, expected one such as 1x28x28. "
                "Leave out the batch."
            )
        sizes = tuple(int(size) for size in re.split("[x,]", shape))
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int):  # a model of transformers takes token ids
        length = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (batch, *(sizes or (length,))), generator=generator)
    if sizes is None:
        return None
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    check_memory(math.prod((batch, *sizes)) * dtype.itemsize, "--shape")
    return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def check_memory(n_bytes: int, where: str) -> None:
    """Refuse inputs that the machine cannot hold: the system would end the process without a word.

    Raises:
        ShapeError: They would take more than half of the memory.
    """
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return
    if n_bytes > most:
        raise ShapeError(
            f"inputs must fit into half of the memory: {where} asks for {n_bytes:,} bytes, expected at most {most:,}. "
            "Ask for smaller ones."
        )


def _factory(text: str) -> Callable[[], Any]:
    if text in models.names():
        return lambda: models.build(text)
    match = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", text)
    if match is None:
        raise KindError(
            f"a model must be known: MODEL has {text!r}, expected one of {', '.join(models.names())}, a "
            "function such as package.module:build, or a folder that save_pretrained of tensortrain or transformers "
            "wrote. Check the spelling."
        )
    return _imported(match[1], match[2], text)


def _imported(module_name: str, path: str, text: str) -> Callable[[], Any]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the installed command, unlike python -m, does not look here
    try:
        found: Any = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except TTError:
        raise
    except (Exception, SystemExit) as error:
        raise KindError(
            f"a model's function must be importable: {text!r} fails with {type(error).__name__} ({error}). "
            "Run the command where the module can be imported, or set PYTHONPATH."
        ) from error
    if not callable(found):
        raise KindError(
            f"a model's function must be callable: {text!r} is a {type(found).__name__}. "
            "Name a function or a class that takes no arguments."
        )
    return found


def _call(factory: Callable[[], Any], text: str) -> nn.Module:
    try:
        model = factory()
    except TTError:
        raise
    except (Exception, SystemExit) as error:
        raise KindError(
            f"a model's function must run without arguments: {text!r} raises {type(error).__name__} ({error}). Wrap it "
            "in a function that needs none."
        ) from error
    if not isinstance(model, nn.Module):
        raise KindError(
            f"a model's function must return a module: {text!r} returns {type(model).__name__}. Return the model."
        )
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    state = _read_state(path)
    faults = _faults(model.state_dict(), state)
    if faults:
        more = f" and {len(faults) - 3} faults more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"weights must fit the model: {path} has {', '.join(faults[:3])}{more}. Give the weights of this model."
        )
    model.load_state_dict(state, strict=True)


def _faults(own: Mapping[str, Any], state: Any) -> list[str]:
    """What keeps a state dict from fitting, one phrase each."""
    if not isinstance(state, Mapping):
        return [f"a {type(state).__name__} in place of a state dict"]
    missing = [f"no {name}" for name in own.keys() - state.keys()]
    extra = [f"{name!r} too many" for name in state.keys() - own.keys()]
    shapes = [
        f"{name} of shape {_shape(state[name])}, expected {_shape(own[name])}"
        for name in own.keys() & state.keys()
        if _shape(state[name]) != _shape(own[name])
    ]
    return sorted(missing) + sorted(extra) + sorted(shapes)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _read_state(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"weights must be a file: there is no {path}. Check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".pt", ".pth", ".bin"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and others, by the damage
        reason = " ".join(str(error).split()) or "the file is empty or cut off"
        if isinstance(error, pickle.UnpicklingError):  # its text advises to load the file all the same
            reason = "it holds Python objects other than tensors"
        raise CheckpointError(
            f"weights must be readable without running code: {path} has {type(error).__name__} ({reason:.160}). Save a "
            "plain state dict, best as safetensors."
        ) from error
    raise CheckpointError(
        f"weights must be of a known kind: {path} ends in {path.suffix!r}, expected .safetensors, .pt or .pth. Save "
        "them with safetensors.torch.save_file."
    )
