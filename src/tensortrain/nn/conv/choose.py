"""Which way a convolution runs: predicted, then timed once for each size on each machine.

The time of the library's convolution at a shape depends on layouts and blockings that no formula of ours knows. So
the first call at a size runs the likeliest ways on numbers of their own, in turns, and the fastest is kept. The way
through the dense kernel as torch runs it is always among those tried, where the layer may build that kernel.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tensortrain.contract.trials import (
    Notebook,
    can_time,
    duel,
    roughly_in_use,
    seconds_in_use,
    timed,
    train_once,
    trial_key,
)
from tensortrain.formats import FactorSpec
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.ways import DenseWay, Maker, Way
from tensortrain.system.machine import Watch
from tensortrain.system.native import library

__all__ = ["Found", "Request", "bucket", "fastest_way", "roughly"]

_MOST_TRIED = 12
_LIKELY = 4.0  # a prediction so many times longer than the best one is not tried
_LEAST_TRIED = 3  # beside the dense kernel
_ROUGHLY_TRIED = 4  # likewise, where a rough answer will do
_TOO_LONG_S = 0.25  # of one round as predicted: fewer ways are tried then
_FAR_TOO_LONG_S = 0.5  # likewise, of those few: with fewer examples
_MOST_BYTES = 2**28  # of input, output and states: likewise
_CLEARLY = 0.87  # what is not faster by so much than the dense kernel as torch runs it is left
_MOST_DUELS = 3  # of the fastest with the dense kernel as torch runs it
_LONG_WAY_S = 9e-5  # of a call that finds nothing ready: through plans and checks; seen on a CPU
_MARGIN = 0.7  # untimed, a way has to be predicted so much faster than the dense kernel to run in its place
_DISTURBED_S = 600  # after so long a trial beside other programs is made again
_NOTES = Notebook("convolutions-5")  # since training takes a short way
_KNOWN: dict[Any, _Trial] = {}
_DENSE_S: dict[Any, float] = {}  # of dense kernels that were timed for rough answers
_IS_ROUGH: ContextVar[bool] = ContextVar("_IS_ROUGH", default=False)


@dataclass(frozen=True)
class Request:
    """What a way is looked for.

    Args:
        spec: Of all groups.
        options: Of the convolution.
        batch, spatial: Of the input.
        out_features: Numbers of one example's output.
        training: Whether gradients to the cores are wanted.
        dtype, device: Of cores and input.
        channels_last: Whether the input lies so.
        has_bias: Whether one is added, which some ways do within their last product.
    """

    spec: FactorSpec
    options: ConvOptions
    batch: int
    spatial: tuple[int, ...]
    out_features: int
    training: bool
    dtype: torch.dtype
    device: torch.device
    channels_last: bool = False
    has_bias: bool = True

    @property
    def in_channels(self) -> int:
        """Of all groups."""
        return self.spec.weight.in_features * self.spec.weight.groups

    @property
    def n_positions(self) -> int:
        """Of the inputs of all examples."""
        return self.batch * math.prod(self.spatial)


@dataclass(frozen=True)
class Found:
    """The way that was chosen, and the times of all that were looked at.

    Args:
        way: What runs.
        seconds: By the names of the ways; for the size of the request.
        is_measured: Whether they are measured, not predicted.
    """

    way: Way
    seconds: dict[str, float]
    is_measured: bool


@dataclass(frozen=True)
class _Trial:
    """The name of the fastest way, and seconds for each position of the input by the names of all that were run."""

    name: str
    seconds: dict[str, float]


def fastest_way(request: Request, ways: Sequence[Way], maker: Maker, *, may_time: bool) -> Found:
    """The way that ran fastest of those predicted to be fast.

    Args:
        request: The size.
        ways: Candidates; the first is the one that the others have to beat.
        maker: Of the layer that asks.
        may_time: Whether ways may be run at all.

    Cost: some 50 ms once for every size; what was found is kept with the constants of the machine.
    """
    if len(ways) == 1 or not may_time or request.n_positions == 0 or not can_time(request.device):
        return predicted(ways)
    key = _key(request, ways)
    known = _KNOWN.get(key)
    if known is None or all(way.name != known.name for way in ways):
        recalled = _recalled(ways, request, key)
        known = recalled or _tried(ways, request, maker, key)
        if known is None:
            return predicted(ways)
        if recalled or not _IS_ROUGH.get():
            _KNOWN[key] = known
    way = next(way for way in ways if way.name == known.name)
    seconds = {name: each * request.n_positions for name, each in known.seconds.items()}
    return Found(way, seconds, is_measured=True)


@contextlib.contextmanager
def roughly() -> Iterator[None]:
    """Inside, the likeliest ways alone are tried, for a shorter time, and what is found is not kept.

    For layers that stand for others of about their size for a while.
    """
    token = _IS_ROUGH.set(True)
    try:
        yield
    finally:
        _IS_ROUGH.reset(token)


def predicted(ways: Sequence[Way]) -> Found:
    """The way of least predicted time; the dense kernel is left for one that is clearly faster only."""
    plain = [way for way in ways if not way.packs] or list(ways)
    best = min(plain, key=lambda way: way.predicted_s * (_MARGIN if way.uses_dense else 1.0))
    return Found(best, {way.name: way.predicted_s for way in ways}, is_measured=False)


def bucket(size: int) -> int:
    """Sizes of one bucket run alike: they differ by less than an eighth."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _key(request: Request, ways: Sequence[Way]) -> tuple[Any, ...]:
    size = (1 << max(0, request.batch - 1).bit_length(), *map(bucket, request.spatial))
    rules = any(way.uses_dense for way in ways), any(way.packs for way in ways), all(way.uses_dense for way in ways)
    how = request.training, request.channels_last, request.has_bias, str(request.dtype)
    return trial_key(request.device, repr(request.spec.to_dict()), repr(request.options), size, *how, rules)


