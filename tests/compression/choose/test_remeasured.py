"""Plans by losses that are measured: what no prediction sees decides where the budget goes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression import apply_plan_, plan_compression
from tensortrain.compression.choose import planner
from tensortrain.compression.choose.plan import CompressionPlan, LayerPlan
from tensortrain.compression.choose.remeasured import Seen, scaled, spent_again


class Averaged(nn.Module):
    """Two maps at every position; errors of the second are averaged with their signs, those of the first are not.

    Inputs of an example share a part: what is wrong with that part is wrong at all positions alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 48, bias=False)
        self.second = nn.Linear(48, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.second(x), torch.sign(torch.sin(40 * x[..., :1])) * self.first(x)
        return sum(part.mean(dim=1) for part in parts)  # type: ignore[return-value]


def batches(n: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 1, 48, generator=draw) + 0.3 * torch.randn(16, 24, 48, generator=draw) for _ in range(n)]


def spoiled(model: nn.Module, plan: CompressionPlan, data: list[Tensor]) -> float:
    small = apply_plan_(copy.deepcopy(model), plan)
    with torch.no_grad():
        pairs = [(small(x), model(x)) for x in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def test_what_adds_up_over_positions_is_seen_and_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "tried", lambda model, menus, *rest: list(menus))  # which sees it as well
    torch.manual_seed(0)
    model, data = Averaged().eval(), batches(10, 1)
    how = {"budget": 0.6, "data": data, "n_batches": 8, "formats": ("low_rank",), "allow_slower": True}
    guessed, measured = (plan_compression(model, **how, measure_losses=each) for each in (False, True))
    sizes = [{layer.name: layer.params_after for layer in plan.layers} for plan in (guessed, measured)]
    assert sizes[1]["second"] > 1.2 * sizes[0]["second"]
    assert measured.params_after <= 0.6 * measured.params_before
    other = batches(6, 2)
    assert spoiled(model, measured, other) < 0.8 * spoiled(model, guessed, other)
    assert any("Losses of the layers were measured on 2 batches held back" in note for note in measured.notes)


def plan_of(**losses: float) -> CompressionPlan:
    """A plan whose layers are predicted to spoil so much."""
    layers = [
        replace(LayerPlan((name,), "Linear", (8, 8), None, 64, 64, None, None, None, "left dense: "), loss=loss)
        for name, loss in losses.items()
    ]
    return CompressionPlan(tuple(layers), "2x", 128, 64)


def test_scales_are_ratios_and_those_not_seen_get_the_usual_one() -> None:
    plan = plan_of(a=0.1, b=0.1, c=0.1)
    times, usual = scaled(plan, {"a": 0.2, "b": 0.3, "c": 40.0}, {}, 1.0)
    assert times == pytest.approx({"a": 2.0, "b": 3.0, "c": 400.0})
    assert usual == pytest.approx(3.0)
    # A plan made with scales predicts by them: what is seen then scales them on.
    again, _ = scaled(plan, {"a": 0.05}, times, usual)
    assert again["a"] == pytest.approx(1.0)
    assert again["c"] == pytest.approx(400.0)


@pytest.mark.parametrize("seen", [0.0, 1e9])
def test_what_one_layer_seems_to_lose_stays_within_reason(seen: float) -> None:
    times, usual = scaled(plan_of(a=0.1, b=0.1, c=0.1), {"a": seen, "b": 0.1, "c": 0.1}, {}, 1.0)
    assert usual == pytest.approx(1.0)
    assert 0 < times["a"] <= 1e3
    assert scaled(plan_of(a=0.1), {"a": math.inf}, {}, 1.0) == ({}, 1.0)


def test_the_plan_that_spoils_least_together_is_taken() -> None:
    spoiled = {64: 0.3, 50: 0.2, 40: 0.4}
    asked: list[dict[str, float]] = []

    def plans(times: Mapping[str, float], usual: float) -> CompressionPlan:
        asked.append(dict(times))
        return replace(plan_of(a=0.1, b=0.1), params_after=[50, 40, 40][len(asked) - 1])

    def look(plan: CompressionPlan) -> Seen:
        return Seen(spoiled[plan.params_after], {"a": 0.2, "b": 0.1 * plan.params_after / 64})

    times, _, found = spent_again(plans, plan_of(a=0.1, b=0.1), look)
    assert found == [0.3, 0.2, 0.4]  # of a plan that does the same as one before nothing is built
    assert times == asked[0]
