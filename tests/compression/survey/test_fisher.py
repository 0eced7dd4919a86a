"""Changes of class probabilities are weighed by their divergence, not by squared logits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.layers import find_layers
from tensortrain.compression.survey.moments import Calibration
from tensortrain.formats.weighting import energy
from tensortrain.train.task import Task

N_CLASSES = 6
SOFTMAX = Task("classify", class_axis=1)


def calibrated(model: nn.Module, data: list[Tensor], task: Task | None) -> Calibration:
    n = len(data)
    return calibrate(model, find_layers(model)[0], data, n_batches=n, gradient_batches=n, task=task)


def rows_of(n: int, n_batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 10, generator=generator) for _ in range(n_batches)]


def softmax_regression() -> nn.Linear:
    """Its last class is dead: of no example is it likelier than 1 in 10,000."""
    model = nn.Linear(10, N_CLASSES, bias=False)
    with torch.no_grad():
        model.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return model


class WithDeadClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = softmax_regression()
        self.register_buffer("offset", torch.tensor([0.0] * (N_CLASSES - 1) + [-12.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.offset


@torch.no_grad()
def divergence(model: nn.Module, layer: nn.Linear, change: Tensor, data: list[Tensor]) -> float:
    """Measured, in nats an example."""
    x = torch.cat(data)
    before = F.log_softmax(model(x).double(), dim=-1)
    layer.weight += change
    after = F.log_softmax(model(x).double(), dim=-1)
    layer.weight -= change
    return float((before.exp() * (before - after)).sum(-1).mean())


def small_change(rows: slice = slice(None)) -> Tensor:
    change = torch.zeros(N_CLASSES, 10)
    change[rows] = 0.02 * torch.randn(change[rows].shape, generator=torch.Generator().manual_seed(8))
    return change


def test_half_the_energy_of_a_small_change_is_its_divergence() -> None:
    model, data = WithDeadClass(), rows_of(1500)
    found = calibrated(model, data, SOFTMAX)
    assert found.in_nats
    measured = divergence(model, model.head, small_change(), data)
    assert energy(small_change(), *found.weighing("head")) / 2 == pytest.approx(measured, rel=0.2)


def test_raw_logits_rank_a_change_of_a_dead_class_as_one_that_counts() -> None:
    model, data = WithDeadClass(), rows_of(1500)
    dead, alive = small_change(slice(N_CLASSES - 1, None)), small_change(slice(0, 1))
    measured = divergence(model, model.head, dead, data) / divergence(model, model.head, alive, data)
    ratios = {}
    for name, task in {"nats": SOFTMAX, "squares": None}.items():
        weighing = calibrated(model, data, task).weighing("head")
        ratios[name] = energy(dead, *weighing) / energy(alive, *weighing)
    assert ratios["nats"] < 3 * measured
    assert ratios["squares"] > 1000 * measured


def test_inner_layers_and_outputs_that_are_probabilities_already() -> None:
    model = nn.Sequential(nn.Linear(10, 8, bias=False), nn.Tanh(), nn.Linear(8, 4), nn.Softmax(dim=1))
    data = rows_of(1500)
    found = calibrated(model, data, Task("classify", class_axis=1, probabilities=True))
    change = 0.02 * torch.randn(8, 10, generator=torch.Generator().manual_seed(2))
    x = torch.cat(data)
    with torch.no_grad():
        before = model(x).double()
        model[0].weight += change
        after = model(x).double()
    measured = float((before * (before.log() - after.log())).sum(-1).mean())
    assert energy(change, *found.weighing("0")) / 2 == pytest.approx(measured, rel=0.25)


def test_yes_or_no_outputs_are_weighed_by_their_divergence() -> None:
    model, data = nn.Linear(10, 3, bias=False), rows_of(1500)
    found = calibrated(model, data, Task("multi-label", class_axis=1))
    change, x = 0.02 * torch.randn(3, 10, generator=torch.Generator().manual_seed(2)), torch.cat(data)
    with torch.no_grad():
        p, q = (torch.sigmoid((x @ w.T).double()) for w in (model.weight, model.weight + change))
    measured = float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean())
    assert energy(change, *found.weighing("")) / 2 == pytest.approx(measured, rel=0.2)


def gradient_along(metric: Metric, y: Tensor, batch: Any) -> Tensor:
    values, direction = metric.along("", y, batch, torch.Generator().manual_seed(0))
    return torch.autograd.grad(values, y, direction)[0]


@pytest.mark.parametrize("shape", [(50_000, 4), (10_000, 4, 5)])
def test_a_direction_has_the_second_moment_of_probability_minus_draw(shape: tuple[int, ...]) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -9.0])
    y = logits.reshape(1, 4, *[1] * (len(shape) - 2)).expand(shape).clone().requires_grad_()
    gradient = gradient_along(Metric(nn.Identity(), SOFTMAX), y, torch.zeros(1))
    rows, p = gradient.movedim(1, -1).reshape(-1, 4), torch.softmax(logits, 0)
    exact = torch.diag(p) - torch.outer(p, p)
    assert ((rows.T @ rows) / len(rows) - exact).norm() < 0.03 * exact.norm()


def test_blanked_out_positions_and_masked_classes_have_no_part() -> None:
    y = torch.zeros(2, 3, 4)
    y[:, :, 3] = float("-inf")
    y.requires_grad_()
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    metric = Metric(nn.Identity(), Task("causal-lm", class_axis=2))
    gradient = gradient_along(metric, y, batch)
    assert bool((gradient[batch["attention_mask"] == 0] == 0).all())
    assert bool((gradient[..., 3] == 0).all())
    assert bool((gradient[batch["attention_mask"] == 1][..., :3] != 0).all())


def test_only_the_direction_of_an_embedding_counts() -> None:
    y = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = gradient_along(Metric(nn.Identity(), Task("embed")), y, y.detach())
    assert (gradient * y).sum(dim=-1).abs().max() < 1e-5


def test_several_outputs_count_alike_whatever_they_are_measured_in() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.values = nn.Linear(10, 5, bias=False), nn.Linear(10, 7, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.words(x), "values": 300 * self.values(x)}

    model, data = TwoHeads(), rows_of(1500)
    found = calibrated(model, data, Task("classify", outputs=("logits", "values"), main="logits", class_axis=1))
    shares = [energy(m.weight.detach(), *found.weighing(n)) / found.output_scale for n, m in model.named_children()]
    # Each output is carried by its one layer; probabilities depend on the inputs, which products of moments pass over.
    assert shares == pytest.approx([1.0, 1.0], rel=0.15)


def test_a_pickle_of_the_version_before_speaks_of_squares() -> None:
    state = {"layers": {}, "n_examples": 2, "output_scale": 1.0}
    found = Calibration.__new__(Calibration)
    found.__setstate__(state)
    assert not found.in_nats
    assert math.isclose(found.output_scale, SimpleNamespace(**state).output_scale)