def _recalled(ways: Sequence[Way], request: Request, key: Any) -> _Trial | None:
    """What an earlier process on this machine found; not for long where other programs disturbed it."""
    note = _NOTES.read(key, request.device)
    try:
        if not note["alone"] and time.time() - note["made"] > _DISTURBED_S:
            return None
        known = _Trial(note["way"], {str(name): float(each) for name, each in note["seconds"].items()})
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    return known if known.name in known.seconds and any(way.name == known.name for way in ways) else None


def _tried(ways: Sequence[Way], request: Request, maker: Maker, key: Any) -> _Trial | None:
    """What a trial finds; None where it would take too much time or memory."""
    is_rough = _IS_ROUGH.get()
    tried = _in_time(_likely(ways, _ROUGHLY_TRIED) if is_rough else _likely(ways))
    small = _smaller(request, tried)
    if small is None:
        return None
    watch = Watch()
    try:
        with torch.autocast(request.device.type, enabled=False):
            find = _fastest_once if is_rough else _fastest_of
            best, found = find(tried, small, maker)
    except torch.OutOfMemoryError:
        return None
    earlier = _recalled(ways, request, key)  # another process was at it at the same time
    if earlier is not None:
        return earlier
    told = zip(tried, best, strict=True)
    each = {way.name: seconds / small.n_positions for way, seconds in told if seconds < math.inf}
    if not is_rough:
        made = {"alone": watch.is_alone(), "made": time.time()}
        _NOTES.write(key, request.device, {"way": tried[found].name, "seconds": each, **made})
    return _Trial(tried[found].name, each)


def _fastest(calls: Sequence[Callable[[], object]], timer: Callable[[Any], float]) -> tuple[list[float], int]:
    """Seconds of each call, and which runs: the first, unless another is clearly faster in turns of the two alone."""
    best = seconds_in_use(calls, timer)
    likely = sorted(range(1, len(calls)), key=lambda k: best[k])
    for k in likely[:_MOST_DUELS]:
        if best[k] >= _CLEARLY * best[0]:
            break
        best[k], best[0] = duel(calls[k], calls[0], timer)
        if best[k] < _CLEARLY * best[0]:
            return best, k
    return best, 0


def _fastest_of(ways: Sequence[Way], request: Request, maker: Maker) -> tuple[list[float], int]:
    return _fastest(_calls(ways, request, maker), _timer(request))


def _fastest_once(ways: Sequence[Way], request: Request, maker: Maker) -> tuple[list[float], int]:
    """The same from less of each, which luck may decide where two are nearly equal.

    At inference the dense kernel takes as long whatever cores it was made from: it is timed for the first of them.
    """
    keys = [_dense_key(way, request) for way in ways]
    new = [k for k, key in enumerate(keys) if key is None or key not in _DENSE_S]
    seconds = roughly_in_use(_calls([ways[k] for k in new], request, maker), _timer(request)) if new else []
    best = [math.inf if key is None else _DENSE_S.get(key, math.inf) for key in keys]
    for k, each in zip(new, seconds, strict=True):
        best[k] = each
        if keys[k] is not None and each < math.inf:
            _DENSE_S[keys[k]] = each
    found = min(range(len(ways)), key=best.__getitem__)
    return best, found if best[found] < _CLEARLY * best[0] else 0


def _dense_key(way: Way, request: Request) -> Any | None:
    """What the time of a dense kernel depends on; None of other ways, and in training, where it is made every time."""
    if not way.uses_dense or request.training:
        return None
    size = request.batch, request.spatial, request.channels_last, request.has_bias
    weight = request.spec.weight
    return way.name, weight, request.options, size, request.dtype, request.device, torch.get_num_threads()


def _timer(request: Request) -> Callable[[Any], float]:
    return lambda call: timed(call, request.device) + call.more_s


def _likely(ways: Sequence[Way], most: int = _MOST_TRIED) -> list[Way]:
    """The first way, those through the dense kernel, and the others that are predicted to be fast."""
    limit = _LIKELY * min(way.predicted_s for way in ways)
    others = [way for way in ways[1:] if way.predicted_s <= limit]
    dense = [way for way in others if way.uses_dense]
    rest = sorted((way for way in others if not way.uses_dense), key=lambda way: way.predicted_s)
    return [ways[0], *dense, *rest[:most]]


