"""Planning changes nothing, prints, and survives the way through JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, assert_unchanged, batches, decay_, mlp, snapshot
from torch import nn

import tensortrain as tt
from tensortrain.compression import CompressionPlan, Silent, apply_plan_, count_params, plan_compression
from tensortrain.contract import CostModel, use_cost_model
from tensortrain.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    FilterError,
    KindError,
    NonFiniteError,
    ShapeError,
    TTError,
)
from tensortrain.formats import get_format

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


class Fuse(nn.Module):
    """Passes its input on until it has run ``n`` times; then it fails."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("blown")
        return x


def odd_modes(model: nn.Module) -> nn.Module:
    """Train and eval mixed, some weights frozen, a hook here and there."""
    for k, module in enumerate(model.modules()):
        module.training = k % 2 == 0
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 3 != 0)
    next(iter(model.children())).register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("build, shape", [(ConvNet, (3, 8, 8)), (TwoHeads, (24,))])
def test_planning_changes_nothing(build, shape) -> None:
    model, data = odd_modes(decay_(build())), batches(3, 4, *shape)
    before = snapshot(model)
    state = torch.get_rng_state()
    plan_compression(model, budget="3x", data=data)
    plan_compression(model, budget="3x", example_inputs=data[0])
    tt.inspect(model, data[0][0])
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails_at", [0, 1, 2])  # the first trial, the second, the last batch
def test_a_failing_forward_leaves_nothing_behind(fails_at: int) -> None:
    model = odd_modes(nn.Sequential(nn.Linear(8, 8), Fuse(fails_at), nn.BatchNorm1d(8), nn.Linear(8, 8)))
    before = snapshot(model)
    with pytest.raises((RuntimeError, DataError), match="blown"):
        plan_compression(model, budget="2x", data=batches(3, 4, 8))
    assert_unchanged(model, before)


def test_a_failing_pass_for_gradients_is_noted_and_inputs_alone_decide() -> None:
    model = odd_modes(nn.Sequential(nn.Linear(8, 8), Fuse(4), nn.BatchNorm1d(8), nn.Linear(8, 8)))
    before = snapshot(model)
    plan = plan_compression(model, budget="1.2x", data=batches(3, 4, 8))
    assert any("inputs alone" in note and "blown" in note for note in plan.notes)
    assert_unchanged(model, before)


def test_a_nan_weight_is_found_before_anything_is_lost() -> None:
    model = mlp(16, 16, 16)
    with torch.no_grad():
        model[2].weight[3, 4] = torch.nan
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match="'2'"):
        plan_compression(model, budget="2x")
    assert_unchanged(model, before)
    plan_compression(model, budget=0.9, exclude="2")  # the advice of the message


def test_bad_calibration_data_is_an_error_of_ours() -> None:
    model = mlp(8, 8, 8)
    with pytest.raises(NonFiniteError, match="calibration data"):
        plan_compression(model, budget="2x", data=[torch.full((4, 8), torch.inf)])
    with pytest.raises(DataError, match="at least one"):
        plan_compression(model, budget="2x", data=[])


def test_unknown_formats_and_patterns_are_errors() -> None:
    model = mlp(8, 8)
    with pytest.raises(ShapeError, match="'svd'"):
        plan_compression(model, budget="2x", formats=("svd",))
    with pytest.raises(FilterError):
        plan_compression(model, budget="2x", include="fc")
    with pytest.raises(BudgetError, match="must have layers"):
        plan_compression(model, budget="2x", include="0", exclude="0")


def test_the_same_call_makes_the_same_plan() -> None:
    model, data = decay_(ConvNet()), batches(2, 4, 3, 8, 8)
    assert plan_compression(model, budget="4x", data=data) == plan_compression(model, budget="4x", data=data)


def test_only_the_formats_asked_for_are_used() -> None:
    model = decay_(ConvNet())
    for formats in (("tucker2",), ("low_rank",), ("tt",)):
        plan = plan_compression(model, budget=0.9, formats=formats)
        assert {layer.format for layer in plan.layers} == {*formats, "dense"}


def test_a_plan_prints() -> None:
    model = nn.ModuleDict({"body": decay_(mlp(64, 64)), "tail": nn.Bilinear(8, 8, 4)})
    text = str(plan_compression(model, budget={"params": 3000}))
    head, _, row, total, left = text.splitlines()
    assert head.split() == ["layer", "format", "modes", "out", "x", "in", "ranks", "params", "error"]
    assert row.startswith("body.0 ")
    assert "4,160 -> " in row
    assert total.startswith("budget 3000 params: 4,420 -> ")
    assert left.startswith("left alone: tail (Bilinear, 260 parameters): no plan reaches its weight (4, 8, 8)")


