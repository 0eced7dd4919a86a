"""TT-SVD of what does not fit the memory: pieces are decomposed as they come and joined pairwise.

Pieces lie in different places of the tensor, so their errors are orthogonal: the errors of one level of joins add in
squares and come to no more than the tolerance of that level. A tree of joins has few levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.algebra import add_cores, pad_zeros
from tensortrain.cores.decompose import decompose
from tensortrain.cores.ranks import RankLike
from tensortrain.cores.rounding import round_cores
from tensortrain.cores.tolerance import Finished, checked_eps, compute_dtype
from tensortrain.cores.validation import DTYPES
from tensortrain.errors import KindError, ShapeError

__all__ = ["is_stream", "stream_tt_svd"]

_SHARE = 0.4  # of eps for all levels together; the rest is left for the last rounding, which finds the ranks


def is_stream(x: Any) -> bool:
    """Whether ``x`` is read piece by piece: an array, a slice of a safetensors file, or an iterable of slabs."""
    if isinstance(x, Tensor):
        return False
    return isinstance(x, np.ndarray) or hasattr(x, "get_shape") or isinstance(x, Iterator) or _is_list_of_tensors(x)


def _is_list_of_tensors(x: Any) -> bool:
    return (
        isinstance(x, Iterable)
        and not isinstance(x, (str, bytes))
        and (not isinstance(x, Sequence) or (len(x) > 0 and all(isinstance(part, Tensor) for part in x)))
    )


@torch.no_grad()
def stream_tt_svd(
    x: Any,
    shape: Sequence[int] | None,
    *,
    eps: float | None,
    max_rank: RankLike | None,
    method: str,
    slab_bytes: int,
) -> Finished:
    """Cores of what is read piece by piece; see ``tt_svd``."""
    stored = _Stored.of(x)
    if stored is None:
        joiner, whole = _joined_slabs(iter(x), _checked_modes(shape), eps, method)
    else:
        if shape is not None and tuple(shape) != stored.shape:
            raise ShapeError(
                f"a stored tensor has its own shape: shape has {tuple(shape)}, expected {stored.shape}. Leave it out."
            )
        if stored.n_bytes <= slab_bytes:
            return decompose(stored.read(stored.box), eps=eps, max_rank=max_rank, method=method)
        joiner = _Joiner(eps, method, stored.dtype, len(stored.shape), max(1, stored.levels(slab_bytes)))
        whole = _joined_box(stored, stored.box, slab_bytes, joiner)
    return joiner.finished(whole, max_rank)


def _checked_modes(shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        raise ShapeError("a stream of slabs needs the shape of the whole: shape has None, expected a tuple. Pass it.")
    return tuple(int(n) for n in shape)


class _Joiner:
    """Decomposes pieces, joins trains, and shares the tolerance out among the levels of the tree.

    All in the compute dtype: the cores are cast to that of the tensor once, at the end.
    """

    def __init__(self, eps: float | None, method: str, dtype: torch.dtype, order: int, levels: int) -> None:
        self.eps, self.dtype = checked_eps(eps, dtype, order), dtype
        self.share = _SHARE * self.eps / (levels + 1)
        self.method, self.n_pieces = method, 0

    def piece(self, x: Tensor) -> Finished:
        """Cores, and their absolute error over their own norm."""
        self.n_pieces += 1
        # what has no such dtype is refused there
        wide = x.to(compute_dtype(x.dtype)) if x.dtype in DTYPES else x
        return decompose(wide, eps=self.share, method=self.method)

    def join(self, left: Finished, right: Finished, dim: int) -> Finished:
        """Side by side along a mode. Errors relative to the parts are no larger relative to the whole."""
        joined = _side_by_side(left.cores, right.cores, dim)
        found = round_cores(joined, (0, len(joined) - 1), eps=self.share)
        before = max(left.bound, right.bound)
        return replace(found, bound=before + found.bound * (1.0 + before))

    def finished(self, whole: Finished, max_rank: RankLike | None) -> Finished:
        """What is left of the tolerance goes to the last rounding: the errors so far need not be orthogonal to it."""
        left = max(self.eps - whole.bound * (1.0 + self.eps), 0.5 * self.eps)
        last = round_cores(whole.cores, whole.center, eps=left, max_rank=max_rank, dtype=self.dtype)
        # relative to a norm that the pieces together may have changed by their own error
        total = whole.bound + last.bound * (1.0 + whole.bound)
        return replace(last, bound=total, method=self.method, eps=self.eps, n_pieces=self.n_pieces)


def _side_by_side(left: Sequence[Tensor], right: Sequence[Tensor], dim: int) -> list[Tensor]:
    n, m = left[dim].shape[-2], right[dim].shape[-2]
    return add_cores(pad_zeros(left, dim, (0, m)), pad_zeros(right, dim, (n, 0)))


class _Stored:
    """A tensor in a file, read box by box."""

    def __init__(self, source: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.source, self.shape, self.dtype = source, shape, dtype

    @classmethod
    def of(cls, x: Any) -> _Stored | None:
        if isinstance(x, np.ndarray):
            if x.ndim == 0 or x.dtype.kind not in "fc":
                raise KindError(
                    f"an array must have a mode and a floating or complex dtype: x has shape {x.shape} and {x.dtype}, "
                    "expected (n_1, ..). Convert it with x.astype(float)."
                )
            return cls(x, tuple(x.shape), torch.from_numpy(np.empty(0, x.dtype)).dtype)
        if hasattr(x, "get_shape"):
            shape = tuple(x.get_shape())
            first = x[tuple(slice(0, 1) for _ in shape)]
            return cls(x, shape, torch.as_tensor(first).dtype)
        return None

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, n) for n in self.shape)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def levels(self, slab_bytes: int) -> int:
        return math.ceil(math.log2(max(1.0, self.n_bytes / slab_bytes))) + 1

    def read(self, box: Sequence[tuple[int, int]]) -> Tensor:
        part = self.source[tuple(slice(*span) for span in box)]
        return torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else torch.as_tensor(part)


def _joined_box(stored: _Stored, box: tuple[tuple[int, int], ...], slab_bytes: int, joiner: _Joiner) -> Finished:
    """Halve the slowest mode that can be halved until a piece fits, and join the halves."""
    sizes = [stop - start for start, stop in box]
    if math.prod(sizes) * stored.dtype.itemsize <= slab_bytes or max(sizes) == 1:
        return joiner.piece(stored.read(box))
    dim = next(k for k, n in enumerate(sizes) if n > 1)
    start, stop = box[dim]
    middle = (start + stop) // 2
    halves = [(*box[:dim], span, *box[dim + 1 :]) for span in ((start, middle), (middle, stop))]
    left, right = (_joined_box(stored, half, slab_bytes, joiner) for half in halves)
    return joiner.join(left, right, dim)


def _joined_slabs(
    slabs: Iterator[Any], modes: tuple[int, ...], eps: float | None, method: str
) -> tuple[_Joiner, Finished]:
    """Slabs along the first mode, joined like the digits of a binary counter: few trains are held at a time."""
    joiner: _Joiner | None = None
    held: list[tuple[int, Finished]] = []  # level, train
    seen = 0
    for slab in slabs:
        part = torch.as_tensor(slab)
        if part.ndim == len(modes) - 1:
            part = part[None]
        if tuple(part.shape[1:]) != modes[1:] or seen + part.shape[0] > modes[0]:
            raise ShapeError(
                f"slabs must fill the first mode: a slab at {seen} has shape {tuple(part.shape)}, expected "
                f"(at most {modes[0] - seen}, {', '.join(map(str, modes[1:]))}). Check shape and order."
            )
        if joiner is None:
            joiner = _Joiner(eps, method, part.dtype, len(modes), 2 * max(1, modes[0].bit_length()))
        seen += part.shape[0]
        held.append((0, joiner.piece(part)))
        while len(held) > 1 and held[-1][0] == held[-2][0]:
            (level, left), (_, right) = held[-2:]
            held[-2:] = [(level + 1, joiner.join(left, right, 0))]
    if joiner is None or seen != modes[0]:
        raise ShapeError(
            f"slabs must fill the first mode: they came to {seen} of {modes[0]}. Check shape, or give the rest."
        )
    while len(held) > 1:
        (level, left), (_, right) = held[-2:]
        held[-2:] = [(level + 1, joiner.join(left, right, 0))]
    return joiner, held[0][1]
