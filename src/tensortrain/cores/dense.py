"""What is dense, to cores: a tensor, a matrix with modes, or what is read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensortrain.cores.decompose import check_method, check_tensor, decompose
from tensortrain.cores.ranks import RankLike
from tensortrain.cores.regroup import dense_to_paired
from tensortrain.cores.streaming import is_stream, stream_tt_svd
from tensortrain.cores.tolerance import Finished
from tensortrain.errors import KindError, ShapeError

__all__ = ["SLAB_BYTES", "cores_of_dense"]

SLAB_BYTES = 1 << 28  # of a stored array that are read at a time


def cores_of_dense(
    x: Tensor | Any,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: str = "auto",
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    batch_dims: int = 0,
    slab_bytes: int = SLAB_BYTES,
) -> Finished:
    """Cores ``(.., r, n, s)``, those of a matrix with both modes joined to one; arguments as for ``tt_svd``."""
    check_method(method)
    if is_stream(x):
        if out_modes is not None or in_modes is not None or batch_dims:
            raise KindError(
                "a stream is decomposed as a plain tensor: out_modes, in_modes or batch_dims were given, expected "
                "none. Load the tensor, or reshape the train."
            )
        return stream_tt_svd(x, shape, eps=eps, max_rank=max_rank, method=method, slab_bytes=slab_bytes)
    check_tensor(x, batch_dims)
    if out_modes is not None or in_modes is not None:
        x = _paired(x, out_modes, in_modes, batch_dims)
    return decompose(x, eps=eps, max_rank=max_rank, method=method, n_batch=batch_dims)


def _paired(x: Tensor, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None, n_batch: int) -> Tensor:
    """A matrix as a tensor ``(.., i_1 j_1, .., i_d j_d)``."""
    if out_modes is None or in_modes is None:
        missing = "out_modes" if out_modes is None else "in_modes"
        raise ShapeError(f"a matrix needs both mode tuples: {missing} has None, expected a tuple. Pass both.")
    out, into = tuple(int(n) for n in out_modes), tuple(int(n) for n in in_modes)
    if len(out) != len(into) or not out:
        raise ShapeError(
            f"out_modes and in_modes must have one length: they have {len(out)} and {len(into)} entries, expected "
            "equal lengths of at least 1. Pad the shorter one with modes of size 1."
        )
    if x.ndim != 2 + n_batch:
        raise ShapeError(f"modes are for a matrix: x has shape {tuple(x.shape)}, expected (M, N). Reshape it to 2-D.")
    for name, modes, size in (("out_modes", out, x.shape[-2]), ("in_modes", into, x.shape[-1])):
        if math.prod(modes) != size or min(modes) < 1:
            raise ShapeError(
                f"{name} must multiply to the size of its axis: {name} has {modes} with product {math.prod(modes)}, "
                f"expected {size} (x has shape {tuple(x.shape)}). Choose factors of {size}."
            )
    return dense_to_paired(x, out, into)
