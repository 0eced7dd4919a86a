"""What an operation costs on a device: a few measured constants, and time predicted from them.

The model is coarse on purpose. It only has to rank plans, so it knows a peak rate, how that rate
falls off for thin operands, bandwidths of cache and memory, and a fixed cost per call.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tensortrain.system.machine import Watch, device_key, known_file, read_json, write_json
from tensortrain.system.records import read_record
from tensortrain.system.timing import usual_seconds

__all__ = ["CostModel", "cost_model", "given_or_measured", "is_measured", "measure_cost_model", "use_cost_model"]

# glibc maps results above this size anew at every call, and first touch of the pages then dominates.
_FRESH_BYTES = 32 * 2**20
# Of the library's convolutions on CPUs: how many numbers must be summed, and how many outputs made, for half the rate
# of a product; and the fixed cost of a call, in calls of a small operation.
_CONV_HALF_FAN = 60.0
_CONV_HALF_OUTS = 8.0
_CONV_CALLS = 12
# Sizes at which products are timed, ``(m, n, k)`` and ``(batch, m, n, k)``. Libraries fall off between the widths that
# suit a vector and those that do not by factors that no formula of ours knows, so both kinds of widths are here.
_GEMM_AT = ((1, 2, 12, 90, 700, 6000), (3, 5, 8, 11, 16, 45, 200, 1500), (5, 11, 45, 200, 1500))
_BATCHED_AT = (
    (1, 8, 64, 512, 4000),
    (2, 4, 8, 24, 70, 250),
    (2, 5, 8, 11, 16, 25, 45, 100, 200),
    (2, 5, 16, 60, 220),
)
_MOST_FLOPS, _MOST_NUMEL = 3e8, 2**22  # of one that is timed
_COPIED_AT = ((256, 4, 4, 4, 16), (256, 11, 53, 1, 6), (38, 7, 7, 15, 4), (44, 1, 437, 1, 37), (1, 93, 12, 11, 17))


@dataclass(frozen=True)
class CostModel:
    """Predicts seconds from shapes.

    A product of ``m x k`` by ``k x n`` runs at ``peak * e(m) * e(n) * e(k)``, where ``n`` is the side
    whose entries lie next to each other in the result, ``e(m) = m / (m + half)``, ``e(k)`` likewise
    and ``e(n) = 1 / (1 + (half / n)^2)``: below the vector width the loss is steeper than linear.

    Args:
        gemm_flops_s: Peak float32 rate of one large product, flops per second.
        gemm_half: ``(m, n, k)`` at which one product runs at half its rate.
        batched_flops_s: Peak float32 rate inside a batch of products, flops per second.
        batched_half: As ``gemm_half``, for each product of a batch.
        matrix_s: Fixed cost of each product of a batch, seconds.
        bandwidth_bytes_s: Memory bandwidth, bytes per second.
        cache_bandwidth_bytes_s: Bandwidth while everything fits in ``cache_bytes``.
        cache_bytes: Footprint up to which the cache bandwidth holds.
        fresh_bytes_s: Rate of writing a result of more than 32 MiB, bytes per second.
        permute_bytes_s: Rate of a copy that transposes, bytes read plus bytes written per second.
        overhead_s: Cost of calling one small operation, seconds.
        float64_rate, half_rate, complex64_rate, complex128_rate: Rate of that dtype over float32's.
        gemm_table, batched_table: Measured time of products at a grid of sizes, over what the peak rate and the
            bandwidth allow; empty where nothing was measured. Between the sizes it is interpolated, and ``gemm_half``,
            ``batched_half`` and ``matrix_s`` are not asked.
        backward_s: Fixed cost of a backward pass, seconds.
    """

    gemm_flops_s: float
    gemm_half: tuple[float, float, float]
    batched_flops_s: float
    batched_half: tuple[float, float, float]
    matrix_s: float
    bandwidth_bytes_s: float
    cache_bandwidth_bytes_s: float
    cache_bytes: float
    fresh_bytes_s: float
    permute_bytes_s: float
    overhead_s: float
    float64_rate: float = 0.5
    half_rate: float = 1.0
    complex64_rate: float = 0.25
    complex128_rate: float = 0.12
    gemm_table: tuple[float, ...] = ()
    batched_table: tuple[float, ...] = ()
    backward_s: float = 1e-12

    @classmethod
    def reference(cls, device_type: str = "cpu") -> CostModel:
        """Return fixed constants of a usual machine, for tests and for devices that cannot be timed."""
        return _REFERENCE.get(device_type, _REFERENCE["cpu"])

    def gemm_s(
        self,
        m: int,
        n: int,
        k: int,
        *,
        batch: int = 1,
        batched: bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> float:
        """Seconds for ``batch`` products of ``m x k`` by ``k x n``.

        Args:
            m, n, k: Sizes of each product.
            batch: How many.
            batched: Whether the call is that of a batch, even of one; by default if there are several.
            dtype: Of both operands.

        Example:
            >>> model = CostModel.reference("cpu")
            >>> model.gemm_s(64, 64, 64) < model.gemm_s(128, 64, 64)
            True
        """
        flops = 2.0 * batch * m * n * k
        # In a batch one operand is the same for all products, so it is read once.
        n_bytes = float(dtype.itemsize) * (batch * (m * n + min(m, n) * k) + max(m, n) * k)
        in_batch = batch > 1 if batched is None else batched
        write = self._fresh_s(float(dtype.itemsize) * batch * m * n)
        table, peak = self.gemm_table, self.gemm_flops_s
        if in_batch:
            table, peak = self.batched_table, self.batched_flops_s
        if table:
            plain = flops / (peak * self._dtype_rate(dtype)) + n_bytes / self._bandwidth(n_bytes)
            return write + (self.overhead_s + plain) * _interpolated(
                table, in_batch, (batch, m, n, k) if in_batch else (m, n, k)
            )
        fixed = self.overhead_s + (self.matrix_s * batch if batch > 1 else 0.0)
        arithmetic = flops / (self._rate(m, n, k, in_batch) * self._dtype_rate(dtype))
        return fixed + write + max(arithmetic, n_bytes / self._bandwidth(n_bytes))

    def linear_s(self, b: int, out_features: int, in_features: int, *, dtype: torch.dtype = torch.float32) -> float:
        """Seconds for a dense layer on ``b`` rows; reading the weight bounds small ``b``."""
        return self.gemm_s(b, out_features, in_features, dtype=dtype)

    def copy_s(self, n_bytes: float) -> float:
        """Seconds for a transposing copy that reads and writes ``n_bytes`` together."""
        return self.overhead_s + n_bytes / self.permute_bytes_s + self._fresh_s(n_bytes / 2)

    def stream_s(self, n_bytes: float) -> float:
        """Seconds for passing over ``n_bytes`` in order, as a sum does."""
        return self.overhead_s + n_bytes / self._bandwidth(n_bytes)

    def conv_s(self, flops: float, n_bytes: float, *, dtype: torch.dtype = torch.float32) -> float:
        """Seconds for a convolution, roughly: half the peak rate, or bandwidth."""
        arithmetic = flops / (0.5 * self.gemm_flops_s * self._dtype_rate(dtype))
        return self.overhead_s + max(arithmetic, n_bytes / self._bandwidth(n_bytes))

    def convolution_s(
        self,
        flops: float,
        channels: tuple[int, int, int, int],
        kernel: int,
        in_positions: int,
        out_positions: int,
        *,
        itemsize: int = 4,
    ) -> float:
        """Seconds for one call of the library's convolution.

        The rate is that of large products, less for few numbers that are summed and for few outputs. Each call lays the
        kernel out anew, which counts where the image is small.

        Args:
            flops: Two per multiply-add.
            channels: ``(examples, groups, inputs of a group, outputs of a group)``.
            kernel: Positions of the kernel.
            in_positions, out_positions: Positions of one example.
            itemsize: Bytes of a number.
        """
        rows, groups, ins, outs = channels
        fan = ins * kernel
        rate = self.gemm_flops_s * fan / (fan + _CONV_HALF_FAN) * outs / (outs + _CONV_HALF_OUTS)
        n_bytes = float(itemsize) * rows * groups * (ins * in_positions + outs * out_positions)
        laid_out = 2.0 * itemsize * groups * fan * outs / self.permute_bytes_s
        work = max(flops / rate, n_bytes / self._bandwidth(n_bytes))
        return (
            _CONV_CALLS * self.overhead_s
            + laid_out
            + work
            + self._fresh_s(float(itemsize) * rows * out_positions * groups * outs)
        )

    def _rate(self, m: int, n: int, k: int, batched: bool) -> float:
        peak = self.batched_flops_s if batched else self.gemm_flops_s
        half_m, half_n, half_k = self.batched_half if batched else self.gemm_half
        return peak * m / (m + half_m) * k / (k + half_k) / (1 + (half_n / n) ** 2)

    def _bandwidth(self, n_bytes: float) -> float:
        return self.cache_bandwidth_bytes_s if n_bytes <= self.cache_bytes else self.bandwidth_bytes_s

    def _fresh_s(self, result_bytes: float) -> float:
        return result_bytes / self.fresh_bytes_s if result_bytes > _FRESH_BYTES else 0.0

    def _dtype_rate(self, dtype: torch.dtype) -> float:
        if dtype == torch.float64:
            return self.float64_rate
        if dtype.is_complex:
            return self.complex128_rate if dtype == torch.complex128 else self.complex64_rate
        return self.half_rate if dtype.itemsize == 2 else 1.0


def _interpolated(table: Sequence[float], in_batch: bool, sizes: Sequence[int]) -> float:
    """A factor between those at the nearest sizes of the grid, in logarithms; at its edge beyond."""
    found = [(0, 1.0)]  # positions in the table, and their weights
    for knots, size in zip(_BATCHED_AT if in_batch else _GEMM_AT, sizes, strict=True):
        k = min(max(bisect_right(knots, size), 1), len(knots) - 1)
        share = math.log(max(size, 1) / knots[k - 1]) / math.log(knots[k] / knots[k - 1])
        share = min(max(share, 0.0), 1.0)
        found = [
            (at * len(knots) + k - 1 + more, weight * part)
            for at, weight in found
            for more, part in ((0, 1.0 - share), (1, share))
            if part
        ]
    return math.exp(sum(weight * math.log(table[at]) for at, weight in found))


_REFERENCE = {
    "cpu": CostModel(
        gemm_flops_s=1.5e11,
        gemm_half=(4.0, 7.0, 5.0),
        batched_flops_s=1.3e11,
        batched_half=(10.0, 12.0, 5.0),
        matrix_s=5e-8,
        bandwidth_bytes_s=2.2e10,
        cache_bandwidth_bytes_s=8e10,
        cache_bytes=8e6,
        fresh_bytes_s=2e9,
        permute_bytes_s=1e10,
        overhead_s=2.5e-6,
    ),
    "cuda": CostModel(
        gemm_flops_s=5e13,
        gemm_half=(64.0, 32.0, 32.0),
        batched_flops_s=3e13,
        batched_half=(16.0, 16.0, 16.0),
        matrix_s=1e-9,
        bandwidth_bytes_s=2e12,
        cache_bandwidth_bytes_s=4e12,
        cache_bytes=3e7,
        fresh_bytes_s=2e12,
        permute_bytes_s=1e12,
        overhead_s=8e-6,
        half_rate=8.0,
    ),
}

_OVERRIDE: ContextVar[CostModel | None] = ContextVar("tensortrain_cost_model", default=None)
_KNOWN: dict[str, CostModel] = {}


def cost_model(device: torch.device | str = "cpu") -> CostModel:
    """Return the cost model in force: the one set by ``use_cost_model``, else this device's.

    The constants of a device are measured once, in three to five seconds, and kept in
    ``$XDG_CACHE_HOME/tensortrain`` (``~/.cache/tensortrain``). A cache file that cannot be read or
    written is passed over; what was measured while other programs were at work is measured again after ten minutes.
    Devices other than cpu and cuda get the reference constants.
    """
    override = _OVERRIDE.get()
    if override is not None:
        return override
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return CostModel.reference(device.type)
    key = device_key(device)
    if key not in _KNOWN:
        _KNOWN[key] = _load(_cache_file(key)) or _measure_and_store(device, _cache_file(key))
    return _KNOWN[key]


def is_measured() -> bool:
    """Whether the constants in force are those of the machine, not ones set by ``use_cost_model``."""
    return _OVERRIDE.get() is None


def given_or_measured(model: CostModel | None, device: torch.device) -> CostModel:
    """The model that a caller gave, else the one in force."""
    return cost_model(device) if model is None else model


@contextmanager
def use_cost_model(model: CostModel) -> Iterator[CostModel]:
    """Plan with ``model`` inside the ``with`` block.

    Example:
        >>> with use_cost_model(CostModel.reference("cpu")) as model:
        ...     cost_model() is model
        True
    """
    token = _OVERRIDE.set(model)
    try:
        yield model
    finally:
        _OVERRIDE.reset(token)


def measure_cost_model(device: torch.device | str = "cpu", *, is_busy: bool = False) -> CostModel:
    """Time small operations and products of many sizes on ``device`` and return the constants, to two digits.

    Args:
        device: Where.
        is_busy: Other programs are at work: the least of some times counts, as theirs only ever add to it.

    Cost: three to five seconds; about 200 MB for a moment.
    """
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        return _Stopwatch(torch.device(device), is_busy).cost_model()


class _Stopwatch:
    """Times products and copies on one device."""

    def __init__(self, device: torch.device, is_busy: bool = False) -> None:
        self.device, self._is_busy, self._watch = device, is_busy, Watch()
        self.side = 512 if device.type == "cpu" else 4096  # large enough to reach the peak rate
        self.generator = torch.Generator().manual_seed(0)

    def is_busy(self) -> bool:
        """Whether other programs are, or have been, at work meanwhile."""
        self._is_busy = self._is_busy or not self._watch.is_alone()
        return self._is_busy

    def cost_model(self) -> CostModel:
        overhead = self.seconds(*self.linear(1, 4, 4))
        peak = self.rate(overhead, self.side, self.side, self.side)
        batched_peak = self.rate(overhead, 64, 64, 64, batch=64)
        bandwidth = self.bandwidth()
        cache = max(self.clone_rate(2**18), bandwidth), self.cache_bytes() if self.device.type == "cpu" else 3e7
        constants: dict[str, Any] = {
            "gemm_flops_s": peak,
            "gemm_half": self.halves(overhead, peak, many=self.side * 8, batch=1),
            "batched_flops_s": batched_peak,
            "batched_half": self.halves(overhead, batched_peak, many=64, batch=256),
            "matrix_s": max(self.seconds(*self.batched(4096, 2, 2, 2)) - overhead, 1e-12) / 4096,
            "bandwidth_bytes_s": bandwidth,
            "cache_bandwidth_bytes_s": cache[0],
            "cache_bytes": cache[1],
            "fresh_bytes_s": self.clone_rate(12 * 2**20) / 2,
            "permute_bytes_s": self.permute_rate(),
            "overhead_s": overhead,
            **self.dtype_rates(),
            "backward_s": max(self.backward_s() - 3 * overhead, 1e-12),
        }
        model = CostModel(**{name: _round2(value) for name, value in constants.items()})
        if self.device.type != "cpu":
            return model
        tables = {"gemm_table": self.table(model, _GEMM_AT), "batched_table": self.table(model, _BATCHED_AT)}
        return replace(model, **{name: _round2(table) for name, table in tables.items()})

    def table(self, model: CostModel, grid: tuple[tuple[int, ...], ...]) -> tuple[float, ...]:
        """Measured over plain times of products at all sizes of a grid, those that are too large as the next ones."""
        in_batch, found = grid is _BATCHED_AT, dict[tuple[int, ...], float]()
        ones = (1.0,) * math.prod(map(len, grid))
        flat = replace(model, gemm_table=ones, batched_table=ones)
        pools = [self.randn(_MOST_NUMEL) for _ in range(2)]
        for at in product(*(range(len(knots)) for knots in grid)):
            sizes = tuple(knots[i] for knots, i in zip(grid, at, strict=True))
            if _is_too_large(*sizes):
                smaller = (tuple(i - (place == j) for j, i in enumerate(at)) for place in range(len(at)) if at[place])
                found[at] = math.exp(statistics.fmean(math.log(found[one]) for one in smaller))
            else:
                seconds = self.seconds(*_product_of(pools, *sizes), burst_s=4e-4)
                batch, m, n, k = sizes if in_batch else (1, *sizes)
                found[at] = seconds / flat.gemm_s(m, n, k, batch=batch, batched=in_batch)
        return tuple(found.values())

    def backward_s(self) -> float:
        """Forward and backward of one small product."""
        with torch.enable_grad():
            x, weight = (self.randn(4, 4).requires_grad_() for _ in range(2))
            grad = self.randn(4, 4)

            def step() -> None:
                torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad)

            return self.seconds(step)

    def halves(self, overhead: float, peak: float, *, many: int, batch: int) -> tuple[float, float, float]:
        """One thin product per side; its loss against the peak gives the side of half rate."""
        thin = 4
        loss_m = peak / self.rate(overhead, thin, 64, 64, batch=4 * batch) - 1
        loss_n = peak / self.rate(overhead, many, thin, 64, batch=batch) - 1
        loss_k = peak / self.rate(overhead, many, 64, thin, batch=batch) - 1
        half_n = thin * math.sqrt(max(loss_n, 0.0))
        return _clamp(thin * loss_m), _clamp(half_n), _clamp(thin * loss_k)

    def rate(self, overhead: float, m: int, n: int, k: int, *, batch: int = 1) -> float:
        call = self.linear(m, n, k) if batch == 1 else self.batched(batch, m, n, k)
        # A call cannot be all overhead; a noisy clock must not give a negative or endless rate.
        seconds = self.seconds(*call)
        return 2.0 * batch * m * n * k / max(seconds - overhead, 0.1 * seconds)

    def bandwidth(self) -> float:
        side = 4096
        return 4.0 * side * side / self.seconds(*self.linear(1, side, side))

    def cache_bytes(self) -> float:
        """The largest weight, of a few, that one row reads faster than memory could give it."""
        read = {
            side: 4.0 * side * side / self.seconds(*self.linear(1, side, side)) for side in (512, 724, 1024, 1448, 4096)
        }
        limit = math.sqrt(read[512] * read[4096])
        return max((4.0 * side * side for side, rate in read.items() if rate > limit), default=4.0 * 512**2)

    def clone_rate(self, numel: int) -> float:
        x = torch.zeros(numel, device=self.device)
        return 8.0 * numel / self.seconds(torch.clone, x)

    def permute_rate(self) -> float:
        """Of arrays as cut up between two steps of a sweep, the mean over some sizes."""
        rates = []
        for sizes in _COPIED_AT:
            x = self.randn(*sizes)
            rates.append(8.0 * x.numel() / self.seconds(lambda t: t.permute(0, 3, 4, 1, 2).contiguous(), x))
        return statistics.geometric_mean(rates)

    def dtype_rates(self) -> dict[str, float]:
        side = self.side // 2
        seconds = {dtype: self.dtype_s(side, dtype) for dtype in _DTYPE_FIELDS}
        base = self.dtype_s(side, torch.float32)
        return {name: base / seconds[dtype] for dtype, name in _DTYPE_FIELDS.items()}

    def dtype_s(self, side: int, dtype: torch.dtype) -> float:
        x = self.randn(side, side).to(dtype)
        return self.seconds(torch.matmul, x, x)

    def linear(self, m: int, n: int, k: int) -> tuple[Callable[..., object], torch.Tensor, torch.Tensor]:
        return torch.nn.functional.linear, self.randn(m, k), self.randn(n, k)

    def batched(self, batch: int, m: int, n: int, k: int) -> tuple[Callable[..., object], torch.Tensor, torch.Tensor]:
        return torch.bmm, self.randn(m, k).expand(batch, -1, -1), self.randn(batch, k, n)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def seconds(
        self, function: Callable[..., object], *args: torch.Tensor, turns: int = 3, burst_s: float = 2e-3
    ) -> float:
        """Seconds of a call as trials and benchmarks count them, not the least of many, which nobody sees again."""
        call = partial(function, *args)
        call()
        if self.is_busy():
            return max(min(self.timed(call) for _ in range(_CALLS_WHILE_BUSY)), 1e-9)
        return max(usual_seconds(call, self.timed, turns=turns, burst_s=burst_s), 1e-9)

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _is_too_large(*sizes: int) -> bool:
    """Whether a product of the grid takes too long to be timed."""
    batch, (m, n, k) = math.prod(sizes[:-3]), sizes[-3:]
    return 2 * batch * m * n * k > _MOST_FLOPS or max(m * k, n * k, batch * n * max(m, k)) > _MOST_NUMEL


def _product_of(pools: Sequence[torch.Tensor], *sizes: int) -> tuple[Callable[..., object], torch.Tensor, torch.Tensor]:
    """A product as plans take it: of rows by a weight, or of one weight by a batch."""
    m, n, k = sizes[-3:]
    left = pools[0][: m * k].view(m, k)
    if len(sizes) == 3:
        return torch.nn.functional.linear, left, pools[1][: n * k].view(n, k)
    batch = sizes[0]
    return torch.bmm, left.expand(batch, -1, -1), pools[1][: batch * k * n].view(batch, k, n)


_DTYPE_FIELDS = {
    torch.float64: "float64_rate",
    torch.bfloat16: "half_rate",
    torch.complex64: "complex64_rate",
    torch.complex128: "complex128_rate",
}


def _clamp(half: float) -> float:
    return min(max(half, 0.1), 256.0)


def _round2(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(float(f"{v:.2g}") for v in value)
    return float(f"{value:.2g}")


def _cache_file(key: str) -> Path:
    return known_file("cost-model-5", key)


def _measure_and_store(device: torch.device, path: Path) -> CostModel:
    """Measured again if other programs are at work: their share of the processor is not the machine's."""
    found: list[CostModel] = []
    was_alone = False
    for _ in range(_MOST_TRIES):
        watch = Watch()
        found.append(measure_cost_model(device, is_busy=bool(found)))
        was_alone = watch.is_alone()
        if was_alone:
            found = found[-1:]
            break
    model = _best_of(found)
    entry = {"measured_on": device_key(device), "was_alone": was_alone, "constants": asdict(model)}
    write_json(path, entry)
    return model


