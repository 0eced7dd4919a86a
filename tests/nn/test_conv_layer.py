"""Convolutions are torch's with the same kernel: every format, every option, outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.testing import IMPLEMENTATIONS, assert_agrees, assert_gradcheck, rel_error

FORMATS = ("tt", "tt_naive", "tucker2", "low_rank")
LAYERS = {1: tt.nn.Conv1d, 2: tt.nn.Conv2d, 3: tt.nn.Conv3d}
TORCH = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POSITIONS = {1: (11,), 2: (8, 7), 3: (6, 5, 7)}


def torch_convolution(layer: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """torch's own module with the options of ``layer``, as a function of its weight."""
    twin = layer.dense_type(**layer.arguments_of(layer), device="meta")

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(twin, parameters, (x,))

    return apply


def check(layer: Any, x: Tensor) -> None:
    assert_agrees(layer, x, torch_convolution(layer))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_agrees_with_dense(n: int, format: str, dtype: torch.dtype, implementation: str) -> None:
    layer = LAYERS[n](4, 6, 3, format=format, rank=3, implementation=implementation, dtype=dtype)
    check(layer, torch.randn(2, 4, *POSITIONS[n], dtype=dtype))


OPTIONS: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "dilation": {"dilation": 2},
    "all three": {"stride": 2, "padding": 1, "dilation": 2},
    "padding same": {"padding": "same"},
    "padding valid": {"padding": "valid"},
    "even kernel, same": {"kernel_size": 2, "padding": "same"},
    "kernel of 4, same, dilated": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "kernel of 5": {"kernel_size": 5, "padding": 2},
    "kernel of 1": {"kernel_size": 1},
    "kernel of 1, stride, padding": {"kernel_size": 1, "stride": 2, "padding": 1},
    "groups": {"groups": 2},
    "groups, stride, no bias": {"groups": 2, "stride": 2, "bias": False},
    "as many groups as inputs": {"groups": 4, "out_channels": 8},
    "depthwise": {"groups": 4, "out_channels": 4},
    "no bias": {"bias": False},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect, same": {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    "replicate, same, even": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
    "circular, groups, stride": {"padding": 1, "padding_mode": "circular", "groups": 2, "stride": 2},
    "circular, valid": {"padding": "valid", "padding_mode": "circular"},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees(name: str, format: str, implementation: str) -> None:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **OPTIONS[name]}
    layer = tt.nn.Conv2d(**options, format=format, rank=2, implementation=implementation)
    check(layer, torch.randn(2, 4, 9, 8))


