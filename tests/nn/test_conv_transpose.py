"""Transposed convolutions are torch's with the same weight: every format, every option, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import KindError, ShapeError
from tensortrain.nn.conv.transpose import swap_channels
from tensortrain.testing import IMPLEMENTATIONS, assert_agrees, assert_gradcheck, rel_error

FORMATS = ("tt", "tt_naive", "tucker2", "low_rank")
LAYERS = {1: tt.nn.ConvTranspose1d, 2: tt.nn.ConvTranspose2d, 3: tt.nn.ConvTranspose3d}
TORCH = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POSITIONS = {1: (7,), 2: (5, 4), 3: (3, 2, 4)}


def torch_layer(layer: Any, *more: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """torch's own module with the options of ``layer``, as a function of its weight."""
    twin = layer.dense_type(**layer.arguments_of(layer), device="meta")

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = swap_channels(weight, layer.groups)
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(twin, parameters, (x, *more))

    return apply


def check(layer: Any, x: Tensor) -> None:
    assert_agrees(layer, x, torch_layer(layer))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_agrees_with_dense(n: int, format: str, dtype: torch.dtype, implementation: str) -> None:
    layer = LAYERS[n](4, 6, 3, 2, format=format, rank=3, implementation=implementation, dtype=dtype)
    check(layer, torch.randn(2, 4, *POSITIONS[n], dtype=dtype))


