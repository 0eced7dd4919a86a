"""Times of candidates: from a few ranks, measured for convolutions; and the fastest of like plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import ConvNet, batches, decay_, mlp
from torch import nn

from tensortrain.compression import plan_compression
from tensortrain.compression.choose import chooser, trial
from tensortrain.compression.choose.candidates import candidates
from tensortrain.compression.choose.clock import Clock, _between, _enough_of, _spread, _times
from tensortrain.compression.choose.cost import dense_cost, spec_cost
from tensortrain.compression.choose.load import Load, load_of, loads_of
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import find_layers
from tensortrain.formats import get_format

LOAD = Load(3, 3, (8, 8), seen=True)


def layer_of(module: nn.Module):
    return find_layers(nn.Sequential(module))[0][0]


@pytest.fixture
def timed(monkeypatch, tmp_path) -> list[int]:
    """Every layer is worth a trial; how many specs each trial had."""
    calls: list[int] = []
    measured = trial._measured

    def counted(layer, specs, load):
        calls.append(len(specs))
        return measured(layer, specs, load)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trial, "_WORTH_S", 0.0)
    monkeypatch.setattr(trial, "_KNOWN", {})
    monkeypatch.setattr(trial, "_measured", counted)
    return calls


def test_between_knots_times_are_linear_and_beyond_them_never_fall() -> None:
    curve = [(10, 1.0), (20, 3.0), (40, 2.0)]
    assert [_between(curve, size) for size in (5, 10, 15, 30, 40, 80)] == [1.0, 1.0, 2.0, 2.5, 2.0, 2.0]
    assert _between([(10, 1.0), (20, 3.0)], 30) == 5.0
    assert _between([(10, 1.0)], 30) == _between([(10, 1.0)], 3) == 1.0


def test_knots_are_candidates_each_once() -> None:
    found = candidates(layer_of(nn.Linear(24, 20)), formats=("low_rank",))
    assert len(_spread(found, (0.0, 0.0, 0.01, 1.0))) == 2
    assert _spread(found[:1], (0.25, 0.8)) == found[:1]


@pytest.mark.usefixtures("fixed_plans")
def test_linear_times_are_those_predicted() -> None:
    layer, clock = layer_of(nn.Linear(300, 200)), Clock()
    found = list(candidates(layer, formats=("low_rank",)))
    load = Load(64, 64, (), seen=True)
    times = clock.all(layer, load, found)
    assert times[-1] == spec_cost(layer, found[-1].spec, load).seconds
    assert clock.exact(layer, found[3], load, found) == spec_cost(layer, found[3].spec, load).seconds
    for candidate, seconds in zip(found, times, strict=True):
        assert 0.7 <= seconds / spec_cost(layer, candidate.spec, load).seconds <= 1.4


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(8, 6, 3, padding=1), nn.Conv1d(6, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=2)]
)
def test_convolutions_are_run_once_for_every_shape(timed: list[int], conv: nn.Module) -> None:
    load = dataclasses.replace(LOAD, spatial=(8,) * (conv.weight.ndim - 2))
    layer, twin, clock = layer_of(conv), layer_of(conv), Clock()
    found = candidates(layer, formats=("low_rank",))
    state = torch.get_rng_state()
    assert all(seconds > 0 for seconds in clock.all(layer, load, found))
    assert timed == [0, 2]
    assert clock.all(twin, load, found) == clock.all(layer, load, found)
    trial._KNOWN.clear()  # as in a later process
    assert Clock().all(layer, load, found) == clock.all(layer, load, found)
    assert timed == [0, 2]
    assert torch.equal(torch.get_rng_state(), state)


def test_transposed_convolutions_are_timed_too(timed: list[int]) -> None:
    layer = layer_of(nn.ConvTranspose2d(6, 4, 3, stride=2))
    assert trial.can_time(layer, LOAD, 1.0)
    seconds = trial.trial_seconds(layer, [get_format("low_rank").spec(layer.weight, rank=2)], LOAD)
    assert len(seconds) == 2


def test_what_is_not_timed(timed: list[int]) -> None:
    conv = layer_of(nn.Conv2d(4, 4, 3))
    assert trial.can_time(conv, LOAD, 1.0)
    assert not trial.can_time(layer_of(nn.Linear(4, 4)), LOAD, 1.0)
    assert not trial.can_time(layer_of(nn.Conv2d(4, 4, 3).half()), LOAD, 1.0)
    assert not trial.can_time(conv, dataclasses.replace(LOAD, seen=False), 1.0)
    assert not trial.can_time(conv, dataclasses.replace(LOAD, spatial=(20000, 20000)), 1.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert not trial.can_time(conv, LOAD, 1.0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fixed_plans")
def test_nothing_is_timed_where_constants_are_given(timed: list[int]) -> None:
    assert not trial.can_time(layer_of(nn.Conv2d(4, 4, 3)), LOAD, 1.0)


def test_a_damaged_record_is_measured_again(timed: list[int]) -> None:
    layer = layer_of(nn.Conv2d(4, 4, 3))
    trial.trial_seconds(layer, (), LOAD)
    file = trial._NOTES._file(torch.device("cpu"))
    for text in ("[", "[]", "{}", file.read_text().replace("[", "[null,")):
        file.write_text(text)
        trial._KNOWN.clear()
        assert len(trial.trial_seconds(layer, (), LOAD)) == 1
    assert timed == [0] * 5


def test_speed_is_judged_at_the_batch_of_the_data_and_at_one() -> None:
    model = mlp(6, 5)
    layers = find_layers(model)[0]
    seen = calibrate(model, layers, batches(2, 4, 6))
    assert [load.rows for load in loads_of(layers[0], seen, None)] == [4, 1]
    assert [load.rows for load in loads_of(layers[0], seen, 7)] == [7]
    assert loads_of(layers[0], None, None) == (load_of(layers[0], None, None),)


@pytest.mark.usefixtures("double", "fixed_plans")
@pytest.mark.parametrize("build, shape", [(lambda: mlp(96, 128, 64, 96), (96,)), (ConvNet, (3, 8, 8))])
def test_the_fastest_of_like_plans_is_taken(build, shape, monkeypatch) -> None:
    model, data = decay_(build()), batches(2, 4, *shape)
    quick = plan_compression(model, budget="3x", data=data)
    monkeypatch.setattr(chooser.Chooser, "_may_quicken", False)
    best = plan_compression(model, budget="3x", data=data)
    assert best.params_after <= best.params_before / 3
    assert 0.95 * best.params_after <= quick.params_after <= best.params_before / 3


def test_a_hopeless_family_keeps_what_is_smaller_than_all_others() -> None:
    layer = layer_of(decay_(nn.Sequential(nn.Linear(96, 96)), power=3.0)[0])
    found = candidates(layer, formats=("low_rank", "tt"))
    low = [c.point.n_params for c in found if c.spec.format == "low_rank"]
    trains = [c.point.n_params for c in found if c.spec.format == "tt"]
    assert trains
    assert min(trains) < min(low)


def test_a_trial_takes_no_more_than_it_needs() -> None:
    load = Load(8, 8, (4096,), seen=True)
    assert _enough_of(load, (3,), 1e-3) == load
    assert _enough_of(load, (3,), 20e-3) == dataclasses.replace(load, rows=2)
    small = _enough_of(load, (3,), 320e-3)  # 40 ms an example
    assert (small.rows, small.spatial) == (1, (512,))
    assert _times(load, small) == 64
    assert _enough_of(dataclasses.replace(load, spatial=(64, 20)), (3, 1), 320e-3).spatial == (48, 16)


def test_rough_times_are_predicted_shares_of_the_measured_dense_layer(timed: list[int]) -> None:
    layer, clock = layer_of(nn.Conv2d(8, 8, 3)), Clock()
    found = candidates(layer, formats=("low_rank",))
    rough = clock.all(layer, LOAD, found, roughly=True)
    assert timed == [0]
    share = clock.dense(layer, LOAD) / dense_cost(layer, LOAD).seconds
    assert rough[0] == pytest.approx(share * spec_cost(layer, found[0].spec, LOAD).seconds)
    clock.all(layer, LOAD, found, roughly=None)  # none of them is a last resort
    assert timed == [0, 2]
