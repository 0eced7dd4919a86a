"""Which way a recurrent layer takes through a sequence: torch's own kernel on dense weights, or step by step.

Torch's kernel does a whole sequence in one call, but needs dense maps: kept at inference, made anew from the cores in
training. Step by step the input map runs factorized on all steps at once. The one with the shorter predicted time runs;
where predictions lie close together, both are run once and the machine remembers which was faster.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tensortrain.contract import cost_model
from tensortrain.contract.cost import is_measured
from tensortrain.contract.grouped import can_group, is_batched
from tensortrain.nn.composite import Map, is_plain
from tensortrain.nn.linear import Linear
from tensortrain.nn.recurrent.cells import Cell
from tensortrain.nn.runner import may_be_dense, power_of_two
from tensortrain.system.machine import device_key, known_file, read_json, write_json

__all__ = ["Way", "differentiable_twice", "kernel_is_faster", "may_take_kernel"]

Way = Callable[[list[Cell], Tensor], Tensor]  # outputs of one layer, from its cells and an input

_FAR_APART = 4.0  # predictions further apart than this decide without a trial
_TOO_LONG_S = 0.4  # of a trial, as predicted
_CALLS = {"lstm": 14, "gru": 10}  # operations of one step; four for the others
_ROUNDS = 3
_KNOWN: dict[Any, bool] = {}


def may_take_kernel(cells: Sequence[Cell], x: Tensor) -> bool:
    """Whether torch's kernel computes the same, may have its dense weights, and nobody looks on who it would escape."""
    if not x.is_cpu or not can_group() or any(cell.kernel is None or cell.is_watched() for cell in cells):
        return False
    return all(_may_be_dense(one) for cell in cells for one in (cell.ih, cell.hh))


def _may_be_dense(one: Map) -> bool:
    return may_be_dense(one) if isinstance(one, Linear) else is_plain(one)


