"""Two processes with half of each batch end where one process with the whole batch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_training import make_batches, make_model, train, train_part
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

N_PROCESSES, TIMEOUT_S = 2, 60.0
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
both_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes saved; they run once for all tests."""
    folder = tmp_path_factory.mktemp("distributed")
    running = mp.start_processes(
        train_part, (N_PROCESSES, str(folder), TIMEOUT_S / 2), N_PROCESSES, join=False, start_method=fresh.METHOD
    )
    fresh.join(running, TIMEOUT_S)
    return folder


def _saved(folder: Path, dtype: torch.dtype) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{dtype}-{rank}.pt") for rank in range(N_PROCESSES)]


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


@both_dtypes
def test_two_processes_train_as_one(folder: Path, dtype: torch.dtype) -> None:
    alone, start = make_model(0, dtype), make_model(0, dtype)
    losses = train(alone, make_batches())
    saved = _saved(folder, dtype)
    expected, begun = alone.state_dict(), start.state_dict()
    for found in saved:
        state = _plain(found["state"])
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert value.dtype == dtype
            assert (value - expected[name]).abs().max() <= TOLERANCE[dtype], name
            assert (value - begun[name]).abs().max() > 1e-3, f"{name} was not trained"
    means = torch.tensor([found["losses"] for found in saved], dtype=dtype).mean(0)
    torch.testing.assert_close(means, torch.tensor(losses, dtype=dtype), rtol=0, atol=10 * TOLERANCE[dtype])


@both_dtypes
def test_weights_of_the_first_process_replace_what_others_had_cached(folder: Path, dtype: torch.dtype) -> None:
    model = make_model(0, dtype)
    ids, _ = make_batches()[0]
    for rank, found in enumerate(_saved(folder, dtype)):
        with torch.no_grad():
            logits = model(ids[rank::N_PROCESSES])
        torch.testing.assert_close(found["first_logits"], logits, rtol=0, atol=10 * TOLERANCE[dtype])


@both_dtypes
def test_state_dict_loads_into_the_plain_model(folder: Path, dtype: torch.dtype) -> None:
    ids, _ = make_batches()[0]
    for rank, found in enumerate(_saved(folder, dtype)):
        model = make_model(5, dtype)
        model.load_state_dict(_plain(found["state"]))
        with torch.no_grad():
            logits = model(ids[rank::N_PROCESSES])
        torch.testing.assert_close(logits, found["logits"], rtol=0, atol=10 * TOLERANCE[dtype])