def test_progress_is_told() -> None:
    class Log(Silent):
        def __init__(self) -> None:
            self.said: list[object] = []

        def on_start(self, name: str, total: int | None) -> None:
            self.said.append((name, total))

        def on_step(self, n: int, **figures: float) -> None:
            self.said.append(n)

        def on_end(self) -> None:
            self.said.append("end")

    log = Log()
    plan_compression(decay_(mlp(16, 16, 16)), budget="2x", data=batches(2, 4, 16), n_batches=2, observer=log)
    # After these, layers as small as this leave much of the budget, and it is planned again in finer steps.
    assert log.said[:15] == [
        ("calibrate", 2),
        1,
        2,
        "end",
        ("gradients", 2),
        1,
        2,
        "end",
        ("widths", 1),
        1,
        "end",
        ("candidates", 2),
        1,
        2,
        "end",
    ]


# -- JSON -----------------------------------------------------------------------------------------------


def planned() -> tuple[nn.Module, CompressionPlan]:
    model = decay_(ConvNet())
    return model, plan_compression(model, budget="3x", data=batches(2, 4, 3, 8, 8))


@pytest.fixture(scope="module")
def text() -> str:
    with use_cost_model(CostModel.reference("cpu")):
        return plan_compression(decay_(ConvNet()), budget="3x").to_json()


def test_json_gives_the_plan_back() -> None:
    model = nn.ModuleDict({"a": decay_(TwoHeads(48)), "b": decay_(ConvNet()), "c": nn.MultiheadAttention(8, 2)})
    plan = plan_compression(model, budget="2x", exclude="b.conv2")
    text = plan.to_json()
    again = CompressionPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert str(again) == str(plan)
    assert again.calibration is None


def test_a_plan_from_json_applies_to_a_fresh_model() -> None:
    model, plan = planned()
    fresh = copy.deepcopy(model)
    apply_plan_(model, plan)
    apply_plan_(fresh, CompressionPlan.from_json(plan.to_json()))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in fresh.state_dict().items()} == shapes
    assert fresh(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def edited(text: str, **changes: object) -> str:
    data = json.loads(text)
    return json.dumps({**data, **changes})


def with_layer(text: str, **changes: object) -> str:
    data = json.loads(text)
    layer = next(layer for layer in data["layers"] if layer["spec"])
    layer.update(changes)
    return json.dumps(data)


def with_spec(text: str, **changes: object) -> str:
    data = json.loads(text)
    next(layer for layer in data["layers"] if layer["spec"])["spec"].update(changes)
    return json.dumps(data)


DAMAGES = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "a number": lambda text: "3",
    "null": lambda text: "null",
    "nested": lambda text: "[" * 100_000,
    "version": lambda text: edited(text, version=99),
    "no layers": lambda text: edited(text, layers=None),
    "layers of text": lambda text: edited(text, layers=["fc"]),
    "count of text": lambda text: edited(text, params_after="few"),
    "endless count": lambda text: edited(text, params_after=float("inf")),
    "left alone": lambda text: edited(text, left_alone=[{"name": "x"}]),
    "left alone with a text for a count": lambda text: edited(
        text, left_alone=[{"name": "x", "kind": "Linear", "reason": "tied", "n_params": "9"}]
    ),
    "unknown key": lambda text: with_layer(text, colour="red"),
    "names of text": lambda text: with_layer(text, names="head"),
    "no names": lambda text: with_layer(text, names=[]),
    "names of numbers": lambda text: with_layer(text, names=[3]),
    "params of text": lambda text: with_layer(text, params_after="few"),
    "implementation": lambda text: with_layer(text, implementation="magic"),
    "format": lambda text: with_spec(text, format="os.system"),
    "rank zero": lambda text: with_spec(text, ranks=[1, 0, 1]),
    "rank of text": lambda text: with_spec(text, ranks=["a"]),
    "modes": lambda text: with_spec(text, out_modes=[7, 7]),
    "negative size": lambda text: with_spec(text, out_features=-4),
    "kind": lambda text: with_spec(text, kind="attention"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_json_is_refused(damage: str, text: str) -> None:
    with pytest.raises(CheckpointError, match="to_json"):
        CompressionPlan.from_json(DAMAGES[damage](text))


def test_removing_any_key_is_noticed(text: str) -> None:
    data = json.loads(text)
    for key in data:
        with pytest.raises(CheckpointError):
            CompressionPlan.from_json(json.dumps({k: v for k, v in data.items() if k != key}))


def test_a_plan_for_another_model_is_refused_and_nothing_changed() -> None:
    _, plan = planned()
    others = [
        mlp(8, 8),  # no such names
        ConvNet(8),  # other shapes
        Tagger(),  # "head" of another shape
        nn.ModuleDict({"conv1": nn.Conv2d(3, 16, 3), "conv2": nn.Linear(16, 32), "head": nn.Linear(512, 10)}),
    ]
    for other in others:
        before = snapshot(other)
        with pytest.raises(ShapeError, match="a plan must fit its model") as caught:
            apply_plan_(other, CompressionPlan.from_json(plan.to_json()))
        assert "Nothing was changed" in str(caught.value)
        assert_unchanged(other, before)


def narrowed_at(model: nn.Module, *shape: int) -> Any:
    plan = plan_compression(model, budget="1.3x", data=batches(4, 9, *shape), formats=("narrow",), allow_slower=True)
    assert plan.narrowed
    return plan


def between(kind: Any, norm: Any, width: int = 48) -> nn.Sequential:
    return nn.Sequential(kind(20, width), norm, nn.ReLU(), kind(width, 6))


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (between(lambda a, b: nn.Conv1d(a, b, 1), nn.BatchNorm1d(48)), "is a Conv1d"),
        (between(lambda a, b: nn.Linear(a + 4, b) if a == 20 else nn.Linear(a, b), nn.BatchNorm1d(48)), "of shape"),
        (between(nn.Linear, nn.LayerNorm(20, elementwise_affine=False)), None),
        (between(nn.Linear, nn.BatchNorm1d(24)), "a BatchNorm1d of other sizes"),
        (nn.Sequential(*between(nn.Linear, nn.ReLU())[2:]), "lacks it"),
    ],
)
def test_layers_that_are_narrowed_together_must_be_of_the_kind_planned(other: nn.Module, found: str | None) -> None:
    plan = narrowed_at(between(nn.Linear, nn.BatchNorm1d(48)).eval(), 20)
    before = snapshot(other)
    if found is None:  # what holds no numbers needs no change
        tt.apply_plan_(other, plan)
        return
    with pytest.raises(ShapeError, match=found) as caught:
        apply_plan_(other, CompressionPlan.from_json(plan.to_json()))
    assert "Nothing was changed" in str(caught.value)
    assert_unchanged(other, before)


