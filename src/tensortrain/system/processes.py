"""Several processes that each see a part of the data: what they sum up, and what the first one decides for all.

Where ``torch.distributed`` has a process group of more than one, every process has to make the same calls; ``alone``
is for calls that one of them makes by itself. An error of one ends the work of all: before anything is exchanged they
tell each other in one number whether all go on, and inside of ``together`` one that fails takes part in that once more.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tensortrain.errors import ProcessError

__all__ = [
    "added_up",
    "alone",
    "first_of",
    "gathered",
    "n_processes",
    "own_place",
    "own_rank",
    "own_share",
    "sum_",
    "summed_",
    "together",
]

T = TypeVar("T")

_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)
_SHORT_STEP = 2**20  # numbers of one that is parked, summed at once
_DEEPEST = 2**20  # more parts of a work within each other than there ever are


@dataclass
class _Part:
    """A part of the work that all processes do together; with the error by which it ended for all."""

    failure: BaseException | None = None


_PARTS: ContextVar[tuple[_Part, ...]] = ContextVar("_PARTS", default=())  # those that this process is in, outer first


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself, whatever process group there is."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextlib.contextmanager
def together(joined: bool = True) -> Iterator[None]:
    """Inside, an error of one process is an error of all: it raises its own, the others a ``ProcessError``.

    No process leaves before all have come to the end. What is inside of another such part ends by itself: where all
    catch what it raises, they go on together.

    Args:
        joined: Off: every process for itself.
    """
    if not joined or n_processes() == 1:
        yield
        return
    part = _Part()
    token = _PARTS.set((*_PARTS.get(), part))
    try:
        try:
            yield
        except BaseException as error:
            if part.failure is None:  # the others do not know yet
                with contextlib.suppress(Exception):  # they may be gone
                    _agree(error)
            raise
        _agree()
    finally:
        _PARTS.reset(token)


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


def own_place(k: int) -> int:
    """The place among the things of all, which go round, of the k-th thing of this process."""
    return k * n_processes() + own_rank()


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if n_processes() == 1:
        return [value]
    packed = _packed(value)  # what cannot be sent is an error before the others wait for it
    _agree()
    return [_unpacked(each) for each in _all_of(packed)]


def first_of(value: T) -> T:
    """The value of the first process."""
    if n_processes() == 1:
        return value
    box = [_packed(value) if own_rank() == 0 else b""]
    _agree()
    dist.broadcast_object_list(box, src=0)
    found: T = value if own_rank() == 0 else _unpacked(box[0])
    return found


def summed_(total: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    sum_([total])
    return total


def sum_(totals: Sequence[Tensor]) -> None:
    """Add up tensors over all processes, in place."""
    if n_processes() == 1:
        return
    parts = [part for total in totals for part in total.view(-1).split(_SHORT_STEP)]
    place = _place()
    _agree()
    for part in parts:
        moved = part.to(place)
        dist.all_reduce(moved)
        if moved is not part:
            part.copy_(moved)


def added_up(totals: Sequence[Tensor | None], device: torch.device) -> Iterator[Tensor | None]:
    """Tensors added up over all processes, each in place when its turn comes; who has none adds nothing.

    Args:
        device: Of tensors that a process does not have; these are float64.
    """
    known = gathered([None if total is None else tuple(total.shape) for total in totals])
    for total, *shapes in zip(totals, *known, strict=True):
        shape = next((each for each in shapes if each is not None), None)
        if shape is None:
            yield None
        else:
            yield summed_(torch.zeros(shape, dtype=torch.float64, device=device) if total is None else total)


def _agree(error: BaseException | None = None) -> None:
    """Tell each other that all go on.

    Raises:
        ProcessError: One does not; the part of the work that it leaves has ended for all.
    """
    parts = _PARTS.get()
    over = next((part.failure for part in parts if part.failure is not None), None)
    if over is not None:
        raise over
    try:
        outermost = _outermost_left(0 if error is None else len(parts))
        if outermost is None:
            return
        failure: BaseException = _failure(error)
    except Exception as broken:  # a process is gone: nothing more can be exchanged
        for part in parts:
            part.failure = broken
        raise
    for part in parts[max(0, min(outermost, len(parts)) - 1) :]:
        part.failure = failure
    if error is None:
        raise failure


def _outermost_left(depth: int) -> int | None:
    """The outermost part of the work that one of the processes leaves by an error, None where none does.

    Args:
        depth: Of the part that this process leaves so, counted from 1; 0 where it goes on.
    """
    number = torch.tensor([_DEEPEST - depth if depth else 0], device=_place())
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    found = int(number)
    return _DEEPEST - found if found else None


def _failure(error: BaseException | None) -> ProcessError:
    """What the others raise: the error of the first process that has one of its own."""
    known = _all_of(None if error is None else _told(error))
    told = [(rank, *each) for rank, each in enumerate(known) if each is not None]
    rank, kind, text, own = next((one for one in told if one[-1] is None), told[0])
    rank, kind, text = own or (rank, kind, text)
    return ProcessError(
        f"processes that work together must all go on: process {rank} of {len(known)} has ended with {kind}: {text}; "
        "expected no error. Look at what that process raised.",
        rank,
        kind,
        text,
    )


def _told(error: BaseException) -> tuple[str, str, tuple[int, str, str] | None]:
    """The kind and the words of an error; of one that was told by another process, what that one had."""
    own = (error.rank, error.kind, error.text) if isinstance(error, ProcessError) else None
    return type(error).__name__, str(error), own


def _all_of(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _packed(value: Any) -> bytes:
    return pickle.dumps(value)


def _unpacked(packed: bytes) -> Any:
    # from a process of the same group alone, as torch's own exchange of objects does
    return pickle.loads(packed)


def _place() -> torch.device:
    """Where the process group takes tensors."""
    backend = str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
