"""How long convolutions take on this machine: run once for every kind and size, and remembered.

Libraries of convolutions choose among algorithms whose times differ several fold and follow from no count, so that a
prediction may be far off where that of a matrix product is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tensortrain.compression.choose.load import Load
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.contract.cost import is_measured
from tensortrain.contract.trials import Notebook, timed, trial_key
from tensortrain.formats import FactorSpec
from tensortrain.nn import ConvLayer
from tensortrain.nn.conv.choose import roughly
from tensortrain.system.timing import calls_in_a_row, seconds_per_call

__all__ = ["can_time", "told", "trial_seconds"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # that every processor convolves
_WORTH_S = 2e-4  # a dense layer that is predicted to take less is not tried
_MOST_ENTRIES = 2**26  # of an input: a trial must not exhaust the memory
_BURST_S = 1e-3  # about so long takes one turn
_MOST_ROUNDS, _ENOUGH_S = 3, 0.06  # after two rounds, no new one begins later than this

_CPU = torch.device("cpu")
_NOTES = Notebook("layers-2")
_KNOWN: dict[Any, list[float]] = {}


def can_time(layer: FoundLayer, load: Load, dense_s: float) -> bool:
    """Whether the layer is of a kind whose times are measured, here and now."""
    weight: Any = layer.module.weight
    if not issubclass(layer.reader, ConvLayer) or weight.device.type != "cpu" or not load.seen:
        return False
    if weight.dtype not in _DTYPES or dense_s < _WORTH_S:
        return False
    if not is_measured() or torch.are_deterministic_algorithms_enabled():
        return False
    n_inputs = _n_channels(layer) * math.prod(load.spatial)
    return load.rows * n_inputs <= _MOST_ENTRIES


def _n_channels(layer: FoundLayer) -> int:
    channels: int = layer.module.in_channels  # type: ignore[assignment]
    return channels


def told(layer: FoundLayer) -> str:
    """What the time of a layer depends on, its load and its format aside."""
    weight: Any = layer.module.weight
    arguments = layer.reader.arguments_of(layer.module)
    return f"{layer.reader.__name__} {arguments} {weight.dtype} {layer.weight}"


def trial_seconds(layer: FoundLayer, specs: Sequence[FactorSpec], load: Load) -> list[float]:
    """Seconds of the dense layer, and of the layer at every spec, on one batch of the load.

    They take turns on numbers of their own; the least of a few counts. Found once on a machine.
    """
    key = trial_key(_CPU, told(layer), tuple(specs), load)
    if key not in _KNOWN:
        _KNOWN[key] = _recalled(key, 1 + len(specs)) or _noted(key, _measured(layer, specs, load))
    return _KNOWN[key]


def _recalled(key: Any, count: int) -> list[float] | None:
    """What an earlier process on this machine found."""
    seconds = _NOTES.read(key, _CPU)
    if not isinstance(seconds, list) or len(seconds) != count:
        return None
    return seconds if all(isinstance(one, float) and one > 0 for one in seconds) else None


def _noted(key: Any, seconds: list[float]) -> list[float]:
    _NOTES.write(key, _CPU, seconds)
    return seconds


def _measured(layer: FoundLayer, specs: Sequence[FactorSpec], load: Load) -> list[float]:
    weight: Any = layer.module.weight
    place: dict[str, Any] = {"device": "cpu", "dtype": weight.dtype}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        dense = layer.reader.dense_type(**layer.reader.arguments_of(layer.module), **place)
        modules: list[nn.Module] = [dense, *(layer.reader.like(layer.module, spec, **place) for spec in specs)]
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            parameter.fill_(0.01)
        x = torch.full((load.rows, _n_channels(layer), *load.spatial), 0.5, dtype=weight.dtype)
        with torch.autocast("cpu", enabled=False), roughly():
            return _in_turns([_call(module.eval(), x) for module in modules])


def _call(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    for call in calls:
        call()  # plans are made
    best = [timed(call, _CPU) for call in calls]
    n_in_a_row = [calls_in_a_row(seconds, _BURST_S) for seconds in best]
    start = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        for k, call in enumerate(calls):
            best[k] = min(best[k], seconds_per_call(call, n_in_a_row[k], lambda call: timed(call, _CPU)))
        if turn > 0 and time.perf_counter() - start > _ENOUGH_S:
            break
    return best
