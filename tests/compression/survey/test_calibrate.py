"""Second moments against direct sums, and predicted changes against measured ones."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import ConvNet, Tagger, assert_unchanged, batches, decay_, mlp, snapshot
from torch import Tensor, nn

from tensortrain.compression import (
    Calibration,
    apply_plan_,
    find_layers,
    plan_compression,
)
from tensortrain.compression.choose.weights import carried
from tensortrain.compression.survey import moments
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.moments import expected_shares
from tensortrain.errors import KindError
from tensortrain.formats import ChainFormat, energy

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


def calibrated(model: nn.Module, data: Any, **options: Any) -> Calibration:
    return calibrate(model, find_layers(model)[0], data, **options)


def covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / rows.shape[0]


def test_batches_that_come_after_those_summed_up_are_held_back() -> None:
    data = batches(5, 20, 4, 12)
    found = calibrated(nn.Linear(12, 5), data, n_batches=2, n_held=2)
    assert [one is other for one, other in zip(found.held, data[2:4], strict=True)] == [True, True]
    alike = calibrated(nn.Linear(12, 5), data, n_batches=2)
    torch.testing.assert_close(found.grams[""], alike.grams[""])
    assert alike.held == calibrated(nn.Linear(12, 5), data[:2], n_batches=2, n_held=2).held == []


# -- inputs ---------------------------------------------------------------------------------------------


def test_inputs_of_a_linear_layer_with_bias_are_centred() -> None:
    data = batches(3, 20, 4, 12, mean=1.5)
    found = calibrated(nn.Linear(12, 5), data)
    rows = torch.cat([x.reshape(-1, 12) for x, _ in data])
    torch.testing.assert_close(found.grams[""], covariance(rows))
    torch.testing.assert_close(found.means[""], rows.mean(dim=0))
    assert found.input_shapes == {"": (20, 4, 12)}
    assert found.calls == {"": 1}
    assert found.n_examples == 20


def test_inputs_of_a_linear_layer_without_bias_are_not_centred() -> None:
    data = batches(3, 20, 12, mean=1.5)
    found = calibrated(nn.Linear(12, 5, bias=False), data)
    rows = torch.cat([x for x, _ in data])
    torch.testing.assert_close(found.grams[""], rows.T @ rows / 60)
    assert found.means == {}


def test_a_batch_norm_that_follows_makes_up_for_the_mean() -> None:
    data = batches(3, 20, 12, mean=1.5)
    rows = torch.cat([x for x, _ in data])
    normed = nn.Sequential(nn.Linear(12, 5, bias=False), nn.BatchNorm1d(5))
    found = calibrated(normed, data)
    torch.testing.assert_close(found.grams["0"], covariance(rows))
    assert found.norms == {"0": "1"}
    between = nn.Sequential(nn.Linear(12, 5, bias=False), nn.ReLU(), nn.BatchNorm1d(5))
    assert calibrated(between, data).norms == {}


def test_a_batch_norm_behind_two_layers_makes_up_for_neither() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 5, bias=False), nn.Linear(12, 5, bias=False)
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.norm(self.b(x))

    found = calibrated(Forked(), batches(2, 20, 12, mean=1.5))
    assert found.norms == {}
    assert found.means == {}


def test_batches_may_be_lists_or_named_tuples() -> None:
    pair = namedtuple("pair", "x y")
    (x, y), *_ = batches(1, 20, 12)
    exact = calibrated(nn.Linear(12, 5), [(x, y)]).grams[""]
    for batch in ([x, y], pair(x, y), x):
        torch.testing.assert_close(calibrated(nn.Linear(12, 5), [batch]).grams[""], exact)


def test_only_so_many_batches_are_run() -> None:
    data = batches(5, 20, 12)
    found = calibrated(nn.Linear(12, 5), data, n_batches=2, keep_batches=1)
    torch.testing.assert_close(found.grams[""], covariance(torch.cat([x for x, _ in data[:2]])))
    assert len(found.batches) == 1
    assert found.batches[0][0] is data[0][0]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "padding": (0, 2)},
        {"dilation": 2},
        {"padding": "same"},
        {"padding": "valid"},
    ],
)
def test_patches_of_a_convolution(options: dict[str, Any]) -> None:
    data = [torch.randn(1, 3, 9, 8) + 0.7 for _ in range(3)]
    conv = nn.Conv2d(3, 4, 3, **options)
    found = calibrated(conv, data)
    unfold = {**options, "padding": {"same": 1, "valid": 0}.get(options.get("padding"), options.get("padding", 0))}
    patches = torch.cat([F.unfold(x, 3, **unfold).transpose(1, 2).reshape(-1, 27) for x in data])
    torch.testing.assert_close(found.grams[""], covariance(patches))
    torch.testing.assert_close(found.means[""], patches.mean(dim=0))
    # The order is that of the flattened kernel: the mean output follows from the mean patch.
    mean_output = torch.stack([conv(x).mean(dim=(0, 2, 3)) for x in data]).mean(dim=0)
    torch.testing.assert_close(conv.weight.flatten(1) @ found.means[""] + conv.bias, mean_output)


def test_of_many_large_images_some_are_taken() -> None:
    data = [torch.randn(16, 2, 48, 48)]
    found = calibrated(nn.Conv2d(2, 4, 3), data)
    patches = F.unfold(data[0][::8], 3).transpose(1, 2).reshape(-1, 18)[::2]
    torch.testing.assert_close(found.grams[""], covariance(patches))


def test_sampled_patches_resemble_all_of_them() -> None:
    x = torch.randn(16, 2, 40, 40).cumsum(dim=-1) / 4
    found = calibrated(nn.Conv2d(2, 4, 3, bias=False), [x])
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 18)
    exact = patches.T @ patches / patches.shape[0]
    assert (found.grams[""] - exact).norm() < 0.35 * exact.norm()  # two of sixteen images, one patch in two


def test_tokens_are_counted() -> None:
    model = Tagger(20)
    ids = [torch.randint(0, 20, (4, 6)) for _ in range(3)]
    found = calibrated(model, [{"input_ids": x, "labels": x} for x in ids])
    counts = torch.bincount(torch.cat(ids).flatten(), minlength=20)
    torch.testing.assert_close(found.grams["embed"], expected_shares(counts.double()), check_dtype=False)


def test_masked_positions_are_not_counted() -> None:
    model = Tagger(20)
    ids = torch.randint(0, 20, (4, 6))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [0] * 6, [1, 0, 0, 0, 0, 1]])
    found = calibrated(model, [{"input_ids": ids, "attention_mask": mask}])
    seen = ids[mask.bool()]
    torch.testing.assert_close(found.grams["embed"], expected_shares(torch.bincount(seen, minlength=20).double()))
    torch.testing.assert_close(found.grams["hidden"], covariance(model.embed(seen)).detach())
    torch.testing.assert_close(found.means["hidden"], model.embed(seen).mean(dim=0).detach())


def test_wide_inputs_keep_the_diagonal_alone(monkeypatch) -> None:
    monkeypatch.setattr(moments, "LARGEST_FULL_GRAM", 4)
    data = batches(2, 20, 12, mean=0.5)
    full = covariance(torch.cat([x for x, _ in data]))
    model = nn.Linear(12, 5)
    found = calibrated(model, data)
    torch.testing.assert_close(found.grams[""], full.diagonal())
    assert found.output_grams[""].shape == (5,)
    plan = plan_compression(model, budget="2x", data=data)
    assert plan.layers[0].spec is not None


def test_a_shared_layer_sums_over_its_calls() -> None:
    layer = nn.Linear(6, 6)
    found = calibrated(nn.Sequential(layer, nn.Tanh(), layer), batches(1, 10, 6))
    assert found.calls == {"0": 2}
    assert found.grams["0"].shape == (6, 6)


def test_the_feature_map_before_a_flattening_is_known() -> None:
    found = calibrated(ConvNet(), batches(1, 2, 3, 8, 8))
    assert found.structures == {"head": (32, 4, 4)}


def test_shapes_alone_when_moments_are_not_wanted() -> None:
    found = calibrated(mlp(6, 6), batches(2, 5, 6), grams=False)
    assert found.grams == found.means == found.output_grams == {}
    assert found.input_shapes == {"0": (5, 6)}


def test_a_layer_that_never_runs_has_no_moments() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = calibrated(Unused(), batches(2, 5, 12))
    assert set(found.grams) == {"used"}
    assert plan_compression(decay_(Unused()), budget="2x", data=batches(2, 5, 12)).params_after <= 156


# -- outputs --------------------------------------------------------------------------------------------


def test_output_moments_are_those_of_the_exact_jacobian() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4))
    data = batches(6, 3000, 6)
    found = calibrated(model, data)
    second = model[2].weight.detach()
    for name, jacobian in {"0": second @ model[1].weight.detach(), "1": second, "2": torch.eye(4)}.items():
        exact = jacobian.T @ jacobian
        # 18,000 random directions: an entry deviates by about 1/sqrt(18,000) of the norm.
        assert (found.output_grams[name] - exact).norm() < 0.04 * exact.norm()
    y = torch.cat([model(x) for x, _ in data]).detach()
    exact_scale = torch.stack([(part - part.mean(dim=0)).square().sum() for part in y.split(3000)]).sum() / len(y)
    assert found.output_scale == pytest.approx(exact_scale.item())


def test_output_moments_of_a_nonlinear_net() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    data = batches(6, 3000, 4)
    found = calibrated(model, data)
    rows = torch.cat([x for x, _ in data])
    slope = 1 - torch.tanh(model[0](rows)).detach().square()  # b i
    jacobians = model[2].weight.detach() * slope[:, None, :]  # b o i
    exact = torch.einsum("boi,boj->ij", jacobians, jacobians) / len(rows)
    assert (found.output_grams["0"] - exact).norm() < 0.06 * exact.norm()


def test_output_moments_sum_over_the_positions_of_an_example() -> None:
    torch.manual_seed(1)
    head = nn.Linear(5, 3, bias=False)
    found = calibrated(nn.Sequential(nn.Linear(4, 5), head), batches(6, 500, 8, 4))
    exact = 8 * head.weight.detach().T @ head.weight.detach()
    assert (found.output_grams["0"] - exact).norm() < 0.05 * exact.norm()


def test_gradients_flow_past_frozen_weights_and_inplace_activations() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).requires_grad_(False)
    before = snapshot(model)
    found = calibrated(model, batches(3, 50, 6))
    assert set(found.output_grams) == {"0", "2"}
    assert found.output_grams["0"].abs().sum() > 0
    assert_unchanged(model, before)


def test_a_part_that_runs_without_gradients_is_weighed_by_its_inputs_alone() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    found = calibrated(Frozen(), batches(2, 20, 12))
    assert set(found.grams) == {"body", "head"}
    assert set(found.output_grams) == {"head"}
    assert found.weighing("body")[1] is None


def test_a_model_whose_output_has_no_gradient_is_weighed_by_inputs_alone() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(dim=-1)

    found = calibrated(Chosen(), batches(2, 20, 12))
    assert set(found.grams) == {"body"}
    assert found.output_grams == {}
    assert plan_compression(decay_(Chosen()), budget="2x", data=batches(2, 20, 12)).params_after <= 78


def test_output_functions_choose_what_is_judged() -> None:
    model = mlp(6, 6, 3)
    data = batches(2, 50, 6)
    found = calibrated(model, data, output=lambda net, batch: net[0](batch[0]))
    assert set(found.output_grams) == {"0"}
    with pytest.raises(KindError, match="output="):
        calibrated(_Wordy(), data)


class _Wordy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> str:
        self.body(x)
        return "words"


def test_batches_of_one_example_work() -> None:
    data = [(torch.randn(1, 12), torch.zeros(1, dtype=torch.long)) for _ in range(6)]
    plan = plan_compression(decay_(mlp(12, 12, 12)), budget="2x", data=data)
    assert plan.params_after <= 156


# -- predictions ----------------------------------------------------------------------------------------


def relative_change(small: nn.Module, model: nn.Module, data: list[Any]) -> float:
    """Mean square of the output's change over its mean square about the mean."""
    exact = torch.cat([model(batch[0]) for batch in data]).detach()
    found = torch.cat([small(batch[0]) for batch in data]).detach()
    return float((found - exact).square().sum() / (exact - exact.mean(dim=0)).square().sum())


