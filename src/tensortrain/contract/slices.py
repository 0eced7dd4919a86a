"""Products with a dense weight that is built a few rows at a time, within the call.

With many rows of input a product with the dense weight takes less time than any way from core to core. Where the whole
weight would take more memory than a layer may keep, or changes from call to call as in training, slices of it are made
from the two halves of the chain, used at once, and overwritten by the next: they never leave the cache.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tensortrain.contract.grouped import is_batched
from tensortrain.system.tracing import is_traced, is_transformed, sizes_of

__all__ = ["SLICE_BYTES", "dense_of_halves", "modes_at_a_time", "sliced_product"]

SLICE_BYTES = 2**22  # of weight: it stays in the cache, and its products are large enough
_MOST_KEPT_BYTES = 8 * SLICE_BYTES
_LEAST_ROWS = 160  # of a slice, whatever its bytes: thinner ones make slow products


def modes_at_a_time(rows_per_mode: int, columns: int, itemsize: int) -> int:
    """How many of the first output modes make a slice.

    Args:
        rows_per_mode: Rows of the weight that one of them has.
        columns: Of the weight.
        itemsize: Bytes of a number.
    """
    fits = SLICE_BYTES // max(1, rows_per_mode * columns * itemsize)
    return max(1, fits, -(-_LEAST_ROWS // rows_per_mode))


def dense_of_halves(left: Tensor, right: Tensor) -> Tensor:
    """The weight ``(i1 i2, j1 j2)`` of ``left`` ``(1, i1, j1, r)`` and ``right`` ``(r, i2, j2, 1)``, differentiably."""
    _, i1, j1, r = sizes_of(left)
    _, i2, j2, _ = sizes_of(right)
    product = (left.reshape(i1 * j1, r) @ right.reshape(r, i2 * j2)).reshape(i1, j1, i2, j2)
    return product.transpose(1, 2).reshape(i1 * i2, j1 * j2)


def sliced_product(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``, the weight made slice by slice; differentiable to any order.

    Args:
        x: ``(b, N)``.
        left, right: Halves of the weight, ``(1, i1, j1, r)`` and ``(r, i2, j2, 1)``.
        bias: ``(M,)``.

    Cost: ``2 r M N`` flops beside those of the dense product, ``4 r M N`` more and as many again in the backward pass;
        memory for two slices of 4 MiB.
    """
    if not _can_slice(x, left, right):
        return F.linear(x, dense_of_halves(left, right), bias)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, left, right, bias)):
        y: Tensor = _Sliced.apply(x, left, right, bias)
        return y
    return _Slices(left, right).product(x, bias)


