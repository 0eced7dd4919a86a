"""Which way a recurrent layer takes through a sequence: torch's own kernel on dense weights, or step by step.

Torch's kernel does a whole sequence in one call, but needs dense maps: kept at inference, made anew from the cores in
training. Step by step the input map runs factorized on all steps at once, and the hidden one at every step: in one call
of our own kernels where they serve, else operation by operation. The one with the shorter predicted time runs; where
predictions lie close together, both are run once and the machine remembers which was faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tensortrain.contract import cost_model
from tensortrain.contract.grouped import can_group, is_wrapped
from tensortrain.contract.trials import Notebook, best_seconds, can_time, timed, train_once, trial_key
from tensortrain.nn.composite import Map, is_plain
from tensortrain.nn.linear import Linear
from tensortrain.nn.recurrent.sequences import alias, may_run, serves_dtype, step_seconds
from tensortrain.nn.runner import may_be_dense, power_of_two
from tensortrain.system.parking import reuse_freed_memory

if TYPE_CHECKING:
    from tensortrain.nn.recurrent.cells import Cell

__all__ = [
    "DENSE_STEPS",
    "KERNEL",
    "STEPS",
    "MapInCell",
    "Run",
    "differentiable_twice",
    "fastest_way",
    "fused_step_is_faster",
    "may_take_kernel",
    "ways_of",
]

# What gives the outputs of one layer by the way of this name, again and again, from its cells and so many of the first
# steps of an input.
Run = Callable[[str, list[Any], Tensor, int], Callable[[], Tensor]]

KERNEL = "torch's kernel"
STEPS = "steps"
DENSE_STEPS = "steps, hidden maps dense"  # by our kernels

_FAR_APART = 4.0  # predictions further apart than this decide without a trial
_TOO_LONG_S = 0.2  # of one round of a trial, as predicted: of a longer sequence the first steps are tried,
_FEWEST_STEPS = 4  # unless they are fewer than these
_CALLS = {"lstm": 14, "gru": 10}  # operations of one step; four for the others
_CALLS_OF_TORCH = {"lstm": 1}  # of one step by torch's kernel; seven for the others
_GATE_S = {torch.float32: 1.2e-9, torch.float64: 5e-9}  # of one gate of one row by our kernels
_REBUILD_CALLS = 40  # operations, forward and backward
_FOUND = Notebook("recurrent-5")
_KNOWN: dict[Any, str] = {}


def may_take_kernel(cells: Sequence[Cell], x: Tensor) -> bool:
    """Whether torch's kernel computes the same, may have its dense weights, and nobody looks on who it would escape."""
    if not x.is_cpu or not can_group() or any(cell.kernel is None or cell.is_watched() for cell in cells):
        return False
    return all(_may_be_dense(one) for cell in cells for one in (cell.ih, cell.hh))


def _may_be_dense(one: Map) -> bool:
    return may_be_dense(one) if isinstance(one, Linear) else is_plain(one)


def ways_of(cells: Sequence[Cell], x: Tensor, *, are_dense: bool) -> list[str]:
    """The ways that one layer may take through an input.

    Args:
        cells: Of the layer, one for each direction.
        x: Its input.
        are_dense: Whether all maps multiply by dense weights at these sizes.
    """
    are_served = x.is_cpu and all(may_run(cell, x.dtype) for cell in cells)
    if x.numel() == 0 or not may_take_kernel(cells, x):
        found = [KERNEL] if are_dense else [STEPS]
    else:
        found = [KERNEL, STEPS] if are_served or not are_dense else [KERNEL]
    if STEPS in found and are_served and x.numel() > 0 and can_group() and any(_has_choice(cell.hh) for cell in cells):
        found.append(DENSE_STEPS)
    return found


def _has_choice(one: Map) -> bool:
    return isinstance(one, Linear) and one.implementation == "auto" and may_be_dense(one)


