"""Loading into a model that lives: its objects stay, its hooks fire, its optimizer goes on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import CheckpointError
from tensortrain.io import load_pretrained, save_pretrained

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))


def factorized(rank: int = 3) -> nn.Sequential:
    model = dense()
    model[0] = tt.nn.Linear.from_dense(model[0], rank=rank)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = factorized()
    return model, save_pretrained(model, tmp_path / "m")


def test_an_optimizer_goes_on(saved: tuple[nn.Module, Path]) -> None:
    original, folder = saved
    model = factorized().train()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(X).square().sum().backward()
    optimizer.step()
    objects = dict(model.named_modules()), dict(model.named_parameters())
    assert load_pretrained(folder, model) is model
    assert (dict(model.named_modules()), dict(model.named_parameters())) == objects
    before = model(X)
    assert torch.equal(before, original(X))
    before.square().sum().backward()
    optimizer.step()
    assert (model(X) - before).abs().max() > 1e-3


def test_what_the_caller_froze_stays_frozen(saved: tuple[nn.Module, Path]) -> None:
    original, folder = saved
    model = factorized()
    model[0].cores[1].requires_grad_(False)
    load_pretrained(folder, model)
    assert [core.requires_grad for core in model[0].cores] == [True, False]
    assert torch.equal(model(X), original(X))


@pytest.mark.parametrize("start", [dense, functools.partial(factorized, 2)], ids=["dense", "another rank"])
def test_a_layer_of_another_form_keeps_its_place_everywhere(saved: tuple[nn.Module, Path], start: Any) -> None:
    original, folder = saved
    model, calls = start(), []
    layer = model[0]
    layer.tag = "mine"
    held, run = [layer], layer.forward
    handle = layer.register_forward_hook(lambda *a: calls.append(1))
    load_pretrained(folder, model)
    assert model[0] is layer is held[0]
    assert (type(layer), layer.tag, layer.ranks) == (tt.nn.Linear, "mine", original[0].ranks)
    assert torch.equal(model(X), original(X))
    assert calls == [1]
    torch.testing.assert_close(run(X), original[0](X))
    handle.remove()
    model(X)
    assert calls == [1]


def test_dense_layers_come_back_in_a_factorized_model(tmp_path: Path) -> None:
    original = dense().eval()
    save_pretrained(original, tmp_path / "m")
    model = factorized()
    load_pretrained(tmp_path / "m", model)
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "spec")
    assert torch.equal(model(X), original(X))


def test_another_dtype_keeps_the_parameter_objects(saved: tuple[nn.Module, Path]) -> None:
    original, folder = saved
    model = factorized().double()
    parameters = dict(model.named_parameters())
    load_pretrained(folder, model)
    assert dict(model.named_parameters()) == parameters
    assert torch.equal(model(X), original(X))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 12)
        self.layer = nn.Linear(12, 12)
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.table(ids)))


@pytest.mark.parametrize("by", ["object", "storage"])
def test_tied_parameters_of_the_model_stay_tied(tmp_path: Path, by: str) -> None:
    original, model, ids = Tied().eval(), Tied(), torch.arange(4)
    original.layer = tt.nn.Linear.from_dense(original.layer, rank=2).eval()
    if by == "storage":
        model.head.weight = nn.Parameter(model.table.weight.data)
    weights = model.table.weight, model.head.weight
    save_pretrained(original, tmp_path / "m")
    load_pretrained(tmp_path / "m", model)
    assert (model.table.weight, model.head.weight) == weights
    assert torch.equal(model(ids), original(ids))


def test_failure_halfway_changes_nothing(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tensortrain.io import restore

    _, folder = saved
    model = dense()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = dict(model.named_modules()), dict(model.named_parameters())
    make, left = restore.Fill.make, [3]

    def failing(change: Any) -> None:
        make(change)
        left[0] -= 1
        if not left[0]:
            raise MemoryError

    monkeypatch.setattr(restore.Fill, "make", failing)
    with pytest.raises(MemoryError):
        load_pretrained(folder, model)
    assert (dict(model.named_modules()), dict(model.named_parameters())) == objects
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", ["hooked", "patched"])
def test_a_layer_with_more_to_it_is_not_replaced(saved: tuple[nn.Module, Path], wrong: str) -> None:
    model = dense()
    if wrong == "hooked":  # a weight that the user's own hook computes; those of torch's ways are made plain
        model[0].weight_raw = nn.Parameter(model[0].weight.data.clone())
        del model[0].weight
        model[0].register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", 2 * layer.weight_raw))
    else:
        model[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="must be an ordinary one: '0'"):
        load_pretrained(saved[1], model)
