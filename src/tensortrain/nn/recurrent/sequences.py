"""Whole sequences by the kernels: all time steps of one direction in one call, its maps factorized or dense.

Between Python and torch, a time step costs as much as its products where few rows meet a small map. The kernels take
both maps as sweeps over cores or ready matrices, share the examples of a batch among threads, and leave for the way
back no more than the gates; merging, steps and gradients are one function to autograd. Where they do not serve, the
caller goes step by step.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tensortrain.contract import Plan, cost_model
from tensortrain.contract.compiled import compiled
from tensortrain.contract.grouped import can_group
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.composite import Map, is_plain
from tensortrain.nn.cores import are_plain
from tensortrain.nn.linear import Linear
from tensortrain.nn.runner import trains
from tensortrain.system.native import library

if TYPE_CHECKING:
    from tensortrain.nn.recurrent.cells import Cell, State

__all__ = [
    "KINDS",
    "Direction",
    "MapAtWork",
    "Spread",
    "alias",
    "direction_of",
    "may_run",
    "plan_of_product",
    "plan_of_steps",
    "serves",
    "serves_dtype",
    "step_seconds",
]

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # in the order of recurrent.h
_DTYPES = (torch.float32, torch.float64)
_CLEARLY = 0.7  # predicted shares of a time below this decide
_NEVER = 1e9  # is the dense weight worth it


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

    @property
    def n_rows(self) -> int:
        """Of all steps."""
        return self.n_steps * self.batch if self.counts is None else int(self.counts.sum())


class MapAtWork(NamedTuple):
    """A map as the kernels take it.

    Args:
        sweep: Compiled, over ``tensors``.
        ready: The same over the matrices that the steps make of these.
        is_turned: Whether the tensors are matrices, transposes of the cores of the sweep.
        tensors: Stored cores where they are trained, else matrices made of them; those of the map itself.
        bias: Of the map.
    """

    sweep: Any
    ready: Any
    is_turned: bool
    tensors: list[Tensor]
    bias: Tensor | None

    @property
    def is_made(self) -> bool:
        """Whether the tensors were made of cores."""
        return self.sweep is self.ready


def serves_dtype(dtype: torch.dtype) -> bool:
    """Whether the kernels are there and take tensors of this dtype."""
    return dtype in _DTYPES and library() is not None


def may_run(cell: Cell, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what the steps of this cell would, and nobody waits for its maps to be called."""
    if cell.kernel is None or cell.output_size != cell.hidden_size or cell.is_watched():
        return False
    return serves_dtype(dtype)


def serves(cell: Cell, x: Tensor) -> bool:
    """Whether the kernels may take this input through the cell, and nothing looks on that they would escape."""
    # (first of all: sizes of a traced tensor are none to ask for)
    return can_group() and x.is_cpu and x.numel() > 0 and may_run(cell, x.dtype)


# -- maps -------------------------------------------------------------------------------------------------


def _input_map(one: Map, rows: int) -> MapAtWork | None:
    """The input map for one product with so many rows; None where it must be called."""
    if not isinstance(one, Linear):
        return _dense(one) if is_plain(one) else None
    return _at_work(one, plan_of_product(one, rows)) if _has_sweep(one) else None


def _hidden_map(one: Map, spread: Spread, *, dense: bool) -> MapAtWork | None:
    """The hidden map for all steps, by its dense weight perhaps; None where no sweep carries it."""
    if not isinstance(one, Linear):
        return _dense(one) if is_plain(one) else None
    if not _has_sweep(one):
        return None
    if spread.n_steps == 1 and trains(one) and not dense:
        return _at_work(one, plan_of_product(one, spread.batch))
    # Where gradients are wanted, a dense weight and its gradient cost as much as so many rows as its rank.
    makes_more = trains(one) and spread.n_steps * spread.batch <= max(one.spec.ranks)
    plan = plan_of_steps(one, spread.batch, dense=dense, least=_NEVER if makes_more else _CLEARLY)
    return _at_work(one, plan)


def _whole(one: Map) -> MapAtWork | None:
    """A map by its dense weight; None where no sweep makes that."""
    if not isinstance(one, Linear):
        return _dense(one) if is_plain(one) else None
    return _at_work(one, one.runner.plan(one, 1, force="dense")) if _has_sweep(one) else None


