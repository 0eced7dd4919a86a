"""One rank for all layers."""

from __future__ import annotations

import copy

import pytest
from small_models import mlp

from tensortrain.compression import apply_plan_, count_params, plan_uniform
from tensortrain.errors import BudgetError


@pytest.mark.parametrize("format", ["low_rank", "tt"])
def test_the_largest_rank_that_fits(format: str) -> None:
    model = mlp(64, 96, 96, 10)
    plan = plan_uniform(model, budget="3x", format=format)
    small = apply_plan_(copy.deepcopy(model), plan)
    limit = count_params(model) // 3
    assert count_params(small) == plan.params_after <= limit
    ranks = {max(layer.spec.ranks) for layer in plan.layers if layer.spec is not None and layer.name != "4"}
    assert len(ranks) == 1
    assert ranks.pop() > 1


def test_one_rank_more_would_not_fit() -> None:
    model = mlp(64, 96, 96, 10)
    plan = plan_uniform(model, budget="3x")
    rank = plan.layers[0].spec.ranks[1]
    sizes = [layer.shape for layer in plan.layers]
    biases = sum(m for m, _ in sizes)
    more = biases + sum(min((rank + 1) * (m + n), m * n) for m, n in sizes)
    assert plan.params_after <= count_params(model) // 3 < more


def test_layers_that_would_not_shrink_stay_dense() -> None:
    plan = plan_uniform(mlp(64, 64, 3), budget="1.5x")
    assert plan.layers[1].spec is None
    assert "no smaller" in plan.layers[1].decision


def test_an_impossible_budget() -> None:
    with pytest.raises(BudgetError, match="at least"):
        plan_uniform(mlp(64, 96, 10), budget="500x")


def test_a_generous_budget_ends() -> None:
    plan = plan_uniform(mlp(8, 8, 8), budget=1.0)
    assert plan.params_after <= plan.params_before
