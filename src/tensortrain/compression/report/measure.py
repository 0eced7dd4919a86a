"""Measure models side by side: latency, peak and resident memory, flops.

Every function runs the model in eval mode without gradients and puts each module's mode back.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tensortrain.compression.report.report import LatencyRow, MemoryRow
from tensortrain.compression.report.turns import Turns
from tensortrain.errors import ShapeError
from tensortrain.train.batches import Parts, device_of, map_tensors, read_batch, tensors_in, to_device
from tensortrain.train.modes import evaluating

__all__ = [
    "Call",
    "Latency",
    "batch_of",
    "call_of",
    "count_flops",
    "latency_rows",
    "measure_latency",
    "memory_rows",
    "peak_memory",
    "resident_bytes",
    "shares_batch_axis",
]

_RUNS_PER_TURN = 4
_MAX_RUNS = 20_000
_FEWEST_PAIRS = 5  # the least and the largest of five hold the median with 94 %


Call = Parts  # its name in the version before


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass of one model at one batch size.

    ``speedup`` holds, with 95 % confidence, how many times faster than the first model it is: the median of the ratios
    of turns that followed each other. None for the first model itself.
    """

    name: str
    batch: int
    median_ms: float
    p90_ms: float
    n_runs: int
    threads: int
    dtype: str
    speedup: tuple[float, float] | None = None


def measure_latency(
    models: Mapping[str, nn.Module],
    inputs: Callable[[int], Any] | Any,
    *,
    batches: Sequence[int] = (1, 128),
    repeats: int = 20,
    min_time_s: float = 0.2,
    max_time_s: float = 20.0,
    fewest_runs: int = _RUNS_PER_TURN,
    turns: Turns | None = None,
) -> list[Latency]:
    """Time the forward passes of several models, turn about.

    The models take turns in alternating order, so a machine that slows down slows all of them. A turn is
    one untimed run, which brings the model's weights back into the caches, then four timed ones; where five such
    turns of all models would take more than the time, it is one timed run.

    Args:
        models: Name -> model; all take the same input.
        inputs: A function from batch size to input, or an example, see :func:`batch_of`: a batch as
            ``train.batches`` reads it.
        batches: Batch sizes.
        repeats: Least timed runs of each model and batch.
        min_time_s: Least seconds of timed runs over all models together.
        max_time_s: Seconds after which ``repeats`` is given up, warm-up and untimed runs included.
        fewest_runs: Timed runs of each model, however long they take.
        turns: Who is in memory, of models whose weights lie in files; reading these is not counted.

    Returns:
        list: One :class:`Latency` per batch and model, in that order; milliseconds.
    """
    results = []
    turns = turns or Turns(models.values())
    with evaluating(*models.values()):
        for batch in batches:
            x = _input(inputs, batch)
            samples = _sample_in_turns(models, x, repeats, min_time_s, max_time_s, fewest_runs, turns)
            first = next(iter(models), "")
            for name, model in models.items():
                times_ms = sorted(1e3 * seconds for turn in samples[name] for seconds in turn)
                results.append(
                    Latency(
                        name=name,
                        batch=batch,
                        median_ms=statistics.median(times_ms),
                        p90_ms=times_ms[math.ceil(0.9 * len(times_ms)) - 1],
                        n_runs=len(times_ms),
                        threads=torch.get_num_threads(),
                        dtype=_dtype_name(model),
                        speedup=None if name == first else _ratios_between(samples[first], samples[name]),
                    )
                )
    return results


def latency_rows(
    dense: nn.Module,
    compressed: nn.Module,
    inputs: Callable[[int], Any] | Any,
    *,
    batches: Sequence[int] = (1, 128),
    repeats: int = 20,
    min_time_s: float = 0.2,
    max_time_s: float = 20.0,
    fewest_runs: int = _RUNS_PER_TURN,
    turns: Turns | None = None,
) -> list[LatencyRow]:
    """Time two models by :func:`measure_latency`, one report row per batch size."""
    measured = measure_latency(
        {"dense": dense, "compressed": compressed},
        inputs,
        batches=batches,
        repeats=repeats,
        min_time_s=min_time_s,
        max_time_s=max_time_s,
        fewest_runs=fewest_runs,
        turns=turns,
    )
    return [
        LatencyRow(
            a.batch, a.median_ms, b.median_ms, a.p90_ms, b.p90_ms, a.threads, a.dtype, *(b.speedup or (None, None))
        )
        for a, b in zip(measured[::2], measured[1::2], strict=True)
    ]