def _can_slice(x: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether nothing looks on that would have to see every product, or cast it."""
    if is_traced() or is_transformed() or forward_ad._current_level >= 0:
        return False
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return x.dtype == left.dtype == right.dtype and x.shape[0] > 0


class _Kept(threading.local):
    """Memory of one thread for its slices: to ask the system for it at every call would take as long as to fill it."""

    room: Tensor | None = None


_kept = _Kept()


def _rooms(n: int, like: Tensor) -> Tensor:
    """So many numbers that hold nothing yet, until the next call of this thread."""
    n_bytes = n * like.element_size()
    if n_bytes > _MOST_KEPT_BYTES or not like.is_cpu or like.is_inference() or torch.is_inference_mode_enabled():
        return like.new_empty(n)
    if _kept.room is None or _kept.room.numel() < n_bytes:
        _kept.room = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    return _kept.room[:n_bytes].view(like.dtype)


class _Slices:
    """The slices of a weight, made one after the other in the same memory."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        _, self.i1, self.j1, r = left.shape
        _, self.i2, self.j2, _ = right.shape
        self.left = left.reshape(self.i1, self.j1, r)
        self.right = right.reshape(r, self.i2 * self.j2)
        self.n_columns = self.j1 * self.j2
        self.step = min(self.i1, modes_at_a_time(self.i2, self.n_columns, left.element_size()))
        self._made, self._sorted = _rooms(2 * self.step * self.i2 * self.n_columns, left).chunk(2)

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of first output modes."""
        return [(start, min(start + self.step, self.i1)) for start in range(0, self.i1, self.step)]

    def rows(self, span: tuple[int, int]) -> slice:
        """Of the weight, in a range of first modes."""
        return slice(span[0] * self.i2, span[1] * self.i2)

    def lead(self, span: tuple[int, int]) -> Tensor:
        """The left half of a slice, ``(i1 j1, r)``."""
        return self.left[span[0] : span[1]].flatten(0, 1)

    def make(self, span: tuple[int, int]) -> Tensor:
        """A slice ``(i1 i2, j1 j2)``, in memory that the next one takes."""
        made = torch.mm(self.lead(span), self.right, out=self._part(self._made, span).view(-1, self.i2 * self.j2))
        return self._swapped(made, span, self.j1, self.i2).view(-1, self.n_columns)

    def gradient(self, arriving: Tensor, x: Tensor, span: tuple[int, int]) -> Tensor:
        """Of a slice, as the product of the halves makes it: ``(i1 j1, i2 j2)``; in the same memory too."""
        rows = torch.mm(arriving.t(), x.conj(), out=self._part(self._made, span).view(-1, self.n_columns))
        return self._swapped(rows, span, self.i2, self.j1).view(-1, self.i2 * self.j2)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], self.i1 * self.i2)
        for span in self.spans():
            torch.mm(x, self.make(span).t(), out=y[:, self.rows(span)])
        return y if bias is None else y.add_(bias)

    def _part(self, room: Tensor, span: tuple[int, int]) -> Tensor:
        return room[: (span[1] - span[0]) * self.i2 * self.n_columns]

    def _swapped(self, made: Tensor, span: tuple[int, int], first: int, second: int) -> Tensor:
        """Both middle axes of ``(i1, first, second, j2)`` in the other order."""
        if first == 1 or second == 1:
            return made
        into = self._part(self._sorted, span).view(-1, second, first, self.j2)
        return into.copy_(made.view(-1, first, second, self.j2).transpose(1, 2))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, left, right)
        return _Slices(left, right).product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_bias = grad.sum(0) if needs[3] else None
        if torch.is_grad_enabled() or is_transformed() or is_batched(grad):
            return *_recorded(x, left, right, grad, needs[:3]), of_bias
        return *_gradients(x, left, right, grad.contiguous(), needs[:3]), of_bias


def _gradients(x: Tensor, left: Tensor, right: Tensor, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    slices = _Slices(left, right)
    of_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    of_left = torch.empty_like(slices.left, memory_format=torch.contiguous_format) if needs[1] else None
    of_right = torch.zeros_like(slices.right) if needs[2] else None
    for span in slices.spans():
        arriving = grad[:, slices.rows(span)]
        if of_x is not None:
            of_x.addmm_(arriving, slices.make(span).conj())
        if of_left is None and of_right is None:
            continue
        of_slice = slices.gradient(arriving, x, span)
        if of_left is not None:
            torch.mm(of_slice, slices.right.mH, out=of_left[span[0] : span[1]].view(of_slice.shape[0], -1))
        if of_right is not None:
            of_right.addmm_(slices.lead(span).mH, of_slice)
    of_left = None if of_left is None else of_left.view(left.shape)
    return [of_x, of_left, None if of_right is None else of_right.view(right.shape)]


def _recorded(x: Tensor, left: Tensor, right: Tensor, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients that have gradients, by torch's own derivatives of the dense product."""
    with torch.enable_grad():
        # aliases: the history of one may hold another one
        inputs = [one.view_as(one) for one in (x, left, right)]
        y = F.linear(inputs[0], dense_of_halves(inputs[1], inputs[2]))
    wanted = [one for one, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()) if wanted else ())
    return [next(found) if need else None for need in needs]
