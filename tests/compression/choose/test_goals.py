"""Budgets of several measures, of measured ones, and of several at once: read before the work, kept or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, batches, decay_, mlp
from torch import nn

import tensortrain as tt
from tensortrain.compression import Silent, apply_plan_, count_params, plan_compression
from tensortrain.compression.choose import planner, proving
from tensortrain.compression.choose.cost import dense_cost
from tensortrain.compression.choose.goals import Sizes, read_goals
from tensortrain.compression.choose.load import Load
from tensortrain.compression.survey.layers import find_layers
from tensortrain.errors import BudgetError, KindError
from tensortrain.nn import FactorizedLayer
from tensortrain.system.storage import count_bytes
from tensortrain.train.batches import Parts

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")

NOW = Sizes(params=1000, n_bytes=8000, flops=5000)


def bytes_of(model: nn.Module) -> int:
    return count_bytes((*model.parameters(), *model.buffers()))


# -- reading ----------------------------------------------------------------------------------------------


def test_goals_are_read() -> None:
    goals = read_goals(
        {"bytes": "4x", "flops": 0.5, "latency_ms": 3, "batch_size": 8, "max_metric_drop": 0}, NOW, can_evaluate=True
    )
    assert [(each.measure, each.limit) for each in goals.counted] == [("flops", 2500), ("bytes", 2000)]
    assert (goals.latency_ms, goals.batch_size, goals.metric_drop) == (3.0, 8, 0.0)
    assert goals.text == "4x bytes and 0.5 flops and 3 ms at batch 8 and a drop of at most 0"
    assert goals.is_measured
    assert not read_goals({"params": 10, "bytes": 100}, NOW).is_measured
    assert read_goals({"latency_ms": 3}, NOW).batch_size == 1
    assert read_goals({"latency_ms": 3}, NOW, batch_size=5).batch_size == 5


@pytest.mark.parametrize(
    "budget, says",
    [
        ({}, "what else it bounds: found {}"),
        ({"joules": 3}, "found 'joules'"),
        ({"params": "2x", "speed": 3}, "found 'speed'"),
        ({"batch_size": 4}, "without 'latency_ms'"),
        ({"params": "2x", "batch_size": 4}, "without 'latency_ms'"),
        ({"latency_ms": 0}, "positive number of milliseconds"),
        ({"latency_ms": "fast"}, "positive number of milliseconds"),
        ({"latency_ms": math.nan}, "positive number of milliseconds"),
        ({"latency_ms": 3, "batch_size": 0}, "batch_size has 0"),
        ({"latency_ms": 3, "batch_size": 2.5}, "batch_size has 2.5"),
        ({"max_metric_drop": -0.1}, "not negative"),
        ({"max_metric_drop": True}, "not negative"),
        ({"max_metric_drop": math.inf}, "not negative"),
        ({"bytes": 9000}, "between 1 and the 8,000 bytes"),
        ({"bytes": "0.5x"}, "asks for growth"),
        ({"params": 10, "bytes": None}, "number or a ratio"),
    ],
)
def test_goals_that_cannot_be_read_are_errors(budget: Any, says: str) -> None:
    with pytest.raises(BudgetError) as caught:
        read_goals(budget, NOW, can_evaluate=True)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "budget, says",
    [
        ({"max_metric_drop": 0.1}, "Pass evaluate="),
        ({"params": "2x", "max_metric_drop": 0.1}, "Pass evaluate="),
        ({"latency_ms": 3.0}, "Pass data="),
        ({"latency_ms": -1}, "positive number"),
        ({"params": "2x", "watts": 1}, "found 'watts'"),
    ],
)
def test_what_a_budget_lacks_is_known_before_the_work(monkeypatch: pytest.MonkeyPatch, budget: Any, says: str) -> None:
    monkeypatch.setattr(planner, "find_layers", lambda *args, **options: pytest.fail("surveyed"))
    data = None if "latency_ms" in budget else [pytest.fail]
    with pytest.raises(BudgetError, match=says):
        plan_compression(mlp(8, 8), budget=budget, data=data)


def test_a_size_below_the_smallest_form_is_known_before_the_data_is_touched() -> None:
    def untouched() -> Any:
        pytest.fail("the data was read")
        yield

    with pytest.raises(BudgetError, match=r"allows 300 bytes, but no form of this model has fewer than"):
        plan_compression(mlp(64, 64, 10), budget={"params": "2x", "bytes": 300}, data=untouched())


# -- bytes ------------------------------------------------------------------------------------------------


class Padded(Tagger):
    """With a padding row that was trained, which is kept beside the cores."""

    def __init__(self) -> None:
        super().__init__(300, 32, 7)
        old = self.embed.weight.detach()
        self.embed = nn.Embedding(300, 32, padding_idx=0)
        with torch.no_grad():
            self.embed.weight.copy_(old)


def mixed() -> nn.Module:
    """Layers of two dtypes, and a buffer that counts too."""
    model = nn.ModuleDict({"a": nn.Linear(96, 96, dtype=torch.float32), "b": nn.Linear(96, 96, dtype=torch.bfloat16)})
    model.register_buffer("table", torch.zeros(1000, dtype=torch.int16))
    return model


BYTES: dict[str, Any] = {
    "mlp": lambda: mlp(96, 80, 64, 10),
    "conv": lambda: ConvNet(16),
    "padding row": Padded,
    "shared": lambda: TwoHeads(48),
    "lstm": lambda: nn.LSTM(64, 64),
    "two dtypes": mixed,
    "half": lambda: mlp(96, 96).bfloat16(),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_budget_in_bytes_is_kept_and_spent(name: str) -> None:
    model = BYTES[name]()
    before = bytes_of(model)
    plan = plan_compression(model, budget={"bytes": "3x"}, allow_slower=True)
    small = apply_plan_(model, plan)
    assert 0.9 * before / 3 <= bytes_of(small) <= before / 3
    assert plan.budget == "3x bytes"


def test_bytes_go_where_numbers_are_small() -> None:
    """Of two equal layers the one in half the width costs half for the same error."""
    torch.manual_seed(0)
    plan = plan_compression(mixed(), budget={"bytes": "2x"}, allow_slower=True)
    wide, half = plan.layers
    assert half.params_after > 1.2 * wide.params_after


# -- several sizes ----------------------------------------------------------------------------------------


def spent(plan: tt.CompressionPlan) -> dict[str, int]:
    return {"params": plan.params_after, "flops": sum(layer.flops_after or 0 for layer in plan.layers)}


def test_several_sizes_hold_at_once() -> None:
    """Convolutions have the flops, the head has the parameters."""
    torch.manual_seed(0)
    model, data = decay_(ConvNet(16), 0.3), batches(2, 8, 3, 8, 8)
    how: dict[str, Any] = {"data": data, "allow_slower": True, "formats": ("low_rank", "tucker2", "tt")}
    full = plan_compression(model, budget=1.0, **how)
    before = spent(full)
    few = plan_compression(model, budget={"params": "3x"}, **how)
    light = plan_compression(model, budget={"flops": "3x"}, **how)
    assert spent(few)["flops"] > before["flops"] / 3
    assert spent(light)["params"] > before["params"] / 3
    both = plan_compression(model, budget={"params": "3x", "flops": "3x"}, **how)
    for measure, amount in spent(both).items():
        assert 0.85 * before[measure] / 3 <= amount <= before[measure] / 3
    assert all(layer.implementation == "factorized" for layer in both.layers if layer.spec is not None)
    assert both.budget == "3x params and 3x flops"


@pytest.mark.parametrize("loose", [1.0, "1.2x"])
def test_a_limit_that_does_not_bind_changes_nothing(loose: Any) -> None:
    model = decay_(mlp(96, 80, 64, 10))
    alone = plan_compression(model, budget={"params": "4x"}, allow_slower=True)
    both = plan_compression(model, budget={"params": "4x", "bytes": loose}, allow_slower=True)
    assert both.layers == alone.layers


def test_sizes_that_cannot_be_kept_together_say_what_was_reached() -> None:
    model, data = ConvNet(16), batches(2, 8, 3, 8, 8)
    with pytest.raises(BudgetError, match="must be reachable"):
        plan_compression(model, budget={"params": "2x", "flops": "5000x"}, data=data, allow_slower=True)


# -- a figure of the user's -------------------------------------------------------------------------------


class Judge:
    """How near a model is to the one that it was made with, and how often it was asked."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.x, self.n_calls = x, 0
        self.wanted = self.given(model)

    def given(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return copy.deepcopy(model).eval()(self.x)

    def __call__(self, model: nn.Module) -> float:
        self.n_calls += 1
        return 1 - float((self.given(model) - self.wanted).norm() / self.wanted.norm())


def judged(power: float = 2.0, *, build: Any = lambda: mlp(48, 64, 40), shape: tuple[int, ...] = (48,)) -> Any:
    torch.manual_seed(1)
    model, data = decay_(build(), power), batches(4, 16, *shape)
    return model, data, Judge(model, data[0][0])


@pytest.mark.parametrize("build, shape", [(lambda: mlp(48, 64, 40), (48,)), (lambda: ConvNet(8), (3, 8, 8))])
@pytest.mark.parametrize("drop", [0.1, 0.3])
def test_the_smallest_model_within_a_drop(build: Any, shape: tuple[int, ...], drop: float) -> None:
    model, data, judge = judged(build=build, shape=shape)
    plan = plan_compression(
        model, budget={"max_metric_drop": drop}, data=data, evaluate=judge, allow_slower=True, n_batches=4
    )
    assert 2 <= judge.n_calls <= 12
    small = apply_plan_(copy.deepcopy(model), plan)
    assert 1 - judge(small) <= drop
    tighter = plan_compression(
        model, budget={"params": int(0.8 * plan.params_after)}, data=data, allow_slower=True, n_batches=4
    )
    assert 1 - judge(apply_plan_(copy.deepcopy(model), tighter)) > drop
    assert any(note.startswith("Measured before healing: the figure is") for note in plan.notes)
    assert not any("of its budget" in note for note in plan.notes)  # a limit of the search is nobody's budget


def test_a_larger_drop_gives_a_smaller_model() -> None:
    model, data, judge = judged()
    how: dict[str, Any] = {"data": data, "evaluate": judge, "allow_slower": True, "formats": ("low_rank", "tt")}
    sizes = [plan_compression(model, budget={"max_metric_drop": p}, **how).params_after for p in (0.05, 0.15, 0.4)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_every_plan_is_judged_once_and_calibrated_once() -> None:
    class Passes(Silent):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_start(self, name: str, total: int | None) -> None:
            self.seen.append(name)

    model, data, judge = judged()
    seen: list[int] = []

    def noted(each: nn.Module) -> float:
        seen.append(count_params(each))
        return judge(each)

    watch = Passes()
    plan_compression(
        model, budget={"max_metric_drop": 0.1}, data=data, evaluate=noted, allow_slower=True, observer=watch
    )
    assert len(seen) == len(set(seen)) > 3
    assert watch.seen.count("calibrate") == watch.seen.count("candidates") == 1


def test_a_drop_that_no_smaller_model_keeps_says_what_was_reached() -> None:
    model, data, _ = judged()
    full = count_params(model)
    with pytest.raises(BudgetError, match=r"takes least away .* makes the figure fall by 1\. Allow") as caught:
        plan_compression(
            model,
            budget={"max_metric_drop": 0.5},
            data=data,
            evaluate=lambda each: float(count_params(each) == full),
            allow_slower=True,
        )
    assert "a drop of at most 0.5" in str(caught.value)


def test_a_figure_that_is_no_number_never_holds() -> None:
    model, data, _ = judged()
    with pytest.raises(BudgetError, match="must be reachable"):
        plan_compression(
            model, budget={"max_metric_drop": 9.0}, data=data, evaluate=lambda each: math.nan, allow_slower=True
        )


def test_a_size_and_a_drop_both_hold_or_it_is_an_error_before_healing() -> None:
    model, data, judge = judged()
    both = {"params": "2x", "max_metric_drop": 0.5}
    plan = plan_compression(model, budget=both, data=data, evaluate=judge, allow_slower=True)
    assert plan.layers == plan_compression(model, budget={"params": "2x"}, data=data, allow_slower=True).layers

    class NoHealing(Silent):
        def on_start(self, name: str, total: int | None) -> None:
            assert name != "heal"

    with pytest.raises(BudgetError, match="before healing, from 1 to"):
        tt.compress(
            model,
            budget={"params": "8x", "max_metric_drop": 0.01},
            data=data,
            evaluate=judge,
            heal={"steps": 2},
            allow_slower=True,
            observer=NoHealing(),
        )


def test_compress_keeps_the_drop_and_reports_it() -> None:
    model, data, judge = judged()
    result = tt.compress(
        model, budget={"max_metric_drop": 0.2}, data=data, evaluate=judge, heal={"steps": 2}, measure=False
    )
    assert result.report.metric_compressed is not None
    assert result.report.metric_compressed >= 0.8
    assert any("the figure is" in note for note in result.report.notes)


def test_evaluate_must_be_a_function() -> None:
    with pytest.raises(KindError, match="evaluate must be a function"):
        plan_compression(mlp(8, 8), budget="2x", evaluate=3)  # type: ignore[arg-type]


# -- a time -----------------------------------------------------------------------------------------------


ROWS, REST_MS, SLOWNESS = 64, 0.05, 1.7


def clock_ms(model: nn.Module, rows: int = ROWS) -> float:
    """Layers as they are predicted, all slower by one factor, and a rest that nothing takes away."""
    seconds = 0.0
    for module in model.modules():
        if isinstance(module, FactorizedLayer):
            seconds += module.plan(rows).predicted_s
        elif isinstance(module, nn.Linear):
            seconds += dense_cost(find_layers(module)[0][0], Load(rows, rows, (), True)).seconds
    return REST_MS + 1e3 * SLOWNESS * seconds


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> list[Parts]:
    """A clock that does not depend on the machine, and what it timed."""
    timed: list[Parts] = []

    def read(model: nn.Module, call: Parts) -> float:
        timed.append(call)
        model(*call.args, **call.kwargs)
        return clock_ms(model)

    monkeypatch.setattr(proving, "time_ms", read)
    return timed


def slow(*sizes: int) -> Any:
    torch.manual_seed(1)
    return decay_(mlp(*sizes), 0.5), batches(2, 8, sizes[0])


def in_time(model: nn.Module, ms: float, **more: Any) -> dict[str, Any]:
    return {"latency_ms": ms, "batch_size": ROWS, **more}


@pytest.mark.parametrize("share", [0.85, 0.65])
def test_a_time_is_kept_as_measured(stopwatch: list[Parts], share: float) -> None:
    model, data = slow(768, 768, 256)
    limit = share * clock_ms(model)
    plan = plan_compression(model, budget=in_time(model, limit), data=data)
    reached = clock_ms(apply_plan_(copy.deepcopy(model), plan))
    assert 0.9 * limit <= reached <= limit  # no faster than it has to be
    assert {call.args[0].shape[0] for call in stopwatch} == {ROWS}
    assert len(stopwatch) <= 12
    assert any(note.startswith("Measured: ") and f"at batch size {ROWS}" in note for note in plan.notes)


def test_a_time_that_the_model_keeps_as_it_is_takes_nothing_away(stopwatch: list[Parts]) -> None:
    model, data = slow(256, 256)
    plan = plan_compression(model, budget={"latency_ms": 1e6}, data=data)
    assert plan.params_after == count_params(model)


def test_a_time_that_nothing_keeps_says_what_was_reached(stopwatch: list[Parts]) -> None:
    model, data = slow(768, 768)
    with pytest.raises(
        BudgetError, match=r"allows 0\.05 ms at batch size 64, but the fastest of 2 plans takes 0\."
    ) as e:
        plan_compression(model, budget=in_time(model, REST_MS), data=data)
    assert f"the model as it is takes {clock_ms(model):.4g} ms" in str(e.value)
    assert len(stopwatch) <= 3


def test_a_time_and_a_size_both_hold(stopwatch: list[Parts]) -> None:
    model, data = slow(768, 768, 256)
    total, whole = count_params(model), clock_ms(model)
    for limits in (in_time(model, 0.65 * whole, params="1.3x"), in_time(model, 0.8 * whole, params="6x")):
        plan = plan_compression(model, budget=limits, data=data)
        small = apply_plan_(copy.deepcopy(model), plan)
        shares = count_params(small) / (total / float(limits["params"][:-1])), clock_ms(small) / limits["latency_ms"]
        assert max(shares) <= 1
        assert max(shares) >= 0.9  # the one that binds is spent


def test_a_time_and_a_drop_both_hold_or_say_so(stopwatch: list[Parts]) -> None:
    model, data = slow(768, 384)
    judge = Judge(model, data[0][0])
    limits = in_time(model, 0.75 * clock_ms(model), max_metric_drop=1e-3)
    with pytest.raises(BudgetError, match="makes the figure fall by"):
        plan_compression(model, budget=limits, data=data, evaluate=judge)
    plan = plan_compression(model, budget={**limits, "max_metric_drop": 1.0}, data=data, evaluate=judge)
    assert len([note for note in plan.notes if note.startswith("Measured")]) == 2


def test_inputs_that_share_no_axis_cannot_be_cut(stopwatch: list[Any]) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * scale

    data: Sequence[Any] = [(torch.randn(8, 64), torch.ones(64))] * 2
    with pytest.raises(BudgetError, match="batch_size=8 in the budget"):
        plan_compression(Weighted(), budget={"latency_ms": 1.0}, data=data)
    plan_compression(Weighted(), budget={"latency_ms": 1e6, "batch_size": 8}, data=data)


def test_a_real_clock_gives_a_time() -> None:
    model = mlp(32, 32)
    before = model.training
    assert proving.time_ms(model, Parts((torch.randn(4, 32),))) > 0
    assert model.training is before
    with pytest.raises(KindError, match="must run on the inputs that it is timed with"):
        proving.time_ms(model, Parts((torch.randn(4, 31),)))


def test_compress_takes_a_time_and_times_the_result(stopwatch: list[Parts]) -> None:
    model, data = slow(768, 384)
    result = tt.compress(model, budget=in_time(model, 0.75 * clock_ms(model)), data=data, heal=False, measure=False)
    assert clock_ms(result.model) <= 0.75 * clock_ms(model)
    assert result.report.params_after == result.plan.params_after < count_params(model)
