"""One calibration, many budgets: plans, figures, table, curve, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from small_models import ConvNet, assert_unchanged, batches, decay_, mlp, snapshot
from torch import nn

import tensortrain as tt
from tensortrain.compression import Silent, count_params, plan_compression
from tensortrain.errors import BudgetError, KindError

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")

BUDGETS = ["1.5x", "2x", "4x"]


def net() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(3)
    return decay_(mlp(48, 64, 40)), batches(4, 8, 48)


class Noted(Silent):
    def __init__(self) -> None:
        self.names: list[str] = []

    def on_start(self, name: str, total: int | None) -> None:
        self.names.append(name)


def figure(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.ones(2, 48)).square().mean())


@pytest.mark.parametrize("heal", [False, {"steps": 2}])
def test_each_budget_gets_what_it_gets_by_itself(heal: Any) -> None:
    model, data = net()
    before, watch = snapshot(model), Noted()
    given: dict[str, Any] = {"data": data, "heal": heal, "measure": False}
    found = tt.pareto(model, BUDGETS, observer=watch, **given)
    assert_unchanged(model, before)
    assert watch.names.count("calibrate") == watch.names.count("candidates") == 1
    assert len(found.results) == 3
    for budget, result in zip(BUDGETS, found.results, strict=True):
        alone = tt.compress(model, budget=budget, **given)
        assert result.plan == alone.plan
        assert torch.equal(result.model(data[0][0]), alone.model(data[0][0]))
        assert bool(result.report.healing) is bool(heal)


def test_rows_and_table() -> None:
    model, data = net()
    found = tt.pareto(model, [{"bytes": "2x"}, "4x", 0.5], data=data, evaluate=figure, heal=False, metric_name="m")
    rows = found.rows
    assert [row.budget for row in rows] == ["2x bytes", "4x", "0.5"]
    assert rows[0].params == pytest.approx(rows[2].params, rel=0.05)
    assert rows[1].params <= count_params(model) / 4
    assert rows[1].predicted_loss > rows[0].predicted_loss > 0  # type: ignore[operator]
    assert all(row.latency_ms > 0 and row.speedup > 0 for row in rows)  # type: ignore[operator]
    assert [row.metric for row in rows] == [figure(result.model) for result in found.results]
    text = str(found).splitlines()
    assert len(text) == 5
    assert "predicted loss" in text[0]
    assert "m cut" in text[0]
    assert f"{rows[1].params:,}" in text[3]


def test_the_original_is_judged_once() -> None:
    model, data = net()
    asked: list[nn.Module] = []

    def judge(each: nn.Module) -> float:
        asked.append(each)
        return figure(each)

    tt.pareto(model, BUDGETS, data=data, heal=False, measure=False, evaluate=judge)
    assert sum(each is model for each in asked) == 1
    assert len(asked) == 4


def test_the_report_holds_the_whole_curve() -> None:
    model, data = net()
    found = tt.pareto(model, BUDGETS, data=data, evaluate=figure, heal={"steps": 2}, measure=False)
    report = found.report
    assert [point.method for point in report.curve] == ["original", *3 * ["before healing", "healed"]]
    assert [point.label for point in report.curve[1:]] == ["1.5x", "1.5x", "2x", "2x", "4x", "4x"]
    assert report.params_after == min(row.params for row in found.rows)
    assert sum(note.startswith("Budget ") for note in report.notes) == 3
    assert tt.Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("evaluate", [None, figure])
def test_the_curve_is_drawn(evaluate: Any, tmp_path: Path) -> None:
    model, data = net()
    found = tt.pareto(model, BUDGETS, data=data, heal={"steps": 2}, measure=False, evaluate=evaluate)
    drawn = found.plot(tmp_path / "curve.png")
    assert isinstance(drawn, Figure)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    axes = drawn.axes[0]
    assert axes.get_ylabel() == ("predicted loss" if evaluate is None else "metric")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == (["predicted"] if evaluate is None else ["before healing", "healed", "original"])


def test_without_data_there_is_no_predicted_loss() -> None:
    found = tt.pareto(net()[0], ["2x"], measure=False)
    assert found.rows[0].predicted_loss is None
    assert found.results[0].plan.loss is None
    found.plot()


def test_losses_of_a_plan_add_up_and_survive_json() -> None:
    torch.manual_seed(0)
    model, data = decay_(ConvNet()), batches(4, 8, 3, 8, 8)
    plan = plan_compression(model, budget="2x", data=data, allow_slower=True)
    assert plan.loss == pytest.approx(sum(layer.loss or 0.0 for layer in plan.layers))
    assert 0 < plan.loss < 1  # type: ignore[operator]
    again = tt.CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.loss == plan.loss
    # That the model will be healed changes what is chosen, not what a choice spoils.
    healed = plan_compression(model, budget="2x", data=data, allow_slower=True, will_heal=True)
    assert healed.loss >= 0.99 * plan.loss  # type: ignore[operator]


def test_each_healing_has_a_file_of_its_own(tmp_path: Path) -> None:
    model, data = net()
    given: dict[str, Any] = {"data": data, "heal": {"steps": 2}, "measure": False, "checkpoint": tmp_path / "h.ckpt"}
    first = tt.pareto(model, BUDGETS, **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h-budget-2.ckpt", "h-budget-3.ckpt", "h.ckpt"]
    again = tt.pareto(model, BUDGETS, **given)
    x = data[0][0]
    for one, two in zip(first.results, again.results, strict=True):
        assert torch.equal(one.model(x), two.model(x))


@pytest.mark.parametrize(
    "budgets, options, error, says",
    [
        ([], {}, BudgetError, "must be a list"),
        ("2x", {}, BudgetError, "must be a list"),
        ({"params": 10}, {}, BudgetError, "must be a list"),
        (["2x", "fast"], {}, BudgetError, "'fast'"),
        (["2x", {"params": 3}], {}, BudgetError, "must be reachable"),
        (["2x"], {"inplace": True}, KindError, "inplace is given"),
        (["2x"], {"n_stages": 2}, KindError, "n_stages is given"),
    ],
)
def test_lists_that_cannot_be_kept_are_errors_before_the_work(
    budgets: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    model, data = net()
    watch = Noted()
    with pytest.raises(error, match=says):
        tt.pareto(model, budgets, data=data, observer=watch, **options)
    assert watch.names == []
