"""What a budget means, and that models really come out within it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, batches, decay_, mlp
from torch import nn

import tensortrain as tt
from tensortrain.compression import apply_plan_, count_params, plan_compression, read_budget
from tensortrain.compression.report.measure import count_flops
from tensortrain.errors import BudgetError

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


@pytest.mark.parametrize(
    "budget, measure, limit",
    [
        ("20x", "params", 50),
        (" 2.5X ", "params", 400),
        ("4", "params", 250),
        ("3x", "params", 333),
        (0.05, "params", 50),
        (1.0, "params", 1000),
        (1, "params", 1000),
        ({"params": 123}, "params", 123),
        ({"params": np.int64(123)}, "params", 123),
        ({"params": 123.7}, "params", 123),
        ({"params": "4x"}, "params", 250),
        ({"params": 0.5}, "params", 500),
        ({"params": 1}, "params", 1),
        ({"params": 1.0}, "params", 1000),
        ({"flops": 5000}, "flops", 5000),
        ({"flops": "4x"}, "flops", 2000),
    ],
)
def test_budgets_are_read(budget, measure, limit) -> None:
    found = read_budget(budget, params=1000, flops=8000)
    assert (found.measure, found.limit) == (measure, limit)
    assert found.text


@pytest.mark.parametrize(
    "budget, says",
    [
        ("lots", "ratio such as '20x': found 'lots'"),
        ("", "found ''"),
        ("-3x", "found '-3x'"),
        ("0.5x", "asks for growth"),
        (0, "share must lie in"),
        (1.5, "share must lie in"),
        (20, "share must lie in"),
        (-0.1, "share must lie in"),
        (math.nan, "number or a ratio"),
        (math.inf, "number or a ratio"),
        (None, "number or a ratio"),
        (True, "number or a ratio"),
        ([3], "number or a ratio"),
        ({}, "one measure"),
        ({"params": 10, "flops": 10}, "one measure"),
        ({"params": 1001}, "between 1 and the 1,000 parameters"),
        ({"params": 0}, "between 1 and"),
        ({"params": -5}, "between 1 and"),
        ({"params": None}, "number or a ratio"),
        ({"flops": 9000}, "between 1 and the 8,000 flops"),
        ({"bytes": 10}, "'params' or 'flops': found 'bytes'"),
    ],
)
def test_unreadable_or_growing_budgets_are_errors(budget, says) -> None:
    with pytest.raises(BudgetError) as caught:
        read_budget(budget, params=1000, flops=8000)
    assert says in str(caught.value)
    assert "'20x'" in str(caught.value) or "between 1 and" in str(caught.value)  # what to pass instead


def test_flops_need_inputs() -> None:
    with pytest.raises(BudgetError, match="example_inputs= or data="):
        plan_compression(mlp(8, 8), budget={"flops": "2x"})


def test_impossible_budgets_say_what_is_possible() -> None:
    model = mlp(64, 64, 10)
    with pytest.raises(BudgetError, match="Ask for at least") as caught:
        plan_compression(model, budget={"params": 100})
    least = int(str(caught.value).rsplit("at least ", 1)[1].rstrip(".").replace(",", ""))
    assert 100 < least < count_params(model)
    plan = plan_compression(model, budget={"params": least})  # what it says is true
    assert count_params(apply_plan_(model, plan)) <= least


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(BudgetError, match="must have layers"):
        plan_compression(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), budget="2x")


MODELS: dict[str, Any] = {
    "mlp": lambda: mlp(96, 80, 64, 10),
    "no bias": lambda: mlp(60, 60, 30, bias=False),
    "one layer": lambda: mlp(100, 80),
    "conv": lambda: ConvNet(16),
    "embedding": lambda: Tagger(300, 32, 7),
    "shared": lambda: TwoHeads(48),
    "norms": lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32), nn.BatchNorm1d(32)),
}


@pytest.mark.parametrize("budget", ["2x", "5x", 0.75, {"params": "8x"}])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_fills_the_budget(name: str, budget) -> None:
    model = decay_(MODELS[name]())
    total = count_params(model)
    limit = read_budget(budget, params=total).limit
    plan = plan_compression(model, budget=budget)
    assert plan.params_before == total
    small = apply_plan_(model, plan)
    assert small is model
    assert count_params(small) == plan.params_after
    # One more rank of a low-rank layer costs a row and a column: in tiny models that may be more than 5 %.
    one_rank = min(sum(layer.shape[:2]) for layer in plan.layers)
    assert min(0.95 * limit, limit - one_rank) <= plan.params_after <= limit
    assert plan.compression == pytest.approx(total / plan.params_after)


def test_everything_else_in_the_model_counts() -> None:
    model = decay_(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)))
    model.register_parameter("extra", nn.Parameter(torch.zeros(1500)))
    plan = plan_compression(model, budget={"params": 7000}, include="0")
    assert 6650 <= count_params(apply_plan_(model, plan)) == plan.params_after <= 7000
    assert [layer.name for layer in plan.layers] == ["0"]


FLOPS_CASES: dict[str, Any] = {
    "mlp": (lambda: mlp(96, 80, 64, 10), lambda size: batches(2, size, 96)),
    "sequence": (lambda: mlp(48, 64, 48), lambda size: batches(2, size, 5, 48)),
    "conv": (lambda: ConvNet(16), lambda size: batches(2, size, 3, 8, 8)),
    "shared": (lambda: TwoHeads(48), lambda size: batches(2, size, 48)),
}


# Plans are made for powers of two rows.
@pytest.mark.parametrize("name, size", [*((name, 11) for name in FLOPS_CASES), ("mlp", 8)])
def test_a_flops_budget_holds_in_a_real_count(name: str, size: int) -> None:
    build, data = FLOPS_CASES[name]
    model, given = decay_(build()), data(size)
    x = given[0][0]
    before = count_flops(model, x)
    plan = plan_compression(model, budget={"flops": "3x"}, data=given, allow_slower=True)
    assert sum(layer.flops_before for layer in plan.layers) * size == before  # type: ignore[misc]
    planned = sum(layer.flops_after for layer in plan.layers)  # type: ignore[misc]
    limit = before // size // 3
    assert 0.8 * limit <= planned <= limit
    apply_plan_(model, plan)
    with torch.no_grad():
        model(x)  # merged cores are prepared once
    after = count_flops(model, x) / size
    assert after <= 1.02 * limit
    assert after == pytest.approx(planned, rel=0.02)


def test_a_shared_convolution_counts_as_often_as_it_runs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    x = torch.randn(4, 8, 6, 6)
    row = next(iter(tt.inspect(Twice(), x)))
    assert row.flops == count_flops(Twice(), x) // 4
