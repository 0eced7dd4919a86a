"""Compressing and healing in turns: sizes on the way, what is planned again, kill and resume, in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ConvNet, batches, decay_, mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import Silent, count_params
from tensortrain.compression.api import _in_turns
from tensortrain.compression.stages import Factorize, Heal
from tensortrain.errors import BudgetError, KindError, RankError
from tensortrain.nn import FactorizedLayer

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")

HEAL = {"steps": 8, "lr": 1e-2}  # in two turns: 2 and 14


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def net() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(3)
    return decay_(mlp(48, 64, 10), 0.5), batches(6, 8, 48, classes=10)


def run(model: nn.Module, data: Any, **options: Any) -> tt.CompressionResult:
    given = {"budget": "9x", "heal": HEAL, "measure": False, "allow_slower": True, "n_stages": 2}
    return tt.compress(model, data=data, **(given | options))


def figure(model: nn.Module) -> float:
    with torch.no_grad():
        return float(next(model.parameters()).abs().mean())


@pytest.mark.parametrize("n_stages", [2, 3])
@pytest.mark.parametrize("budget", ["9x", {"params": 500}, {"bytes": "9x"}])
def test_sizes_fall_by_equal_ratios(n_stages: int, budget: Any) -> None:
    model, data = net()
    total = count_params(model)
    result = run(model, data, budget=budget, n_stages=n_stages, evaluate=figure)
    points = [point for point in result.report.curve if point.method == "before healing"]
    last = total / result.report.params_after
    limit = total // 9 if budget != {"params": 500} else 500
    one_rank = 48 + 64
    assert limit - one_rank <= result.report.params_after <= limit
    for k, point in enumerate(points, start=1):
        assert point.compression == pytest.approx(last ** (k / n_stages), rel=0.1)
    assert [point.method for point in result.report.curve] == ["original", *n_stages * ["before healing", "healed"]]
    assert result.report.metric_compressed == points[-1].metric
    assert result.plan.params_before == result.report.params_before == total
    assert sum(note.startswith("On the way: ") for note in result.report.notes) == n_stages - 1


def test_layers_of_the_first_turn_are_planned_again() -> None:
    """Without that the second turn would find nothing left to take from."""
    model, data = net()
    first = run(model, data, budget="3x", n_stages=1)
    result = run(model, data)
    assert all(layer.spec is not None for layer in result.plan.layers[:1])
    assert result.report.params_after < 0.4 * first.report.params_after
    assert any(isinstance(module, FactorizedLayer) for module in result.model.modules())
    assert not any(isinstance(module, FactorizedLayer) for module in model.modules())


def test_what_the_user_had_factorized_stays() -> None:
    model, data = net()
    own = tt.nn.Linear(48, 64, rank=2)
    model[0] = own
    result = run(model, data, budget="1.5x")
    assert isinstance(result.model[0], tt.nn.Linear)
    assert result.model[0].spec == own.spec
    assert result.model[2].spec is not None


def test_recurrent_layers_are_taken_apart_in_every_turn() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(24, 32, batch_first=True), nn.Linear(32, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, data = Reads(), batches(4, 6, 5, 24, classes=6)
    result = run(model, data, budget="4x")
    assert result.report.params_after <= count_params(model) / 4
    assert [layer.spec is not None for layer in result.plan.layers].count(True) >= 2
    result.model(data[0][0])


def test_rows_of_healing_go_on() -> None:
    model, data = net()
    steps = [row["step"] for row in run(model, data).report.healing]
    assert steps == sorted(steps)
    assert len(set(steps)) == len(steps) > 1


def test_in_place_is_the_same() -> None:
    model, data = net()
    apart = run(copy.deepcopy(model), data)
    result = run(model, data, inplace=True)
    assert result.model is model
    assert torch.equal(values(model), values(apart.model))


def test_a_model_changed_in_place_is_whole_after_an_error_in_the_second_turn() -> None:
    class Stops(Silent):
        healings = 0

        def on_start(self, name: str, total: int | None) -> None:
            self.healings += name == "heal"
            if name == "decompose" and self.healings:
                raise RuntimeError("no more")

    model, data = net()
    before, kinds = values(model), [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="no more"):
        run(model, data, inplace=True, observer=Stops())
    assert torch.equal(values(model), before)
    assert [type(module) for module in model.modules()] == kinds


class Killed(Silent):
    def __init__(self, healing: int) -> None:
        self.left, self.name = healing, ""

    def on_start(self, name: str, total: int | None) -> None:
        self.name = name
        self.left -= name == "heal"

    def on_step(self, n: int, **figures: float) -> None:
        if self.name == "heal" and self.left < 0 and n == 2:
            raise SystemExit("killed")


@pytest.mark.parametrize("healing", [0, 1])
@pytest.mark.parametrize("build, shape", [(lambda: mlp(48, 64, 10), (48,)), (ConvNet, (3, 8, 8))])
def test_a_killed_turn_goes_on_to_the_same_bits(healing: int, build: Any, shape: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, data = decay_(build(), 0.5), batches(4, 8, *shape, classes=10)
    whole = run(model, data, budget="4x")
    file = tmp_path / "heal.ckpt"
    with pytest.raises(SystemExit):
        run(model, data, budget="4x", checkpoint=file, observer=Killed(healing))
    again = run(model, data, budget="4x", checkpoint=file)
    assert torch.equal(values(again.model), values(whole.model))
    assert again.plan == whole.plan


def test_a_list_may_say_the_same() -> None:
    model, data = net()
    by_list = run(
        model,
        data,
        n_stages=1,
        heal=None,
        stages=[Factorize(way=0.5), Heal(steps=2, lr=1e-2), Factorize(), Heal(steps=14, lr=1e-2)],
    )
    assert torch.equal(values(by_list.model), values(run(model, data).model))


@pytest.mark.parametrize(
    "n_stages, heal, wanted",
    [
        (1, {"steps": 5}, [(5, None)]),
        (2, {"steps": 40}, [(10, None), (70, None)]),
        (2, {"epochs": 4}, [(6, None), (42, None)]),
        (3, {"steps": 32}, [(6, None), (6, None), (84, None)]),
        (2, {"steps": 1}, [(1, None), (1, None)]),
        (2, None, [(2, None), (10, None)]),
        (2, {"epochs": 0}, [(None, 0), (None, 0)]),
    ],
)
def test_the_last_turn_has_most_steps(n_stages: int, heal: Any, wanted: list[tuple[int | None, int | None]]) -> None:
    """All together have as many as equal ones would have."""
    _, data = net()
    todo = _in_turns(n_stages, None, None, heal, data)
    assert [(one.steps, one.epochs) for one in todo if isinstance(one, Heal)] == wanted


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"n_stages": 0}, RankError, "n_stages has 0"),
        ({"n_stages": 1.5}, RankError, "n_stages has 1.5"),
        ({"heal": False}, KindError, "with heal=False"),
        ({"data": None}, KindError, "with no data"),
        ({"heal": None, "stages": [Factorize()]}, KindError, "stages is given beside n_stages=2"),
        ({"budget": {"max_metric_drop": 0.1}, "evaluate": figure}, BudgetError, "must have a size to go to"),
        ({"budget": {"latency_ms": 3}}, BudgetError, "must have a size to go to"),
    ],
)
def test_turns_that_cannot_be_taken(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model, data = net()
    with pytest.raises(error, match=says):
        run(model, options.pop("data", data), **options)


def test_a_drop_has_to_hold_at_the_end_of_the_way() -> None:
    model, data = net()
    full = count_params(model)
    asked: list[int] = []

    def judge(each: nn.Module) -> float:
        asked.append(count_params(each))
        return float(count_params(each) > full / 5)

    with pytest.raises(BudgetError, match="makes the figure fall by 1 before healing"):
        run(model, data, budget={"params": "9x", "max_metric_drop": 0.5}, evaluate=judge)
    assert any(full / 5 < n < full for n in asked)  # the first turn was taken