OPTIONS: dict[str, dict[str, Any]] = {
    "padding beyond the kernel": {"padding": 3, "stride": 3},
    "output padding": {"stride": 3, "output_padding": 2},
    "output padding up to the dilation": {"stride": 1, "dilation": 3, "output_padding": 2},
    "all of them": {"stride": (2, 3), "padding": (1, 0), "dilation": (2, 1), "output_padding": (1, 2), "groups": 2},
    "kernel of 1": {"kernel_size": 1, "stride": 2},
    "flat kernel": {"kernel_size": (1, 4), "stride": (1, 2)},
    "no bias": {"bias": False},
    "groups": {"groups": 2, "stride": 2},
    "as many groups as inputs": {"groups": 4, "out_channels": 8},
    "depthwise": {"groups": 4, "out_channels": 4, "kernel_size": 2},
    "one channel to a prime": {"in_channels": 1, "out_channels": 7},
    "rank above the feasible": {"rank": 10**6},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees(name: str, format: str, implementation: str) -> None:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "rank": 2, **OPTIONS[name]}
    layer = tt.nn.ConvTranspose2d(**options, format=format, implementation=implementation)
    check(layer, torch.randn(2, options["in_channels"], 4, 5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [(1, 4, 3, 5, 1), (1, 9, 1, 2, 1), 1])
def test_three_channel_modes(rank: Any, implementation: str) -> None:
    layer = tt.nn.ConvTranspose2d(
        12, 12, 3, 2, in_modes=(2, 3, 2), out_modes=(3, 1, 4), rank=rank, implementation=implementation
    )
    check(layer, torch.randn(2, 12, 3, 4))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "no batch axis": lambda: torch.randn(4, 3, 5),
    "empty batch": lambda: torch.randn(0, 4, 3, 5),
    "transposed": lambda: torch.randn(2, 4, 5, 3).transpose(2, 3),
    "channels last": lambda: torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_any_input_shape_and_strides(groups: int, kind: str, format: str, implementation: str) -> None:
    layer = tt.nn.ConvTranspose2d(
        4, 6, 3, stride=2, padding=1, groups=groups, format=format, rank=2, implementation=implementation
    )
    check(layer, INPUTS[kind]())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("output_size", [(9, 13), (10, 14), (2, 6, 10, 13)])
def test_output_size(output_size: tuple[int, ...], format: str, implementation: str) -> None:
    layer = tt.nn.ConvTranspose2d(
        4, 6, 3, stride=(2, 3), padding=(0, 1), output_padding=1, format=format, rank=2, implementation=implementation
    )
    x = torch.randn(2, 4, 4, 5)
    kernel = layer.format.to_dense(list(layer.cores), layer.spec)
    exact = torch_layer(layer, output_size)(x, kernel, layer.bias)
    found = layer(x, output_size)
    assert found.shape == exact.shape
    assert found.shape[2:] == output_size[-2:]
    assert rel_error(found, exact) <= 1e-12
    upstream = torch.randn_like(exact)
    ours = torch.autograd.grad(found, list(layer.parameters()), upstream)
    theirs = torch.autograd.grad(exact, list(layer.parameters()), upstream)
    assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))
    assert layer(x[0], output_size[-2:]).shape == exact.shape[1:]


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck(format: str, implementation: str) -> None:
    layer = tt.nn.ConvTranspose2d(
        4, 4, (2, 3), stride=(1, 2), padding=1, groups=2, format=format, rank=2, implementation=implementation
    )
    assert_gradcheck(layer, torch.randn(1, 4, 3, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_autocast_gives_the_dtype_of_torch(format: str, implementation: str) -> None:
    layer = tt.nn.ConvTranspose2d(4, 6, 3, format=format, rank=2, implementation=implementation, dtype=torch.float32)
    dense, x = layer.to_dense(), torch.randn(2, 4, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(x), dense(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert rel_error(found, dense(x)) <= 0.03  # a few roundings of 0.4 % each
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_from_dense_and_back(n: int, format: str) -> None:
    dense = TORCH[n](4, 6, 2, stride=3, padding=1, output_padding=2, groups=2, dilation=2, bias=n > 1)
    layer = LAYERS[n].from_dense(dense, format=format)
    back = layer.to_dense()
    assert repr(back) == repr(dense)
    assert layer.weight.shape == dense.weight.shape
    assert rel_error(back.weight, dense.weight) <= 1e-13
    x = torch.randn(2, 4, *POSITIONS[n])
    assert rel_error(layer(x), dense(x)) <= 1e-12


def test_square_weights_are_not_taken_for_their_transpose() -> None:
    dense = nn.ConvTranspose2d(5, 5, 3)
    layer = tt.nn.ConvTranspose2d.from_dense(dense, format="low_rank")
    assert rel_error(layer.weight, dense.weight) <= 1e-13


def test_eps_holds_for_torchs_weight() -> None:
    dense = nn.ConvTranspose2d(8, 12, 3)
    layer = tt.nn.ConvTranspose2d.from_dense(dense, eps=0.3)
    assert 0.01 < rel_error(layer.weight, dense.weight) <= 0.3


def test_starts_with_the_variance_and_the_bias_of_torch() -> None:
    dense, layer = nn.ConvTranspose2d(8, 60, 3), tt.nn.ConvTranspose2d(8, 60, 3, rank=8)
    # 4320 entries drawn by torch: their variance is within 10 % of its expectation with great certainty.
    assert 0.9 < float((layer.weight.var() / dense.weight.var()).detach()) < 1.1
    assert layer.bias is not None
    assert float(layer.bias.detach().abs().max()) <= 1 / (60 * 9) ** 0.5


def test_counts_and_config() -> None:
    layer = tt.nn.ConvTranspose2d(64, 128, 3, in_modes=(4, 4, 4), out_modes=(4, 8, 4), rank=(1, 27, 22, 22, 1))
    assert layer.n_params == 9 * 27 + 27 * 16 * 22 + 22 * 32 * 22 + 22 * 16 + 128
    again = tt.nn.ConvTranspose2d(**layer.config())
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 64, 3, 3)
    assert rel_error(again(x), layer(x)) == 0
    assert "64, 128, kernel_size=(3, 3)" in repr(layer)


def test_auto_weighs_core_by_core_against_the_dense_kernel() -> None:
    thin = tt.nn.ConvTranspose2d(256, 256, 3, stride=2, format="tucker2", rank=8, dtype=torch.float32)
    thick = tt.nn.ConvTranspose2d(8, 8, 3, stride=2, rank=8, dtype=torch.float32)
    assert not thin.plan(8, (32, 32)).uses_dense
    assert thick.plan(8, (32, 32)).uses_dense
    assert thick.plan(8, (32, 32)).dense_flops == 2 * 8 * 32 * 32 * 8 * 8 * 9
    # The chain runs at the input positions and ends with its filters.
    layer = tt.nn.ConvTranspose2d(8, 8, 3, stride=2, in_modes=(8,), out_modes=(8,), rank=(1, 4, 1))
    with torch.no_grad():
        plan = layer.plan(1, (5, 5))
    assert plan.factorized_flops <= 2 * 25 * (8 * 4) * 9 + 2 * 32 * 8 * (4 * 8)  # rows rounded to 32


def test_compiles_and_exports() -> None:
    for format in ("tt", "tucker2"):
        for implementation in ("factorized", "dense"):
            layer = tt.nn.ConvTranspose2d(8, 12, 3, 2, format=format, rank=3, implementation=implementation).eval()
            torch._dynamo.reset()
            x = torch.randn(3, 8, 4, 5)
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            assert rel_error(compiled(x), layer(x)) <= 1e-12
            program = torch.export.export(layer, (x,))
            assert rel_error(program.module()(x), layer(x)) <= 1e-12


def test_messages() -> None:
    layer = tt.nn.ConvTranspose2d(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ShapeError, match=r"expected \(7, 7\) to \(8, 8\)"):
        layer(x, (9, 8))
    with pytest.raises(ShapeError, match="a size per position axis"):
        layer(x, (8,))
    with pytest.raises(ShapeError, match="expected C = 4"):
        layer(torch.randn(2, 6, 3, 3))
    with pytest.raises(ShapeError, match="output_padding must be smaller"):
        tt.nn.ConvTranspose2d(4, 6, 3, output_padding=1)
    with pytest.raises(ShapeError, match="pads with zeros alone"):
        tt.nn.ConvTranspose2d(4, 6, 3, padding_mode="reflect")
    with pytest.raises(ShapeError, match="groups must divide"):
        tt.nn.ConvTranspose2d(4, 6, 3, groups=4)
    with pytest.raises(KindError, match=r"takes a torch.nn.ConvTranspose2d"):
        tt.nn.ConvTranspose2d.from_dense(nn.Conv2d(4, 6, 3))
