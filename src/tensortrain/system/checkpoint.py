"""Nested plain data with tensors in one file, as long work keeps its state.

The file appears whole or not at all. It is a safetensors file, whose metadata hold everything but the tensors as JSON:
no pickle is read or written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensortrain.errors import CheckpointError
from tensortrain.system.files import whole_file

__all__ = ["RunFile", "read_checkpoint", "same_start", "start_signature", "unusable", "write_checkpoint"]

_VERSION = 2
_SAMPLE = 65_536  # elements of one tensor that the signature looks at
_SAME_START = 1e-3  # rebuilt models may differ by round-off (thread counts); other models differ by order one


class RunFile:
    """The checkpoint of one run, which knows that of another.

    Args:
        path: Where it lies.
        every_s: Least time between two writes, in seconds.
        settings: What decides the result, as text: another value means another run.
        start: Numbers that the run begins with, see ``start_signature``.
    """

    def __init__(self, path: Path, every_s: float, settings: Mapping[str, Any], start: Tensor) -> None:
        self.path, self.every_s, self.written_at = path, every_s, time.perf_counter()
        self.settings = {name: str(value) for name, value in settings.items()}
        self.start = start

    def due(self) -> bool:
        """Whether it is time for another write."""
        return time.perf_counter() - self.written_at >= self.every_s

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the file."""
        write_checkpoint(self.path, {"settings": self.settings, "start": self.start, **content})
        self.written_at = time.perf_counter()

    def read(self) -> dict[str, Any]:
        """What was written.

        Raises:
            CheckpointError: The file is damaged, or of another run.
        """
        content = read_checkpoint(self.path)
        self._check_is_this_run(content)
        return content

    def _check_is_this_run(self, content: Mapping[str, Any]) -> None:
        saved = content.get("settings")
        if not isinstance(saved, dict):
            raise unusable(self.path, "no settings of a run")
        odd = sorted(k for k in self.settings.keys() | saved.keys() if self.settings.get(k) != saved.get(k))
        if not odd and not same_start(content.get("start"), self.start):
            odd = ["starting weights"]
        if odd:
            raise CheckpointError(
                f"a checkpoint must be of the same run: {self.path} has other {', '.join(odd)}, expected those of this "
                "call. Use another file to keep both."
            )


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, whole.

    Raises:
        CheckpointError: The content has something else than tensors, numbers, texts and containers of these.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_as_tree({"version": _VERSION, **content}, tensors))
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"tree": tree})


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
        raise unusable(path, f"{type(error).__name__} on reading it") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise unusable(path, "content of another kind")
    return content


def _as_tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested containers as JSON can hold them; tensors are set aside under the number that stands for them."""
    if isinstance(value, Tensor):
        # As the axes lie in memory, outermost first: fused optimizers want weights and moments laid out alike.
        strides = value.stride()
        axes = sorted(range(value.ndim), key=lambda axis: -strides[axis])
        name = str(len(tensors))
        stored = value.detach().cpu().permute(axes).resolve_conj().resolve_neg()
        is_complex = stored.is_complex()  # safetensors knows complex64 alone
        stored = torch.view_as_real(stored) if is_complex else stored
        tensors[name] = stored.contiguous().clone()  # a storage of its own, for safetensors
        return {"complex" if is_complex else "tensor": [name, axes]}
    if isinstance(value, Mapping):  # keys may be numbers, as in the state of an optimizer
        return {"dict": [[_as_tree(key, tensors), _as_tree(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_as_tree(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_as_tree(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"a checkpoint must be plain data: it has a {type(value).__name__}, expected tensors, numbers, texts and "
        "containers of these. Use an optimizer of torch.optim, or leave out checkpoint=."
    )


def _from_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_tree(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind in ("tensor", "complex"):
        name, axes = value
        stored = tensors[name] if kind == "tensor" else torch.view_as_complex(tensors[name])
        return stored.permute([axes.index(k) for k in range(len(axes))])
    if kind == "tuple":
        return tuple(_from_tree(item, tensors) for item in value)
    if kind == "dict":
        return {_from_tree(key, tensors): _from_tree(item, tensors) for key, item in value}
    raise KeyError(kind)


def unusable(path: Path, what: str) -> CheckpointError:
    """What to raise for a file that does not hold what was written."""
    return CheckpointError(
        f"a checkpoint must be whole: {path} has {what}, expected one written by the same work. Remove the file."
    )


def start_signature(values: Iterable[Any]) -> Tensor:
    """Return two numbers per tensor, its norm and a fixed projection: float64 ``(n, 2)``.

    With it a checkpoint knows the numbers that its run began with, and is not taken for another run's.
    """
    rows = [_norm_and_projection(value) for value in values if isinstance(value, Tensor)]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)


def _norm_and_projection(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    flat = flat[:: -(-flat.numel() // _SAMPLE) or 1]
    flat = torch.view_as_real(flat.resolve_conj()).flatten() if flat.is_complex() else flat
    flat = flat.to("cpu", torch.float64)
    # Multiples of the golden ratio modulo one: spread evenly, and the same on every machine.
    direction = (torch.arange(flat.numel(), dtype=torch.float64) * 0.6180339887498949) % 1 - 0.5
    return torch.stack((flat.norm(), flat @ direction))


def same_start(saved: object, current: Tensor) -> bool:
    """Tell whether two signatures are of the same weights, up to round-off."""
    if not isinstance(saved, Tensor) or saved.shape != current.shape:
        return False
    scale = current[:, :1].abs().clamp(min=1e-30)
    return bool(((saved - current).abs() <= _SAME_START * scale).all())