def memory_rows(
    dense: nn.Module,
    compressed: nn.Module,
    inputs: Callable[[int], Any] | Any,
    *,
    batches: Sequence[int] = (1, 128),
    have_run: bool = False,
    is_tidy: bool = False,
    turns: Turns | None = None,
) -> list[MemoryRow]:
    """Measure peak and resident bytes of two models, one report row per batch size.

    Args:
        have_run: Whether both ran at these sizes before, so that the caches built on first use are there.
        is_tidy: Whether garbage was collected just before.
        turns: Who is in memory, as ``measure_latency`` takes it; the compressed model is, at the end.
    """
    rows, turns = [], turns or Turns((dense, compressed))
    if not is_tidy:
        gc.collect()
    for batch in batches:
        x = _input(inputs, batch)
        # Peaks first: a run may build a cached dense weight, which then counts as resident.
        peak, smaller_peak = (_peak(model, x, warm_up=not have_run, turns=turns) for model in (dense, compressed))
        rows.append(MemoryRow(batch, peak, smaller_peak, resident_bytes(dense), resident_bytes(compressed)))
    return rows


def peak_memory(model: nn.Module, x: Any) -> int:
    """Extra bytes allocated at the worst moment of one forward pass.

    Counts activations, the output and the scratch memory of the operations, above what was allocated when
    the pass began; parameters and input are not counted. One pass runs before the measured one, so caches
    built on first use do not count either: they belong to :func:`resident_bytes`. On CPU these are
    PyTorch's own allocations; scratch memory that a BLAS or oneDNN library takes for itself is not seen.
    On CUDA it is the allocator's peak.

    Returns:
        int: Bytes.
    """
    return _peak(model, x, warm_up=True, turns=Turns((model,)))


def _peak(model: nn.Module, x: Any, *, warm_up: bool, turns: Turns) -> int:
    x = _parts(model, x)
    with evaluating(model), torch.no_grad():
        turns.begin(model, lambda: _call(model, x))
        if warm_up:
            _call(model, x)
            gc.collect()  # garbage freed during the pass would hide as much new memory
        device = device_of(model)
        return _peak_cuda(model, x, device) if device.type == "cuda" else _peak_cpu(model, x)


