"""Whole sequences by the kernels: all time steps of a layer in one call, its hidden map factorized or dense.

Between Python and torch, a time step costs as much as its products where few rows meet a small map. The kernels take
the hidden map as a sweep over ready matrices, share the examples of a batch among threads, and leave for the way back
no more than the gates. Where they do not serve, the caller goes step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tensortrain.contract import Plan, cost_model
from tensortrain.contract.compiled import compiled
from tensortrain.contract.grouped import can_group
from tensortrain.nn.composite import Map, is_plain
from tensortrain.nn.cores import are_plain
from tensortrain.nn.linear import Linear
from tensortrain.system.native import library

if TYPE_CHECKING:
    from tensortrain.nn.recurrent.cells import Cell, State

__all__ = [
    "Ready",
    "Spread",
    "alias",
    "by_sequence",
    "may_run",
    "plan_of_steps",
    "ready_map",
    "serves",
    "serves_dtype",
    "step_seconds",
]

_KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # in the order of recurrent.h
_DTYPES = (torch.float32, torch.float64)
_CLEARLY = 0.7  # predicted shares of a time below this decide
_NEVER = 1e9  # is the dense weight worth it
Recorded = Callable[..., tuple[Tensor, ...]]


class Spread(NamedTuple):
    """Where the rows of a sequence lie.

    Args:
        n_steps, batch: Time steps, and rows of the largest one.
        time_first: Whether the steps of a padded tensor lie along its first axis.
        counts: Rows of every step of a packed tensor; None for a padded one.
    """

    n_steps: int
    batch: int
    time_first: bool = True
    counts: Tensor | None = None


class Ready(NamedTuple):
    """A hidden map that the kernels can apply at every step.

    Args:
        sweep: Compiled, over ready matrices.
        weights: Those matrices, differentiable in the parameters.
        product: The same map on any rows, differentiable: from the rows and the matrices.
    """

    sweep: Any
    weights: tuple[Tensor, ...]
    product: Callable[[Tensor, Sequence[Tensor]], Tensor]


def serves_dtype(dtype: torch.dtype) -> bool:
    """Whether the kernels are there and take tensors of this dtype."""
    return dtype in _DTYPES and library() is not None


def may_run(cell: Cell, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what the steps of this cell would, and nobody waits for its maps to be called."""
    if cell.kernel is None or cell.output_size != cell.hidden_size or cell.is_watched():
        return False
    return serves_dtype(dtype)


def serves(cell: Cell, gates: Tensor) -> bool:
    """Whether the kernels may do the steps after these gates, and nothing looks on that they would escape."""
    # (first of all: sizes of a traced tensor are none to ask for)
    return can_group() and gates.is_cpu and gates.numel() > 0 and may_run(cell, gates.dtype)


def ready_map(one: Map, rows: int, n_steps: int, *, dense: bool = False) -> Ready | None:
    """The hidden map for steps of about so many rows, by its dense weight perhaps; None where no sweep carries it."""
    if not isinstance(one, Linear):
        return _dense(one) if is_plain(one) else None
    if not _has_sweep(one):
        return None
    # Where gradients are wanted, a dense weight and its gradient cost as much as so many rows as its rank.
    makes_more = (
        torch.is_grad_enabled()
        and any(core.requires_grad for core in one.core_list())
        and n_steps * rows <= max(one.spec.ranks)
    )
    plan = plan_of_steps(one, rows, dense=dense, least=_NEVER if makes_more else _CLEARLY)
    sweep = compiled(plan, ready=True)
    if sweep is None:
        return None
    weights = one.runner.prepared(one, plan)
    return Ready(sweep, weights, lambda x, weights: plan.execute(x, (), weights))


def plan_of_steps(one: Linear, rows: int, *, dense: bool = False, least: float = _CLEARLY) -> Plan:
    """The plan for a map that is applied at every step: its weights are made once, and no step is called from Python.

    Where a single call would multiply by the dense weight, the time between Python and its products may be why.
    """
    rows = max(1, rows)
    with torch.no_grad():  # the plan for weights that are kept, whether or not gradients are wanted
        if dense and one.implementation == "auto":
            return one.runner.plan(one, rows, force="dense")
        plan = one.plan(rows)
        if not plan.uses_dense or one.implementation != "auto":
            return plan
        other = one.runner.plan(one, rows, force="factorized")
    return other if _products_s(other) < least * _products_s(plan) else plan


def step_seconds(one: Map, rows: int, dtype: torch.dtype, *, dense: bool = False) -> float | None:
    """Predicted for the products of one step by the kernels; None where no sweep carries the map."""
    if not isinstance(one, Linear):
        return float(cost_model("cpu").gemm_s(rows, one.out_features, one.in_features, dtype=dtype))
    if not _has_sweep(one):
        return None
    plan = plan_of_steps(one, rows, dense=dense)
    return None if compiled(plan, ready=True) is None else _products_s(plan)


def _has_sweep(one: Linear) -> bool:
    return one.ordered is None and one.stand_ins is None and are_plain(one.cores)


def _products_s(plan: Plan) -> float:
    """Seconds of a plan's products alone; no end of them where no sweep carries it."""
    if compiled(plan, ready=True) is None:
        return math.inf
    return float(sum(step.predicted_s for step in plan.steps))


def _dense(one: nn.Linear) -> Ready:
    weight = one.weight
    sweep = library().dense_sweep(one.in_features, one.out_features)  # type: ignore[union-attr]
    return Ready(sweep, (weight,), lambda x, weights: x @ weights[0].mT)


