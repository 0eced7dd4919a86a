"""The convolutions that are timed: fixed ones, a random grid, our layers for them, and the peers' chains.

Peers are written out as the chains of torch's convolutions that TensorLy-Torch's ``FactorizedConv`` runs (``cp``: 1x1,
one depthwise convolution per axis, 1x1; ``tucker``: 1x1, k x k, 1x1; ``tt``: 1x1, one convolution per axis, 1x1), at
the same number of parameters as ours, so that they can be timed where that package is not installed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.formats import format_names, get_format

__all__ = ["FIXED", "FORMATS", "ConvCase", "dense_of", "layer_of", "peers_of", "random_cases", "small_cases"]

FORMATS = tuple(name for name in format_names() if "conv" in get_format(name).kinds)
_OURS: dict[int, Any] = {1: tt.nn.Conv1d, 2: tt.nn.Conv2d, 3: tt.nn.Conv3d}
_DENSE: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class ConvCase:
    """One convolution and the share of its parameters that is kept."""

    inputs: int
    outputs: int
    kernel: int
    spatial: tuple[int, ...]
    batch: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    share: float = 0.1

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.spatial))
        told = f"{self.inputs} -> {self.outputs}, {self.kernel}^{len(self.spatial)} at {size}, b {self.batch}"
        more = [f"{word} {n}" for word, n in self._options().items() if n > 1]
        return ", ".join([told, *more, f"{self.share:.0%}"])

    def _options(self) -> dict[str, int]:
        return {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}

    def arguments(self) -> dict[str, Any]:
        """Of the layer, torch's or ours."""
        padding = self.dilation * (self.kernel - 1) // 2
        return {
            "in_channels": self.inputs,
            "out_channels": self.outputs,
            "kernel_size": self.kernel,
            "padding": padding,
            **self._options(),
        }

    def input(self) -> Tensor:
        return torch.randn(self.batch, self.inputs, *self.spatial)

    @property
    def n_params(self) -> int:
        """That a factorized kernel may have."""
        return int(self.share * self.outputs * self.inputs // self.groups * self.kernel ** len(self.spatial))


FIXED = tuple(
    ConvCase(c, s, k, (n, n), batch, stride)
    for c, s, k, n, stride in (
        (64, 64, 3, 56, 1),
        (3, 64, 7, 112, 2),
        (128, 256, 3, 28, 2),
        (256, 512, 3, 14, 1),
        (512, 512, 3, 7, 1),
        (256, 1024, 1, 14, 1),
    )
    for batch in (1, 8)
)


def random_cases(seed: int, count: int) -> list[ConvCase]:
    """Convolutions of all kinds; the same ones for the same seed."""
    rng = random.Random(seed)
    return [_drawn(rng) for _ in range(count)]


def small_cases(seed: int, count: int) -> list[ConvCase]:
    """Convolutions so small that what happens around them takes as long; the same ones for the same seed."""
    rng = random.Random(seed)
    return [_drawn_small(rng) for _ in range(count)]


def _drawn_small(rng: random.Random) -> ConvCase:
    n_axes, groups = rng.choice((2, 2, 2, 2, 1, 3)), rng.choice((1, 1, 1, 1, 2))
    inputs, outputs = (groups * round(2 ** rng.uniform(3, 6) / groups) for _ in range(2))
    side = {1: rng.randint(28, 400), 2: rng.randint(7, 28), 3: rng.randint(4, 9)}[n_axes]
    kernel, stride = rng.choice((1, 3, 3, 3, 5) if n_axes < 3 else (1, 3)), rng.choice((1, 1, 1, 2))
    batch, share = rng.choice((1, 2, 4, 8)), rng.choice((0.05, 0.1, 0.25, 0.5))
    return ConvCase(inputs, outputs, kernel, (side,) * n_axes, batch, stride, 1, groups, share)


def _drawn(rng: random.Random) -> ConvCase:
    n_axes = rng.choice((2, 2, 2, 2, 1, 3))
    groups = rng.choice((1, 1, 1, 1, 2, 4))
    inputs, outputs = (groups * round(2 ** rng.uniform(3, 8 - math.log2(groups) / 2)) for _ in range(2))
    most = {1: 4000.0, 2: 64.0, 3: 14.0}[n_axes]
    side = round(most ** rng.uniform(0.5, 1.0))
    kernel = rng.choice((1, 3, 3, 3, 5)) if n_axes < 3 else rng.choice((1, 3))
    dilation = rng.choice((1, 1, 1, 2)) if side > 2 * kernel else 1
    stride, batch = rng.choice((1, 1, 1, 2)), rng.choice((1, 2, 8))
    share = rng.choice((0.05, 0.1, 0.25, 0.5))
    return ConvCase(inputs, outputs, kernel, (side,) * n_axes, batch, stride, dilation, groups, share)


def dense_of(case: ConvCase) -> nn.Module:
    """torch's layer."""
    layer: nn.Module = _DENSE[len(case.spatial)](**case.arguments())
    return layer.eval()


def layer_of(case: ConvCase, format: str) -> Any:
    """Ours."""
    return _OURS[len(case.spatial)](**case.arguments(), format=format, rank=case.share).eval()


def peers_of(case: ConvCase) -> dict[str, Callable[[Tensor], Tensor]]:
    """The peers' chains, of about as many parameters as ours."""
    if case.groups > 1 or case.kernel == 1:
        return {}
    return {"cp chain": _cp_chain(case), "tucker chain": _tucker_chain(case), "tt chain": _tt_chain(case)}


def _along(case: ConvCase, axis: int) -> dict[str, Any]:
    """Options of a convolution along one axis."""
    padding = case.dilation * (case.kernel - 1) // 2
    values = {"stride": (case.stride, 1), "padding": (padding, 0), "dilation": (case.dilation, 1)}
    n_axes = len(case.spatial)
    return {word: tuple(one if k == axis else off for k in range(n_axes)) for word, (one, off) in values.items()}


def _kernel(case: ConvCase, outputs: int, inputs: int, axis: int | None) -> Tensor:
    n_axes = len(case.spatial)
    sizes = [case.kernel if axis in (None, k) else 1 for k in range(n_axes)] if axis != -1 else [1] * n_axes
    return nn.Parameter(torch.randn(outputs, inputs, *sizes) / math.sqrt(inputs))


def _cp_chain(case: ConvCase) -> Callable[[Tensor], Tensor]:
    n_axes, convolve = len(case.spatial), _CONVOLVE[len(case.spatial)]
    rank = max(1, case.n_params // (case.inputs + case.outputs + n_axes * case.kernel))
    first, last = _kernel(case, rank, case.inputs, -1), _kernel(case, case.outputs, rank, -1)
    middle = [_kernel(case, rank, 1, axis) for axis in range(n_axes)]
    options, bias = [_along(case, axis) for axis in range(n_axes)], nn.Parameter(torch.randn(case.outputs))

    def run(x: Tensor) -> Tensor:
        x = convolve(x, first)
        for kernel, option in zip(middle, options, strict=True):
            x = convolve(x, kernel, groups=rank, **option)
        return convolve(x, last, bias)

    return run


def _tucker_chain(case: ConvCase) -> Callable[[Tensor], Tensor]:
    convolve, ratio = _CONVOLVE[len(case.spatial)], case.outputs / case.inputs
    a, b = case.kernel ** len(case.spatial) * ratio, case.inputs + ratio * case.outputs
    r_in = max(1, int((math.sqrt(b * b + 4 * a * case.n_params) - b) / (2 * a)))
    r_out = max(1, int(ratio * r_in))
    first, last = _kernel(case, r_in, case.inputs, -1), _kernel(case, case.outputs, r_out, -1)
    middle, bias = _kernel(case, r_out, r_in, None), nn.Parameter(torch.randn(case.outputs))
    option = {"stride": case.stride, "padding": case.dilation * (case.kernel - 1) // 2, "dilation": case.dilation}

    def run(x: Tensor) -> Tensor:
        return convolve(convolve(convolve(x, first), middle, **option), last, bias)

    return run


def _tt_chain(case: ConvCase) -> Callable[[Tensor], Tensor]:
    n_axes, convolve = len(case.spatial), _CONVOLVE[len(case.spatial)]
    a, b = n_axes * case.kernel, case.inputs + case.outputs
    rank = max(1, int((math.sqrt(b * b + 4 * a * case.n_params) - b) / (2 * a)))
    first, last = _kernel(case, rank, case.inputs, -1), _kernel(case, case.outputs, rank, -1)
    middle = [_kernel(case, rank, rank, axis) for axis in range(n_axes)]
    options, bias = [_along(case, axis) for axis in range(n_axes)], nn.Parameter(torch.randn(case.outputs))

    def run(x: Tensor) -> Tensor:
        x = convolve(x, first)
        for kernel, option in zip(middle, options, strict=True):
            x = convolve(x, kernel, **option)
        return convolve(x, last, bias)

    return run
