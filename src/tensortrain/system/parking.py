"""Large tensors that lie in files, mapped into memory: what is not looked at takes none.

A parked tensor is a tensor like any other, on the CPU. Its numbers come from the file when they are read, and go there
when they are written; after ``let_go`` they take no memory until they are needed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.system.storage import count_bytes, span_of

__all__ = [
    "LARGE_BYTES",
    "activations_parked",
    "are_large",
    "bring_in",
    "can_park",
    "is_parked",
    "let_go",
    "let_go_after_use",
    "let_go_of_all",
    "memory_given_back",
    "memory_reused",
    "park",
    "parked_zeros",
    "reuse_freed_memory",
    "tidy",
    "weights_parked",
]

LARGE_BYTES = 2**28  # what holds no more than this together is left in memory

_CHUNK = 2**20  # numbers that are written at once
_HELD_BYTES, _WORTH_BYTES = 2**24, 2**17  # of what backward needs: held in memory all the same; least size of a file
_PREFIX = "tensortrain-parked-"
# GNU's allocator keeps what was freed of blocks up to the size of the largest that was freed, 32 MB at most, between
# others that are still used: as much as half a GB beside a model of that size.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MMAP_MAX = -3, -1, -4  # of mallopt
_OWN_MAP_BYTES, _USUAL_MAP_BYTES = 2**20, 2**25
_USUAL_MAPS, _NEVER_TRIMMED = 2**16, 2**31 - 1
_WORTH_THE_PAGES = 2**28  # of a model: memory that always comes anew from the system costs a sixth of the time
_KEPT_BYTES = 2**24  # as large as tensors of a small model's training step are together
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def park(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a tensor in a file that nobody else sees, and that is gone with the tensor.

    Where there is no room on the disk it lies in memory.
    """
    parked = parked_zeros(tensor.shape, dtype or tensor.dtype)
    flat, source = parked.view(-1), tensor.detach().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        flat[start : start + _CHUNK] = source[start : start + _CHUNK]
        let_go(parked)
    return parked