def three_layers() -> nn.Sequential:
    layers = [nn.Linear(24, 30), nn.Linear(30, 30), nn.Linear(30, 20)]
    return nn.Sequential(*(decay_(layer, power=0.3) for layer in layers))


@pytest.mark.parametrize("fmt", ["low_rank", "tt"])
@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_the_change_of_the_output_follows_from_the_moments(name: str, fmt: str, monkeypatch) -> None:
    # The allocation reckons with decompositions; least squares afterwards does better (see the next test).
    monkeypatch.setattr(ChainFormat, "refine_flops", 0)
    model, data = three_layers(), batches(6, 1000, 24, mean=0.5)
    plan = plan_compression(model, budget=0.8, data=data, include=name, formats=(fmt,), task="regress")
    calibration, entry = plan.calibration, plan.layers[0]
    assert calibration is not None
    assert entry.rel_error is not None
    small = apply_plan_(copy.deepcopy(model), plan)
    measured = relative_change(small, model, data)
    difference = (model.get_submodule(name).weight - small.get_submodule(name).weight).detach()
    exact = energy(difference, *calibration.weighing(name)) / calibration.output_scale
    assert measured == pytest.approx(exact, rel=0.05)  # random directions stand for the Jacobian
    layer = find_layers(model, include=name)[0][0]
    predicted = carried(layer, calibration) * entry.rel_error**2  # what the allocation reckoned with
    assert measured == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_least_squares_change_the_output_less_than_reckoned_with(name: str, monkeypatch) -> None:
    model, data = three_layers(), batches(6, 1000, 24, mean=0.5)
    plan = plan_compression(model, budget=0.8, data=data, include=name, formats=("tt",))
    refined = relative_change(apply_plan_(copy.deepcopy(model), plan), model, data)
    monkeypatch.setattr(ChainFormat, "refine_flops", 0)
    plain = relative_change(apply_plan_(copy.deepcopy(model), plan), model, data)
    assert refined <= 1.05 * plain


