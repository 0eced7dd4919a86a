"""Choose a plan by running the likeliest ones.

Predicted times are right within a factor of two or so, and the plans of one layer often lie closer together than
that. So the first call of a layer at a size runs the best few of them, in turns, and keeps the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensortrain.contract.choose import candidates
from tensortrain.contract.plan import Plan, Shape
from tensortrain.contract.trials import Notebook, can_time, digest, seconds_in_use, train_once
from tensortrain.contract.trials import timed as _timed
from tensortrain.system.machine import Watch, memory_bytes
from tensortrain.system.native import library

__all__ = ["fastest_plan"]

_MOST_CANDIDATES = 6
_LIKELY = 3.0  # a prediction so many times longer than the best one is not tried
_TOO_LONG_S = 0.8  # of one round as predicted: beyond it the likeliest plans alone are tried
# Of input, output and what a plan holds in between: a trial must not exhaust the memory.
_MOST_BYTES = max(2**28, memory_bytes() // 16)
_FLIPPED_ROWS = range(2, 129)  # beyond, a product and its transpose are level
_CACHED_BYTES = 2**22  # smaller states stay in the cache between two steps
_ROWS_AT_A_TIME = 12  # fewer make products too small, more leave the cache
_MOST_BY_PARTS = 4
_CLEARLY = 0.97  # what is not faster by so much than an earlier candidate is taken for level with it

_KNOWN: dict[Any, Plan] = {}
_NOTES = Notebook("plans-3")  # since calls are timed in a row, and their seconds noted


def fastest_plan(
    shape: Shape,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    training: bool = False,
    allow_dense: bool = True,
    force: Any = None,
    may_time: bool = True,
) -> Plan:
    """The plan that ran fastest of those predicted to be fast.

    Where nothing can be timed, it is the plan of least predicted time: while a program is traced, compiled or
    captured, under a dispatch mode or a transform of ``torch.func``, under ``use_cost_model``, with
    ``torch.use_deterministic_algorithms(True)``, on devices other than CPU and CUDA, and where the two likeliest plans
    take more than 0.8 seconds or the likeliest one holds more than 256 MiB and a 16th of the machine's memory.

    Args:
        shape, batch, dtype, device, training, allow_dense, force: As for ``plan_chain`` and ``plan_network``.
        may_time: Whether plans may be run at all.

    Cost: some 50 ms once for every size. What was found is kept with the constants of the machine
    (``$XDG_CACHE_HOME/tensortrain``), so that a later process on it takes the same plan and gets the same bits.
    """
    device = torch.device(device)
    options = {"batch": batch, "dtype": dtype, "training": training, "allow_dense": allow_dense, "force": force}
    plans: Sequence[Plan] = candidates(shape, device=device, **options)
    if not may_time or len(plans) == 1 or not can_time(device):
        return plans[0]
    key = _key(shape, device, options)
    if key not in _KNOWN:
        _KNOWN[key] = _recalled(plans, device, key) or _found(plans, device, key)
    return _KNOWN[key]


def _key(shape: Shape, device: torch.device, options: dict[str, Any]) -> tuple[Any, ...]:
    key = (shape, device, torch.get_num_threads(), *options.values())
    kernels = library()
    if device.type != "cpu" or kernels is None:
        return key
    return (*key, Path(kernels.__file__).parent.name)  # other times, other plans


def _found(plans: Sequence[Plan], device: torch.device, key: Any) -> Plan:
    chosen = _in_time(_likely(plans))
    if len(chosen) < 2:
        return plans[0]
    watch = Watch()
    try:
        with torch.autocast(device.type, enabled=False):
            found = _fastest(chosen, device)
    except torch.OutOfMemoryError:
        return plans[0]
    earlier = _recalled(plans, device, key)  # another process was at it at the same time
    if earlier is not None:
        return earlier
    seconds = found.predicted_s if watch.is_alone() else None  # beside other programs it says which, not how long
    _NOTES.write(key, device, {"plan": digest(found.course), "seconds": seconds})
    return found


def _recalled(plans: Sequence[Plan], device: torch.device, key: Any) -> Plan | None:
    """The plan that an earlier process on this machine found."""
    note = _NOTES.read(key, device)
    wanted, seconds = (note.get("plan"), note.get("seconds")) if isinstance(note, dict) else (note, None)
    known = [*plans, *_flipped(plans), *_by_parts(plans)]
    found = next((plan for plan in known if digest(plan.course) == wanted), None)
    return found if found is None or not isinstance(seconds, float) else _measured(found, seconds)


def _measured(plan: Plan, seconds: float) -> Plan:
    return replace(plan, predicted_s=seconds, is_measured=True)


def _likely(plans: Sequence[Plan]) -> list[Plan]:
    """The first few, the dense weight among them where it is allowed, and at few rows their flipped forms."""
    limit = _LIKELY * plans[0].predicted_s
    found = [plan for plan in plans if plan.predicted_s <= limit][:_MOST_CANDIDATES]
    found += [plan for plan in plans if plan.uses_dense and plan not in found and plan.predicted_s <= 2 * limit]
    if _held_bytes(plans[0]) > _MOST_BYTES:
        return []
    found = [plan for plan in found if _held_bytes(plan) <= _MOST_BYTES]
    return found + _flipped(found) + _by_parts(found)


def _in_time(plans: Sequence[Plan]) -> list[Plan]:
    """The first plans of which one round takes no longer than is allowed."""
    spent = accumulate(plan.predicted_s for plan in plans)
    return [plan for plan, seconds in zip(plans, spent, strict=True) if seconds <= _TOO_LONG_S]


def _held_bytes(plan: Plan) -> int:
    """What a trial of this plan allocates, gradients of input and output included."""
    ends = plan.batch * (plan.in_features + plan.out_features) * plan.dtype.itemsize
    return plan.peak_bytes + ends * (2 if plan.training else 1)


def _flipped(plans: Sequence[Plan]) -> list[Plan]:
    """The flipped forms that are worth a trial."""
    if not plans or plans[0].training or plans[0].batch not in _FLIPPED_ROWS:
        return []
    return [flipped for plan in plans if (flipped := plan.flipped()).flips]


def _by_parts(plans: Sequence[Plan]) -> list[Plan]:
    """The likeliest plans a few rows at a time, where states are too large for the cache of a core."""
    if not plans or plans[0].training or plans[0].device_type != "cpu" or library() is None:
        return []
    large = [plan for plan in plans if plan.state_bytes > _CACHED_BYTES]
    return [plan.by_parts(_ROWS_AT_A_TIME) for plan in large[:_MOST_BY_PARTS]]


def _fastest(plans: Sequence[Plan], device: torch.device) -> Plan:
    seconds = seconds_in_use([_call(plan, device) for plan in plans], lambda call: _timed(call, device))
    found = 0
    for k in range(1, len(plans)):
        if seconds[k] < _CLEARLY * seconds[found]:
            found = k
    return _measured(plans[found], seconds[found])


def _call(plan: Plan, device: torch.device) -> Callable[[], object]:
    """One inference, or one training step, of a plan on numbers of its own."""
    with torch.inference_mode(False), torch.no_grad():
        x = torch.full((plan.batch, plan.in_features), 0.5, dtype=plan.dtype, device=device)
        cores = [torch.full(size, 0.5, dtype=plan.dtype, device=device) for size in plan.shape.core_shapes]
    if not plan.training:
        with torch.no_grad():
            weights = plan.prepare(cores)
        return lambda: _infer(plan, x, weights)
    with torch.no_grad():
        seed = torch.full((plan.batch, plan.out_features), 0.5, dtype=plan.dtype, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, *cores)]
    return lambda: train_once(lambda: plan.execute(leaves[0], leaves[1:]), leaves, seed)


def _infer(plan: Plan, x: Tensor, weights: Sequence[Tensor]) -> None:
    with torch.no_grad():
        plan.execute(x, (), weights)
