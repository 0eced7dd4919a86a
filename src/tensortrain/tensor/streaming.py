"""TT-SVD of what does not fit the memory: pieces are decomposed as they come and joined pairwise.

Pieces lie in different places of the tensor, so their errors are orthogonal: the errors of one level of joins add in
squares and come to no more than the tolerance of that level. A tree of joins has few levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.ranks import RankLike
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.cores.validation import DTYPES
from tensortrain.errors import KindError, ShapeError
from tensortrain.tensor.algebra import cat
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.rounding import round_and_store, round_tt
from tensortrain.tensor.train import TensorTrain

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


def stream_tt_svd(
    x: Any,
    shape: Sequence[int] | None,
    *,
    eps: float | None,
    max_rank: RankLike | None,
    method: str,
    slab_bytes: int,
    one: Callable[..., Approximation[TensorTrain]],
) -> Approximation[TensorTrain]:
    """See ``tt_svd``; ``one`` decomposes a piece in memory."""
    stored = _Stored.of(x)
    if stored is not None:
        if shape is not None and tuple(shape) != stored.shape:
            raise ShapeError(
                f"a stored tensor has its own shape: shape has {tuple(shape)}, expected {stored.shape}. Leave it out."
            )
        if stored.n_bytes <= slab_bytes:
            return one(stored.read(stored.box), eps=eps, max_rank=max_rank, method=method)
        joiner = _Joiner(eps, method, one, stored.dtype, len(stored.shape), max(1, stored.levels(slab_bytes)))
        whole = _joined_box(stored, stored.box, slab_bytes, joiner)
    else:
        if shape is None:
            raise ShapeError(
                "a stream of slabs needs the shape of the whole: shape has None, expected a tuple. Pass it."
            )
        modes = tuple(int(n) for n in shape)
        joiner, whole = _joined_slabs(iter(x), modes, eps, method, one)
    value, bound = whole
    # What is left of the tolerance: the errors so far and the last rounding need not be orthogonal.
    left = max(joiner.eps - bound * (1.0 + joiner.eps), 0.5 * joiner.eps)
    last = round_and_store(value, joiner.dtype, eps=left, max_rank=max_rank)
    assert last.rel_error_bound is not None
    # relative to a norm that the pieces together may have changed by their own error
    total = bound + last.rel_error_bound * (1.0 + bound)
    return Approximation(
        last.value, total, {**last.info, "method": method, "eps": joiner.eps, "n_pieces": joiner.n_pieces}
    )


class _Joiner:
    """Decomposes pieces, joins trains, and shares the tolerance out among the levels of the tree.

    All in the compute dtype: the cores are cast to that of the tensor once, at the end.
    """

    def __init__(
        self, eps: float | None, method: str, one: Callable[..., Any], dtype: torch.dtype, order: int, levels: int
    ) -> None:
        self.eps, self.dtype = checked_eps(eps, dtype, order), dtype
        self.share = _SHARE * self.eps / (levels + 1)
        self.method, self.one, self.n_pieces = method, one, 0

    def piece(self, x: Tensor) -> tuple[TensorTrain, float]:
        """A train and its absolute error over its own norm."""
        self.n_pieces += 1
        # what has no such dtype is refused there
        wide = x.to(compute_dtype(x.dtype)) if x.dtype in DTYPES else x
        found = self.one(wide, eps=self.share, method=self.method)
        return found.value, float(found.rel_error_bound)

    def join(
        self, left: tuple[TensorTrain, float], right: tuple[TensorTrain, float], dim: int
    ) -> tuple[TensorTrain, float]:
        """Side by side along a mode. Errors relative to the parts are no larger relative to the whole."""
        found = round_tt(cat((left[0], right[0]), dim=dim), eps=self.share)
        before = max(left[1], right[1])
        assert found.rel_error_bound is not None
        return found.value, before + found.rel_error_bound * (1.0 + before)


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


def _joined_box(
    stored: _Stored, box: tuple[tuple[int, int], ...], slab_bytes: int, joiner: _Joiner
) -> tuple[TensorTrain, float]:
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
    slabs: Iterator[Any], modes: tuple[int, ...], eps: float | None, method: str, one: Callable[..., Any]
) -> tuple[_Joiner, tuple[TensorTrain, float]]:
    """Slabs along the first mode, joined like the digits of a binary counter: few trains are held at a time."""
    joiner: _Joiner | None = None
    held: list[tuple[int, tuple[TensorTrain, float]]] = []  # level, train
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
            joiner = _Joiner(eps, method, one, part.dtype, len(modes), 2 * max(1, modes[0].bit_length()))
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
