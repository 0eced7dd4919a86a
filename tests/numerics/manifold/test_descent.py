"""Descent on the manifold of trains: it arrives, says why it ended, and goes on after a kill."""

from pathlib import Path

import pytest
import torch

import tensortrain as tt
from tensortrain.errors import CheckpointError
from tensortrain.manifold import descend


def distance(target):
    return lambda x: (x - target).norm() ** 2


def trains(*ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tt.randn((3, 4, 3, 2), rank, dtype=torch.float64, generator=generator) for rank in ranks]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_goes_on_after_a_kill_to_the_same_bits(stop_at, tmp_path: Path):
    target, start = trains(3, 2)

    def figures(x):
        return {"size": float(x.norm())}

    whole, history = descend(distance(target), start, n_steps=9, figures=figures)
    seen = []

    def kill(_, so_far):
        seen.append(len(so_far))
        if len(so_far) == stop_at:
            raise StoppedError

    options = {"n_steps": 9, "figures": figures, "checkpoint": tmp_path / "run", "inputs": target.cores}
    with pytest.raises(StoppedError):
        descend(distance(target), start, observer=kill, **options)
    found, again = descend(distance(target), start, **options)
    assert seen == list(range(1, stop_at + 1))
    assert again == history
    assert history.size[-1] == float(whole.norm())
    assert all(torch.equal(a, b) for a, b in zip(found.cores, whole.cores, strict=True))
    _, more = descend(distance(target), start, **(options | {"n_steps": 11}))
    assert len(more) == 11
    with pytest.raises(CheckpointError, match="starting weights"):
        descend(distance(target), trains(2, seed=5)[0], **options)


def test_says_why_it_ended():
    target, start = trains(2, 2)
    found, history = descend(distance(target), start, n_steps=400, tol=1e-8)
    assert history.stop == "gradient"
    assert float((found - target).norm()) < 1e-6 * float(target.norm())
    assert descend(distance(target), start, n_steps=3)[1].stop == "max_steps"
    _, history = descend(distance(target), target, n_steps=5)
    assert history.stop in ("gradient", "stagnated")
