"""Every format in every kind of layer: agreement with dense, traced programs, manners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.contract import NetworkPlan
from tensortrain.errors import KindError
from tensortrain.testing import IMPLEMENTATIONS, assert_agrees, assert_gradcheck, rel_error

NETWORKS = ("cp", "tucker", "ring", "block_term", "btt")
FORMATS = (*NETWORKS, "kronecker", "tt_separate")
every_format = pytest.mark.parametrize("format", FORMATS)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@every_format
@every_implementation
@pytest.mark.parametrize("sizes", [(30, 48), (7, 13), (1, 6), (5, 1)], ids=str)
def test_linear_agrees_with_dense(sizes: tuple[int, int], implementation: Any, format: str) -> None:
    layer = tt.nn.Linear(*sizes, format=format, rank=2, implementation=implementation)
    assert_agrees(layer, torch.randn(3, 5, sizes[0]), linear)
    assert_agrees(layer, torch.randn(sizes[0], 4).T, linear)
    assert layer(torch.randn(0, sizes[0])).shape == (0, sizes[1])
    assert layer(torch.randn(sizes[0])).shape == (sizes[1],)


@every_format
def test_linear_in_single_precision_and_without_bias(format: str) -> None:
    layer = tt.nn.Linear(30, 48, bias=False, format=format, rank=3, implementation="factorized", dtype=torch.float32)
    assert_agrees(layer, torch.randn(6, 30, dtype=torch.float32), linear)


@pytest.mark.parametrize("format", NETWORKS)
def test_complex_cores_multiply(format: str) -> None:
    layer = tt.nn.Linear(12, 10, format=format, rank=2, implementation="factorized", dtype=torch.complex128)
    assert_agrees(layer, torch.randn(4, 12, dtype=torch.complex128), linear)


@every_format
def test_gradcheck(format: str) -> None:
    layer = tt.nn.Linear(6, 4, format=format, rank=2, implementation="factorized")
    assert_gradcheck(layer, torch.randn(2, 6))


@every_format
@pytest.mark.parametrize("implementation", ["factorized", "dense"])
def test_traced_programs(implementation: Any, format: str) -> None:
    torch._dynamo.reset()
    layer = tt.nn.Linear(24, 18, format=format, rank=2, implementation=implementation)
    x = torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("b")},)).module()
    assert rel_error(compiled(x), layer(x)) <= 1e-12
    with torch.no_grad():
        for core in layer.cores:  # a compiled layer reads its cores anew
            core.add_(0.1)
    y = compiled(x)
    assert rel_error(y, layer(x)) <= 1e-12
    found = torch.autograd.grad(y.square().sum(), list(layer.cores))
    exact = torch.autograd.grad(layer(x).square().sum(), list(layer.cores))
    assert all(rel_error(f, e) <= 1e-12 for f, e in zip(found, exact, strict=True))
    longer = torch.randn(11, 24)
    assert exported(longer).shape == (11, 18)


@pytest.mark.parametrize("format", NETWORKS)
def test_plans(format: str) -> None:
    layer = tt.nn.Linear(64, 48, format=format, rank=4)
    plan = layer.plan(16)
    assert isinstance(plan, NetworkPlan)
    forced = layer.plan(16, force="factorized")
    assert not forced.uses_dense
    assert plan.predicted_s <= forced.predicted_s
    assert "core by core" in str(forced)
    with pytest.raises(KindError, match="left-to-right"):
        layer.plan(16, force="left-to-right")


def test_a_large_layer_runs_core_by_core() -> None:
    layer = tt.nn.Linear(4096, 4096, format="btt", rank=2, dtype=torch.float32).eval()
    with torch.no_grad():
        assert not layer.plan(1).uses_dense
        assert layer.plan(1).speed_up > 1


@every_format
@every_implementation
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 3), "groups": 2, "bias": False},
        {"kernel_size": 1},
        {"kernel_size": 2, "padding": 1, "padding_mode": "circular", "dilation": 2},
    ],
    ids=str,
)
def test_convolutions(options: dict[str, Any], implementation: Any, format: str) -> None:
    layer = tt.nn.Conv2d(4, 6, format=format, rank=2, implementation=implementation, **options)
    plain: Any = nn.Conv2d(4, 6, **options)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if options.get("padding_mode") == "circular":
            x = F.pad(x, (1, 1, 1, 1), mode="circular")
            return F.conv2d(x, weight, bias, dilation=2)
        return F.conv2d(x, weight, bias, plain.stride, plain.padding, plain.dilation, plain.groups)

    assert_agrees(layer, torch.randn(2, 4, 7, 5), convolve)
    assert layer(torch.randn(0, 4, 7, 5)).shape[0] == 0
    assert str(layer.plan(2, (7, 5)))


@every_format
def test_convolutions_in_one_and_three_axes(format: str) -> None:
    one = tt.nn.Conv1d(4, 6, 3, format=format, rank=2, implementation="factorized")
    assert_agrees(one, torch.randn(2, 4, 9), lambda x, w, b: F.conv1d(x, w, b))
    three = tt.nn.Conv3d(4, 6, (1, 2, 3), format=format, rank=2, implementation="factorized")
    assert_agrees(three, torch.randn(1, 4, 3, 4, 5), lambda x, w, b: F.conv3d(x, w, b))


@every_format
@every_implementation
def test_embeddings(implementation: Any, format: str) -> None:
    layer = tt.nn.Embedding(53, 12, padding_idx=3, format=format, rank=2, implementation=implementation)

    def lookup(ids: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(ids, table).masked_fill((ids == 3)[..., None], 0.0)

    assert_agrees(layer, torch.randint(53, (4, 5)), lookup)
    assert layer(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 12)
    assert str(layer.plan(20))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_traced_convolutions_and_embeddings(kind: str, format: str) -> None:
    torch._dynamo.reset()
    layer: Any
    if kind == "conv":
        layer = tt.nn.Conv2d(4, 6, 3, format=format, rank=2, implementation="factorized")
        x = torch.randn(2, 4, 6, 5)
    else:
        layer = tt.nn.Embedding(53, 12, format=format, rank=2, implementation="factorized")
        x = torch.randint(53, (4, 5))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert rel_error(compiled(x), layer(x)) <= 1e-12


@every_format
def test_structured_initialisation(format: str) -> None:
    layer = tt.nn.Linear(64, 64, format=format, rank=4, init="structured")
    for core, (f_in, f_out) in zip(layer.cores, layer.format.core_fans(layer.spec), strict=True):
        expected = min(1.0, (f_out / f_in) ** 0.5) / f_in**0.5
        assert float(core.detach().std()) == pytest.approx(expected, rel=0.6)  # few entries in some cores