def test_changes_of_several_layers_are_bounded_by_their_sum() -> None:
    # Layers in sequence lose the same weak directions of the signal, which count once then.
    model, data = three_layers(), batches(6, 1000, 24)
    plan = plan_compression(model, budget=0.7, data=data, formats=("low_rank", "tt"))
    layers = {layer.name: layer for layer in find_layers(model)[0]}
    parts = [carried(layers[e.name], plan.calibration) * (e.rel_error or 0.0) ** 2 for e in plan.layers]
    assert sum(part > 0.1 * max(parts) for part in parts) >= 2
    measured = relative_change(apply_plan_(copy.deepcopy(model), plan), model, data)
    assert 0.9 * max(parts) <= measured <= 1.1 * sum(parts)


# -- means ----------------------------------------------------------------------------------------------


def test_the_bias_keeps_the_mean_output() -> None:
    data = batches(4, 50, 24, mean=2.0)
    rows = torch.cat([x for x, _ in data])
    layer = decay_(nn.Linear(24, 24), power=0.5)
    new = apply_plan_(layer, plan_compression(layer, budget="3x", data=data))
    assert (new(rows) - layer(rows)).norm() > 0.05 * layer(rows).norm()
    torch.testing.assert_close(new(rows).mean(dim=0), layer(rows).mean(dim=0), rtol=1e-10, atol=1e-10)