def test_a_plan_does_not_apply_twice() -> None:
    model, plan = planned()
    apply_plan_(model, plan)
    before = snapshot(model)
    with pytest.raises(ShapeError):
        apply_plan_(model, plan)
    assert_unchanged(model, before)


# -- never slower ---------------------------------------------------------------------------------------

SLOW_STARTS = CostModel(
    gemm_flops_s=1e12,
    gemm_half=(1.0, 1.0, 1.0),
    batched_flops_s=1e12,
    batched_half=(1.0, 1.0, 1.0),
    matrix_s=1e-9,
    bandwidth_bytes_s=1e12,
    cache_bandwidth_bytes_s=1e12,
    cache_bytes=1e7,
    fresh_bytes_s=1e12,
    permute_bytes_s=1e12,
    overhead_s=1.0,  # so two small products always lose against one large
)


@pytest.fixture
def no_dense_cache(monkeypatch) -> None:
    monkeypatch.setattr(tt.nn.FactorizedLayer, "dense_limit_bytes", 0)


@pytest.mark.usefixtures("no_dense_cache")
def test_a_layer_that_would_be_slower_is_left_dense() -> None:
    model, data = decay_(mlp(64, 64, 64)), batches(2, 4, 64)
    with use_cost_model(SLOW_STARTS):
        with pytest.raises(BudgetError, match="allow_slower=True"):
            plan_compression(model, budget="2x", data=data, formats=("low_rank", "tt"))
        plan = plan_compression(model, budget=1.0, data=data)
        assert all(layer.spec is None for layer in plan.layers)
        forced = plan_compression(model, budget="2x", data=data, allow_slower=True)
    assert all(layer.spec is not None for layer in forced.layers)
    assert all(layer.decision == "compressed" for layer in forced.layers)


