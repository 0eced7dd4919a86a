"""The IDX file format of MNIST and its relatives, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensortrain.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, uncompressed when its first two bytes are gzip's.

    Raises:
        DataError: The file cannot be read, or its compressed stream is cut short or damaged.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"a data file must be whole: {path} has {error or type(error).__name__}, expected a readable "
            "file. Fetch it again."
        ) from error


def parse_idx(content: bytes, *, where: str) -> Tensor:
    """Read an IDX array of unsigned bytes.

    Args:
        content: The uncompressed file: two zero bytes, type code, number of axes, big-endian sizes, data.
        where: Name for messages.

    Returns:
        Tensor: uint8, in the shape that the header states.

    Raises:
        DataError: Wrong magic number, or the data is longer or shorter than the header states.
    """
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise DataError(
            f"an IDX file of bytes must start with 00 00 08: {where} has {content[:4].hex(' ') or 'nothing'}, expected "
            "that magic number. Check that this is the right file."
        )
    n_axes = content[3]
    header_bytes = 4 + 4 * n_axes
    if len(content) < header_bytes:
        raise _wrong_size(where, len(content), header_bytes)
    shape = struct.unpack(f">{n_axes}I", content[4:header_bytes])
    expected = header_bytes + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise _wrong_size(where, len(content), expected)
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape).copy())


def _wrong_size(where: str, actual: int, expected: int) -> DataError:
    return DataError(
        f"an IDX file must hold what its header states: {where} has {actual} bytes, expected {expected}. "
        "Fetch the file again."
    )
