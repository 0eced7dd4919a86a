"""Layers that a model holds besides their names: replaced there too, or left alone and said so."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_models import assert_unchanged, decay_, snapshot
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import (
    apply_plan_,
    compress,
    find_layers,
    plan_compression,
    to_dense_,
)
from tensortrain.system import (
    aliases,
)

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")

Pair = namedtuple("Pair", "layer other")


@dataclass(frozen=True)
class Frozen:
    layer: Any


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Net(nn.Module):
    """Runs its layer by ``reach(self)`` alone, which ``keep`` made possible."""

    def __init__(self, keep: Callable[[Any], None], reach: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)
        self.reach = reach
        keep(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.reach(self)(x)))


def keep(name: str, make: Callable[[nn.Module], Any]) -> Callable[[Any], None]:
    def put(net: nn.Module) -> None:
        object.__setattr__(net, name, make(net.inner))

    return put


class Unregistered(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def closing_over(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def once(x: Tensor) -> Tensor:
        return layer(x)

    return lambda x: once(x)


PLACES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "attribute": (lambda layer: layer, lambda held: held),
    "list in a tuple": (lambda layer: ([layer],), lambda held: held[0][0]),
    "tuple in a list": (lambda layer: [(1, (layer, layer))], lambda held: held[0][1][1]),
    "named tuple": (lambda layer: Pair(layer, 0), lambda held: held.layer),
    "deque": (lambda layer: deque([layer]), lambda held: held[0]),
    "value": (lambda layer: {"a": {"b": layer}}, lambda held: held["a"]["b"]),
    "key": (lambda layer: {layer: layer}, lambda held: held[next(iter(held))]),
    "set": (lambda layer: {layer}, lambda held: next(iter(held))),
    "frozen set": (lambda layer: frozenset([layer]), lambda held: next(iter(held))),
    "data class": (lambda layer: Frozen([layer]), lambda held: held.layer[0]),
    "slots": (lambda layer: Slotted(layer), lambda held: held.layer),
    "namespace": (lambda layer: types.SimpleNamespace(layer=layer), lambda held: held.layer),
    "forward": (lambda layer: layer.forward, lambda held: held),
    "call": (lambda layer: [layer.__call__], lambda held: held[0]),
    "partial": (lambda layer: functools.partial(lambda f, x: f(x), layer), lambda held: held),
    "keyword of a partial": (lambda layer: functools.partial(lambda x, f: f(x), f=layer), lambda held: held),
    "closure": (closing_over, lambda held: held),
    "default": (lambda layer: lambda x, f=layer: f(x), lambda held: held),
    "weak reference": (lambda layer: weakref.ref(layer), lambda held: held()),
    "weak set": (lambda layer: weakref.WeakSet([layer]), lambda held: next(iter(held))),
    "module in a list": (lambda layer: [Unregistered(layer)], lambda held: held[0]),
}


def net(place: str) -> nn.Module:
    make, reach = PLACES[place]
    return decay_(Net(keep("held", make), lambda self: reach(self.held)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_layer_is_replaced_wherever_it_is_held(place: str, inplace: bool) -> None:
    model, x = net(place), torch.randn(7, 24)
    exact = model(x).detach()
    result = compress(model, budget=0.4, heal=False, measure=False, allow_slower=True, inplace=inplace)
    small = result.model
    assert isinstance(small.inner, tt.nn.Linear)
    calls: list[Tensor] = []
    small.inner.cores[0].register_hook(calls.append)
    small(x).sum().backward()
    assert len(calls) == 1  # the new cores took part
    assert not torch.allclose(small(x), exact)
    if not inplace:
        assert torch.equal(model(x), exact)
        assert type(model.inner) is nn.Linear
    torch.testing.assert_close(to_dense_(small)(x), small(x))
    assert type(small.inner) is nn.Linear


@pytest.mark.parametrize("place", ["tuple in a list", "key", "partial", "closure", "slots", "weak reference"])
def test_a_failure_puts_all_places_back(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model, x = net(place), torch.randn(7, 24)
    plan = plan_compression(model, budget=0.4, allow_slower=True)
    before, exact, real = snapshot(model), model(x).detach(), aliases.find_aliases

    def and_one_that_fails(*args: Any) -> Any:
        class Fails(aliases._Place):
            def put(self, value: Any, undo: Any) -> None:
                raise KeyboardInterrupt

        found = real(*args)
        found.references.append(aliases.Reference(found.references[0].target, Fails()))
        return found

    monkeypatch.setattr(aliases, "find_aliases", and_one_that_fails)
    with pytest.raises(KeyboardInterrupt):
        apply_plan_(model, plan)
    assert_unchanged(model, before)
    assert torch.equal(model(x), exact)


LEFT: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "iterator": (lambda layer: iter((layer,)), "cannot be replaced: the model.held (inside tuple_iterator)"),
    "weight in a list": (lambda layer: [layer.weight], "its weight is tied: it shares memory with the model.held[0]"),
    "bias": (lambda layer: {"b": layer.bias}, "its bias is tied: it shares memory with the model.held['b']"),
    "view": (lambda layer: layer.weight.data[:3].T, "its weight is tied: it shares memory with the model.held"),
    "tuple of a class of its own": (lambda layer: type("Own", (tuple,), {})((layer,)), "cannot be replaced"),
}


@pytest.mark.parametrize("what", LEFT)
def test_a_layer_that_cannot_be_replaced_somewhere_is_left_alone(what: str) -> None:
    make, reason = LEFT[what]
    model = Net(keep("held", make), lambda self: self.inner)
    found, left = find_layers(model)
    assert [layer.name for layer in found] == ["head"]
    assert reason in left[0].reason


def test_optimizers_and_trainers_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    vars(model)["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    vars(model)["trainer"] = types.SimpleNamespace(parameters=list(model.parameters()))
    assert [layer.name for layer in find_layers(model)[0]] == ["0"]


def test_much_that_hangs_on_a_model_costs_little() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    vars(model)["data"] = [[k] for k in range(300_000)]
    assert [layer.name for layer in find_layers(model)[0]] == ["0"]
