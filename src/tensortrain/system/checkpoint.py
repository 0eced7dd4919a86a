"""What a training run must keep to go on after a kill as if nothing had happened.

The file is written beside its final place and moved there by rename. It is a safetensors file, whose metadata hold
everything but the tensors as JSON: no pickle is read or written.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensortrain.errors import CheckpointError

_VERSION = 2
_SAMPLE = 65_536  # elements of one tensor that the signature looks at
_SAME_START = 1e-3  # rebuilt models may differ by round-off (thread counts); other models differ by order one


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, whole.

    Raises:
        CheckpointError: The content has something else than tensors, numbers, texts and containers of these.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_as_tree({"version": _VERSION, **content}, tensors))
    save_file(tensors, unfinished, metadata={"tree": tree})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: It is truncated, or of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tree = json.loads((file.metadata() or {})["tree"])
            # Copies, since a tensor that is mapped onto the file dies with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        content = _from_tree(tree, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unusable(path, f"{type(error).__name__} on reading it") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise _unusable(path, "content of another kind")
    return content


def _as_tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested containers as JSON can hold them; tensors are set aside under the number that stands for them."""
    if isinstance(value, Tensor):
        # As the axes lie in memory, outermost first: fused optimizers want weights and moments laid out alike.
        strides = value.stride()
        axes = sorted(range(value.ndim), key=lambda axis: -strides[axis])
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().permute(axes).contiguous().clone()  # a storage of its own, for safetensors
        return {"tensor": [name, axes]}
    if isinstance(value, Mapping):  # keys may be numbers, as in the state of an optimizer
        return {"dict": [[_as_tree(key, tensors), _as_tree(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_as_tree(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_as_tree(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"a training checkpoint must be plain data: it has a {type(value).__name__}, expected tensors, numbers, texts "
        "and containers of these. Use an optimizer of torch.optim, or leave out checkpoint=."
    )


def _from_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_tree(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        name, axes = value
        return tensors[name].permute([axes.index(k) for k in range(len(axes))])
    if kind == "tuple":
        return tuple(_from_tree(item, tensors) for item in value)
    if kind == "dict":
        return {_from_tree(key, tensors): _from_tree(item, tensors) for key, item in value}
    raise KeyError(kind)


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"a training checkpoint must be whole: {path} has {what}, expected one written by fit. Remove the file."
    )


def rng_state(data: object, device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that training may draw from."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *rest),
        "loader": [generator.get_state() for generator in loader_generators(data)],
    }


def set_rng_state(state: Mapping[str, Any], data: object, device: torch.device) -> None:
    """Put every generator back to where :func:`rng_state` saw it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    for generator, saved in zip(loader_generators(data), state["loader"], strict=True):
        generator.set_state(saved)


def loader_generators(data: object) -> list[torch.Generator]:
    """Return the generators that a loader, its samplers and its data set draw from, each once."""
    found: dict[int, torch.Generator] = {}
    for part in loader_parts(data):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found.setdefault(id(generator), generator)
    return list(found.values())


def loader_parts(data: object) -> Iterator[object]:
    """Give a loader and the parts of it that may hold state."""
    yield data
    for path in (("sampler",), ("batch_sampler",), ("batch_sampler", "sampler"), ("dataset",)):
        part: object = data
        for name in path:
            part = getattr(part, name, None)
        if part is not None:
            yield part


def start_signature(model: nn.Module) -> Tensor:
    """Return two numbers per tensor of the model, its norm and a fixed projection: float64 ``(n, 2)``.

    With it a checkpoint knows the weights that its run began with, and is not taken for another model's.
    """
    rows = [_norm_and_projection(value) for value in model.state_dict().values() if isinstance(value, Tensor)]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)


def _norm_and_projection(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    flat = flat[:: -(-flat.numel() // _SAMPLE) or 1]
    flat = (flat.abs() if flat.is_complex() else flat).to("cpu", torch.float64)
    # Multiples of the golden ratio modulo one: spread evenly, and the same on every machine.
    direction = (torch.arange(flat.numel(), dtype=torch.float64) * 0.6180339887498949) % 1 - 0.5
    return torch.stack((flat.norm(), flat @ direction))


def same_start(saved: object, current: Tensor) -> bool:
    """Tell whether two signatures are of the same weights, up to round-off."""
    if not isinstance(saved, Tensor) or saved.shape != current.shape:
        return False
    scale = current[:, :1].abs().clamp(min=1e-30)
    return bool(((saved - current).abs() <= _SAME_START * scale).all())


def check_state_fits(model: nn.Module, state: object, path: Path) -> None:
    """Refuse a state dict of other names or shapes before anything is loaded from it.

    Raises:
        CheckpointError: A tensor is extra, missing or of another shape.
    """
    own = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = state if isinstance(state, dict) else {}
    shapes = {name: value.shape for name, value in found.items() if isinstance(value, Tensor)}
    if own != shapes:
        odd = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
        raise _unusable(path, f"tensors that do not fit the model ({', '.join(odd[:3])})")
