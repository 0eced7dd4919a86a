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
    """``x * 2**exponent`` in two halves, since ``2**exponent`` alone may overflow."""
    half = exponent // 2
    return x * _pow2(half, x) * _pow2(exponent - half, x)


def split_pow2(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(y, e)`` with ``x = y * 2**e`` and the largest entry of ``y`` in ``[1/2, 1)``.

    The exponent carries no gradient; it is a constant for autograd, and the product is exact.
    """
    if x.numel() == 0:
        return x, torch.zeros((), dtype=torch.int32, device=x.device)
    exponent = torch.frexp(x.detach().abs().amax()).exponent
    return times_pow2(x, -exponent), exponent


def spread_pow2(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Multiply a train by ``2**exponent``, an equal part to every core."""
    each, extra = divmod(exponent, len(cores))
    return [times_pow2(core, each + (k < extra)) for k, core in enumerate(cores)]


def _pow2(exponent: Tensor | int, like: Tensor) -> Tensor | float:
    if isinstance(exponent, int):
        return 2.0**exponent
    real = like.real.dtype if like.is_complex() else like.dtype
    return torch.exp2(exponent.to(real))
