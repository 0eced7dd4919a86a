"""What a training run must keep to go on after a kill as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensortrain.system.checkpoint import unusable
from tensortrain.system.history import History

__all__ = [
    "Progress",
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
