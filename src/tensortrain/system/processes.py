"""Several processes that each see a part of the data: what they sum up, and what the first one decides for all.

Where ``torch.distributed`` has a process group of more than one, every process has to make the same calls; ``alone``
is for calls that one of them makes by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["alone", "first_of", "gathered", "n_processes", "own_rank", "own_share", "summed_"]

T = TypeVar("T")

_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)
_SHORT_STEP = 2**20  # numbers of one that is parked, summed at once


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself, whatever process group there is."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def n_processes() -> int:
    """How many work together; 1 where there is no process group."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def own_rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if n_processes() > 1 else 0


def own_share(n: int) -> int:
    """How many of n things that go round are this process's; at least one."""
    return max(1, len(range(own_rank(), n, n_processes())))


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    n = n_processes()
    if n == 1:
        return [value]
    found: list[Any] = [None] * n
    dist.all_gather_object(found, value)
    return found


def first_of(value: T) -> T:
    """The value of the first process."""
    if n_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def summed_(total: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if n_processes() == 1:
        return total
    place = _place()
    for part in total.view(-1).split(_SHORT_STEP):
        moved = part.to(place)
        dist.all_reduce(moved)
        if moved is not part:
            part.copy_(moved)
    return total


def _place() -> torch.device:
    """Where the process group takes tensors."""
    backend = str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