def _dense(one: nn.Linear) -> MapAtWork:
    sweep = library().dense_sweep(one.in_features, one.out_features)  # type: ignore[union-attr]
    return MapAtWork(sweep, sweep, False, [one.weight], one.bias)


def _at_work(one: Linear, plan: Plan) -> MapAtWork | None:
    ready = compiled(plan, ready=True)
    if ready is None:
        return None
    if trains(one):
        sweep, is_turned = compiled(plan, ready=False), _is_turned(one.spec)
        if sweep is not None and is_turned is not None:
            return MapAtWork(sweep, ready, is_turned, one.core_list(), one.bias)
    return MapAtWork(ready, ready, False, list(one.runner.prepared(one, plan)), one.bias)


@lru_cache(maxsize=1024)
def _is_turned(spec: FactorSpec) -> bool | None:
    """Whether stored cores are transposes of the chain's, and no more; None where they are laid out in another way."""
    stored = [torch.empty(shape) for shape in spec.core_shapes]
    taken = get_format(spec.format).to_chain(stored, spec)
    if len(taken) != len(stored) or any(a.data_ptr() != b.data_ptr() for a, b in zip(stored, taken, strict=True)):
        return None
    if all(core.is_contiguous() for core in taken):
        return False
    pairs = zip(stored, taken, strict=True)
    return True if all(a.ndim == 2 and _lie_alike(a.T, b) for a, b in pairs) else None


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two views of the same numbers give them in the same order."""
    strides = [[s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1] for x in (one, other)]
    return strides[0] == strides[1]


def plan_of_product(one: Linear, rows: int) -> Plan:
    """The plan for a single product that is not called from Python, its way back included where gradients are wanted.

    Where a single call of the map would multiply by the dense weight, the time between Python and its products may be
    why.
    """
    rows = max(1, rows)
    plan = one.plan(rows)
    if not plan.uses_dense or one.implementation != "auto":
        return plan
    other = one.runner.plan(one, rows, force="factorized")
    return other if _products_s(other) < _CLEARLY * _products_s(plan) else plan


def plan_of_steps(one: Linear, rows: int, *, dense: bool = False, least: float = _CLEARLY) -> Plan:
    """The plan for a map that is applied at every step: its weights are made once, no step is called from Python."""
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


# -- all steps ----------------------------------------------------------------------------------------------


class Direction(NamedTuple):
    """One direction of a layer made ready for inputs of one size.

    Args:
        cell: Whose steps they are.
        numbers, counts: Where the rows lie, as the kernels take it.
        input: Map of the inputs; None where the module is called first.
        hidden: Map of the states.
    """

    cell: Cell
    numbers: list[int]
    counts: Tensor | None
    input: MapAtWork | None
    hidden: MapAtWork

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Outputs ``(.., H)`` with the rows of the input, and the last state; None where a tensor is no plain one."""
        given = x if self.input is not None else self.cell.ih(x)
        tensors = (*self.hidden.tensors, *(() if self.input is None else self.input.tensors))
        if not all(map(_is_ordinary, (given, *state, *tensors))):
            return None
        kernels: Any = library()
        found = kernels.recur(self.numbers, self.counts, self.input, self.hidden, given, list(state))
        if found is None:
            return None
        *last, output = found
        return output.view(*x.shape[:-1], self.cell.hidden_size), tuple(last)


def direction_of(
    cell: Cell, spread: Spread, *, reverse: bool, dense: bool = False, by_torch: bool = False
) -> Direction | None:
    """A direction by the kernels, where no sweep is missing; see ``serves``.

    Args:
        cell: Of the layer.
        spread: Where the rows lie.
        reverse: From the last step to the first.
        dense: Multiply by the dense weight of the hidden map, where its plan may.
        by_torch: In training of an LSTM, torch's own kernel does the steps, on dense weights that ours make.
    """
    hidden = _whole(cell.hh) if by_torch else _hidden_map(cell.hh, spread, dense=dense)
    if hidden is None:
        return None
    numbers = [KINDS.index(str(cell.kernel)), cell.hidden_size, *map(int, spread[:3]), int(reverse), int(by_torch)]
    given = _whole(cell.ih) if by_torch else _input_map(cell.ih, spread.n_rows)
    return Direction(cell, numbers, spread.counts, given, hidden)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.layout is torch.strided


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
