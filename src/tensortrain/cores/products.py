"""Products and sums that are known by what they do to a carry, approximated without ever being formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.canonical import left_qr, orthogonalize_cores, right_qr
from tensortrain.cores.linalg import cut_basis
from tensortrain.cores.ranks import max_ranks
from tensortrain.cores.rounding import round_cores
from tensortrain.cores.scaling import place_pow2, split_pow2
from tensortrain.cores.sketch import OVERSAMPLING, Virtual, sketched_cores
from tensortrain.cores.unfold import absorb_right, as_left, as_right

__all__ = ["METHODS"]

_Made = tuple[Sequence[Tensor], dict[str, Any]]
_NO_LIMIT = 1 << 62


def _randomized(virtual: Virtual, eps: float, caps: Sequence[int], max_sweeps: int) -> _Made:
    """Sketches of growing rank until the singular values left over show that nothing above ``eps`` was missed."""
    guess = 16
    while True:
        widths = [min(r, cap + OVERSAMPLING, guess + OVERSAMPLING) for r, cap in zip(virtual.ranks, caps, strict=True)]
        sketched, exponent = sketched_cores(virtual, widths)
        last = len(sketched) - 1
        placed, single = place_pow2(sketched, exponent, last, virtual.like.dtype)
        span = (last, last) if single else (0, last)
        found = round_cores(placed, span, eps=eps, max_rank=caps[1:-1] if len(caps) > 2 else None)
        full = [w >= min(r, cap + OVERSAMPLING) for w, r, cap in zip(widths, virtual.ranks, caps, strict=True)]
        # A rank that came near the width may have been held down by it.
        if all(done or rank + OVERSAMPLING // 2 <= w for done, rank, w in zip(full, found.ranks, widths, strict=True)):
            return found.cores, {"sketch_ranks": tuple(widths)}
        guess *= 2


def _zipped(virtual: Virtual, eps: float, caps: Sequence[int], max_sweeps: int) -> _Made:
    """One pass from the left: each core of the product is cut as soon as it is known, then all are rounded."""
    virtual = virtual.balanced()
    like, d = virtual.like, len(virtual.modes)
    # What lies right of a bond is near orthonormal, not quite: hence a margin, and no proof.
    share = 0.1 * eps / math.sqrt(max(1, d - 1))
    most = max_ranks(virtual.modes)
    limits = [4 * cap + OVERSAMPLING if cap < top else _NO_LIMIT for cap, top in zip(caps, most, strict=True)]
    carry = like.new_ones((*like.shape[:-3], 1, 1))
    exponent = torch.zeros(like.shape[:-3], dtype=torch.int32, device=like.device)
    cores = []
    for k in range(d - 1):
        full = virtual.pass_left(k, carry)
        rows = as_left(full)
        size = torch.linalg.matrix_norm(rows)
        basis, _, _ = cut_basis(rows, share * size, limits[k + 1])
        cores.append(basis.unflatten(-2, full.shape[-3:-1]))
        carry, step = split_pow2(basis.mH @ rows, like.ndim - 3)
        exponent = exponent + step
    last, step = split_pow2(virtual.pass_left(d - 1, carry), like.ndim - 3)
    placed, single = place_pow2([*cores, last], exponent + step, d - 1, like.dtype)
    span = (d - 1, d - 1) if single else (0, d - 1)
    return round_cores(placed, span, eps=eps, max_rank=caps[1:-1]).cores, {}


def _fitted(virtual: Virtual, eps: float, caps: Sequence[int], max_sweeps: int) -> _Made:
    """Alternating least squares at the ranks of a randomized start.

    With orthonormal cores beside it, the best core k is the product seen through them; one pass to the left and one
    to the right are a sweep, and the norm of the core grows until it settles.
    """
    cores, _ = _randomized(virtual, eps, caps, max_sweeps)
    d, n_batch = len(cores), virtual.like.ndim - 3
    cores, _ = orthogonalize_cores(cores, (0, d - 1), 0)
    one = virtual.like.new_ones((*virtual.like.shape[:-3], 1, 1))
    right = [one] * (d + 1)
    right_exponent = [torch.zeros(virtual.like.shape[:-3], dtype=torch.int32, device=one.device)] * (d + 1)
    for k in range(d - 1, 0, -1):
        seen = virtual.pass_right(k, right[k + 1])
        right[k], step = split_pow2(as_right(seen) @ as_right(cores[k]).mH, n_batch)
        right_exponent[k] = right_exponent[k + 1] + step
    sizes: list[float] = []
    exponent = right_exponent[0]
    for n_sweeps in range(1, max_sweeps + 1):
        left, left_exponent = [one] * (d + 1), [right_exponent[d]] * (d + 1)
        for k in range(d):
            cores[k] = absorb_right(virtual.pass_left(k, left[k]), right[k + 1])
            exponent = left_exponent[k] + right_exponent[k + 1]
            if k < d - 1:
                cores[k] = left_qr(cores[k])[0]
                seen = virtual.pass_left(k, left[k])
                left[k + 1], step = split_pow2(as_left(cores[k]).mH @ as_left(seen), n_batch)
                left_exponent[k + 1] = left_exponent[k] + step
        sizes.append(float((torch.linalg.vector_norm(cores[-1], dim=(-3, -2, -1)).log2() + exponent).amax()))
        # The square of the error is the square of the norm lost: a norm that stands still means the fit does.
        if len(sizes) > 1 and abs(sizes[-1] - sizes[-2]) <= 0.1 * eps**2 + 1e-14:
            break
        if n_sweeps == max_sweeps:
            break
        last = cores[-1]
        for k in range(d - 1, 0, -1):
            cores[k] = right_qr(last if k == d - 1 else absorb_right(virtual.pass_left(k, left[k]), right[k + 1]))[0]
            seen = virtual.pass_right(k, right[k + 1])
            right[k], step = split_pow2(as_right(seen) @ as_right(cores[k]).mH, n_batch)
            right_exponent[k] = right_exponent[k + 1] + step
    placed, _ = place_pow2(cores, exponent, d - 1, virtual.like.dtype)
    converged = len(sizes) > 1 and abs(sizes[-1] - sizes[-2]) <= 0.1 * eps**2 + 1e-14
    return placed, {"n_sweeps": len(sizes), "converged": converged}


METHODS: dict[str, Callable[[Virtual, float, Sequence[int], int], _Made]] = {
    "randomized": _randomized,
    "zipup": _zipped,
    "fit": _fitted,
}
