"""Forms of layers tried on data: what the output changes by, all positions of an example together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.layers import find_layers
from tensortrain.compression.survey.tried import Trial, losses_of
from tensortrain.system.observer import Silent
from tensortrain.train.outputs import judged_outputs

pytestmark = pytest.mark.usefixtures("double")


class Pooled(nn.Module):
    """Convolutions, their maps averaged, and a map of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv1d(8, 12, 2, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.first(x)).flatten(2)
        return self.head(torch.tanh(self.second(maps)).mean(-1))


class Averaged(nn.Module):
    """Words, a recurrent cell that is called step by step, and the mean of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.step, self.head = nn.Embedding(40, 10), nn.Linear(22, 12), nn.Linear(12, 6, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        state, total = torch.zeros(len(ids), 12), torch.zeros(len(ids), 12)
        for x in self.words(ids).unbind(1):
            state = torch.tanh(self.step(torch.cat([x, state], dim=-1)))
            total = total + state
        return self.head(total / ids.shape[1])


def pictures(n: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(40, 3, 1, 1, generator=draw) + torch.randn(40, 3, 6, 6, generator=draw) for _ in range(n)]


def texts(n: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(40, (40, 9), generator=draw) for _ in range(n)]


def measured(model: nn.Module, name: str, change: Tensor, shift: Tensor | None, held: list[Tensor]) -> float:
    """Share that the changed layer really spoils, by the squares of its outputs."""
    other = copy.deepcopy(model)
    layer = other.get_submodule(name)
    with torch.no_grad():
        layer.weight.add_(change.T if isinstance(layer, nn.Embedding) else change.reshape(layer.weight.shape))
        if shift is not None:
            layer.bias.add_(shift)
        wanted, given = (torch.cat([net(x) for x in held]) for net in (model, other))
    return float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize(("kind", "data"), [(Pooled, pictures), (Averaged, texts)])
def test_what_small_changes_spoil_is_told(kind, data) -> None:
    torch.manual_seed(0)
    model, batches = kind().eval(), data(14)
    layers = find_layers(model)[0]
    found = calibrate(model, layers, batches, n_batches=6, n_held=8)
    draw, trials = torch.Generator().manual_seed(3), []
    for layer in layers:
        matrix = layer.kernel.flatten(1).T if layer.weight.kind == "embedding" else layer.kernel.flatten(1)
        change = 0.02 * torch.randn(matrix.shape, generator=draw) * matrix.std()
        has_bias = getattr(layer.module, "bias", None) is not None
        trials.append(Trial(layer, change, 0.01 * torch.randn(len(matrix), generator=draw) if has_bias else None))
    seen = losses_of(model, trials, found, lambda batch: judged_outputs(model, batch)[0], Metric(model), Silent())
    assert len(seen) == len(layers)
    for trial, loss in zip(trials, seen, strict=True):
        assert loss is not None
        assert loss == pytest.approx(measured(model, trial.layer.name, trial.change, trial.shift, found.held), rel=0.4)


def test_what_cannot_be_told_is_left_out_and_nothing_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).train()
    data = [torch.randn(6, 4, 4, 4) for _ in range(4)]
    layers = find_layers(model)[0]
    found = calibrate(model, layers, data, n_batches=2, n_held=2)
    trials = [Trial(layer, torch.ones_like(layer.kernel).flatten(1)) for layer in layers]
    judge = lambda batch: judged_outputs(model, batch)[0]  # noqa: E731
    grouped, linear = losses_of(model, trials, found, judge, Metric(model), Silent())
    assert grouped is None
    assert linear is not None
    found.held = [torch.randn(6, 4, 9, 9)]  # that the model does not run on
    assert losses_of(model, trials, found, judge, Metric(model), Silent()) == [None, None]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class Picky(nn.Module):
    """Runs on the batches that it was calibrated on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 50:
            raise ValueError("too loud")
        return self.head(torch.tanh(self.first(x)))


def _on_loud_batches(change: Tensor) -> tuple[list[float | None], list[str]]:
    torch.manual_seed(0)
    model, data = Picky(), [torch.randn(9, 8) for _ in range(4)]
    layers = find_layers(model)[0]
    found = calibrate(model, layers, data, n_batches=4, observer=Silent(), n_held=0)
    found.held = [100 * torch.randn(9, 8)]
    trials = [Trial(layers[0], change)]

    def judge(batch: Tensor) -> dict[str, Tensor]:
        return judged_outputs(model, batch, None, with_labels=False)[0]

    return losses_of(model, trials, found, judge, Metric(model, None), Silent()), found.notes


def test_a_model_that_fails_on_held_back_batches_is_told_of() -> None:
    losses, notes = _on_loud_batches(torch.zeros(12, 8))
    assert losses == [None]
    assert any("held back" in note and "too loud" in note for note in notes)


def test_errors_of_this_package_are_not_taken_for_those_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Picky, "forward", lambda self, x: self.head(torch.tanh(self.first(x))))
    with pytest.raises(RuntimeError):
        _on_loud_batches(torch.zeros(12, 9))
