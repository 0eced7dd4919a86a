"""Two processes with half of the data each find the plan of one with all of it, and heal one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_plans import CASES, FITS, fitted, made, planned, trained, work_together

import tensortrain as tt
from tensortrain.compression import CompressionPlan
from tensortrain.system.processes import alone, first_of, gathered, n_processes, own_rank, own_share, summed_

N_PROCESSES, TIMEOUT_S = 2, 120.0

pytestmark = [
    pytest.mark.usefixtures("double", "fixed_plans"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
    ),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found; they run once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    running = mp.start_processes(
        work_together, (N_PROCESSES, str(folder), TIMEOUT_S / 2), N_PROCESSES, join=False, start_method=fresh.METHOD
    )
    fresh.join(running, TIMEOUT_S)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(N_PROCESSES)]


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_find_the_plan_of_one(both, case) -> None:
    wanted = planned(case)
    for found in both:
        plan = CompressionPlan.from_json(found[case]["plan"])
        assert [layer.spec for layer in plan.layers] == [layer.spec for layer in wanted.layers]
        assert plan.narrowed == wanted.narrowed
        assert plan.notes == wanted.notes
    assert both[0][case]["plan"] == both[1][case]["plan"]


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_add_up_their_statistics(both, case) -> None:
    calibration = planned(case).calibration
    assert calibration is not None
    for found in both:
        for name in ("grams", "output_grams"):
            wanted = getattr(calibration, name)
            assert found[case][name].keys() == wanted.keys()
            for layer, moment in wanted.items():
                torch.testing.assert_close(found[case][name][layer], moment)


def test_plans_are_kept_in_one_folder_for_all(both) -> None:
    for found in both:
        assert found["kept"] == [found["units"]["plan"]] * 2


def test_two_processes_train_as_one_with_the_whole_batches(both) -> None:
    wanted = trained()
    for found in both:
        for name, value in wanted.items():
            torch.testing.assert_close(found["trained"][name], value)


@pytest.mark.parametrize("fit", list(FITS))
def test_two_processes_fit_the_numbers_of_one(both, fit) -> None:
    wanted = fitted(fit)
    assert any("refitted" in note or "kept for" in note for note in wanted["notes"])
    for found in both:
        assert found[fit]["notes"] == wanted["notes"]
        assert found[fit]["numbers"].keys() == wanted["numbers"].keys()
        for name, value in wanted["numbers"].items():
            torch.testing.assert_close(found[fit]["numbers"][name], value)
            assert torch.equal(both[0][fit]["numbers"][name], both[1][fit]["numbers"][name])


def test_two_processes_heal_one_model(both) -> None:
    model, data = made("convolutions")
    start = tt.compress(model, budget="1.5x", data=data, heal=False, measure=False).model.state_dict()
    one, other = (found["healed"] for found in both)
    assert one.keys() == start.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in one.items())


def test_one_process_may_work_alone(both) -> None:
    assert both[0]["alone"] == planned("units").to_json()


def test_without_a_group_nothing_is_exchanged() -> None:
    x = torch.ones(3)
    assert summed_(x) is x
    assert (n_processes(), own_rank(), own_share(5)) == (1, 0, 5)
    assert gathered("a") == ["a"]
    assert first_of("b") == "b"
    with alone():
        assert n_processes() == 1
