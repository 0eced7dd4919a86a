"""Large tensors that lie in files, mapped into memory: what is not looked at takes none.

A parked tensor is a tensor like any other, on the CPU. Its numbers come from the file when they are read, and go there
when they are written; after ``let_go`` they take no memory until they are needed again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from tensortrain.system.storage import count_bytes

__all__ = [
    "LARGE_BYTES",
    "activations_parked",
    "are_large",
    "can_park",
    "is_parked",
    "let_go",
    "map_file",
    "park",
    "park_zeros",
    "weights_parked",
]

LARGE_BYTES = 2**27  # what holds no more than this together is left in memory

_CHUNK = 2**20  # numbers that are written at once
_HELD_BYTES, _WORTH_BYTES = 2**26, 2**19  # of what backward needs: held in memory all the same; least size of a file
_MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by where they begin


def park(tensor: Tensor, *, dtype: torch.dtype | None = None, path: Path | None = None) -> Tensor:
    """A copy of a tensor in a file.

    Args:
        path: Of a new file; without it, one that nobody sees, and that is gone with the tensor.

    Raises:
        OSError: There is no room on the disk.
    """
    parked = park_zeros(tensor.shape, dtype or tensor.dtype, path=path)
    flat, source = parked.view(-1), tensor.detach().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        flat[start : start + _CHUNK] = source[start : start + _CHUNK]
        let_go(parked)
    return parked


def park_zeros(shape: Iterable[int], dtype: torch.dtype, *, path: Path | None = None) -> Tensor:
    """A tensor of zeros in a file; arguments and errors are those of ``park``."""
    size = torch.Size(shape)
    n_bytes = _n_bytes(size, dtype)
    if n_bytes == 0:
        return torch.zeros(size, dtype=dtype)
    with _new_file(path) as file:
        _reserve(file, n_bytes)
        return _mapped(file, size, dtype)


def map_file(path: Path, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """The tensor in a file that ``park`` wrote.

    Raises:
        OSError: There is no such file, or it is of another size.
    """
    size = torch.Size(shape)
    n_bytes, found = _n_bytes(size, dtype), path.stat().st_size
    if found != n_bytes:
        raise OSError(f"{path} has {found} bytes, expected {n_bytes}")
    if n_bytes == 0:
        return torch.zeros(size, dtype=dtype)
    with path.open("r+b") as file:
        return _mapped(file, size, dtype)


def let_go(*tensors: Tensor | None) -> None:
    """Give back the memory of those that are parked; what was written to them stays in their files."""
    for tensor in tensors:
        mapped = None if tensor is None else _map_of(tensor)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system does it when it has to
            mapped.madvise(mmap.MADV_DONTNEED)


def are_large(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors hold so much together that copies of them lie in files."""
    return count_bytes(tensors) > LARGE_BYTES


def can_park(tensor: Tensor) -> bool:
    """Whether a tensor is worth a file, and its memory is free once it has one."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_inference():
        return False
    n_bytes = tensor.numel() * tensor.element_size()
    own = tensor.untyped_storage().nbytes() == n_bytes and tensor.is_contiguous()
    return own and n_bytes >= _WORTH_BYTES and not (tensor.is_conj() or tensor.is_neg() or is_parked(tensor))


def is_parked(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file."""
    return _map_of(tensor) is not None


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

    try:
        yield put
    except BaseException:
        for tensor in parked:
            tensor.data = tensor.data.clone()
        raise


@contextlib.contextmanager
def activations_parked(*, but_not: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, most of what autograd saves for the backward pass lies in files.

    Args:
        but_not: Tensors that are there anyway, such as parameters.
    """
    own, room = {_address(tensor) for tensor in but_not}, _HELD_BYTES

    def pack(tensor: Tensor) -> Tensor:
        nonlocal room
        n_bytes = tensor.numel() * tensor.element_size()
        plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_nested
        if not plain or n_bytes < _WORTH_BYTES or _address(tensor) in own:
            return tensor
        repeats = tensor.untyped_storage().nbytes() < n_bytes
        room -= 0 if repeats else n_bytes
        return tensor if repeats or room > 0 else park(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda parked: parked):
        yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided and not tensor.is_meta else 0


def _map_of(tensor: Tensor) -> mmap.mmap | None:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    return _MAPS.get(tensor.untyped_storage().data_ptr())


def _n_bytes(size: torch.Size, dtype: torch.dtype) -> int:
    return size.numel() * torch.empty((), dtype=dtype).element_size()


def _new_file(path: Path | None) -> IO[bytes]:
    if path is None:
        return tempfile.TemporaryFile()  # has no name, so that a kill leaves nothing
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w+b")


def _reserve(file: IO[bytes], n_bytes: int) -> None:
    """Take the room on the disk now: writing to a map without room would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    else:
        file.truncate(n_bytes)


def _mapped(file: IO[bytes], size: torch.Size, dtype: torch.dtype) -> Tensor:
    mapped = mmap.mmap(file.fileno(), 0)
    found = torch.frombuffer(mapped, dtype=dtype).view(size)
    _MAPS[found.data_ptr()] = mapped
    return found
