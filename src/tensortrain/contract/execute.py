"""Carry out a plan: by the kernels where they serve the tensors at hand, else product by product in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract.compiled import compiled
from tensortrain.system.native import library
from tensortrain.system.tracing import is_traced, sizes_of

if TYPE_CHECKING:
    from tensortrain.contract.chain_plan import Step
    from tensortrain.contract.plan import Plan

__all__ = ["by_kernels", "linear_product", "sweep"]


def by_kernels(plan: Plan, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, *, ready: bool) -> Tensor | None:
    """The product by the kernels, over cores or ready weights; ``None`` where they do not serve these tensors."""
    if is_traced():
        return None
    made = compiled(plan, ready=ready)
    if made is None:
        return None
    y: Tensor | None = library().run(made, x, list(tensors), bias)  # type: ignore[union-attr]
    return y


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, flipped: bool = False) -> Tensor:
    """``x W^T + b``; flipped, it is computed as ``W x^T``, which BLAS may do faster for a few rows."""
    if not flipped:
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, x.shape[-1]).t()
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return y.t().contiguous().view(*x.shape[:-1], sizes_of(weight)[0])


def sweep(x: Tensor, weights: Sequence[Tensor], steps: Sequence[Step], *, leftward: bool) -> Tensor:
    """All steps of a chain, from its last core or from its first; ``(b, M)`` in some other shape."""
    state = x.reshape(-1, 1, 1) if leftward else x.reshape(-1, 1, sizes_of(x)[-1])
    contract = _step_leftward if leftward else _step_rightward
    for step, weight in zip(steps, weights, strict=True):
        state = contract(state, weight, step)
    return state


# The state between steps is (lead, rows of the last weight, width). After a "copied" step it is a
# transposed view; it is cut into five axes before anything is copied, so that the transpose left over
# and the one that the next step wants become one copy.


def _step_leftward(state: Tensor, weight: Tensor, step: Step) -> Tensor:
    """State ``(b j, s i, p)`` to ``(b, r i, i p)``; ``i p`` are output modes already made."""
    _, rows, p = sizes_of(state)
    i = rows // step.rank
    state = state.reshape(-1, step.mode, step.rank, i, p)
    if step.kind == "batched":
        return _batched(weight, state.reshape(-1, step.mode * step.rank, i * p))
    columns = state.permute(0, 3, 4, 1, 2).reshape(-1, step.mode * step.rank)
    return (
        linear_product(columns, weight, flipped=step.kind == "flipped")
        .reshape(-1, i * p, sizes_of(weight)[0])
        .transpose(1, 2)
    )


def _step_rightward(state: Tensor, weight: Tensor, step: Step) -> Tensor:
    """State ``(b, i r, j p)`` to ``(b i, i s, p)``; ``p`` are input modes still to come."""
    _, rows, columns_left = sizes_of(state)
    i, p = rows // step.rank, columns_left // step.mode
    state = state.reshape(-1, i, step.rank, step.mode, p)
    if step.kind == "batched":
        return _batched(weight, state.reshape(-1, step.rank * step.mode, p))
    columns = state.permute(0, 1, 4, 2, 3).reshape(-1, step.rank * step.mode)
    product = linear_product(columns, weight, flipped=step.kind == "flipped")
    return product.reshape(-1, p, sizes_of(weight)[0]).transpose(1, 2)


def _batched(weight: Tensor, state: Tensor) -> Tensor:
    # bmm reads the expanded weight in place; matmul would fold, and copy, whenever gradients are on.
    return torch.bmm(weight.expand(state.shape[0], -1, -1), state)