def test_the_bias_of_a_convolution_keeps_the_mean_output() -> None:
    data = [torch.randn(1, 6, 8, 8) + 1.0 for _ in range(4)]
    conv = decay_(nn.Conv2d(6, 8, 3, padding=1), power=0.5)
    new = apply_plan_(conv, plan_compression(conv, budget="3x", data=data))
    x = torch.cat(data)
    torch.testing.assert_close(new(x).mean(dim=(0, 2, 3)), conv(x).mean(dim=(0, 2, 3)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_the_statistics_of_a_batch_norm_follow_the_truncation(bias: bool) -> None:
    data = batches(4, 50, 24, mean=2.0)
    rows = torch.cat([x for x, _ in data])
    model = nn.Sequential(decay_(nn.Linear(24, 24, bias=bias), power=0.5), nn.BatchNorm1d(24, momentum=None))
    model(rows)  # statistics of these very rows
    model.eval()
    apply_plan_(model, plan_compression(model, budget="3x", data=data))
    y = model[0](rows)
    torch.testing.assert_close(model[1].running_mean, y.mean(dim=0), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model[1].running_var, y.var(dim=0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind, kernel, shape", [(nn.Conv2d, 1, (16, 6, 5, 5)), (nn.Conv1d, 3, (16, 6, 12))])
def test_of_small_maps_every_example_counts(kind: Any, kernel: int, shape: tuple[int, ...]) -> None:
    conv, x = kind(6, 4, kernel), torch.randn(shape)
    (moments,) = calibrated(conv, [x]).layers.values()
    assert moments.n_rows == len(x) * conv(x)[0, 0].numel()