def kernel_is_faster(cells: list[Cell], x: Tensor, batch: int, n_steps: int, *, by_kernel: Way, by_steps: Way) -> bool:
    """Whether torch's kernel takes less time than the steps; see the module's docstring.

    Args:
        cells: Of one layer, one for each direction.
        x: Input of the layer; only its sizes count.
        batch, n_steps: Rows of a step, and steps.
        by_kernel, by_steps: How the layer runs either way.
    """
    training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in cells[0].parameters()))
    sizes = power_of_two(x.numel() // max(1, x.shape[-1])), power_of_two(batch), power_of_two(n_steps)
    key = (*(_told(cell) for cell in cells), x.dtype, *sizes, training, torch.get_num_threads())
    if key not in _KNOWN:
        kernel_s, steps_s = _predicted_s(cells, x, batch, n_steps, training)
        apart = max(kernel_s, steps_s) / min(kernel_s, steps_s)
        if apart > _FAR_APART or kernel_s + steps_s > _TOO_LONG_S / _ROUNDS or not _can_time():
            return kernel_s <= steps_s
        _KNOWN[key] = _remembered(key, lambda: _tried(cells, x, training, by_kernel, by_steps))
    return _KNOWN[key]


def _told(cell: Cell) -> str:
    return repr((type(cell).__name__, cell.kernel, *(_told_map(one) for one in (cell.ih, cell.hh))))


def _told_map(one: Map) -> Any:
    if isinstance(one, Linear):
        return one.spec, one.implementation, one.dense_limit_bytes, one.may_time_plans, one.bias is None
    return one.in_features, one.out_features, one.bias is None


# -- predicted ------------------------------------------------------------------------------------------


def _predicted_s(cells: Sequence[Cell], x: Tensor, batch: int, n_steps: int, training: bool) -> tuple[float, float]:
    """Seconds by torch's kernel, and step by step."""
    model, rows = cost_model(x.device), x.numel() // max(1, x.shape[-1])
    passes = 3 if training else 1
    kernel_s = steps_s = 0.0
    for cell in cells:
        wide, hidden = cell.ih.out_features, cell.hh.in_features
        recurrent_s = n_steps * model.gemm_s(batch, wide, hidden, dtype=x.dtype)
        kernel_s += passes * (model.gemm_s(rows, wide, cell.ih.in_features, dtype=x.dtype) + recurrent_s)
        if training:
            kernel_s += sum(_rebuild_s(one, model, x.dtype) for one in (cell.ih, cell.hh))
        steps_s += (
            cell.ih.plan(rows).predicted_s
            if isinstance(cell.ih, Linear)
            else passes * model.gemm_s(rows, wide, cell.ih.in_features, dtype=x.dtype)
        )
        n_calls = _CALLS.get(str(cell.kernel), 4)
        bytes_of_a_step = 2 * batch * wide * x.dtype.itemsize
        steps_s += passes * (recurrent_s + n_steps * n_calls * model.stream_s(bytes_of_a_step / n_calls))
    return kernel_s, steps_s


def _rebuild_s(one: Map, model: Any, dtype: torch.dtype) -> float:
    """Make the dense weight from the cores, and its gradient's way back."""
    if not isinstance(one, Linear):
        return 0.0
    m, n, rank = one.out_features, one.in_features, max(one.spec.ranks)
    return float(3 * model.gemm_s(m, n, rank, dtype=dtype) + 4 * model.copy_s(2 * m * n * dtype.itemsize))


# -- tried ----------------------------------------------------------------------------------------------


def _can_time() -> bool:
    return is_measured() and not torch.are_deterministic_algorithms_enabled() and _get_current_dispatch_mode() is None


def _tried(cells: list[Cell], x: Tensor, training: bool, by_kernel: Way, by_steps: Way) -> bool:
    """Run both ways on copies of the cells and numbers of their own."""
    unseen = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch.inference_mode(False), torch.set_grad_enabled(training), unseen:
        copies = copy.deepcopy(cells)
        numbers = torch.full(x.shape, 0.5, dtype=x.dtype, requires_grad=training)
        best = {}
        for _ in range(_ROUNDS):  # the first calls make plans and weights
            for way in (by_kernel, by_steps):
                start = time.perf_counter()
                y = way(copies, numbers)
                if training:
                    leaves = [numbers, *(p for cell in copies for p in cell.parameters() if p.requires_grad)]
                    torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
                seconds = time.perf_counter() - start
                best[way] = min(best.get(way, seconds), seconds)
    return best[by_kernel] <= best[by_steps]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _remembered(key: Any, find: Callable[[], bool]) -> bool:
    """What an earlier process on this machine found, else what is found now."""
    file, name = known_file("recurrent-1", device_key(torch.device("cpu"))), _digest(key)
    known = read_json(file)
    entries = known if isinstance(known, dict) else {}
    if not isinstance(entries.get(name), bool):
        entries = {**entries, name: find()}
        write_json(file, entries)
    found: bool = entries[name]
    return found


def _digest(key: Any) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


# -- second derivatives ---------------------------------------------------------------------------------


def differentiable_twice(fused: Callable[..., Any], recorded: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call a function whose gradients have none, with those of another one that computes the same.

    Args:
        fused, recorded: Both from the tensors to a tuple of tensors.
        tensors: All that either depends on.
    """
    return _Fused.apply(fused, recorded, *tensors)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Callable[..., Any], recorded: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.recorded = recorded
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            ctx.outputs = fused(*ctx.inputs)
        return tuple(y.detach() for y in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()
        inputs, outputs = ctx.inputs, ctx.outputs
        if again or any(map(is_batched, grads)):
            saved = ctx.saved_tensors
            with torch.enable_grad():
                inputs = list(saved) if again else [t.detach().requires_grad_(t.requires_grad) for t in saved]
                outputs = ctx.recorded(*inputs)
        wanted = [one for one, want in zip(inputs, needed, strict=True) if want]
        found = iter(
            torch.autograd.grad(outputs, wanted, grads, retain_graph=True, create_graph=again, allow_unused=True)
        )
        return None, None, *(next(found) if want else None for want in needed)
