"""Linear layers are the dense layer with the same weight: outputs, all gradients, dtypes, shapes of input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.contract import plan_chain
from tensortrain.testing import IMPLEMENTATIONS, assert_agrees, assert_gradcheck, rel_error

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tt, modes chosen": (12, 20, {"rank": 3}),
    "tt, odd modes": (30, 42, {"in_modes": (3, 5, 2), "out_modes": (2, 7, 3), "rank": 4}),
    "tt, modes of size 1": (12, 15, {"in_modes": (1, 4, 1, 3), "out_modes": (5, 1, 1, 3), "rank": 3}),
    "tt, one core": (7, 5, {"in_modes": (7,), "out_modes": (5,)}),
    "tt, rank 1": (24, 16, {"in_modes": (2, 3, 4), "out_modes": (4, 2, 2), "rank": 1}),
    "tt, rank above the feasible": (12, 8, {"in_modes": (2, 3, 2), "out_modes": (2, 2, 2), "rank": 1000}),
    "tt, ranks as given": (12, 8, {"in_modes": (2, 3, 2), "out_modes": (2, 2, 2), "rank": (1, 40, 33, 1)}),
    "tt, primes": (13, 17, {"rank": 2}),
    "tt, one output": (30, 1, {"rank": 2}),
    "tt, one input": (1, 30, {"rank": 2}),
    "tt, no bias": (12, 20, {"rank": 3, "bias": False}),
    "tt, share": (16, 16, {"rank": 0.5}),
    "tt, full": (16, 16, {"rank": "full"}),
    "low_rank": (12, 20, {"format": "low_rank", "rank": 3}),
    "low_rank, rank 1": (12, 20, {"format": "low_rank", "rank": 1}),
    "low_rank, rank above the feasible": (6, 9, {"format": "low_rank", "rank": 1000}),
    "low_rank, rank as given": (6, 9, {"format": "low_rank", "rank": (1, 50, 1)}),
    "low_rank, primes": (13, 17, {"format": "low_rank", "rank": 2}),
}


def make(name: str, **options: Any) -> tt.nn.Linear:
    n_in, n_out, more = CASES[name]
    return tt.nn.Linear(n_in, n_out, **{**more, **options})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_dense(name: str, dtype: torch.dtype, implementation: str) -> None:
    layer = make(name, implementation=implementation, dtype=dtype)
    assert_agrees(layer, torch.randn(5, layer.in_features, dtype=dtype), F.linear)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, odd modes", "tt, modes of size 1", "tt, one core", "low_rank"])
def test_gradcheck(name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation)
    assert_gradcheck(layer, torch.randn(2, layer.in_features))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", range(1, 11))
def test_every_order_up_to_ten(order: int, dtype: torch.dtype, implementation: str) -> None:
    layer = tt.nn.Linear(
        2**order,
        2**order,
        in_modes=(2,) * order,
        out_modes=(2,) * order,
        rank=3,
        implementation=implementation,
        dtype=dtype,
    )
    assert len(layer.cores) == order
    assert_agrees(layer, torch.randn(4, 2**order, dtype=dtype), F.linear)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("format", ["tt", "low_rank"])
def test_complex(format: str, dtype: torch.dtype, implementation: str) -> None:
    layer = tt.nn.Linear(12, 20, format=format, rank=3, implementation=implementation, dtype=dtype)
    assert layer.weight.imag.abs().max() > 0
    assert_agrees(layer, torch.randn(5, 12, dtype=dtype), F.linear)
    assert_agrees(tt.nn.Linear.from_dense(layer.to_dense(), format=format), torch.randn(2, 12, dtype=dtype), F.linear)


INPUTS = {
    "empty batch": lambda n: torch.randn(0, n),
    "one row": lambda n: torch.randn(1, n),
    "no batch axis": lambda n: torch.randn(n),
    "three leading axes": lambda n: torch.randn(2, 1, 3, n),
    "an empty leading axis": lambda n: torch.randn(2, 0, n),
    "transposed": lambda n: torch.randn(n, 3).T,
    "every other row": lambda n: torch.randn(6, n)[::2],
    "every other column": lambda n: torch.randn(3, 2 * n)[:, ::2],
    "batch axis last in memory": lambda n: torch.randn(n, 2, 3).permute(1, 2, 0),
    "one number everywhere": lambda n: torch.randn(1, 1).expand(3, n),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, odd modes", "low_rank"])
@pytest.mark.parametrize("kind", INPUTS)
def test_any_input_shape_and_strides(kind: str, name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation)
    assert_agrees(layer, INPUTS[kind](layer.in_features), F.linear)


@pytest.mark.parametrize("force", ["left-to-right", "right-to-left", "merged"])
@pytest.mark.parametrize("name", ["tt, odd modes", "tt, ranks as given", "low_rank"])
def test_every_plan_agrees(name: str, force: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name)
    plan = layer.plan(5, force=force)
    monkeypatch.setattr(layer.runner, "plan", lambda layer, rows: plan)
    assert_agrees(layer, torch.randn(5, layer.in_features), F.linear)


def test_kept_weights_of_two_plans_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("tt, odd modes", bias=False).requires_grad_(False)
    plans = {1: layer.plan(1, force="left-to-right"), 8: layer.plan(8, force="right-to-left")}
    assert plans[1].groups == plans[8].groups  # yet the weights that the two keep are laid out differently
    monkeypatch.setattr(layer.runner, "plan", lambda layer, rows: plans[rows])
    x = torch.randn(8, layer.in_features)
    exact = F.linear(x, layer.weight)
    for rows in (1, 8, 1):
        assert rel_error(layer(x[:rows]), exact[:rows]) <= 1e-12


def test_auto_runs_both_ways() -> None:
    large = tt.nn.Linear(1024, 1024, in_modes=(4,) * 5, out_modes=(4,) * 5, rank=2, dtype=torch.float32)
    small = tt.nn.Linear(16, 16, rank=2)
    assert not large.plan(1).uses_dense
    assert small.plan(64).uses_dense


@pytest.mark.parametrize("order", [2, 5])
def test_functional_form_agrees(order: int) -> None:
    layer = tt.nn.Linear(2**order, 3**order, in_modes=(2,) * order, out_modes=(3,) * order, rank=3)
    x = torch.randn(2, 3, 2**order)
    found = tt.nn.functional.tt_linear(x, list(layer.cores), layer.bias)
    assert rel_error(found, F.linear(x, layer.weight, layer.bias)) <= 1e-12
    gone = tt.nn.functional.tt_linear(x[:, :0], list(layer.cores))
    assert gone.shape == (2, 0, 3**order)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["tt", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_torch(
    format: str, implementation: str, training: bool, dtype: torch.dtype
) -> None:
    layer = tt.nn.Linear(12, 20, format=format, rank=3, implementation=implementation, dtype=torch.float32)
    dense = layer.to_dense()
    x = torch.randn(5, 12, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(training):
        found, exact = layer(x), dense(x)
    assert found.dtype == exact.dtype == dtype
    # A few roundings of 0.4 % each in bfloat16.
    assert rel_error(found, F.linear(x, dense.weight, dense.bias)) <= 0.02
    if training:
        found.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_layer(implementation: str) -> None:
    layer = tt.nn.Linear(12, 20, rank=3, implementation=implementation, dtype=torch.bfloat16)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    exact = F.linear(x.double(), layer.format.to_dense([c.double() for c in layer.cores], layer.spec))
    assert rel_error(found - layer.bias, exact) <= 0.03  # a few roundings of 0.4 %


def test_plan_chain_sees_the_dtype_of_the_cores() -> None:
    layer = tt.nn.Linear(12, 20, rank=3, dtype=torch.float32)
    plan = layer.plan(7)
    assert (plan.batch, plan.dtype) == (8, torch.float32)  # rounded up to a power of two
    assert plan == plan_chain(plan.chain, batch=8, dtype=torch.float32, training=True)


def test_stands_where_torch_stood() -> None:
    model = nn.Sequential(tt.nn.Linear(12, 30, rank=3), nn.ReLU(), tt.nn.Linear(30, 4, format="low_rank", rank=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(64, 12), torch.randint(0, 4, (64,))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before
