"""Powers of two kept apart from numbers, so that long chains neither overflow nor vanish."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tensortrain.system.tracing import can_look, constant_when_traced

__all__ = [
    "balanced_pow2",
    "in_dtype",
    "keep_pow2",
    "multiplied_pow2",
    "place_pow2",
    "shares_pow2",
    "split_pow2",
    "splitter",
    "spread_pow2",
    "times_pow2",
    "work_dtype",
]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype for arithmetic that LAPACK must know: half precisions are widened to float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def in_dtype(cores: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The cores in a dtype. Asking takes a tenth of the time of a conversion to what a core is already."""
    return [core if core.dtype == dtype else core.to(dtype) for core in cores]


def times_pow2(x: Tensor, exponent: Tensor | int) -> Tensor:
    """``x * 2**exponent`` in two halves, since ``2**exponent`` alone may overflow.

    A tensor of exponents has the leading axes of ``x``, one exponent for each of their members.
    """
    if isinstance(exponent, int) and exponent == 0:
        return x
    if isinstance(exponent, Tensor) and exponent.ndim:
        exponent = exponent.reshape(exponent.shape + (1,) * (x.ndim - exponent.ndim))
    half = torch.floor_divide(exponent, 2) if isinstance(exponent, Tensor) else exponent // 2
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
    # One factor will do, for it cannot overflow unless all is subnormal, and then the clamp keeps it from that.
    exponent = torch.frexp(largest).exponent.clamp_min(3 - _top(x.dtype))
    factor = torch.exp2(-exponent.to(largest.dtype))
    return x * (factor.reshape(factor.shape + (1,) * (x.ndim - n_batch)) if n_batch else factor), exponent