def _in_time(ways: Sequence[Way]) -> list[Way]:
    """The dense kernel and the likeliest others; fewer of them where a round of all takes long."""
    likely = sorted(ways[1:], key=lambda way: way.predicted_s)
    spent = list(accumulate([ways[0].predicted_s, *(way.predicted_s for way in likely)]))
    kept = [way for way, seconds in zip(likely, spent[1:], strict=True) if seconds <= _TOO_LONG_S]
    kept = max(kept, likely[:_LEAST_TRIED], key=len)
    return [way for way in ways if way is ways[0] or way in kept]


def _smaller(request: Request, ways: Sequence[Way]) -> Request | None:
    """The same with as many examples as can be tried; None where a single one is too much."""
    seconds = sum(way.predicted_s for way in ways)
    ends = request.batch * request.out_features + request.in_channels * request.n_positions
    held = (ends * (2 if request.training else 1) + max(way.peak for way in ways)) * request.dtype.itemsize
    share = max(seconds / _FAR_TOO_LONG_S, held / _MOST_BYTES)
    if share <= 1.0:
        return request
    batch = int(request.batch / share)
    return replace(request, batch=batch) if batch >= 1 else None


class _Numbers:
    """What every way of a trial runs on, as a layer's input is the same whichever way it takes."""

    def __init__(self, request: Request) -> None:
        place: dict[str, Any] = {"dtype": request.dtype, "device": request.device}
        x = torch.full((request.batch, request.in_channels, *request.spatial), 0.1, **place)
        self.x = x.movedim(1, -1).contiguous().movedim(-1, 1) if request.channels_last else x
        self.cores = [torch.full(shape, 0.1, **place) for shape in request.spec.core_shapes]
        n_outputs = request.spec.weight.out_features
        self.bias = torch.full((n_outputs,), 0.1, **place) if request.has_bias else None

    @property
    def leaves(self) -> list[Tensor]:
        """All of them, with gradients recorded from now on."""
        own = () if self.bias is None else (self.bias,)
        return [tensor.requires_grad_() for tensor in (self.x, *self.cores, *own)]


@dataclass(frozen=True)
class _Call:
    """One run of a way, and the seconds that a layer takes before it and a trial does not."""

    run: Callable[[], object]
    more_s: float = 0.0

    def __call__(self) -> object:
        return self.run()


def _calls(ways: Sequence[Way], request: Request, maker: Maker) -> list[_Call]:
    """One inference, or one training step, by each way."""
    with torch.inference_mode(False), torch.no_grad():
        numbers = _Numbers(request)
        if not request.training:
            return [_inference(way, numbers, request.options, maker) for way in ways]
        first = ways[0].prepare(maker, numbers.cores, request.options)
        seed = torch.full_like(ways[0].run(numbers.x, first, numbers.bias, request.options, maker), 0.1)
    return [_training_step(way, numbers, numbers.leaves, seed, request.options, maker) for way in ways]


def _inference(way: Way, numbers: _Numbers, options: ConvOptions, maker: Maker) -> _Call:
    x, bias, prepared = numbers.x, numbers.bias, way.prepare(maker, numbers.cores, options)
    ready = way.ready(x, prepared, options)  # as calls after the first one run

    def run() -> None:
        with torch.no_grad():
            if ready is None:
                way.run(x, prepared, bias, options, maker)
            else:
                ready(x, bias)

    return _Call(run, _LONG_WAY_S if ready is None else 0.0)


def _training_step(
    way: Way, numbers: _Numbers, leaves: Sequence[Tensor], seed: Tensor, options: ConvOptions, maker: Maker
) -> _Call:
    x, cores, bias = numbers.x, numbers.cores, numbers.bias
    at_once = _at_once(way, numbers, options)
    others_are_short = x.is_cpu and library() is not None

    def run() -> Tensor:
        return way.run(x, way.prepare(maker, cores, options), bias, options, maker)

    more_s = _LONG_WAY_S if at_once is None and others_are_short else 0.0
    return _Call(lambda: train_once(at_once or run, leaves, seed), more_s)


def _at_once(way: Way, numbers: _Numbers, options: ConvOptions) -> Callable[[], Tensor] | None:
    """The way forward in one call of the kernels, as layers take it from their second step on."""
    x, cores, bias = numbers.x, numbers.cores, numbers.bias
    kernels = library()
    recipe = None if kernels is None or not x.is_cpu else way.recipe(options)
    if kernels is None or recipe is None or x.dtype not in (torch.float32, torch.float64):
        return None
    if isinstance(way, DenseWay) and way.is_torchs_own(options):
        told = options.stride, options.padding, options.dilation, way.groups
        return lambda: kernels.convolve_contracted(recipe, cores, x, bias, *told)
    rest = way.by_weights(options)
    return lambda: rest(x, bias, kernels.contract_cores(recipe, cores))
