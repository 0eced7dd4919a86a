"""Exponents kept beside the numbers of a chain: nothing overflows or vanishes on the way to a value that fits.

Every index of a bond has an exponent of its own, since a sum adds terms of sizes that no common exponent may hold:
one train may grow to ``2**1200`` in the middle and come back, while the one beside it stays at 1.

An algorithm asks a ``Scale`` to ``weigh`` each core by the exponents that wait at its left bond, and to ``split`` what
it carries on. ``Free`` does nothing but remember what was carried; ``Kept`` keeps exponents. ``guarded`` runs the
first, and the second where the numbers came near the ends of the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor

from tensortrain.cores.scaling import keep_pow2, times_pow2
from tensortrain.system.tracing import can_look

__all__ = ["Exponents", "Kept", "Scale", "common", "guarded", "plain_exponent"]

Exponents = Tensor | int  # int32 (.., r), one for each index of a bond; or 0: none are kept
Out = TypeVar("Out")

# Marks the exponent of an index at which everything is zero: it gives way to the others, and is not forgotten, since
# the derivative by a zero is no zero.
_ZERO = -(1 << 27)
_SHARE = 0.9  # of the exponents of a dtype that products may use
_SMALL = 1 << 16  # entries up to which tensors are looked at together


class Scale(Protocol):
    """What an algorithm on a chain does about sizes."""

    def weigh(self, core: Tensor, exponents: Exponents) -> tuple[Tensor, Exponents]:
        """``(p, f)`` with ``core[r, .., s] * 2**exponents[r] = p[r, .., s] * 2**f[s]``, and ``p`` below 1."""
        ...

    def split(self, x: Tensor, axis: int = -1) -> tuple[Tensor, Exponents]:
        """``(y, e)`` with ``x = y * 2**e`` along an axis, and the largest entry at each index of ``y`` near 1."""
        ...


class Free:
    """Numbers as they are, and what was carried on, to be looked at afterwards."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def weigh(self, core: Tensor, exponents: Exponents) -> tuple[Tensor, Exponents]:
        return core, exponents

    def split(self, x: Tensor, axis: int = -1) -> tuple[Tensor, Exponents]:
        if axis == -1:
            self.seen.append(x)
        return x, 0


class Kept:
    """Exponents for every index of a bond, behind ``n_batch`` axes of members."""

    def __init__(self, n_batch: int) -> None:
        self.n_batch = n_batch

    def weigh(self, core: Tensor, exponents: Exponents) -> tuple[Tensor, Exponents]:
        size = core.detach().abs()
        middle = tuple(range(self.n_batch + 1, core.ndim - 1))
        size = _largest(size, middle) if middle else size  # .. r s
        own = torch.frexp(size).exponent
        if isinstance(exponents, int):
            exponents = torch.zeros(size.shape[:-1], dtype=torch.int32, device=size.device)
        waiting = exponents.unsqueeze(-1)
        after = (waiting + own.where(size > 0, _ZERO)).amax(-2)
        after = plain_exponent(after)
        shift = plain_exponent(waiting) - after.unsqueeze(-2)
        # An index at which all is zero had no say in what comes after it.
        shift = torch.where((size > 0) & (shift > -own), -own, shift)
        return times_pow2(core, shift.reshape(*shift.shape[:-1], *(1,) * len(middle), shift.shape[-1])), after

    def split(self, x: Tensor, axis: int = -1) -> tuple[Tensor, Exponents]:
        others = tuple(k for k in range(self.n_batch, x.ndim) if k != x.ndim + axis)
        size = _largest(x.detach().abs(), others)
        # One factor will do: it cannot overflow unless all is subnormal, and the bound keeps it from that.
        exponents = torch.frexp(size).exponent.clamp_min(3 - math.frexp(torch.finfo(size.dtype).max)[1])
        shape = [*x.shape[: self.n_batch], *(1,) * (x.ndim - self.n_batch)]
        shape[axis] = x.shape[axis]
        return x * torch.exp2(-exponents.reshape(shape).to(size.dtype)), exponents.where(size > 0, _ZERO)


def guarded(
    cores: Sequence[Tensor],
    run: Callable[[Scale], Out],
    n_batch: int = 0,
    *,
    factors: int = 1,
    storage: torch.dtype | None = None,
) -> Out:
    """``run`` with a ``Free`` scale if no product leaves the range, else with one that is ``Kept``.

    Args:
        cores: All that is multiplied, of one dtype.
        run: Multiplies cores one after the other, and calls ``split`` on what it carries in between.
        n_batch: Number of batch axes of the cores.
        factors: Cores that are multiplied to what is carried between two splits.
        storage: Dtype that the results go to, if it is another one.
    """
    if not can_look(cores[0]):
        return run(Kept(n_batch))
    top = _SHARE * math.frexp(torch.finfo(storage or cores[0].dtype).max)[1]
    bits = _bits(cores)
    if bits * len(cores) + sum(core.numel().bit_length() for core in cores) <= top:  # no path can leave the range
        return run(Free())
    limit = top / (1 + factors)
    if bits <= limit:
        free = Free()
        out = run(free)
        if _bits(free.seen) <= limit:
            return out
    return run(Kept(n_batch))


@overload
def plain_exponent(exponents: Tensor) -> Tensor: ...


@overload
def plain_exponent(exponents: int) -> int: ...


@overload
def plain_exponent(exponents: Exponents) -> Exponents: ...


def plain_exponent(exponents: Exponents) -> Exponents:
    """Exponents without the mark of a zero."""
    if isinstance(exponents, int):
        return exponents
    return ((exponents - _ZERO // 2) & (-_ZERO - 1)) + _ZERO // 2


def common(x: Tensor, exponents: Exponents, n_batch: int) -> tuple[Tensor, Tensor]:
    """``(y, e)`` with ``x[.., s] * 2**exponents[s] = y[.., s] * 2**e``: one exponent for each member."""
    if isinstance(exponents, int):
        return keep_pow2(x, n_batch)
    top = plain_exponent(exponents.amax(-1))
    shift = (plain_exponent(exponents) - top.unsqueeze(-1)).clamp_max(0)
    return times_pow2(x, shift.reshape(*x.shape[:n_batch], *(1,) * (x.ndim - n_batch - 1), x.shape[-1])), top


def _largest(size: Tensor, axes: tuple[int, ...]) -> Tensor:
    if not axes:
        return size
    return size.amax(axes) if size.numel() else size.sum(axes)  # modes of no entries have no largest one


@torch.no_grad()
def _bits(tensors: Sequence[Tensor]) -> int:
    """Largest modulus of the binary exponents of all entries; 0 where all are zero."""
    if len(tensors) > 1 and sum(map(Tensor.numel, tensors)) <= _SMALL:
        tensors = [torch._C._nn.flatten_dense_tensors(list(tensors))]
    # a host sync for each of the few parts; the exponent of a zero is 0
    ends = [torch.aminmax(torch.frexp(_real(part)).exponent) for part in tensors if part.numel()]
    return max((abs(int(end)) for pair in ends for end in pair), default=0)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