@pytest.mark.usefixtures("no_dense_cache")
def test_the_budget_goes_to_the_layers_that_do_not_lose_time() -> None:
    # Half a megabyte takes longer to read than a call to start; 32 KiB do not.
    model = nn.Sequential(nn.Linear(256, 256), decay_(nn.Linear(256, 16), power=4.0))
    with use_cost_model(replace(SLOW_STARTS, overhead_s=2e-5, bandwidth_bytes_s=1e9, cache_bandwidth_bytes_s=1e9)):
        plan = plan_compression(model, budget="4x", example_inputs=torch.randn(4, 256))
        forced = plan_compression(model, budget="4x", example_inputs=torch.randn(4, 256), allow_slower=True)
    large, small = plan.layers
    assert large.decision == "compressed"
    assert small.spec is None
    assert small.decision.startswith("left dense: every form that fits is predicted slower")
    assert small.params_after == small.params_before
    assert 0.95 * count_params(model) / 4 <= plan.params_after <= count_params(model) / 4
    assert forced.layers[1].spec is not None


def test_every_error_of_planning_is_one_of_ours() -> None:
    for arguments in ({"budget": "x"}, {"budget": "2x", "include": "no"}, {"budget": "2x", "formats": ("no",)}):
        with pytest.raises(TTError):
            plan_compression(mlp(8, 8), **arguments)


class LoudAndQuiet(nn.Module):
    """Two equal branches, one of which hardly reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loud(x) + 0.1 * self.quiet(x)


def test_layers_weigh_more_alike_when_the_model_will_be_healed() -> None:
    model, data = LoudAndQuiet(), batches(4, 32, 48)
    decay_(model)
    params = {
        will_heal: {layer.name: layer.params_after for layer in plan.layers}
        for will_heal in (False, True)
        if (plan := plan_compression(model, budget="3x", data=data, formats=["low_rank"], will_heal=will_heal))
    }
    assert params[False]["loud"] > params[True]["loud"] > params[True]["quiet"]
    assert params[True]["quiet"] > params[False]["quiet"]


# -- menus and budgets at the edge -----------------------------------------------------------------------


def test_a_layer_without_candidates_of_some_format_is_planned_with_data() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=8), nn.Flatten(), nn.Linear(576, 32)
    )
    plan = plan_compression(model, budget="2x", data=batches(2, 4, 3, 8, 8), allow_slower=True)
    assert plan.params_after <= count_params(model) // 2


def test_a_budget_is_spent_when_one_layer_holds_most_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(16, 24, 1), nn.Flatten(), nn.Linear(1536, 96), nn.ReLU(), nn.Linear(96, 10))
    for budget in (1.9, 2.0, 2.2, 2.5, 2.8):
        limit = int(count_params(model) / budget)
        plan = plan_compression(model, budget=f"{budget}x", allow_slower=True)
        assert 0.95 * limit <= plan.params_after <= limit


def test_an_impossible_budget_is_known_before_the_data_is_touched() -> None:
    def data():
        raise AssertionError("the data was read")
        yield

    with pytest.raises(BudgetError, match="no form of this model has fewer than"):
        plan_compression(mlp(64, 64, 10), budget="4000x", data=data())


@pytest.mark.parametrize("value", [[], {}, ""])
@pytest.mark.parametrize("name", ["rel_error", "flops_before", "flops_after"])
def test_empty_values_of_another_kind_are_no_plan(name: str, value: object) -> None:
    _, plan = planned()
    data = json.loads(plan.to_json())
    data["layers"][0][name] = value
    with pytest.raises(CheckpointError):
        CompressionPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("function", [plan_compression, tt.inspect, tt.compress, tt.to_dense_])
def test_what_is_no_module_is_refused(function) -> None:
    options = {"budget": "2x"} if function in (plan_compression, tt.compress) else {}
    with pytest.raises(KindError, match="a model must be a module: found int"):
        function(3, **options)


def test_long_healing_prefers_full_matrix_rank_to_a_small_error() -> None:
    model = decay_(nn.Sequential(nn.Linear(144, 144), nn.ReLU(), nn.Linear(144, 10)))
    data = batches(3, 32, 144)

    def first(will_heal):
        plan = plan_compression(model, budget="8x", data=data, will_heal=will_heal, allow_slower=True)
        spec = plan.layers[0].spec
        assert spec is not None
        return plan, get_format(spec.format).max_matrix_rank(spec)

    short, narrow = first(True)
    long, wide = first("long")
    assert narrow < 24  # a narrow layer has the smallest error
    assert wide == 144
    assert long.layers[0].rel_error > short.layers[0].rel_error
    for plan in (short, long):
        assert 0.95 * plan.params_before / 8 <= plan.params_after <= plan.params_before / 8