def balanced_pow2(cores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The same train but for a power of two, with rows of about 1 in all cores but the first; and its exponent.

    Where one path through a train is spread over the cores and another sits in one of them, no scale of whole cores
    keeps both within the range. So every rank index gets a power of two of its own, which goes from a core to the one
    before it; in the end only paths that are nothing beside the largest may vanish.

    Args:
        cores: ``(.., r, n, s)`` each.
    """
    out, n_batch = list(cores), cores[0].ndim - 3
    total = torch.zeros(cores[0].shape[:-3], dtype=torch.int32, device=cores[0].device)
    for at in range(len(out) - 1, 0, -1):
        out[at], rows = _split_along(out[at], (-2, -1))
        columns, own = _split_along(out[at - 1], (-3, -2))
        weights = rows.movedim(-3, -1) + own  # minus infinity where there is nothing
        top = weights.amax(-1, keepdim=True)
        top = top.where(top.isfinite(), 0.0)
        out[at - 1] = columns * torch.exp2(weights - top)
        total = total + top[..., 0, 0, 0].to(torch.int32)
    out[0], step = split_pow2(out[0], n_batch)
    return out, total + step


def _split_along(core: Tensor, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Slices of a core with their largest entry in ``[1/2, 1)``, and exponents as floats, axes kept."""
    largest = core.detach().abs().amax(dim=dims, keepdim=True)
    exponent = torch.frexp(largest).exponent
    return times_pow2(core, -exponent), torch.where(largest > 0, exponent.to(largest.dtype), -math.inf)


def keep_pow2(x: Tensor, n_batch: int = 0) -> tuple[Tensor, Tensor]:
    """Stands in for ``split_pow2`` where nothing can leave the range: ``x`` as it is, and exponents 0."""
    return x, torch.zeros(x.shape[:n_batch], dtype=torch.int32, device=x.device)


def splitter(cores: Sequence[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``keep_pow2`` if products of these cores ``(r, n, s)``, and their squares, stay far within the range.

    Scaling takes most of the time of small trains. The product of the norms of the cores bounds all that comes; from
    below the ranks tell by how much less it can be, but for cancellation. Batches are always scaled.
    """
    if cores[0].ndim > 3:
        return split_pow2
    logs = torch.stack(torch._foreach_norm([core.detach() for core in cores])).log2()
    ranks = sum(math.log2(core.shape[-1] * core.shape[-2]) for core in cores)
    worst = float(logs.abs().sum()) + ranks  # one sync
    return keep_pow2 if worst < 0.35 * _top(cores[0].dtype) else split_pow2


@constant_when_traced
def _top(dtype: torch.dtype) -> int:
    """Exponent of the largest number of a dtype."""
    return _TOPS.get(dtype) or math.frexp(torch.finfo(dtype).max)[1]


_REALS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Asked for at every step along a chain; finfo takes as long as a product of small cores.
_TOPS = {dtype: math.frexp(torch.finfo(dtype).max)[1] for dtype in (*_REALS, torch.complex128, torch.complex64)}


def spread_pow2(cores: Sequence[Tensor], exponent: Tensor | int) -> list[Tensor]:
    """Multiply a train by ``2**exponent``, an equal part to every core."""
    if isinstance(exponent, Tensor) and exponent.ndim == 0 and exponent.device.type == "cpu" and can_look(exponent):
        exponent = int(exponent)  # numbers take a tenth of the time of tensors of one
    if isinstance(exponent, int) and exponent == 0:
        return list(cores)
    each, extra = exponent // len(cores), exponent % len(cores)
    return [times_pow2(core, each + (extra > k)) for k, core in enumerate(cores)]


def place_pow2(
    cores: Sequence[Tensor], exponent: Tensor | int, at: int, dtype: torch.dtype
) -> tuple[list[Tensor], bool]:
    """Multiply by ``2**exponent``: core ``at`` where ``dtype`` can hold that, else every core alike.

    Returns:
        The cores, and whether core ``at`` took it all.
    """
    shares, single = shares_pow2(cores, exponent, at, dtype)
    return multiplied_pow2(cores, shares), single


def shares_pow2(
    cores: Sequence[Tensor], exponent: Tensor | int, at: int, dtype: torch.dtype, largest: float | None = None
) -> tuple[list[Tensor | int], bool]:
    """How ``2**exponent`` is shared out among the cores, so that ``dtype`` can hold their entries.

    Entries of core ``at`` may be of any size, those of the others are taken to be at most about 1. Its ``largest`` may
    be known already.

    Returns:
        An exponent for each core, and whether core ``at`` gets it all.
    """
    top = _top(dtype) - 3
    if largest is not None and isinstance(exponent, int):
        bits = math.frexp(largest)[1] if largest else 0
        if -top // 2 <= exponent + bits <= top:
            return [exponent if k == at else 0 for k in range(len(cores))], True
    size = _exponent_of(cores[at])
    total = torch.where(size.isfinite(), exponent + size, 0).to(torch.int32)
    lowest, highest = (int(e) for e in torch.aminmax(total)) if total.numel() else (0, 0)  # the one host sync
    if -top // 2 <= lowest and highest <= top:
        return [exponent if k == at else 0 for k in range(len(cores))], True
    each, extra = total // len(cores), total % len(cores)
    shares = [each + (extra > k) for k in range(len(cores))]
    shares[at] = shares[at] - torch.where(size.isfinite(), size, 0).to(torch.int32)
    return list(shares), False


def multiplied_pow2(cores: Sequence[Tensor], shares: Sequence[Tensor | int]) -> list[Tensor]:
    """Every core times its own power of two."""
    pairs = zip(cores, shares, strict=True)
    return [core if isinstance(share, int) and share == 0 else times_pow2(core, share) for core, share in pairs]


def _exponent_of(core: Tensor) -> Tensor:
    """Of two, of the largest entry of each member; minus infinity for zeros."""
    if core.numel() == 0:
        return core.new_full(core.shape[:-3], -math.inf, dtype=torch.float64)
    largest = core.detach().abs().amax(dim=(-3, -2, -1))
    return torch.where(largest > 0, torch.frexp(largest).exponent.to(torch.float64), -math.inf)


def _pow2(exponent: Tensor | int, like: Tensor) -> Tensor | float:
    # What is infinite in the dtype would turn a zero into NaN, and 2.0**1024 is an error in Python.
    most = _top(like.dtype) - 1
    if isinstance(exponent, int):
        return 2.0 ** min(exponent, most)
    real = like.real.dtype if like.is_complex() else like.dtype
    return torch.exp2(exponent.clamp_max(most).to(real))
