"""An error in one of several processes is an error in all: its own there, elsewhere one that says whose."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_errors import HEALS, RAISES, fail_together
from distributed_plans import planned

from tensortrain.errors import ProcessError, TTError
from tensortrain.system.processes import together

N_PROCESSES, TIMEOUT_S = 2, 180.0

pytestmark = [
    pytest.mark.usefixtures("double", "fixed_plans"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
    ),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes raised, in one group for all cases: after each of them it is as good as new."""
    folder = tmp_path_factory.mktemp("failing")
    running = mp.start_processes(
        fail_together, (N_PROCESSES, str(folder), 30.0), N_PROCESSES, join=False, start_method=fresh.METHOD
    )
    fresh.join(running, TIMEOUT_S)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(N_PROCESSES)]


@pytest.mark.parametrize("failing", range(N_PROCESSES))
@pytest.mark.parametrize("case", list(RAISES))
def test_all_processes_raise_what_one_has(both, case, failing) -> None:
    _, kind, words = RAISES[case]
    own, other = both[failing][f"{case} {failing}"], both[1 - failing][f"{case} {failing}"]
    assert kind in ("", own["class"])
    kind = own["class"]
    assert words in own["words"]
    assert other["class"] == "ProcessError"
    assert (other["rank"], other["kind"], other["text"]) == (failing, kind, own["words"])
    assert f"process {failing} of {N_PROCESSES} has ended with {kind}" in other["words"]
    assert own["words"] in other["words"]


@pytest.mark.parametrize("failing", range(N_PROCESSES))
@pytest.mark.parametrize("case", list(HEALS))
def test_a_healing_that_fails_in_one_process_ends_in_all(both, case, failing) -> None:
    results = [found[f"healed: {case} {failing}"] for found in both]
    (one, _), (other, _) = results
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    own, others = (
        [note for note in notes if note.startswith("Healing ended early")]
        for _, notes in (results[failing], results[1 - failing])
    )
    assert len(own) == len(others) == 1
    assert own[0].split("(")[0] == others[0].split("(")[0]  # after as many steps
    if case != "Ctrl-C":
        assert f"process {failing} of {N_PROCESSES} has ended with Bad" in others[0]


def test_each_raises_its_own_where_all_fail(both) -> None:
    for found in both:
        assert found["impossible"]["class"] == "BudgetError"


def test_what_the_first_cannot_send_is_an_error_for_all(both) -> None:
    assert both[0]["first"]["class"] == "TypeError"
    assert (both[1]["first"]["class"], both[1]["first"]["rank"]) == ("ProcessError", 0)


def test_nobody_goes_on_who_catches_the_error_of_another(both) -> None:
    assert both[0]["caught"] == "ProcessError"
    assert both[1]["caught"] == "Bad"


def test_where_all_catch_an_error_they_go_on(both) -> None:
    for found in both:
        assert found["levels"] == ([0, 1], 2.0, 1)


def test_processes_that_failed_find_the_plan_of_one_afterwards(both) -> None:
    assert both[0]["plan"] == both[1]["plan"]
    assert [layer.spec for layer in planned("units").layers]


def test_one_process_raises_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError), together():
        _ = 1 / 0


def test_an_error_of_another_process_is_an_ordinary_one() -> None:
    error = ProcessError("process 3 has ended", 3, "ValueError", "odd")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, TTError)
    assert isinstance(again, RuntimeError)
    assert (str(again), again.rank, again.kind, again.text) == ("process 3 has ended", 3, "ValueError", "odd")
