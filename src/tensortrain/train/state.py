"""What a training run must keep to go on after a kill as if nothing had happened."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensortrain.errors import CheckpointError
from tensortrain.system.checkpoint import (
    read_checkpoint,
    same_start,
    start_signature,
    unusable,
    write_checkpoint,
)
from tensortrain.system.history import History

__all__ = [
    "Progress",
    "RunFile",
    "check_state_fits",
    "loader_generators",
    "loader_parts",
    "rng_state",
    "set_rng_state",
]


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the settled steps of this epoch
    n_losses: int = 0  # of this epoch; batches that were passed over have none
    seconds: float = 0.0
    history: History = field(default_factory=History)
    stopped: bool = False  # by the monitor

    def to_state(self) -> dict[str, Any]:
        """Plain data, as a checkpoint keeps it."""
        return {**vars(self), "history": self.history.rows()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What ``to_state`` gave."""
        return cls(**{**state, "history": History.from_rows(state["history"])})


class RunFile:
    """The checkpoint of one run, which knows that of another.

    Args:
        path: Where it lies.
        every_s: Least time between two writes, in seconds.
        settings: What decides the result, as text: another value means another run.
        model: With the weights that the run begins with.
    """

    def __init__(self, path: Path, every_s: float, settings: Mapping[str, Any], model: nn.Module) -> None:
        self.path, self.every_s, self.written_at = path, every_s, time.perf_counter()
        self.settings = {name: str(value) for name, value in settings.items()}
        self.start = start_signature(model.state_dict().values())

    def due(self) -> bool:
        """Whether it is time for another write."""
        return time.perf_counter() - self.written_at >= self.every_s

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the file."""
        write_checkpoint(self.path, {"settings": self.settings, "start": self.start, **content})
        self.written_at = time.perf_counter()

    def read(self, model: nn.Module) -> dict[str, Any]:
        """What was written.

        Raises:
            CheckpointError: The file is damaged, or of another run, or of another model.
            KeyError, TypeError: Something is missing in it.
        """
        content = read_checkpoint(self.path)
        self._check_is_this_run(content)
        check_state_fits(model, content["model"], self.path)
        return content

    def _check_is_this_run(self, content: Mapping[str, Any]) -> None:
        saved = content["settings"]
        if not isinstance(saved, dict):
            raise TypeError("settings are not a dict")
        odd = sorted(k for k in self.settings.keys() | saved.keys() if self.settings.get(k) != saved.get(k))
        if not odd and not same_start(content["start"], self.start):
            odd = ["starting weights"]
        if odd:
            raise CheckpointError(
                f"a training checkpoint must be of the same run: {self.path} has other "
                f"{', '.join(odd)}, expected those of this call. Use another file to keep both."
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
        raise unusable(path, f"tensors that do not fit the model ({', '.join(odd[:3])})")
