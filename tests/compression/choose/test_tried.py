"""Plans by forms that were tried: what adds up over the positions of an example is spared without being asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression import apply_plan_, plan_compression
from tensortrain.compression.choose import planner
from tensortrain.compression.choose.heights import Heights
from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.choose.tried import Times

pytestmark = pytest.mark.usefixtures("fixed_plans")


class Heard(nn.Module):
    """The states of a recurrent layer and two maps, averaged over time; errors of one change their sign every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 16, batch_first=True)
        self.beside, self.mean = nn.Linear(24, 64), nn.Linear(24, 64)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.mean(x) + torch.sign(torch.sin(40 * x[..., :1])) * self.beside(x)
        return torch.cat([self.lstm(x)[0], maps], dim=-1).mean(dim=1)


class Seen(nn.Module):
    """Two convolutions under a mean over all places, of which the errors of one have another sign at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.beside, self.mean = nn.Conv2d(24, 48, 1), nn.Conv2d(24, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.mean(x) + torch.sign(torch.sin(40 * x[:, :1])) * self.beside(x)).mean(dim=(2, 3))


def sounds(n: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 1, 24, generator=draw) + 0.3 * torch.randn(40, 20, 24, generator=draw) for _ in range(n)]


def pictures(n: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(16, 24, 1, 1, generator=draw) + 0.3 * torch.randn(16, 24, 5, 5, generator=draw) for _ in range(n)
    ]


def spoiled(model: nn.Module, plan: CompressionPlan, data: list[Tensor]) -> float:
    small = apply_plan_(copy.deepcopy(model), plan)
    with torch.no_grad():
        pairs = [(small(x), model(x)) for x in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.parametrize(("kind", "data"), [(Heard, sounds), (Seen, pictures)])
def test_what_adds_up_over_positions_is_spared(kind, data, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, seen = kind().eval(), data(10, 1)
    how: dict[str, Any] = {"budget": 0.6, "data": seen, "n_batches": 8, "allow_slower": True}
    tried = plan_compression(model, **how)
    monkeypatch.setattr(planner, "tried", lambda model, menus, *rest: list(menus))
    guessed = plan_compression(model, **how)
    assert tried.params_after <= 0.6 * tried.params_before
    other = data(6, 2)
    assert spoiled(model, tried, other) < 0.8 * spoiled(model, guessed, other)


def test_before_healing_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = Seen().eval(), pictures(4, 1)
    how: dict[str, Any] = {"budget": "1.5x", "data": data, "n_batches": 2, "will_heal": True, "allow_slower": True}
    plan = plan_compression(model, **how)
    monkeypatch.setattr(planner, "tried", lambda model, menus, *rest: list(menus))
    assert [layer.spec for layer in plan.layers] == [layer.spec for layer in plan_compression(model, **how).layers]


def test_layers_that_lose_alike_are_left_as_predicted() -> None:
    assert Times.of({"a": [(0.1, 2.0)], "b": [(0.1, 3.0)]}, {"c": [(0.1, 3.9)]}) is None
    assert Times.of({}, {}) is None


def test_what_was_not_seen_counts_as_usual_and_chance_is_bounded() -> None:
    factored = {"a": [(0.1, 1.0)], "b": [(0.1, 2.0)], "c": [(0.1, 1e9)]}
    times = Times.of(factored, {"d": [(0.1, 1e-9)], "e": [(0.1, 2.5)]})
    assert times is not None
    assert [times.factored[name].of(0.1) for name in "abc"] == pytest.approx([0.1, 0.2, 200.0])
    assert [times.narrowed[name].of(0.1) for name in "de"] == pytest.approx([0.1 / 8, 0.25])
    assert times.usual.of(0.1) == pytest.approx(0.2)


def test_between_two_forms_losses_follow_a_power_and_never_fall_with_the_error() -> None:
    heights = Heights.through([(0.04, 2.0), (0.01, 4.0)])
    assert heights.of(0.04) == pytest.approx(0.08)
    assert heights.of(0.02) == pytest.approx(0.02 * 8**0.5)
    assert heights.of(0.001) == pytest.approx(0.004)
    assert heights.of(1.0) == pytest.approx(2.0)
    falling = Heights.through([(0.01, 100.0), (0.04, 1.0)])
    assert falling.of(0.04) == pytest.approx(falling.of(0.01)) == pytest.approx(1.0)
    assert Heights().of(0.3) == 0.3
