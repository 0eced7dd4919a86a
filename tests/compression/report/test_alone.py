"""What each layer spoils by itself: measured as it is defined, and near what was predicted."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, assert_unchanged, batches, decay_, mlp, snapshot
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import apply_plan_, plan_compression
from tensortrain.compression.report.alone import loss_together, losses_alone
from tensortrain.viz import write_html

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


class Reads(nn.Module):
    """A recurrent layer, which is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(24, 32, batch_first=True), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


CASES: dict[str, Any] = {
    "mlp": (lambda: mlp(64, 64, 48), lambda: batches(6, 32, 64)),
    "norm": (lambda: ConvNet(4), lambda: batches(6, 64, 3, 8, 8)),
    "shared": (lambda: TwoHeads(48), lambda: batches(6, 32, 48)),
    "lstm": (Reads, lambda: batches(6, 32, 5, 24)),
    "tokens": (lambda: Tagger(60, 16, 5), lambda: [{"input_ids": torch.randint(0, 60, (8, 7))} for _ in range(6)]),
    "bare": (lambda: nn.Linear(64, 64), lambda: batches(6, 32, 64)),
}


FACTORED: dict[str, Any] = {"allow_slower": True, "formats": ("low_rank", "tt")}


def readers(plan: tt.CompressionPlan) -> set[str]:
    """Layers that read hidden units of which some went."""
    return {one.units.reader for one in plan.narrowed}


def planned(name: str, budget: str = "2x") -> tuple[nn.Module, Any, tt.CompressionPlan]:
    torch.manual_seed(2)
    build, data = CASES[name]
    model, given = decay_(build(), 0.7).eval(), data()
    return model, given, plan_compression(model, budget=budget, data=given, allow_slower=True)


@pytest.mark.parametrize("name", CASES)
def test_every_new_layer_is_measured_and_near_its_prediction(name: str) -> None:
    model, _, plan = planned(name)
    before = snapshot(model)
    small = apply_plan_(copy.deepcopy(model), plan)
    found = losses_alone(model, small, plan)
    assert_unchanged(model, before)
    assert set(found) == {layer.name for layer in plan.layers if layer.spec is not None} | readers(plan)
    for layer in plan.layers:
        if layer.spec is not None:
            assert layer.loss is not None
            # To second order, and inputs and gradients taken as independent: the widest seen here is 2.6.
            assert layer.loss / 4 < found[layer.name] < 4 * layer.loss + 1e-3


def test_it_is_the_change_of_the_output_with_one_layer_replaced() -> None:
    model, data, plan = planned("mlp")
    small = apply_plan_(copy.deepcopy(model), plan)
    found = losses_alone(model, small, plan, task="regress")
    assert found
    x = data[0][0]
    with torch.no_grad():
        y = model(x)
        for name, loss in found.items():
            alone = copy.deepcopy(model)
            together = next((one.names for one in plan.narrowed if one.units.reader == name), (name,))
            for each in together:
                alone[int(each)] = small.get_submodule(each)
            assert loss == pytest.approx(float((alone(x) - y).square().sum() / (y - y.mean(0)).square().sum()))


def test_the_statistics_of_a_norm_come_with_its_layer() -> None:
    """Without them the shift and the spread that were put right would count as losses."""
    model, data, _ = planned("norm")
    plan = plan_compression(model, budget="1.02x", data=data, include="conv1", allow_slower=True)
    small = apply_plan_(copy.deepcopy(model), plan)
    assert plan.calibration is not None
    assert plan.calibration.of("conv1").norm == "norm"
    with_them = losses_alone(model, small, plan)["conv1"]
    assert torch.equal(model.norm.running_var, planned("norm")[0].norm.running_var)
    small.norm.load_state_dict(model.norm.state_dict())
    assert losses_alone(model, small, plan)["conv1"] != pytest.approx(with_them)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_report_holds_both(inplace: bool, tmp_path: Any) -> None:
    model, data, _ = planned("mlp")
    result = tt.compress(model, budget="2x", data=data, heal={"steps": 2}, inplace=inplace, **FACTORED)
    layers = [layer for layer in result.report.layers if layer.format != "dense"]
    assert layers
    for layer in layers:
        assert layer.predicted_loss is not None
        assert layer.measured_loss is not None
        assert 0 < layer.measured_loss < 1
        assert re.search(r"\d more parameters would spoil .* % of the output less", layer.why)
    assert tt.Report.from_json(result.report.to_json()) == result.report
    write_html(result.report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Loss predicted" in page
    assert f"compressed: {layers[0].why}" in page


def test_other_batches_count_by_their_mean_and_all_changes_can_be_measured_together() -> None:
    model, _, plan = planned("mlp")
    small = apply_plan_(copy.deepcopy(model), plan)
    others = batches(3, 32, 64)
    each = [losses_alone(model, small, plan, batches=[one]) for one in others]
    found = losses_alone(model, small, plan, batches=others)
    assert found == pytest.approx({name: sum(one[name] for one in each) / 3 for name in found})
    assert found != pytest.approx(losses_alone(model, small, plan))
    net = nn.Linear(64, 64)
    one_change = plan_compression(net, budget="2x", data=others, allow_slower=True)
    cut = apply_plan_(copy.deepcopy(net), one_change)
    alone = losses_alone(net, cut, one_change, batches=others)
    assert [loss_together(net, cut, one_change, batches=others)] == pytest.approx(list(alone.values()))


def test_without_data_or_without_measuring_there_is_none() -> None:
    model, data, _ = planned("mlp")
    for given in ({"data": data, "heal": False, "measure": False}, {"data": None}):
        report = tt.compress(model, budget="2x", allow_slower=True, **given).report  # type: ignore[arg-type]
        assert all(layer.measured_loss is None for layer in report.layers)


def test_classes_are_measured_by_their_divergence_as_they_are_predicted() -> None:
    """Two classes that are never likely have large logits that vary: squares see little else."""
    torch.manual_seed(0)
    model = decay_(mlp(32, 48, 6), 0.7).eval()
    with torch.no_grad():
        model[-1].weight[4:] *= 20
        model[-1].bias[4:] = -400.0
    data = [(x, model(x).argmax(-1)) for x, _ in batches(6, 64, 32)]
    plan = plan_compression(model, budget="2x", data=data, task="classify", **FACTORED)
    assert plan.calibration is not None
    assert plan.calibration.in_nats
    found = losses_alone(model, apply_plan_(copy.deepcopy(model), plan), plan, task="classify")
    predicted = {layer.name: layer.loss for layer in plan.layers if layer.spec is not None}
    in_squares = losses_alone(model, apply_plan_(copy.deepcopy(model), plan), plan, task="regress")
    for name, loss in predicted.items():
        assert loss is not None
        assert loss / 2 < found[name] < 2 * loss
    assert any(in_squares[name] > 2 * max(found[name], loss or 0.0) for name, loss in predicted.items())


@pytest.mark.parametrize("name, budget", [("mlp", "1.3x"), ("norm", "1.1x")])
def test_narrowed_layers_are_measured_with_the_one_that_reads_them(name: str, budget: str) -> None:
    torch.manual_seed(2)
    build, data = CASES[name]
    model, given = decay_(build(), 0.7).eval(), data()
    plan = plan_compression(model, budget=budget, data=given, allow_slower=True, formats=("narrow",))
    before = snapshot(model)
    small = apply_plan_(copy.deepcopy(model), plan)
    found = losses_alone(model, small, plan, task="regress")
    assert_unchanged(model, before)
    assert found
    assert set(found) == readers(plan)
    predicted = {layer.name: layer.loss for layer in plan.layers if layer.name in found}
    for reader, loss in found.items():
        assert loss > 0
        assert predicted[reader] is not None
    if len(found) == 1:  # nothing else is changed
        x = given[0][0] if isinstance(given[0], tuple) else given[0]
        with torch.no_grad():
            y, now = model(x), small(x)
        expected = float((now - y).square().sum() / (y - y.mean(0)).square().sum())
        assert next(iter(found.values())) == pytest.approx(expected, rel=1e-6)


def test_the_report_tells_what_narrowing_spoils() -> None:
    model, data, _ = planned("mlp")
    result = tt.compress(model, budget="1.4x", data=data, heal=False, formats=("narrow",), allow_slower=True)
    assert result.plan.narrowed
    for layer in result.report.layers:
        if layer.name in readers(result.plan):
            assert layer.predicted_loss is not None
            assert layer.measured_loss is not None


def test_of_a_large_model_a_few_examples_are_run_and_all_layers_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, plan = planned("mlp")
    assert plan.calibration is not None
    (batch, *_) = plan.calibration.batches
    small, few = apply_plan_(copy.deepcopy(model), plan), [tensor[:4] for tensor in batch]
    monkeypatch.setattr("tensortrain.compression.report.alone._MOST_FLOPS", 1.0)
    found = losses_alone(model, small, plan)
    assert set(found) == {layer.name for layer in plan.layers if layer.spec is not None} | readers(plan)
    assert found == pytest.approx(losses_alone(model, small, plan, batches=[few]))
    assert found != pytest.approx(losses_alone(model, small, plan, batches=[batch]))


def test_a_batch_whose_tensors_share_no_axis_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, plan = planned("mlp")
    assert plan.calibration is not None
    x, y = plan.calibration.batches[0]
    plan.calibration.batches[0] = x, y.new_zeros(len(x) + 1)
    small = apply_plan_(copy.deepcopy(model), plan)
    whole = losses_alone(model, small, plan, task="regress")
    monkeypatch.setattr("tensortrain.compression.report.alone._MOST_FLOPS", 1.0)
    assert losses_alone(model, small, plan, task="regress") == pytest.approx(whole)
