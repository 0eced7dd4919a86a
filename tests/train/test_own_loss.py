"""Models with a loss of their own and data without labels: what the loop does for tensor-network models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrain.errors import KindError
from tensortrain.system.history import History
from tensortrain.system.observer import Silent
from tensortrain.train.loop import fit


class Born(nn.Module):
    """p(x) = |psi(x)|^2 / Z of a chain of cores (r, n, s): the smallest Born machine that can be trained."""

    def __init__(self, n_sites: int, bond_dim: int, *, generator: torch.Generator) -> None:
        super().__init__()
        ranks = [1, *[bond_dim] * (n_sites - 1), 1]
        self.cores = nn.ParameterList(
            torch.randn(ranks[k], 2, ranks[k + 1], dtype=torch.float64, generator=generator) for k in range(n_sites)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        psi = x.new_ones(len(x), 1, dtype=torch.float64)
        norm = torch.ones(1, 1, dtype=torch.float64)
        for k, core in enumerate(self.cores):
            psi = torch.einsum("br,brs->bs", psi, core[:, x[:, k]].permute(1, 0, 2))
            norm = torch.einsum("rt,rns,tnu->su", norm, core, core)
        return psi[:, 0].square().log() - norm.log().squeeze()

    def nll(self, x: Tensor) -> Tensor:
        return -self.log_prob(x).mean()


def samples() -> Tensor:
    """Bars: all ones or all zeros, with one bit in ten turned."""
    generator = torch.Generator().manual_seed(1)
    bars = (torch.rand(64, 1, generator=generator) > 0.5).expand(-1, 5)
    return (bars ^ (torch.rand(64, 5, generator=generator) < 0.1)).long()


def machine() -> Born:
    return Born(5, 2, generator=torch.Generator().manual_seed(3))


def nll(model: nn.Module, batch: Any) -> Tensor:
    (x,) = batch
    return model.nll(x)


def learn(model: Born, *, n_sweeps: int = 6, loss: Any = nll, **options: Any) -> History:
    """How a model's own ``fit`` calls the loop: data shuffled by its generator, figures of its own."""
    x, validation = samples()[:48], samples()[48:]
    data = DataLoader(TensorDataset(x), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(9))

    def evaluate(model: nn.Module) -> dict[str, Any]:
        ranks = tuple(core.shape[2] for core in model.cores[:-1])
        return {"nll": model.nll(x), "validation_nll": model.nll(validation), "ranks": ranks}

    return fit(model, data, loss=loss, epochs=n_sweeps, lr=0.05, evaluate=evaluate, **options).figures


def test_it_learns_and_the_last_figure_is_that_of_the_result() -> None:
    model = machine()
    history = learn(model)
    assert len(history) == 6
    assert history.nll[-1] == model.nll(samples()[:48]).item()
    assert history.nll[-1] < history.nll[0] - 0.1
    assert history.ranks == [(2, 2, 2, 2)] * 6
    assert len(history.validation_nll) == 6


class Stop(Silent):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, n: int, **figures: float) -> None:
        if n == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 17, 36])
def test_stopped_by_an_observer_it_goes_on_to_the_same_bits(tmp_path: Path, step: int) -> None:
    whole, stopped, resumed = machine(), machine(), machine()
    expected = learn(whole)
    options = {"checkpoint": tmp_path / "born.ckpt", "checkpoint_every_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, observer=Stop(step), **options)
    found = learn(resumed, **options)
    assert all(map(torch.equal, resumed.cores, whole.cores))
    for name in ("nll", "validation_nll", "ranks", "loss"):
        assert getattr(found, name) == getattr(expected, name), name


def test_bare_tensors_are_batches_too() -> None:
    model = machine()
    before = model.nll(samples()).item()
    fit(model, samples().split(16), loss=lambda model, x: model.nll(x), epochs=5, lr=0.05)
    assert model.nll(samples()).item() < before


def test_complex_cores_learn() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    model = nn.ParameterList([weight])
    target = torch.tensor([1j, 2.0, 1 - 1j], dtype=torch.complex128)
    fit(model, [target] * 4, loss=lambda model, x: (model[0] - x).abs().square().sum(), epochs=100, lr=0.05)
    assert (weight - target).abs().max() < 1e-2


@pytest.mark.parametrize("options", [{"n_sweeps": -1}, {"warmup": 2.0}, {"optimizer": "sweep"}, {"schedule": "none"}])
def test_settings_are_checked_before_any_work(options: dict[str, Any]) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("work had begun")

    with pytest.raises((KindError, ValueError)):
        learn(machine(), loss=loss, **options)
