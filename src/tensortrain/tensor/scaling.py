"""Powers of two kept apart from numbers, so that long chains neither overflow nor vanish."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["split_pow2", "spread_pow2", "times_pow2", "work_dtype"]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype for arithmetic that LAPACK must know: half precisions are widened to float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def times_pow2(x: Tensor, exponent: Tensor | int) -> Tensor:
    """``x * 2**exponent`` in two halves, since ``2**exponent`` alone may overflow.

    A tensor of exponents has the leading axes of ``x``, one exponent for each of their members.
    """
    if isinstance(exponent, Tensor):
        exponent = exponent.reshape(exponent.shape + (1,) * (x.ndim - exponent.ndim))
    half = exponent // 2
    return x * _pow2(half, x) * _pow2(exponent - half, x)


def split_pow2(x: Tensor, n_batch: int = 0) -> tuple[Tensor, Tensor]:
    """``(y, e)`` with ``x = y * 2**e`` and the largest entry of ``y`` in ``[1/2, 1)``.

    The exponent carries no gradient; it is a constant for autograd, and the product is exact. The first
    ``n_batch`` axes have an exponent for each member.
    """
    if x.numel() == 0:
        return x, torch.zeros(x.shape[:n_batch], dtype=torch.int32, device=x.device)
    largest = x.detach().abs()
    if x.ndim > n_batch:
        largest = largest.amax(dim=tuple(range(n_batch, x.ndim)))
    exponent = torch.frexp(largest).exponent
    return times_pow2(x, -exponent), exponent


def spread_pow2(cores: Sequence[Tensor], exponent: Tensor | int) -> list[Tensor]:
    """Multiply a train by ``2**exponent``, an equal part to every core."""
    each, extra = exponent // len(cores), exponent % len(cores)
    return [times_pow2(core, each + (extra > k)) for k, core in enumerate(cores)]


def _pow2(exponent: Tensor | int, like: Tensor) -> Tensor | float:
    if isinstance(exponent, int):
        return 2.0**exponent
    real = like.real.dtype if like.is_complex() else like.dtype
    return torch.exp2(exponent.to(real))