def parked_zeros(size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros in such a file, to be written to."""
    try:
        return _zeros_in_file(size, dtype) if size.numel() else torch.zeros(size, dtype=dtype)
    except OSError:
        return torch.zeros(size, dtype=dtype)


def _zeros_in_file(size: torch.Size, dtype: torch.dtype) -> Tensor:
    n_bytes = size.numel() * torch.empty((), dtype=dtype).element_size()
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX)
    try:
        try:
            _reserve(descriptor, n_bytes)
        finally:
            os.close(descriptor)
        # Torch keeps no descriptor open, as Python's mmap does: a process may have about a thousand.
        return torch.from_file(name, shared=True, size=size.numel(), dtype=dtype).view(size)
    finally:
        with contextlib.suppress(OSError):  # some systems keep the names of mapped files
            os.unlink(name)


def let_go(*tensors: Tensor | None) -> None:
    """Give back the memory of those that are parked; what was written to them stays in their files."""
    for tensor in tensors:
        if tensor is not None and is_parked(tensor):
            _forget_pages(tensor.untyped_storage())


def bring_in(*tensors: Tensor | None) -> None:
    """Read a little of every page of those that are parked, so that whoever reads them next need not wait for any."""
    for tensor in tensors:
        if tensor is not None and is_parked(tensor):
            numbers = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            numbers[:: mmap.PAGESIZE].amax()


def let_go_of_all() -> None:
    """``let_go`` for everything that is parked, whoever holds it, where the system lists its maps."""
    advise = _madvise()
    if advise is None:
        return
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            maps = [line.split(maxsplit=1)[0] for line in file if f"/{_PREFIX}" in line]
    except OSError:
        return
    for places in maps:
        start, end = (int(place, 16) for place in places.split("-"))
        advise(start, end - start, mmap.MADV_DONTNEED)


@contextlib.contextmanager
def let_go_after_use(model: nn.Module) -> Iterator[None]:
    """Inside, weights that are parked take memory only while their own module runs."""
    owners = [one for one in model.modules() if any(map(is_parked, one.parameters(recurse=False)))]
    handles = [one.register_forward_hook(_let_go_of_own) for one in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        let_go(*(parameter for one in owners for parameter in one.parameters(recurse=False)))


def _let_go_of_own(module: nn.Module, args: Any, output: Any) -> None:
    let_go(*module.parameters(recurse=False))


def tidy() -> None:
    """Give back to the system what the allocator keeps of memory that was freed: after large tensors that is much."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def reuse_freed_memory() -> None:
    """Let the allocator keep some megabytes of freed memory for the next call, in place of asking the system again.

    GNU's allocator gives back what is freed at the end of its memory beyond twice the largest block that was freed so
    far. A training step with a few blocks of that size would pay for hundreds of page faults every time; one block that
    nobody has written to, and that costs nothing, makes room for them. Once in a process.
    """
    if sys.platform == "linux":
        torch.empty(_KEPT_BYTES, dtype=torch.uint8)


@contextlib.contextmanager
def memory_given_back(whole: Iterable[Tensor]) -> Iterator[None]:
    """Inside, memory of several megabytes goes back to the system as soon as it is freed.

    Args:
        whole: Parameters of the model that is worked on; below 256 MB nothing changes.
    """
    is_worth_it = count_bytes(whole) > _WORTH_THE_PAGES
    option = _mallopt() if is_worth_it and not any(name in os.environ for name in _OWN_SETTINGS) else None
    if option is None or _given_back.depth:
        yield
        return
    _given_back.depth += 1
    option(_MMAP_THRESHOLD, _OWN_MAP_BYTES)
    option(_TRIM_THRESHOLD, _OWN_MAP_BYTES)
    try:
        yield
    finally:
        _given_back.depth -= 1
        option(_MMAP_THRESHOLD, _USUAL_MAP_BYTES)  # where large tensors take the allocator anyway
        option(_TRIM_THRESHOLD, 2 * _USUAL_MAP_BYTES)


@contextlib.contextmanager
def memory_reused(whole: Iterable[Tensor]) -> Iterator[None]:
    """Inside, memory that is freed serves what is asked for next, blocks of any size; in the end it is given back.

    GNU's allocator takes blocks of 32 MB and more from the system one by one, and a page that comes anew costs more
    than what most operations do with it: an addition over 50 MB takes ten times as long into a fresh block.

    Args:
        whole: Parameters of the model that is worked on; above 256 MB nothing changes.
    """
    is_small = count_bytes(whole) <= _WORTH_THE_PAGES
    option = _mallopt() if is_small and not any(name in os.environ for name in _OWN_SETTINGS) else None
    if option is None or _reused.depth:
        yield
        return
    _reused.depth += 1
    option(_MMAP_MAX, 0)
    option(_TRIM_THRESHOLD, _NEVER_TRIMMED)
    try:
        yield
    finally:
        _reused.depth -= 1
        option(_MMAP_MAX, _USUAL_MAPS)
        option(_MMAP_THRESHOLD, _USUAL_MAP_BYTES)
        option(_TRIM_THRESHOLD, 2 * _USUAL_MAP_BYTES)
        tidy()


class _Depth:
    depth = 0


_given_back, _reused = _Depth(), _Depth()


def are_large(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors hold so much together that copies of them lie in files."""
    return count_bytes(tensors) > LARGE_BYTES


def can_park(tensor: Tensor) -> bool:
    """Whether a tensor is worth a file, and its memory is free once it has one."""
    if not _is_plain(tensor) or tensor.is_inference():
        return False
    n_bytes = tensor.numel() * tensor.element_size()
    own = tensor.untyped_storage().nbytes() == n_bytes and tensor.is_contiguous()
    return own and n_bytes >= _WORTH_BYTES and not (tensor.is_conj() or tensor.is_neg() or is_parked(tensor))


def is_parked(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file."""
    if not _is_plain(tensor):
        return False
    name = tensor.untyped_storage().filename
    return name is not None and os.path.basename(name).startswith(_PREFIX)


@contextlib.contextmanager
def weights_parked(whole: Iterable[Tensor]) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """A function that puts parameters into files, where they are what they were; back in memory after an error.

    Args:
        whole: All that there is; where it is not large, nothing is put anywhere.
    """
    large, parked = are_large(whole), list[Tensor]()

    def put(tensors: Iterable[Tensor]) -> None:
        for tensor in (one for one in tensors if large and can_park(one)):
            tensor.data = park(tensor.data)
            parked.append(tensor)
        if large:
            tidy()

    try:
        yield put
    except BaseException:
        for tensor in parked:
            tensor.data = tensor.data.clone()
        raise


@contextlib.contextmanager
def activations_parked(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, most of what autograd saves for the backward pass of a large model lies in files.

    Args:
        parameters: Of the model, which are there anyway.
    """
    parameters, room = list(parameters), _HELD_BYTES
    own = {one.untyped_storage().data_ptr() for one in parameters if _is_plain(one)}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal room
        n_bytes = tensor.numel() * tensor.element_size()
        if not _is_plain(tensor) or n_bytes < _WORTH_BYTES or tensor.untyped_storage().data_ptr() in own:
            return tensor
        repeats = tensor.untyped_storage().nbytes() < n_bytes
        room -= 0 if repeats else n_bytes
        return tensor if repeats or room > 0 else park(tensor)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda parked: parked)
    with hooks if are_large(parameters) else contextlib.nullcontext():
        yield


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of the ordinary kind, on the CPU."""
    return tensor.device.type == "cpu" and not tensor.is_nested and span_of(tensor) is not None


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Take the room on the disk now: writing to a map without room would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.truncate(descriptor, n_bytes)


def _forget_pages(storage: torch.UntypedStorage) -> None:
    advise = _madvise()
    if advise is not None:  # elsewhere the system takes the memory when it has to
        advise(storage.data_ptr(), storage.nbytes(), mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call for memory that is not needed for now."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    return _system_call("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The call of GNU's library that empties its allocator."""
    return _system_call("malloc_trim", ctypes.c_size_t) if sys.platform == "linux" else None


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    """The call that sets GNU's allocator."""
    return _system_call("mallopt", ctypes.c_int, ctypes.c_int) if sys.platform == "linux" else None


def _system_call(name: str, *arguments: Any) -> Callable[..., int] | None:
    try:
        call = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    call.argtypes = arguments
    found: Callable[..., int] = call
    return found