_MOST_TRIES = 2
_CALLS_WHILE_BUSY = 6  # of which the least counts
_RETRY_S = 600.0  # what was measured beside other programs holds for so long


def _best_of(models: Sequence[CostModel]) -> CostModel:
    """Of every constant the one that tells of the fastest machine: other programs only ever add time."""
    best: dict[str, Any] = {}
    for field in fields(CostModel):
        values = [getattr(model, field.name) for model in models]
        if isinstance(values[0], tuple):
            best[field.name] = tuple(map(min, zip(*values, strict=True)))
        else:
            best[field.name] = min(values) if field.name in ("matrix_s", "overhead_s", "backward_s") else max(values)
    return CostModel(**best)


def _load(path: Path) -> CostModel | None:
    try:
        entry = read_json(path)
        model = read_record(CostModel, entry["constants"], "constants")
        is_old = not entry.get("was_alone", True) and time.time() - path.stat().st_mtime > _RETRY_S
    except (TypeError, KeyError, AttributeError, OverflowError, OSError):
        return None
    return model if _is_sound(model) and not is_old else None


def _is_sound(model: CostModel) -> bool:
    """Whether every constant is a positive number, and the tables are of the sizes that are asked for."""
    for table, grid in ((model.gemm_table, _GEMM_AT), (model.batched_table, _BATCHED_AT)):
        if len(table) not in (0, math.prod(map(len, grid))):
            return False
    constants = (getattr(model, field.name) for field in fields(model))
    return all(0 < v < math.inf for value in constants for v in (value if isinstance(value, tuple) else (value,)))
