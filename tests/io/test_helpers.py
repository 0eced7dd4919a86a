"""Models that keep tensors beside parameters and buffers: loaded by their class they run, wherever those lie."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import CheckpointError
from tensortrain.io import load_pretrained, save_pretrained

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "scale note")


@dataclass
class Options:
    scale: Any


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


@functools.lru_cache
def cached() -> Tensor:
    return torch.tensor(3.0)


def closure() -> Callable[[], Tensor]:
    value = torch.tensor(3.0)
    return lambda: value


def default(value: Tensor | None = None) -> Callable[[], Tensor]:
    def get(value: Tensor = torch.tensor(3.0)) -> Tensor:  # noqa: B008
        return value

    return get


# name -> what the constructor keeps, given the layer beside it, and how forward gets the scale from it
KEPT: dict[str, tuple[Callable[[nn.Linear], Any], Callable[[Any], Any]]] = {
    "tuple": (lambda layer: (torch.tensor(3.0),), lambda kept: kept[0]),
    "set": (lambda layer: {torch.tensor(3.0)}, lambda kept: next(iter(kept))),
    "named tuple": (lambda layer: Pair(torch.tensor(3.0), "x"), lambda kept: kept.scale),
    "dataclass": (lambda layer: Options(torch.tensor(3.0)), lambda kept: kept.scale),
    "nested": (lambda layer: {"a": [Options((Slots(torch.tensor(3.0)),))]}, lambda kept: kept["a"][0].scale[0].scale),
    "closure": (lambda layer: closure(), lambda kept: kept()),
    "default": (lambda layer: default(), lambda kept: kept()),
    "partial": (lambda layer: functools.partial(torch.mul, torch.tensor(3.0)), lambda kept: kept(1.0)),
    "cache of a function": (lambda layer: cached(), lambda kept: kept),
    "made from a weight": (lambda layer: [layer.weight.detach().abs().max() * 0 + 3], lambda kept: kept[0]),
    "closure on a weight": (
        lambda layer: functools.partial(torch.add, layer.weight.data[0, 0] * 0),
        lambda kept: kept(3),
    ),
    "made by torch's layers": (
        lambda layer: [nn.Transformer.generate_square_subsequent_mask(2)],
        lambda kept: kept[0][0, 0] + 3,
    ),
    "a parameter in a list": (lambda layer: [layer.bias], lambda kept: 3 + 0 * kept[0].sum()),
}


def model_class(name: str) -> type[nn.Module]:
    keep, get = KEPT[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)
            self.head = nn.Linear(12, 3)
            self.kept = keep(self.head)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)) * get(self.kept)

    return Model


@pytest.mark.parametrize("name", KEPT)
def test_model_built_by_its_class_runs(tmp_path: Path, name: str) -> None:
    cls = model_class(name)
    model = cls()
    model.layer = tt.nn.Linear.from_dense(model.layer, rank=3)
    save_pretrained(model.eval(), tmp_path / "m")
    again = load_pretrained(tmp_path / "m", cls)
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(again(X), model(X))
    assert cached().device.type == "cpu"


def test_alias_of_a_parameter_is_the_parameter(tmp_path: Path) -> None:
    cls = model_class("a parameter in a list")
    save_pretrained(cls(), tmp_path / "m")
    again = load_pretrained(tmp_path / "m", cls)
    assert again.kept[0] is again.head.bias


def test_layers_held_a_second_time(tmp_path: Path) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)
            self.steps = [self.layer]

        def forward(self, x: Tensor) -> Tensor:
            return self.steps[0](x)

    model = Held()
    model.layer = model.steps[0] = tt.nn.Linear.from_dense(model.layer, rank=3)
    save_pretrained(model.eval(), tmp_path / "m")
    again = load_pretrained(tmp_path / "m", Held)
    assert torch.equal(again(X), model(X))


def test_given_model_with_empty_helpers_is_refused(tmp_path: Path) -> None:
    cls = model_class("nested")
    save_pretrained(cls(), tmp_path / "m")
    with torch.device("meta"):
        empty = cls()
    with pytest.raises(CheckpointError, match="kept is on the meta device"):
        load_pretrained(tmp_path / "m", empty)
    assert all(p.is_meta for p in empty.parameters())


def test_weight_norm_of_the_old_kind_is_computed_anew(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), torch.nn.utils.weight_norm(nn.Linear(12, 3)))

    with pytest.warns(FutureWarning):
        model = build()
    model[0] = tt.nn.Linear.from_dense(model[0], rank=3)
    save_pretrained(model.eval(), tmp_path / "m")
    with torch.device("meta"), pytest.warns(FutureWarning):
        empty = build()
    assert torch.equal(load_pretrained(tmp_path / "m", empty)(X), model(X))