def resident_bytes(model: nn.Module) -> int:
    """Bytes a model holds between calls.

    Parameters and buffers, shared storages once, plus each module's ``resident_cache_bytes`` (an integer,
    or a method that returns one) where a module keeps a dense weight it has built.

    Returns:
        int: Bytes.
    """
    storages: dict[Any, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        on_meta = tensor.device.type == "meta"  # meta storages all have address 0
        storages[id(tensor) if on_meta else (tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values()) + sum(_cache_bytes(module) for module in model.modules())


def count_flops(model: nn.Module, x: Any) -> int:
    """Flops of one forward pass by PyTorch's counter: matrix products and convolutions, multiply-add is two.

    Returns:
        int: Flops for the whole batch ``x``.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), counter:
        _call(model, _parts(model, x))
    return int(counter.get_total_flops())


def batch_of(example: Any, batch: int) -> Any:
    """Cut or repeat an example to ``batch`` entries along the first axis of each of its tensors.

    Args:
        example: A tensor, or a tuple, list or mapping of them; what is no tensor stays as it is.
        batch: Entries wanted.

    Returns:
        The same structure.

    Example:
        >>> batch_of(torch.zeros(3, 5), 8).shape
        torch.Size([8, 5])
    """
    if isinstance(example, Tensor):
        if example.ndim == 0:
            return example
        if example.shape[0] == 0:
            raise ShapeError(
                f"an example must have an entry to repeat: the input has shape {tuple(example.shape)}, "
                "expected a first axis of at least 1. Pass one real input."
            )
        return example[torch.arange(batch, device=example.device) % example.shape[0]]
    if isinstance(example, Parts):
        return Parts(batch_of(example.args, batch), batch_of(example.kwargs, batch))
    if isinstance(example, Mapping):
        return {key: batch_of(value, batch) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(batch_of(value, batch) for value in example)
    return example


def call_of(model: nn.Module, batch: Any, *, with_labels: bool = False) -> Parts:
    """What a batch hands to a model, on its device; copies, since a model may write into its input."""
    parts = read_batch(model, to_device(batch, device_of(model)), with_labels=with_labels)
    return Parts(*map_tensors(lambda tensor: tensor.detach().clone(), (parts.args, dict(parts.kwargs))))


def shares_batch_axis(call: Parts) -> bool:
    """Whether all inputs have a first axis of one size and can be cut along it."""
    values = (*call.args, *call.kwargs.values())
    sizes = {tensor.shape[0] for tensor in tensors_in([list(call.args), dict(call.kwargs)]) if tensor.ndim}
    return len(sizes) == 1 and all(isinstance(value, Tensor) or not tensors_in(value) for value in values)


def _sample_in_turns(
    models: Mapping[str, nn.Module],
    x: Any,
    repeats: int,
    min_time_s: float,
    max_time_s: float,
    fewest: int,
    turns: Turns,
) -> dict[str, list[list[float]]]:
    """Seconds of the timed runs of each turn, per model."""
    began = perf_counter()
    inputs = {name: _parts(model, x) for name, model in models.items()}

    def begin(name: str) -> nn.Module:
        turns.begin(models[name], lambda: _call(models[name], inputs[name]))
        return models[name]

    # Warm up outside inference mode: a dense weight cached here must stay usable for training.
    with torch.no_grad():
        first = [_seconds(begin(name), inputs[name], turns) for name in models]
    # A first run may find plans: the quickest tells how long one takes.
    long_turns_s = _FEWEST_PAIRS * len(models) * (1 + _RUNS_PER_TURN) * min(first, default=0.0)
    samples: dict[str, list[list[float]]] = {name: [] for name in models}
    order = list(models)
    with torch.inference_mode():
        while _n_runs(samples) < fewest or not _enough(samples, repeats, min_time_s, began + max_time_s):
            for name in order:
                samples[name].append(_one_turn(begin(name), inputs[name], turns, is_short=long_turns_s > max_time_s))
            order.reverse()
    return samples


def _ratios_between(first: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Between which ratios of paired turns the median ratio lies, with 95 % confidence.

    Order statistics serve: of n pairs, each falls below the true median with a chance of one half, whatever the noise.
    Fewer than five pairs cannot tell; then every run of one model is set against every run of the other.
    """
    pairs = [(statistics.median(one), statistics.median(two)) for one, two in zip(first, other, strict=True)]
    if len(pairs) < _FEWEST_PAIRS:
        ones, twos = list(itertools.chain(*first)), list(itertools.chain(*other))
        pairs = [(min(ones), max(twos)), (max(ones), min(twos))]
    ratios = sorted(a / b if b > 0 else math.inf for a, b in pairs)
    cut = max(0, math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2))  # the binomial's 2.5 %, as a normal
    return ratios[cut], ratios[-1 - cut]


def _one_turn(model: nn.Module, x: Parts, turns: Turns, *, is_short: bool) -> list[float]:
    if is_short:
        return [_seconds(model, x, turns)]
    _call(model, x)
    return [_seconds(model, x, turns) for _ in range(_RUNS_PER_TURN)]


def _seconds(model: nn.Module, x: Parts, turns: Turns) -> float:
    device = device_of(model)
    _synchronize(device)
    start, paused_s = perf_counter(), turns.paused_s
    _call(model, x)
    _synchronize(device)
    return perf_counter() - start - (turns.paused_s - paused_s)


def _n_runs(samples: Mapping[str, list[list[float]]]) -> int:
    """Of every model."""
    return min((sum(map(len, turns)) for turns in samples.values()), default=_MAX_RUNS)


def _enough(samples: Mapping[str, list[list[float]]], repeats: int, min_time_s: float, end: float) -> bool:
    n_runs = _n_runs(samples)
    timed_s = sum(sum(turn) for turns in samples.values() for turn in turns)
    return perf_counter() > end or n_runs >= _MAX_RUNS or (n_runs >= repeats and timed_s >= min_time_s)


def _peak_cpu(model: nn.Module, x: Parts) -> int:
    with _native_stderr_muted(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        output = _call(model, x)
    del output  # freed outside the profile, so that it counts to the end
    assert profile.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        held += n_bytes
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _native_stderr_muted() -> Iterator[None]:
    """PyTorch's tracer writes lines of its own to file descriptor 2, where Python cannot catch them."""
    try:
        kept = os.dup(2)
    except OSError:  # no such descriptor: nothing to mute
        yield
        return
    sys.stderr.flush()
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _peak_cuda(model: nn.Module, x: Parts, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = _call(model, x)
    torch.cuda.synchronize(device)
    del output
    return torch.cuda.max_memory_allocated(device) - before


def _cache_bytes(module: nn.Module) -> int:
    cached = getattr(module, "resident_cache_bytes", 0)
    return int(cached() if callable(cached) else cached)


def _call(model: nn.Module, x: Parts) -> Any:
    return model(*x.args, **x.kwargs)


def _parts(model: nn.Module, batch: Any) -> Parts:
    return batch if isinstance(batch, Parts) else read_batch(model, batch)


def _input(inputs: Callable[[int], Any] | Any, batch: int) -> Any:
    return inputs(batch) if callable(inputs) else batch_of(inputs, batch)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dtype_name(model: nn.Module) -> str:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex())
    return str(next(dtypes, torch.get_default_dtype())).removeprefix("torch.")
