"""Runs that the version before began, and was killed in, go on to where they would have come."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from old_runs import RUNS

from tensortrain.compression.stages.heal import Heal, heal_
from tensortrain.system.checkpoint import read_checkpoint
from tensortrain.train.loop import fit
from tensortrain.train.losses import cross_entropy_loss

FILES = Path(__file__).parent / "files"
PARTS = {"fit": fit, "heal_": heal_, "Heal": Heal, "cross_entropy_loss": cross_entropy_loss}


def same_options(content: dict) -> bool:
    """Whether this torch writes the options of its optimizers as the one that the file was written with."""
    options = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    return all(f"'{name}'" in content["settings"]["parameter groups"] for name in options if name != "params")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_version_before_goes_on(tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(FILES / f"{name}-version-2.ckpt", tmp_path))
    content = read_checkpoint(path)
    if not same_options(content):
        pytest.skip("another torch wrote this file: a run does not go on with another one")
    n_done, rows = content["progress"]["step"], content["progress"]["history"]
    expected, whole = RUNS[name](**PARTS, checkpoint=None, stop=None)
    model, result = RUNS[name](**PARTS, checkpoint=path, stop=None)
    assert 0 < n_done == result.resumed_from < result.steps == whole.steps
    assert result.history[: len(rows)] == rows
    for key, value in expected.state_dict().items():  # another number of threads may round otherwise
        assert torch.allclose(model.state_dict()[key], value, rtol=0, atol=1e-9), key
