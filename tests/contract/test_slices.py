"""Products with a weight that is built slice by slice, against the weight itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.contract import ChainShape, slices
from tensortrain.contract.choose import candidates
from tensortrain.contract.slices import dense_of_halves, sliced_product

# i1, j1, r, i2, j2, rows: sorted slices, and those that need no sorting
SIZES = [(5, 4, 3, 7, 6, 11), (1, 4, 2, 7, 5, 3), (6, 1, 3, 5, 4, 9), (8, 3, 2, 1, 6, 2), (13, 2, 9, 3, 11, 1)]


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 2000)
    monkeypatch.setattr(slices, "_LEAST_ROWS", 4)


def draw(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    i1, j1, r, i2, j2, rows = sizes
    shapes = [(rows, j1 * j2), (1, i1, j1, r), (r, i2, j2, 1), (i1 * i2,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_derivatives_are_those_of_the_weight(sizes: tuple[int, ...]) -> None:
    inputs = draw(sizes)
    x, left, right, bias = inputs
    expected = torch.nn.functional.linear(x, dense_of_halves(left, right), bias)
    torch.testing.assert_close(sliced_product(*inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(sliced_product(*inputs), expected)
    assert torch.autograd.gradcheck(sliced_product, inputs)
    assert torch.autograd.gradgradcheck(sliced_product, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_only_gradients_that_are_wanted_are_made(wanted: tuple[int, ...]) -> None:
    inputs = draw(SIZES[0])
    for k, tensor in enumerate(inputs):
        tensor.requires_grad_(k in wanted)
    x, left, right, bias = inputs
    found = torch.autograd.grad(sliced_product(*inputs).sum(), [inputs[k] for k in wanted])
    dense = torch.nn.functional.linear(x, dense_of_halves(left, right), bias)
    for one, other in zip(found, torch.autograd.grad(dense.sum(), [inputs[k] for k in wanted]), strict=True):
        torch.testing.assert_close(one, other)


def test_complex_weights() -> None:
    inputs = draw(SIZES[0], torch.complex128)
    assert torch.autograd.gradcheck(sliced_product, inputs)


def test_those_who_look_on_see_every_product() -> None:
    x, left, right, bias = draw(SIZES[0])
    expected = sliced_product(x, left, right, bias)
    torch.testing.assert_close(torch.vmap(lambda row: sliced_product(row[None], left, right, bias)[0])(x), expected)
    _, tangent = torch.func.jvp(lambda x: sliced_product(x, left, right, bias), (x,), (x,))
    torch.testing.assert_close(tangent, expected - bias)
    grads = torch.eye(expected.numel(), dtype=torch.float64).view(-1, *expected.shape)[:3]
    (found,) = torch.autograd.grad(sliced_product(x, left, right, bias), x, grads, is_grads_batched=True)
    assert found.shape == (3, *x.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sliced_product(x.float(), left.float(), right.float(), bias.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_a_plan_in_slices_stands_beside_the_others(training: bool) -> None:
    chain = ChainShape((6, 5, 4), (3, 7, 5), (1, 4, 6, 1))
    plans = {plan.kind: plan for plan in candidates(chain, batch=64, dtype=torch.float64, training=training)}
    plan = plans["sliced"]
    cores = [torch.randn(shape, dtype=torch.float64) for shape in chain.core_shapes]
    x, bias = torch.randn(2, 32, 105, dtype=torch.float64), torch.randn(120, dtype=torch.float64)
    expected = plans["dense"].execute(x, cores, bias=bias)
    torch.testing.assert_close(plan.execute(x, cores, bias=bias), expected)
    torch.testing.assert_close(plan.execute(x, cores, plan.prepare(cores), bias), expected)
    inside = plan.fit(101, 113)
    torch.testing.assert_close(
        inside.execute(x[..., :101], cores, bias=bias[:113]),
        torch.nn.functional.linear(x[..., :101], plans["dense"].prepare(cores)[0][:113, :101], bias[:113]),
    )
    assert "sliced" in str(plan)
    assert plan.peak_bytes < plans["dense"].peak_bytes


def test_a_layer_above_its_limit_runs_in_slices() -> None:
    layer = tt.nn.Linear(96, 144, in_modes=(8, 12), out_modes=(12, 12), rank=12, dtype=torch.float64)
    layer.dense_limit_bytes = 1000
    plan = layer.plan(4096, force="factorized")
    assert plan.kind in ("sliced", "merged", "left-to-right", "right-to-left")
    kinds = [p.kind for p in candidates(plan.chain, batch=4096, dtype=torch.float64, allow_dense=False)]
    assert "sliced" in kinds
    assert "dense" not in kinds