PER_AXIS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d, same, even, circular": (1, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "1d, reflect": (1, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2}),
    "2d, unlike axes": (2, {"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
    "2d, flat kernel": (2, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "2d, unlike axes, circular": (2, {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "circular"}),
    "3d, unlike axes": (3, {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "padding": (0, 1, 2)}),
    "3d, same, replicate": (3, {"kernel_size": (2, 1, 3), "padding": "same", "padding_mode": "replicate"}),
    "3d, groups, reflect": (3, {"kernel_size": 2, "padding": 1, "padding_mode": "reflect", "groups": 2}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PER_AXIS)
def test_options_per_axis_agree(name: str, format: str, implementation: str) -> None:
    n, options = PER_AXIS[name]
    layer = LAYERS[n](4, 6, **options, format=format, rank=2, implementation=implementation)
    check(layer, torch.randn(2, 4, *POSITIONS[n]))


RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tt, three channel modes": ("tt", {"in_modes": (2, 3, 2), "out_modes": (3, 2, 2), "rank": (1, 4, 3, 5, 1)}),
    "tt, inner ranks": ("tt", {"in_modes": (4, 3), "out_modes": (3, 4), "rank": (4, 3)}),
    "tt, ranks as given": ("tt", {"in_modes": (4, 3), "out_modes": (3, 4), "rank": (1, 30, 40, 1)}),
    "tt, modes of size 1": ("tt", {"in_modes": (1, 12, 1), "out_modes": (4, 1, 3), "rank": 2}),
    "tt, one channel mode": ("tt", {"in_modes": (12,), "out_modes": (12,), "rank": 5}),
    "tt, rank 1": ("tt", {"rank": 1}),
    "tt, rank above the feasible": ("tt", {"rank": 10**6}),
    "tt_naive, ranks as given": ("tt_naive", {"rank": (1, 5, 20, 40, 1)}),
    "tt_naive, rank above the feasible": ("tt_naive", {"rank": 10**6}),
    "tucker2, unlike ranks": ("tucker2", {"rank": (5, 2)}),
    "tucker2, ranks as given": ("tucker2", {"rank": (20, 30)}),
    "tucker2, rank above the feasible": ("tucker2", {"rank": 10**6}),
    "low_rank, rank as given": ("low_rank", {"rank": (1, 200, 1)}),
    "low_rank, rank above the feasible": ("low_rank", {"rank": 10**6}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", RANKS)
def test_ranks_and_modes_agree(name: str, implementation: str) -> None:
    format, options = RANKS[name]
    layer = tt.nn.Conv2d(12, 12, 3, padding=1, format=format, **options, implementation=implementation)
    check(layer, torch.randn(2, 12, 5, 4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels", [(1, 6), (6, 1), (7, 5), (3, 13)])
def test_single_and_prime_channels(channels: tuple[int, int], format: str, implementation: str) -> None:
    layer = tt.nn.Conv2d(*channels, 3, format=format, rank=2, implementation=implementation)
    check(layer, torch.randn(2, channels[0], 5, 4))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "no batch axis": lambda: torch.randn(4, 6, 5),
    "empty batch": lambda: torch.randn(0, 4, 6, 5),
    "one image": lambda: torch.randn(1, 4, 6, 5),
    "channels last": lambda: torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 4, 5, 6).transpose(2, 3),
    "every other channel": lambda: torch.randn(2, 8, 6, 5)[:, ::2],
    "one number everywhere": lambda: torch.randn(1, 1, 1, 1).expand(2, 4, 6, 5),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_any_input_shape_and_strides(groups: int, kind: str, format: str, implementation: str) -> None:
    layer = tt.nn.Conv2d(4, 6, 3, padding=1, groups=groups, format=format, rank=2, implementation=implementation)
    check(layer, INPUTS[kind]())


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck(format: str, implementation: str) -> None:
    layer = tt.nn.Conv2d(
        4, 4, (2, 3), stride=(1, 2), padding=1, groups=2, format=format, rank=2, implementation=implementation
    )
    assert_gradcheck(layer, torch.randn(1, 4, 3, 4))


def test_auto_weighs_core_by_core_against_the_dense_kernel() -> None:
    thin = tt.nn.Conv2d(256, 256, 3, padding=1, format="tucker2", rank=8, dtype=torch.float32)
    thick = tt.nn.Conv2d(8, 8, 3, padding=1, format="tucker2", rank=8, dtype=torch.float32)
    assert not thin.plan(8, (32, 32)).uses_dense
    assert thick.plan(8, (32, 32)).uses_dense
    thin.implementation, thick.implementation = "dense", "factorized"
    assert thin.plan(8, (32, 32)).uses_dense
    assert not thick.plan(8, (32, 32)).uses_dense


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_from_dense_and_back(n: int, format: str) -> None:
    dense = TORCH[n](4, 6, 2, stride=2, padding=1, groups=2, padding_mode="circular", bias=False)
    layer = LAYERS[n].from_dense(dense, format=format)
    back = layer.to_dense()
    assert repr(back) == repr(dense)
    assert rel_error(back.weight, dense.weight) <= 1e-13
    x = torch.randn(2, 4, *POSITIONS[n])
    assert rel_error(layer(x), dense(x)) <= 1e-12
