"""What all tensor-network models share: how they are stored, their random numbers, and how scores keep their size."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import Halves, outer
from tensortrain.cores.scaling import times_pow2
from tensortrain.errors import CheckpointError
from tensortrain.system.history import History
from tensortrain.system.store.doors import doors

__all__ = [
    "TensorModel",
    "adam",
    "held",
    "label_scores",
    "only_figures",
    "seed_from",
    "settle_",
]

_MOST_SETTLINGS = 400
_JUMP = 32  # bits of the scores, where these say nothing at all: less than the range of any dtype but float16

Model = TypeVar("Model", bound="TensorModel")


class TensorModel(nn.Module):
    """A model that tells what builds it anew, and saves and loads itself by that."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments, as JSON has them, that build a model of the same shapes."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the model into a folder of safetensors and JSON, see ``tensortrain.save_pretrained``."""
        return doors.save(self, directory)

    @classmethod
    def from_pretrained(cls: type[Model], directory: str | os.PathLike[str]) -> Model:
        """Load what ``save_pretrained`` wrote: equal parameters, to the bit.

        Raises:
            CheckpointError: A file is missing, damaged, or of another kind of model.
        """
        model = doors.load(directory)
        if not isinstance(model, cls):
            raise CheckpointError(
                f"a checkpoint must be of the class that loads it: {directory} has a {type(model).__name__}, expected "
                f"a {cls.__name__}. Use {type(model).__name__}.from_pretrained or tensortrain.load_pretrained."
            )
        return model


def seed_from(generator: torch.Generator | None) -> int:
    """A number for what takes a seed."""
    device = generator.device if generator is not None else None
    return int(torch.randint(2**40, (), generator=generator, device=device))


def adam(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    """The optimizer of models whose cores all learn at once."""
    return torch.optim.Adam(parameters, lr=lr)


def only_figures(history: History, names: Sequence[str], **renamed: str) -> History:
    """Some of the figures of a run, under other names where these are given."""
    kept = {renamed.get(name, name): history.columns[name] for name in names if name in history.columns}
    return History(kept, history.stop)


def held(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """``mantissa * 2**exponent``, one exponent for each row, kept finite where it would leave the range."""
    top = math.frexp(torch.finfo(mantissa.dtype).max)[1]
    largest = mantissa.detach().abs().amax(-1) if mantissa.numel() else mantissa.detach().sum(-1)
    return times_pow2(mantissa, torch.minimum(exponent, top - 1 - torch.frexp(largest).exponent))


def label_scores(core: Tensor, halves: Halves, row: Tensor) -> Tensor:
    """Scores ``(b, classes)`` where two walks meet a core with an axis of classes, ``(classes, r, n, s)``."""
    dtype = halves.left.dtype
    here = core.to(dtype).flatten(1, 2).movedim(0, 1).flatten(1)  # r n (classes s)
    seen = (outer(halves.left, row.to(dtype)) @ here).unflatten(-1, (core.shape[0], -1))
    return held((seen * halves.right.unsqueeze(1)).sum(-1), halves.exponent)


@torch.no_grad()
def settle_(cores: Sequence[nn.Parameter], degree: int, scores: Callable[[], Tensor]) -> None:
    """Bring scores that are far from 1 there, by one factor for all cores, so that a softmax can learn from them.

    A product over many positions of features that are mostly below 1, or above, has scores of no use: all alike, or
    all beyond the range.

    Args:
        cores: Parameters of which the scores are a product of some degree.
        degree: How often they occur in it.
        scores: Computes them for some examples.
    """
    for _ in range(_MOST_SETTLINGS):
        size = float(scores().double().abs().median())
        if size == 0:
            factor = 2.0 ** (_JUMP / degree)
        elif not size < torch.finfo(cores[0].dtype).max / 1e4:
            factor = 2.0 ** (-_JUMP / degree)
        else:
            factor = size ** (-1 / degree)
        if 0.1 <= size <= 10:
            return
        for core in cores:
            core.mul_(factor)
