"""Many small products with few distinct right sides, without a copy of the right side for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensortrain.system.native import library
from tensortrain.system.tracing import is_traced, is_transformed

__all__ = ["can_group", "grouped_product", "is_batched", "is_wrapped"]


def can_group() -> bool:
    """Whether nothing looks on that would have to see every product: a tracer, autocast, a transform of torch.func."""
    if is_traced() or is_transformed():
        return False
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return forward_ad._current_level < 0


def grouped_product(states: Tensor, table: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the first ``counts[0]`` states by ``table[0]``, the next ``counts[1]`` by ``table[1]``, and so on.

    Args:
        states: ``(n, lead, r)``, sorted by the entry of the table that each goes with.
        table: ``(j, r, w)``.
        counts: ``j`` numbers that sum to ``n``.

    Returns:
        Tensor: ``(n, lead, w)``, differentiable to any order.

    Cost: ``2 n lead r w`` flops in ``j`` products; no slice of the table is copied.
    """
    if torch.is_grad_enabled() and (states.requires_grad or table.requires_grad):
        found: Tensor = _Grouped.apply(states, table, tuple(counts))
        return found
    return _multiplied(states, table, counts)


def _multiplied(states: Tensor, table: Tensor, counts: Sequence[int]) -> Tensor:
    out = states.new_empty(*states.shape[:2], table.shape[2])
    kernels = library()
    if kernels is not None and kernels.multiply_groups(states, table, counts, out):
        return out
    for k, (some, into) in enumerate(zip(states.split(list(counts)), out.split(list(counts)), strict=True)):
        if some.shape[0]:
            torch.mm(some.reshape(-1, some.shape[2]), table[k], out=into.view(-1, into.shape[2]))
    return out


def _recorded(states: Tensor, table: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.cat([some @ table[k] for k, some in enumerate(states.split(list(counts)))])


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(states, table)
        ctx.counts = counts
        return _multiplied(states, table, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, table = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # gradients that have gradients are recorded
            inputs = [one for one, want in zip((states, table), needed, strict=True) if want]
            found = iter(torch.autograd.grad(_recorded(states, table, ctx.counts), inputs, grad, create_graph=True))
            return next(found) if needed[0] else None, next(found) if needed[1] else None, None
        multiplied, table_grad = _multiplied, _table_grad
        if is_batched(grad):  # many gradients at once: nothing can be written in place
            multiplied, table_grad = _recorded, _recorded_table_grad
        states_grad = multiplied(grad, table.mH, ctx.counts) if needed[0] else None
        return states_grad, table_grad(states, grad, table, ctx.counts) if needed[1] else None, None


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, as under ``vmap`` and ``is_grads_batched``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is more than its numbers: stands for many, is seen by a transform, or carries a tangent."""
    if is_batched(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _recorded_table_grad(states: Tensor, grad: Tensor, table: Tensor, counts: Sequence[int]) -> Tensor:
    parts = zip(states.split(list(counts)), grad.split(list(counts)), strict=True)
    return torch.stack([(some.mH @ its).sum(0) for some, its in parts])


def _table_grad(states: Tensor, grad: Tensor, table: Tensor, counts: Sequence[int]) -> Tensor:
    out = torch.zeros_like(table, memory_format=torch.contiguous_format)
    kernels = library()
    if kernels is not None and kernels.multiply_groups_backward(states, grad, counts, out):
        return out
    for k, (some, its) in enumerate(zip(states.split(list(counts)), grad.split(list(counts)), strict=True)):
        if some.shape[0]:
            torch.mm(some.reshape(-1, some.shape[2]).mH, its.reshape(-1, its.shape[2]), out=out[k])
    return out