def fastest_way(names: Sequence[str], cells: list[Cell], x: Tensor, batch: int, n_steps: int, run: Run) -> str:
    """The way that takes the least time; see the module's docstring.

    Args:
        names: To choose from.
        cells: Of one layer, one for each direction.
        x: Input of the layer; only its sizes count.
        batch, n_steps: Rows of a step, and steps.
        run: How the layer runs.
    """
    training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in cells[0].parameters()))
    sizes = power_of_two(x.numel() // max(1, x.shape[-1])), power_of_two(batch), power_of_two(n_steps)
    key = trial_key(x.device, *(_told(cell) for cell in cells), x.dtype, *sizes, training, *names)
    if key not in _KNOWN:
        seconds = _predicted_s(names, cells, x, batch, n_steps, training)
        best = min(seconds, key=lambda name: seconds[name])
        near = [name for name in names if seconds[name] <= _FAR_APART * seconds[best]]
        few = min(n_steps, int(n_steps * _TOO_LONG_S / sum(seconds[name] for name in near)))
        if len(near) == 1 or few < min(n_steps, _FEWEST_STEPS) or not can_time(x.device):
            return best
        reuse_freed_memory()  # the kernel's workspace is as large as all else
        _KNOWN[key] = _tried(key, near, cells, x, training, lambda name, some, numbers: run(name, some, numbers, few))
    return _KNOWN[key]


class Told(NamedTuple):
    """What a map's times depend on; rank 0 of a dense one."""

    in_features: int
    out_features: int
    rank: int
    has_bias: bool
    spec: Any
    options: Any


def _told(cell: Cell) -> tuple[Any, ...]:
    return type(cell).__name__, cell.kernel, _told_map(cell.ih), _told_map(cell.hh)


def _told_map(one: Map) -> Told:
    if not isinstance(one, Linear):
        return Told(one.in_features, one.out_features, 0, one.bias is not None, None, None)
    options = one.implementation, one.dense_limit_bytes, one.may_time_plans
    rank = max(one.spec.ranks)
    return Told(one.in_features, one.out_features, rank, one.bias is not None, one.spec, options)


# -- predicted ------------------------------------------------------------------------------------------


def _predicted_s(
    names: Sequence[str], cells: Sequence[Cell], x: Tensor, batch: int, n_steps: int, training: bool
) -> dict[str, float]:
    """Seconds by way."""
    rows = x.numel() // max(1, x.shape[-1])
    found = dict.fromkeys(names, 0.0)
    for cell in cells:
        for name in names:
            kernel_s, steps_s = _both_ways_s(cell, rows, batch, n_steps, x.dtype, training, dense=name == DENSE_STEPS)
            found[name] += kernel_s if name == KERNEL else steps_s
    return found


def fused_step_is_faster(cell: Cell, rows: int, dtype: torch.dtype) -> bool:
    """Whether one step by torch's function, on dense maps, is predicted to take less time than by the maps as they are.

    Both maps may be dense; see ``may_take_kernel``.
    """
    training = torch.is_grad_enabled() and any(p.requires_grad for p in cell.parameters())
    rows = power_of_two(rows)
    fused_s, steps_s = _both_ways_s(cell, rows, rows, 1, dtype, training)
    return fused_s <= steps_s


def _both_ways_s(
    cell: Cell, rows: int, batch: int, n_steps: int, dtype: torch.dtype, training: bool, *, dense: bool = False
) -> tuple[float, float]:
    """Seconds of one direction by torch's kernel on dense maps, and step by step, with a dense hidden map perhaps."""
    ih, hh, kernel = _told_map(cell.ih), _told_map(cell.hh), str(cell.kernel)
    step_s = step_seconds(cell.hh, batch, dtype, dense=dense) if may_run(cell, dtype) else None
    kernel_s, steps_s, dense_s = _times(ih, hh, kernel, rows, batch, n_steps, dtype, training, step_s)
    if dense and training:
        steps_s += _rebuild_s(hh, cost_model("cpu"), dtype)
    return kernel_s, steps_s + (cell.ih.plan(rows).predicted_s if isinstance(cell.ih, Linear) else dense_s)


@lru_cache(maxsize=4096)
def _times(
    ih: Told,
    hh: Told,
    kernel: str,
    rows: int,
    batch: int,
    n_steps: int,
    dtype: torch.dtype,
    training: bool,
    step_s: float | None,
) -> tuple[float, float, float]:
    """Seconds of torch's kernel on dense maps, of the steps without their input map, and of a dense input map.

    Args:
        step_s: Of the hidden map's products in one step by our kernels; None where they do not serve.
    """
    model, passes = cost_model("cpu"), 3 if training else 1
    dense_s = passes * model.gemm_s(rows, ih.out_features, ih.in_features, dtype=dtype)
    recurrent_s = model.gemm_s(batch, hh.out_features, hh.in_features, dtype=dtype)
    kernel_s = recurrent_s + _CALLS_OF_TORCH.get(kernel, 7) * model.overhead_s
    rebuild_s = (_rebuild_s(ih, model, dtype) + _rebuild_s(hh, model, dtype)) if training else 0.0
    if step_s is not None:
        hidden_s = step_s + batch * ih.out_features * _GATE_S[dtype]
    else:
        n_calls = _CALLS.get(kernel, 4)
        hidden_s = recurrent_s + n_calls * model.stream_s(2 * batch * ih.out_features * dtype.itemsize / n_calls)
    return dense_s + passes * n_steps * kernel_s + rebuild_s, passes * n_steps * hidden_s, dense_s


def _rebuild_s(one: Told, model: Any, dtype: torch.dtype) -> float:
    """Make the dense weight from the cores, and its gradient's way back."""
    if one.rank == 0:
        return 0.0
    m, n = one.out_features, one.in_features
    calls_s = _REBUILD_CALLS * model.overhead_s
    return float(calls_s + 3 * model.gemm_s(m, n, one.rank, dtype=dtype) + 4 * model.copy_s(2 * m * n * dtype.itemsize))


class MapInCell(NamedTuple):
    """One map of a cell whose other map is dense: what a sequence costs with another form of it.

    Args:
        which: The map.
        blocks: How often a factorized hidden map is applied in a step.
    """

    which: str
    kernel: str | None
    blocks: int
    ih: Told
    hh: Told
    dtype: torch.dtype

    @classmethod
    def of(cls, cell: Cell, which: str) -> MapInCell:
        """Of ``"ih"`` or ``"hh"`` of a cell with dense maps."""
        dtype = next(cell.parameters()).dtype
        return cls(which, cell.kernel, len(cell.blocks()), _told_map(cell.ih), _told_map(cell.hh), dtype)

    def seconds(self, form: Linear | None, rows: int, batch: int, n_steps: int) -> float:
        """Predicted for a sequence at inference, what the other map takes left out.

        A form that may be dense runs in torch's kernel where that takes less time: what it saves of a step by itself is
        not what it saves of the layer. Dense maps take the faster way too, so that what our kernels save of the steps
        is not counted once for every map.

        Args:
            form: Of the map; None as it is.
            rows: Of the input map.
            batch, n_steps: Rows of a step, and steps.
        """
        kernel_s, steps_s, input_s = self._ways_s(None, rows, batch, n_steps)
        whole_s = steps_s + input_s if self.kernel is None else min(kernel_s, steps_s + input_s)
        own_s = input_s if self.which == "ih" else whole_s - input_s
        if form is None:
            return own_s
        if self.which == "ih":
            found_s = form.plan(rows).predicted_s + steps_s
        else:
            found_s = input_s + self._ways_s(form, rows, batch, n_steps)[1]
        if self.kernel is not None and may_be_dense(form):
            found_s = min(found_s, whole_s)
        return own_s + found_s - whole_s

    def _ways_s(self, form: Linear | None, rows: int, batch: int, n_steps: int) -> tuple[float, float, float]:
        """By torch's kernel on dense maps, the steps with this form of the hidden map, and a dense input map."""
        dense_s = cost_model("cpu").gemm_s(batch, self.hh.out_features, self.hh.in_features, dtype=self.dtype)
        step_s = None
        if self.kernel is not None and serves_dtype(self.dtype):
            step_s = dense_s if form is None else step_seconds(form, batch, self.dtype)
        kernel_s, steps_s, input_s = _times(
            self.ih, self.hh, str(self.kernel), rows, batch, n_steps, self.dtype, training=False, step_s=step_s
        )
        if form is not None and step_s is None:
            steps_s += n_steps * (self.blocks * form.plan(batch).predicted_s - dense_s)
        return kernel_s, steps_s, input_s


# -- tried ----------------------------------------------------------------------------------------------


def _tried(
    key: Any,
    names: list[str],
    cells: list[Any],
    x: Tensor,
    training: bool,
    run: Callable[[str, list[Any], Tensor], Callable[[], Tensor]],
) -> str:
    """What an earlier process on this machine found, else what runs of all ways on copies of the cells show now."""
    noted = _FOUND.read(key, x.device)
    if noted in names:
        return str(noted)
    with torch.inference_mode(False), torch.no_grad():
        copies = copy.deepcopy(cells)
        numbers = torch.full(x.shape, 0.5, dtype=x.dtype)
    leaves = [numbers.requires_grad_(), *(p for cell in copies for p in cell.parameters() if p.requires_grad)]

    with torch.set_grad_enabled(training):
        calls = {name: run(name, copies, numbers) for name in names}

    def once(name: str) -> None:
        if training:
            train_once(lambda: calls[name]().sum(), leaves, numbers.new_ones(()))
        else:
            with torch.no_grad():
                calls[name]()

    found = dict(zip(names, best_seconds(names, lambda name: timed(lambda: once(name), x.device)), strict=True))
    best = min(found, key=lambda name: found[name])
    _FOUND.write(key, x.device, best)
    return best


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
        saved = ctx.saved_tensors  # says so where the graph is gone, or what it needs was written to
        again = torch.is_grad_enabled()
        keeps = again or _keeps_graph()
        if again or any(map(is_wrapped, grads)):
            with torch.enable_grad():
                inputs = [alias(one, wanted=want) for one, want in zip(saved, needed, strict=True)]
                outputs = ctx.recorded(*inputs)
        else:
            inputs, outputs = ctx.inputs, ctx.outputs
        if not keeps:
            ctx.inputs = ctx.outputs = None  # their memory serves the next gradients
        wanted = [one for one, want in zip(inputs, needed, strict=True) if want]
        found = iter(
            torch.autograd.grad(outputs, wanted, grads, retain_graph=keeps, create_graph=again, allow_unused=True)
        )
        return None, None, *(next(found) if want else None for want in needed)


def _keeps_graph() -> bool:
    """Whether the backward pass under way may be followed by another one through the same graph."""
    asked: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())
