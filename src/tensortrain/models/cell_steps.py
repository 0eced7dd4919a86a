"""Time steps of higher-order cells: one call of the kernels for all of them where these serve, else one by one.

The gates of a cell are a train of cores which all meet one vector, a one and the last states. Between Python and torch
a step costs more than its products; in one call these are all that is left of it, and the gradients of all cores are
another call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tensortrain.contract.grouped import can_group
from tensortrain.cores.halves import outer
from tensortrain.system.native import library

__all__ = ["ACTIVATIONS", "Course", "next_state", "polynomial", "serves", "taken"]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    None: lambda x: x,
}
_KINDS = {"tanh": 0, "relu": 1, "sigmoid": 4, None: 5, "lstm": 6}  # as recurrent.h numbers them
_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_WEIGHTS = 1 << 20  # in larger ones the products take all the time, and BLAS has them


class Taken(NamedTuple):
    """The states ``(n_lags + n_steps, b, hidden_size)``, the oldest first and those given among them; the last of them
    ``(b, n_lags, hidden_size)``, newest first; and the last cell of an LSTM."""

    states: Tensor
    lags: Tensor
    c: Tensor | None


class Course(NamedTuple):
    """What is done at every step.

    Attributes:
        kind: ``"lstm"``, or the name of an activation.
        n_read: Steps before the cell is fed with what it said.
    """

    kind: str | None
    n_read: int


def polynomial(cores: Sequence[Tensor], seen: Tensor) -> Tensor:
    """``(b, s)`` of cores ``(r, m, s)`` which all meet one vector ``(b, m)``."""
    first, *others = cores
    state = seen @ first[0]
    for core in others:
        if core.shape[1] > 2 * core.shape[2]:
            every = (seen @ core.movedim(1, 0).flatten(1)).unflatten(1, (core.shape[0], -1))  # b r s
            state = (state.unsqueeze(1) @ every).squeeze(1)
        else:  # with the core as it lies: (b, r m) times (r m, s)
            state = outer(state, seen) @ core.flatten(0, 1)
    return state


def next_state(kind: str | None, gates: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``h`` and, of an LSTM, the cell after it; its gates are ``i, g, f, o``."""
    if kind != "lstm" or c is None:
        return ACTIVATIONS[kind](gates), c
    i, g, f, o = gates.chunk(4, dim=1)
    c = c * torch.sigmoid(f) + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def serves(x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the kernels may take an input and these parameters, and nothing looks on that they would escape."""
    if not can_group() or not x.is_cpu or x.numel() == 0 or x.dtype not in (torch.float32, torch.float64):
        return False
    if library() is None:
        return False
    n_weights = 0
    for one in (x, *parameters):
        if type(one) not in _PLAIN or one.dtype != x.dtype or not one.is_cpu:
            return False
        n_weights += one.numel()
    return n_weights - x.numel() <= _MOST_WEIGHTS


def taken(
    course: Course,
    gates: Tensor,
    lags: Tensor,
    c: Tensor | None,
    cores: Sequence[Tensor],
    feed: Tensor | None = None,
    own: Tensor | None = None,
) -> Taken:
    """Take all steps, where ``serves``.

    Args:
        gates: ``(b, n_steps, gates)``: what the inputs add to them, with the bias.
        lags: ``(b, n_lags, hidden_size)``: the states before, newest first.
        c: ``(b, hidden_size)``: of an LSTM.
        cores: ``(r, 1 + n_lags hidden_size, s)``, the last s the gates.
        feed: ``(hidden_size, gates)``: what the state before a step adds once more, after ``n_read`` steps.
        own: ``(n_steps - n_read, b)``, 0 where the feed is left out.

    Cost: O(n_lags hidden_size (r s)) multiplications a step and example, summed over the cores; twice that on the way
    back.
    """
    tensors: Any = (gates, lags, c, feed, own, *cores)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors):
        return Taken(*_Steps.apply(course, *tensors))
    kernels: Any = library()
    found = kernels.higher_there(_KINDS[course.kind], course.n_read, *tensors[:5], cores, False)
    return _step_by_step(course, *tensors) if found is None else Taken(*found[:3])


def _step_by_step(
    course: Course,
    gates: Tensor,
    lags: Tensor,
    c: Tensor | None,
    feed: Tensor | None,
    own: Tensor | None,
    *cores: Tensor,
) -> Taken:
    """The same by operations of torch, which have gradients of any order."""
    n_lags = lags.shape[1]
    states = list(lags.flip(1).unbind(1))
    for t in range(gates.shape[1]):
        seen = torch.cat(states[: -n_lags - 1 : -1], dim=1)
        total = gates[:, t] + polynomial(cores, F.pad(seen, (1, 0), value=1.0))
        if feed is not None and t >= course.n_read:
            before = states[-1] if own is None else states[-1] * own[t - course.n_read, :, None]
            total = total + before @ feed
        h, c = next_state(course.kind, total, c)
        states.append(h)
    return Taken(torch.stack(states), torch.stack(states[: -n_lags - 1 : -1], dim=1), c)


class _Steps(torch.autograd.Function):
    """All steps as one of autograd."""

    @staticmethod
    def forward(ctx: Any, course: Course, *tensors: Any) -> tuple[Tensor | None, ...]:
        kernels: Any = library()
        found = kernels.higher_there(_KINDS[course.kind], course.n_read, *tensors[:5], tensors[5:], True)
        ctx.course, ctx.is_native = course, found is not None
        ctx.set_materialize_grads(False)
        states, lags, c, *kept = (*_step_by_step(course, *tensors), None, None, None) if found is None else found
        ctx.save_for_backward(states, *kept, *tensors)
        return states, lags, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        states, gates_kept, cells, products, *tensors = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(tensors))
        if not ctx.is_native or torch.is_grad_enabled() or not can_group():
            return (None, *_recorded(ctx.course, tensors, grads))
        left = [states, products] if cells is None else [states, products, gates_kept, cells]
        kernels: Any = library()
        of_gates, of_lags, of_cells, of_feed, of_cores = kernels.higher_back(
            _KINDS[ctx.course.kind], ctx.course.n_read, *tensors[:5], tensors[5:], left, *grads,
            ctx.needs_input_grad[2],
        )  # fmt: skip
        return None, of_gates, of_lags, of_cells, of_feed, None, *of_cores


def _recorded(course: Course, tensors: Sequence[Any], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias: the history of one may hold another one, and that way is not to be counted again.
        inputs: list[Any] = [one.view_as(one) if one is not None and one.requires_grad else one for one in tensors]
        found = _step_by_step(course, *inputs)
        every: Any = zip(found, grads, strict=True)
        pairs = [(out, grad) for out, grad in every if grad is not None and out.requires_grad]
        needed = [one for one in inputs if one is not None and one.requires_grad]
        outs, given = [out for out, _ in pairs], [grad for _, grad in pairs]
        made = iter(torch.autograd.grad(outs, needed, given, create_graph=again, allow_unused=True))
    return tuple(next(made) if one is not None and one.requires_grad else None for one in inputs)