def by_sequence(
    cell: Cell, gates: Tensor, state: State, spread: Spread, *, reverse: bool, recorded: Recorded, dense: bool = False
) -> tuple[Tensor, State] | None:
    """All steps of one direction.

    Args:
        cell: Of the layer; see ``serves``.
        gates: What its input map gave, ``(.., n_gates * H)`` with the rows of ``spread``.
        state: First state, tensors ``(b, H)``.
        spread: Where the rows lie.
        reverse: From the last step to the first.
        recorded: The same by operations of torch, from gates, weights, bias and states: for gradients of gradients.
        dense: Multiply by the dense weight of the hidden map, where its plan may.

    Returns:
        tuple: Outputs ``(.., H)`` and the last state; None where the kernels do not serve these tensors.
    """
    ready = ready_map(cell.hh, spread.batch, spread.n_steps, dense=dense)
    if ready is None:
        return None
    numbers = [_KINDS.index(str(cell.kernel)), cell.hidden_size, *spread[:3], reverse]
    bias = cell.hh.bias
    tensors = (gates, *ready.weights, *(() if bias is None else (bias,)), *state)
    if not all(map(_is_ordinary, tensors)):
        return None
    run = _Run([int(n) for n in numbers], spread.counts, ready, bias is not None, len(state), recorded)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        found = _Sequence.apply(run, *tensors)
    else:
        found = run.forward(tensors, keeps=False)
    if found is None:
        return None
    output, *last = found[: 1 + len(state)]
    return output.view(*gates.shape[:-1], cell.hidden_size), tuple(last)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.layout is torch.strided


class _Run(NamedTuple):
    """One call of the kernels: everything but the tensors ``(gates, *weights, bias, *state)``."""

    numbers: list[int]
    counts: Tensor | None
    ready: Ready
    has_bias: bool
    n_states: int
    recorded: Recorded

    def parts(self, tensors: Sequence[Any]) -> tuple[Any, list[Any], Any, list[Any]]:
        gates, *others = tensors
        states = others[len(others) - self.n_states :]
        n = len(self.ready.weights)
        return gates, others[:n], others[n] if self.has_bias else None, states

    def forward(self, tensors: Sequence[Tensor], *, keeps: bool) -> list[Tensor] | None:
        gates, weights, bias, states = self.parts(tensors)
        kernels: Any = library()
        found: list[Tensor] | None = kernels.recur(
            self.numbers, self.counts, self.ready.sweep, weights, bias, gates, states, keeps
        )
        return found

    def backward(
        self, tensors: Sequence[Tensor], out: Tensor, kept: list[Tensor], grads: list[Any]
    ) -> list[Tensor] | None:
        _, weights, _, states = self.parts(tensors)
        kernels: Any = library()
        found: list[Tensor] | None = kernels.recur_backward(
            self.numbers, self.counts, self.ready.sweep, weights, states, out, kept, grads
        )
        return found


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> Any:
        found = run.forward(tensors, keeps=True)
        if found is None:
            return None
        n = 1 + run.n_states
        ctx.run, ctx.n_tensors = run, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, found[0], *found[n:])
        return found[0].clone(), *found[1:n]  # who is given the outputs may write to them

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed, run = ctx.saved_tensors, ctx.needs_input_grad[1:], ctx.run
        tensors, out, kept = saved[: ctx.n_tensors], saved[ctx.n_tensors], list(saved[ctx.n_tensors + 1 :])
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (1 + len(tensors))
        ours = None
        if not torch.is_grad_enabled() and all(map(_is_ordinary, given)):
            ours = run.backward(tensors, out, kept, list(grads))
        if ours is None:
            return (None, *_recorded_grads(run, tensors, needed, grads))
        dx, du, before, *of_states = ours
        gates, wanted = tensors[0], run.parts(needed)
        found: list[Tensor | None] = [dx.view(gates.shape) if wanted[0] else None]
        found += _weight_grads(run, tensors, wanted[1], before, du)
        found += [du.sum(0) if wanted[2] else None] if run.has_bias else []
        found += [one if want else None for one, want in zip(of_states, wanted[3], strict=True)]
        return (None, *found)


def _weight_grads(run: _Run, tensors: Sequence[Tensor], wanted: list[bool], x: Tensor, grad: Tensor) -> list[Any]:
    """Gradients of the hidden map's matrices: of all steps at once."""
    if not any(wanted):
        return [None] * len(wanted)
    with torch.enable_grad():
        given = zip(run.parts(tensors)[1], wanted, strict=True)
        weights = [alias(w, wanted=True) if want else w.detach() for w, want in given]
        y = run.ready.product(x, weights)
    found = iter(torch.autograd.grad(y, [w for w in weights if w.requires_grad], grad))
    return [next(found) if want else None for want in wanted]


def _recorded_grads(run: _Run, tensors: Sequence[Tensor], needed: Sequence[bool], grads: Sequence[Any]) -> list[Any]:
    """The same by operations of torch: gradients that have gradients, or many at once."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [alias(one, wanted=want) for one, want in zip(tensors, needed, strict=True)]
        gates, weights, bias, states = run.parts(inputs)
        output, *last = run.recorded(gates, lambda h: _with_bias(run.ready.product(h, weights), bias), tuple(states))
        outputs = [output.reshape(-1, output.shape[-1]), *last]
        pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None and y.requires_grad]
    wanted = [one for one, want in zip(inputs, needed, strict=True) if want]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True
        )
    )
    return [next(found) if want else None for want in needed]


def alias(tensor: Tensor, *, wanted: bool) -> Tensor:
    """The same numbers as an input of their own: what gradients are taken to, with gradients that go on to the tensor.

    The history of one input may hold another one, as a state holds the weight of the call before; that way is not to be
    counted again.

    Args:
        wanted: Whether a gradient is taken to it, though the tensor may have been frozen by now.
    """
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_() if wanted else tensor


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias
