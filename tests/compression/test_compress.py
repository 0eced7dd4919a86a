"""The one call: what it returns, what it leaves alone, and that it is worth calling."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, assert_unchanged, batches, decay_, mlp, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import tensortrain as tt
from tensortrain.compression import (
    Heal,
    Silent,
    apply_plan_,
    compress,
    count_params,
    evaluate_accuracy,
    fit,
    plan_compression,
)
from tensortrain.compression.stages import Factorize, Refit
from tensortrain.compression.stages import factorize as stage_factorize
from tensortrain.contract import CostModel, use_cost_model
from tensortrain.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    FilterError,
    KindError,
    NonFiniteError,
    RankError,
)
from tensortrain.train import (
    loop as training,
)
from tensortrain.train.losses import cross_entropy_loss

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")

QUICK: dict[str, Any] = {"measure": False, "heal": {"steps": 2}}


def factorized(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, tt.nn.FactorizedLayer)]


# -- what it changes and what it gives --------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_left_as_it_was(train: bool) -> None:
    model, data = decay_(ConvNet()).train(train), batches(2, 8, 3, 8, 8)
    model.conv1.eval()
    before, state = snapshot(model), torch.get_rng_state()
    result = compress(model, budget="3x", data=data, evaluate=lambda net: 0.5, **QUICK)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.model is not model
    assert len(factorized(result.model)) >= 2
    assert [module.training for module in (result.model, result.model.conv1)] == [train, False]


def test_inplace_changes_the_model_itself() -> None:
    model = decay_(mlp(32, 32, 4))
    size = 8 * count_params(model)
    result = compress(model, budget="2x", inplace=True, measure=False)
    assert result.model is model
    assert len(factorized(model)) > 0
    assert result.report.bytes_before == size  # of the model that is no more
    assert result.report.bytes_after == 8 * count_params(model)


def test_a_failed_call_leaves_even_an_inplace_model_alone() -> None:
    model, data = decay_(mlp(32, 32, 4)), batches(2, 8, 32)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        compress(model, budget="2x", data=data, inplace=True)
    assert_unchanged(model, before)


def test_a_bare_layer_comes_back_as_the_new_layer() -> None:
    layer = decay_(nn.Linear(48, 48))
    for inplace in (False, True):
        result = compress(layer, budget="3x", inplace=inplace, measure=False)
        assert isinstance(result.model, tt.nn.Linear)
        assert result.report.params_after == result.model.n_params <= layer.weight.numel() // 3 + 16
        assert result.report.layers[0].name == ""
    assert type(layer) is nn.Linear


def test_the_report_says_what_was_done() -> None:
    model, data = decay_(ConvNet()), batches(2, 8, 3, 8, 8)
    result = compress(model, budget="3x", data=data, name="small net", heal=False, measure=False)
    report, plan = json.loads(result.report.to_json()), result.plan
    assert report["params_before"] == count_params(model) == plan.params_before
    assert report["params_after"] == count_params(result.model) == plan.params_after
    assert [layer["name"] for layer in report["layers"]] == ["conv1", "conv2", "head"]
    for row, layer in zip(report["layers"], plan.layers, strict=True):
        module = result.model.get_submodule(row["name"])
        assert row["params_after"] == count_params(module)
        assert row["format"] == layer.format
        assert tuple(row["ranks"]) == (module.ranks if layer.spec else ())
        assert row["implementation"] == ("auto" if layer.spec else "dense")
        assert row["decision"]
    assert report["bytes_before"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert report["flops_before"] > 0
    assert report["title"] == "small net at 3x"
    assert report["healing"] == report["latency"] == report["memory"] == []
    assert report["provenance"]["wall_s"] >= 0
    assert tt.compress is compress


def test_measurements_are_of_both_models() -> None:
    model, data = decay_(mlp(32, 32, 4)), batches(2, 8, 32)
    report = compress(model, budget="2x", data=data, heal=False).report
    assert [row.batch for row in report.latency] == [1, 8]
    assert all(row.dense_ms > 0 and row.compressed_ms > 0 for row in report.latency)
    assert [row.batch for row in report.memory] == [1, 8]
    assert report.memory[0].dense_resident_bytes == 8 * count_params(model)
    for layer in report.layers:
        assert layer.resident_bytes is not None
        assert layer.resident_bytes >= 8 * layer.params_after


@pytest.mark.parametrize("form", [lambda x, y: x, lambda x, y: (x, y), lambda x, y: [x, y]])
def test_example_inputs_are_a_batch_in_any_form(form) -> None:
    model = decay_(mlp(32, 32, 4))
    report = compress(model, budget="2x", example_inputs=form(torch.randn(8, 32), torch.zeros(8))).report
    assert [row.batch for row in report.latency] == [1, 8]
    assert report.flops_before == 2 * (32 * 32 + 32 * 4)


def test_shared_layers_count_once() -> None:
    model = decay_(TwoHeads(48))
    result = compress(model, budget="3x", measure=False)
    report = result.report
    assert report.params_before == count_params(model) == 2 * (48 * 48 + 48) + 48 * 4 + 4
    assert report.params_before / 3 - 96 <= report.params_after <= report.params_before / 3  # 96: one rank
    assert result.model.blocks[1] is result.model.first
    assert [layer.name for layer in report.layers] == ["first", "blocks.0", "head"]


def test_what_is_left_alone_is_noted() -> None:
    model = nn.ModuleDict({"a": decay_(nn.Linear(48, 48)), "b": nn.Bilinear(8, 8, 20)})
    (note,) = compress(model, budget=0.7, measure=False).report.notes
    assert note.startswith("b (Bilinear) was left alone: no plan reaches its weight (20, 8, 8)")


def test_include_and_exclude() -> None:
    model = decay_(mlp(48, 48, 48, 4))
    result = compress(model, budget=0.7, include="*", exclude=["2", "4"], measure=False)
    assert [type(result.model[k]) for k in (0, 2, 4)] == [tt.nn.Linear, nn.Linear, nn.Linear]
    with pytest.raises(FilterError):
        compress(model, budget=0.7, include="fc1")


def test_a_plan_made_before_is_used() -> None:
    model = decay_(mlp(48, 48, 48))
    plan = plan_compression(model, budget="4x", formats=("tt",))
    result = compress(model, budget="2x", plan=plan, measure=False)
    assert result.plan is plan
    assert count_params(result.model) == plan.params_after


# -- evaluate -------------------------------------------------------------------------------------------


def test_evaluate_is_called_on_the_dense_the_cut_and_the_healed_model() -> None:
    model, data, seen = decay_(mlp(32, 32, 4)), batches(3, 8, 32), []

    def evaluate(net: nn.Module) -> dict[str, float]:
        assert not net.training
        assert not torch.is_grad_enabled()
        seen.append(net)
        return {"score": float(len(seen)), "other": -1.0}

    result = compress(model, budget="2x", data=data, evaluate=evaluate, metric_name="score", heal={"epochs": 2},
                      measure=False)  # fmt: skip
    assert seen[0] is model
    assert all(net is result.model for net in seen[1:])
    report = result.report
    assert (report.metric_name, report.metric_before, report.metric_compressed) == ("score", 1.0, 2.0)
    assert report.metric_after == float(len(seen))
    assert [row["score"] for row in report.healing] == [3.0, 4.0]


def test_without_healing_the_figure_stays() -> None:
    report = compress(decay_(mlp(32, 32, 4)), budget="2x", evaluate=lambda net: 0.25, measure=False).report
    assert (report.metric_before, report.metric_compressed, report.metric_after) == (0.25, 0.25, 0.25)


# -- healing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heal, rows, steps",
    [
        (None, 1, 3),
        (True, 1, 3),
        (False, 0, 0),
        ({"epochs": 2}, 2, 6),
        ({"steps": 4, "lr": 1e-4}, 2, 4),
        (Heal(epochs=1, schedule="constant", optimizer="sgd"), 1, 3),
        ({"epochs": 0}, 0, 0),
        ({"epochs": 1, "loss": "feature"}, 1, 3),
        ({"epochs": 1, "loss": lambda net, batch: net(batch[0]).square().mean()}, 1, 3),
    ],
)
def test_ways_to_heal(heal, rows: int, steps: int) -> None:
    model = mlp(32, 32, 4)
    data = [(x,) for x, _ in batches(3, 256, 32)]
    result = compress(model, budget="4x", data=data, heal=heal, measure=False)
    history = result.report.healing
    assert len(history) == rows
    assert (history[-1]["step"] if history else 0) == steps
    cut = apply_plan_(copy.deepcopy(model), result.plan)
    x = data[0][0]
    refitted = any("refitted on" in note for note in result.report.notes)  # by least squares, before it is trained
    assert not (refitted and heal is False)
    assert torch.equal(cut(x), result.model(x)) == (steps == 0 and not refitted)


def test_batch_norms_are_estimated_anew() -> None:
    model, data = decay_(ConvNet()), batches(3, 16, 3, 8, 8, mean=1.0)
    small = compress(model, budget="4x", data=data, heal={"epochs": 0}, measure=False).model.eval()
    y = torch.cat([small.conv1(x) for x, _ in data])
    torch.testing.assert_close(small.norm.running_mean, y.mean(dim=(0, 2, 3)), rtol=1e-8, atol=1e-8)
    assert small.norm.momentum == 0.1


def test_unlabelled_data_heals_too() -> None:
    model = decay_(mlp(32, 32, 4))
    data = [x for x, _ in batches(3, 8, 32)]
    result = compress(model, budget="2x", data=data, heal={"epochs": 1}, measure=False)
    assert len(result.report.healing) == 1


def test_batches_in_the_manner_of_hugging_face() -> None:
    model = decay_(Tagger(200, 24, 5))
    data = [
        {
            "input_ids": torch.randint(0, 200, (4, 6)),
            "attention_mask": torch.ones(4, 6, dtype=torch.long),
            "labels": torch.randint(0, 5, (4, 6)),
        }
        for _ in range(3)
    ]
    result = compress(model, budget="2x", data=data, heal={"epochs": 1})
    assert len(result.report.healing) == 1
    assert [row.batch for row in result.report.latency] == [1, 4]
    assert result.model(data[0]["input_ids"]).logits.shape == (4, 6, 5)


def test_healing_that_cannot_run_is_refused_before_any_work() -> None:
    class Never(Silent):
        def on_start(self, name: str, total: int | None) -> None:
            raise AssertionError(f"{name} was begun")

    model, data = decay_(mlp(32, 32, 4)), batches(3, 8, 32)
    never: dict[str, Any] = {"budget": "2x", "observer": Never()}
    with pytest.raises(DataError, match="re-iterable"):
        compress(model, data=iter(data), **never)
    with pytest.raises(KindError, match="one length"):
        compress(model, data=data, heal={"epochs": 1, "steps": 1}, **never)
    with pytest.raises(KindError, match="requires grad"):
        compress(copy.deepcopy(model).requires_grad_(False), data=data, **never)
    with pytest.raises(AssertionError, match="calibrate was begun"):
        compress(model, data=data, **never)


def test_an_iterator_serves_for_calibration_alone() -> None:
    model, data = decay_(mlp(32, 32, 4)), batches(3, 8, 32)
    once = compress(model, budget="2x", data=iter(data), heal=False, measure=False)
    assert once.plan == compress(model, budget="2x", data=data, heal=False, measure=False).plan


def test_frozen_models_can_be_cut_without_healing() -> None:
    model = decay_(mlp(32, 32, 4)).requires_grad_(False)
    result = compress(model, budget="2x", data=batches(2, 8, 32), heal=False, measure=False)
    assert not any(p.requires_grad for p in result.model.parameters())


def test_healing_without_data_is_noted() -> None:
    report = compress(decay_(mlp(32, 32, 4)), budget="2x", heal={"epochs": 1}, measure=False).report
    assert report.notes[0] == "Nothing was healed: no data was given."


# -- resuming -------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KillAt(Silent):
    def __init__(self, step: int) -> None:
        self.step, self.training = step, False

    def on_start(self, name: str, total: int | None) -> None:
        self.training = name == "heal"

    def on_step(self, n: int, **figures: float) -> None:
        if self.training and n == self.step:
            raise Killed


@pytest.mark.parametrize("killed_at", [1, 5, 8])
def test_a_killed_healing_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch, killed_at: int) -> None:
    # Written after every step, so that the resume is from the middle of an epoch.
    monkeypatch.setattr(training._Trainer, "_due", lambda self: True)
    model, data = decay_(ConvNet()), batches(3, 8, 3, 8, 8)
    settings: dict[str, Any] = {"budget": "3x", "data": data, "heal": {"epochs": 3}, "measure": False}
    whole = compress(model, **settings)
    path = tmp_path / "heal.pt"
    with pytest.raises(Killed):
        compress(model, checkpoint=path, observer=KillAt(killed_at), **settings)
    assert path.exists() == (killed_at > 1)
    torch.manual_seed(99)  # the state of a new process
    resumed = compress(model, checkpoint=path, **settings)
    again = compress(model, checkpoint=path, **settings)  # the end is loaded
    for other in (resumed, again):
        for (name, value), (_, exact) in zip(
            other.model.state_dict().items(), whole.model.state_dict().items(), strict=True
        ):
            assert torch.equal(value, exact), name
        assert [row["loss"] for row in other.report.healing] == [row["loss"] for row in whole.report.healing]


# -- never slower ---------------------------------------------------------------------------------------


def test_the_report_says_which_layers_would_have_become_slower(monkeypatch) -> None:
    monkeypatch.setattr(tt.nn.FactorizedLayer, "dense_limit_bytes", 0)  # no cached dense weight to fall back on
    reference = CostModel.reference("cpu")
    starts_slowly = CostModel(**{**vars(reference), "overhead_s": 1.0})
    model, data = decay_(mlp(48, 48, 48)), batches(2, 8, 48)
    with use_cost_model(starts_slowly):
        with pytest.raises(BudgetError, match="2 layers would become slower"):
            compress(model, budget="2x", data=data, formats=("low_rank", "tt"))
        kept = compress(model, budget={"params": count_params(model)}, data=data, heal=False, measure=False)
        forced = compress(model, budget="2x", data=data, heal=False, measure=False, allow_slower=True)
    assert factorized(kept.model) == []
    assert all(layer.format == "dense" for layer in kept.report.layers)
    assert len(factorized(forced.model)) == 2
    assert all(layer.decision == "compressed" for layer in forced.report.layers)


# -- is it worth it -------------------------------------------------------------------------------------


def blobs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight classes on two interleaved rings in 40 dimensions: a linear map cannot tell them apart."""
    labels = torch.randint(0, 8, (n,), generator=generator)
    angle = labels * torch.pi / 4 + 0.25 * torch.randn(n, generator=generator)
    radius = 1.0 + (labels % 2)
    plane = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    mixing = torch.randn(2, 40, generator=torch.Generator().manual_seed(5))
    return plane @ mixing + 0.3 * torch.randn(n, 40, generator=generator), labels


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    train = [blobs(64, generator) for _ in range(16)]
    test = [blobs(1000, generator)]
    model = mlp(40, 96, 96, 8)
    fit(model, train, loss=cross_entropy_loss(), epochs=12, lr=3e-3, seed=0)
    return model, train, test


def test_a_healed_model_is_nearly_as_good(trained) -> None:
    model, train, test = trained
    result = compress(
        model,
        budget="6x",
        data=train,
        heal={"epochs": 6, "lr": 3e-3},
        evaluate=lambda net: evaluate_accuracy(net, test),
        metric_name="accuracy",
        measure=False,
    )
    report = result.report
    assert report.metric_before is not None
    assert report.metric_compressed is not None
    assert report.metric_after is not None
    assert report.metric_before > 0.85
    assert report.params_after <= report.params_before / 6
    assert report.metric_after >= report.metric_before - 0.015
    assert report.healing[-1]["loss"] < report.healing[0]["loss"]


def test_healing_helps_where_the_cut_hurts(trained) -> None:
    model, train, test = trained
    budget = {"params": "14x"}
    cut = compress(model, budget=budget, data=train, stages=[Factorize()], measure=False)
    healed = compress(model, budget=budget, data=train, heal={"epochs": 6, "lr": 3e-3}, measure=False)
    before, after = evaluate_accuracy(cut.model, test), evaluate_accuracy(healed.model, test)
    assert before < evaluate_accuracy(model, test) - 0.03
    assert after > before + 0.02
    factored = {"budget": budget, "data": train, "measure": False, "formats": ("low_rank", "tt")}
    plain = compress(model, stages=[Factorize()], **factored)
    refitted = compress(model, stages=[Factorize(), Refit()], **factored)
    assert evaluate_accuracy(refitted.model, test) > evaluate_accuracy(plain.model, test) + 0.02


def test_data_makes_a_better_cut(trained) -> None:
    model, train, test = trained
    x = test[0][0]

    def error(small: nn.Module) -> float:
        return ((small(x) - model(x)).norm() / model(x).norm()).item()

    seeing = compress(model, budget="5x", data=train, heal=False, measure=False).model
    blind = compress(model, budget="5x", measure=False).model
    assert error(seeing) < 0.5 * error(blind)


def test_ranks_go_where_they_matter() -> None:
    # The first layer has one strong direction, the second a flat spectrum.
    steep, flat = nn.Linear(48, 48), nn.Linear(48, 48)
    decay_(steep, power=4.0)
    with torch.no_grad():
        flat.weight.copy_(torch.linalg.qr(torch.randn(48, 48))[0] * 0.6)
    model = nn.ModuleDict({"steep": steep, "flat": flat})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.parts["steep"](x), self.parts["flat"](x)], dim=-1)

    net, data = Both(), [torch.randn(200, 48) for _ in range(6)]
    # Twelve ranks for each of the two, or the same number of parameters spread freely.
    budget = {"params": 2 * (12 * 96 + 48)}
    result = compress(net, budget=budget, data=data, formats=("low_rank",), heal=False, measure=False)
    ranks = {layer.name: layer.ranks[1] for layer in result.report.layers}
    assert ranks["parts.steep"] <= 4
    assert ranks["parts.flat"] >= 20
    uniform = copy.deepcopy(net)
    for name in ("steep", "flat"):
        uniform.parts[name] = tt.nn.Linear.from_dense(net.parts[name], format="low_rank", rank=12)
    assert count_params(result.model) <= count_params(uniform)
    x = torch.randn(500, 48)
    assert F.mse_loss(result.model(x), net(x)) < 0.85 * F.mse_loss(uniform(x), net(x))


def test_a_layer_that_the_output_hardly_feels_gets_few_ranks() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.faint = nn.Linear(40, 40), nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.01 * self.faint(x)

    net, data = decay_(Faint(), power=0.5), [torch.randn(200, 40) for _ in range(6)]
    plan = plan_compression(net, budget="2x", data=data)
    loud, faint = plan.layers
    assert faint.params_after < 0.2 * loud.params_after
    blind = plan_compression(net, budget="2x")
    assert blind.layers[1].params_after > 0.5 * blind.layers[0].params_after


def test_a_damaged_checkpoint_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "heal.pt"
    path.write_bytes(b"not a checkpoint")
    model, data = decay_(mlp(32, 32, 4)), batches(3, 8, 32)
    settings: dict[str, Any] = {"budget": "2x", "data": data, **QUICK}
    first = compress(model, **settings)
    second = compress(model, checkpoint=path, **settings)
    x = data[0][0]
    assert torch.equal(first.model(x), second.model(x))


def test_plans_and_reports_refuse_each_others_text() -> None:
    result = compress(decay_(mlp(32, 32, 4)), budget="2x", measure=False)
    with pytest.raises(CheckpointError):
        tt.CompressionPlan.from_json(result.report.to_json())
    with pytest.raises(DataError):
        type(result.report).from_json(result.plan.to_json())


@pytest.mark.parametrize(
    "heal, message",
    [
        ({"rate": 1e-3}, "heal has 'rate', expected some of epochs, steps, lr"),
        ({"lr": -1.0}, "lr has -1.0, expected a positive number"),
        ({"lr": float("nan")}, "lr has nan"),
        ({"steps": -3}, "steps has -3, expected 0 or more"),
        ({"alpha": 1.5}, r"alpha has 1.5, expected \[0, 1\]"),
        ({"optimizer": "lion"}, "optimizer has 'lion', expected one of adamw, sgd"),
        ({"schedule": "steps"}, "schedule has 'steps'"),
        ({"loss": "distil"}, "loss has 'distil', expected one of distill, feature"),
    ],
)
def test_settings_of_healing_are_checked_before_the_work(heal: dict[str, Any], message: str) -> None:
    class Untouched(list):
        def __iter__(self):
            raise AssertionError("the data was read")

    with pytest.raises((KindError, RankError), match=message):
        compress(mlp(16, 16, 4), budget="2x", data=Untouched([0]), heal=heal)


def test_a_loss_that_does_not_suit_the_model_is_known_before_the_plan(monkeypatch) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(16, 16, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"likeliest": self.inner(x).argmax(dim=-1)}

    monkeypatch.setattr(stage_factorize, "make_plan", lambda *args, **options: pytest.fail("planned"))
    model, data = Encoder().train(), batches(2, 4, 16)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(KindError, match=re.escape("Pass heal=False, or output=")):
        compress(model, budget="2x", data=data)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


class Autoencoder(nn.Module):
    """Convolutions down, transposed ones of another stride, grouping and number of channels up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 24, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1)
        self.mix = nn.ConvTranspose2d(16, 16, 3, padding=1, groups=2, bias=False)
        self.out = nn.ConvTranspose2d(16, 3, 3, padding=1)

    def forward(self, x):
        return self.out(torch.relu(self.mix(torch.relu(self.up(torch.relu(self.down(x)))))))


@pytest.mark.usefixtures("double")
def test_transposed_convolutions_are_compressed_as_what_they_are(tmp_path) -> None:
    model, data = decay_(Autoencoder()), batches(2, 4, 3, 8, 8)
    x = data[0][0] if isinstance(data[0], (tuple, list)) else data[0]
    exact = tt.compress(model, budget="1.2x", data=data, heal=False, allow_slower=True, measure=False)
    kinds = {layer.name: type(exact.model.get_submodule(layer.name)).__name__ for layer in exact.plan.layers}
    assert "ConvTranspose2d" in kinds.values()
    small = tt.compress(model, budget="3x", data=data, heal=False, allow_slower=True, measure=False)
    for layer in small.plan.layers:
        dense, module = model.get_submodule(layer.name), small.model.get_submodule(layer.name)
        error = (module.weight - dense.weight).detach().norm() / dense.weight.detach().norm()
        assert float(error) < 0.9  # a square kernel taken for its transpose would be off by 1.4
    with torch.no_grad():
        before, after = model(x), small.model(x)
    assert float((after - before).norm() / before.norm()) < 0.6
    tt.save_pretrained(small.model, tmp_path / "saved")
    again = tt.load_pretrained(tmp_path / "saved", model=Autoencoder)
    with torch.no_grad():
        assert torch.equal(again(x), after)
    back = tt.to_dense_(small.model)
    assert type(back.up) is nn.ConvTranspose2d
    with torch.no_grad():
        assert torch.allclose(back(x), after, atol=1e-12)
