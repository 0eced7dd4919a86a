"""Options of convolutions drawn at random: whatever torch's layer takes, the factorized one takes and agrees on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.nn.conv.transpose import swap_channels
from tensortrain.testing import assert_agrees

FORMATS = ("tt", "tt_naive", "tucker2", "low_rank")
CONVOLUTIONS = {1: tt.nn.Conv1d, 2: tt.nn.Conv2d, 3: tt.nn.Conv3d}
TRANSPOSED = {1: tt.nn.ConvTranspose1d, 2: tt.nn.ConvTranspose2d, 3: tt.nn.ConvTranspose3d}


def draw_shared(rng: random.Random, n: int) -> dict[str, Any]:
    groups = rng.choice([1, 1, 2, 3])
    return {
        "in_channels": groups * rng.randint(1, 4),
        "out_channels": groups * rng.randint(1, 4),
        "kernel_size": per_axis(rng, n, 1, 3),
        "groups": groups,
        "dilation": per_axis(rng, n, 1, 2),
        "bias": rng.random() < 0.7,
        "format": rng.choice(FORMATS),
        "rank": rng.choice([1, 2, 3, 10**6]),
        "implementation": rng.choice(["factorized", "factorized", "dense", "auto"]),
    }


def per_axis(rng: random.Random, n: int, least: int, most: int) -> int | tuple[int, ...]:
    """One number for all axes, or one per axis."""
    if rng.random() < 0.4:
        return rng.randint(least, most)
    return tuple(rng.randint(least, most) for _ in range(n))


def draw_convolution(rng: random.Random, n: int) -> dict[str, Any]:
    padding: Any = rng.choice([per_axis(rng, n, 0, 2), "same", "valid"])
    stride = 1 if padding == "same" else per_axis(rng, n, 1, 3)
    mode = rng.choice(["zeros", "reflect", "replicate", "circular"])
    return {**draw_shared(rng, n), "stride": stride, "padding": padding, "padding_mode": mode}


def draw_transposed(rng: random.Random, n: int) -> dict[str, Any]:
    shared = draw_shared(rng, n)
    stride = tuple(rng.randint(1, 3) for _ in range(n))
    output_padding = tuple(rng.randrange(s) for s in stride)
    return {**shared, "stride": stride, "padding": per_axis(rng, n, 0, 1), "output_padding": output_padding}


def draw_input(rng: random.Random, channels: int, n: int, least: int) -> Tensor:
    shape = [channels, *(rng.randint(least, least + 3) for _ in range(n))]
    return torch.randn(shape if rng.random() < 0.2 else [rng.randint(1, 3), *shape])


def torch_function(layer: Any) -> Any:
    twin = layer.dense_type(**layer.arguments_of(layer), device="meta")
    transposed = isinstance(layer, tuple(TRANSPOSED.values()))

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = swap_channels(weight, layer.groups) if transposed else weight
        return torch.func.functional_call(twin, {"weight": weight} | ({} if bias is None else {"bias": bias}), (x,))

    return apply


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(25))
def test_convolution(seed: int, n: int) -> None:
    rng = random.Random(f"convolution {n} {seed}")
    layer = CONVOLUTIONS[n](**draw_convolution(rng, n))
    # 5 positions hold a kernel of 3 with dilation 2, and can be padded by 2 in every mode.
    assert_agrees(layer, draw_input(rng, layer.in_channels, n, 5), torch_function(layer))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(25))
def test_transposed_convolution(seed: int, n: int) -> None:
    rng = random.Random(f"transposed {n} {seed}")
    layer = TRANSPOSED[n](**draw_transposed(rng, n))
    assert_agrees(layer, draw_input(rng, layer.in_channels, n, 3), torch_function(layer))
