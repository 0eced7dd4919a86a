"""A model run again from the first changed layer on: what it gives is what a whole run gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression.report import replay as replays
from tensortrain.compression.report.replay import Replay


class Noted(nn.Linear):
    """A layer that counts its calls."""

    n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return super().forward(x)


class WritesToInput(nn.Module):
    """Its caller reads what it has written."""

    def forward(self, x: Tensor) -> None:
        x.mul_(2)


class Odd(nn.Module):
    """Writes in place, shares a layer, keeps things beside its outputs, gives tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Noted(6, 6) for _ in range(4))
        self.twice, self.relu, self.write = Noted(6, 6), nn.ReLU(inplace=True), WritesToInput()
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.a(x)
        same = first
        y = self.relu(first) + same  # ``same`` was written to
        y = self.twice(y)
        y += self.b(y)
        self.kept["y"] = y
        z = self.c(y)
        self.write(z)
        z = self.twice(z) + self.kept["y"]
        return {"z": self.d(z), "y": y}


@pytest.fixture
def odd() -> tuple[Odd, Tensor]:
    torch.manual_seed(0)
    return Odd().eval(), torch.randn(5, 6)


def changed(net: nn.Module, name: str) -> Any:
    return net.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.5)


@torch.no_grad()
def test_each_change_gives_what_a_whole_run_gives(odd: tuple[Odd, Tensor]) -> None:
    net, x = odd
    replay, first = Replay.of(net, lambda: net(x))
    names = ["a", "twice", "b", "c", "d"]
    for name in sorted(names, key=lambda name: replay.place_of([net.get_submodule(name)]), reverse=True):
        handle = changed(net, name)
        with replay.up_to([net.get_submodule(name)]):
            found = net(x)
        handle.remove()
        other = Odd().eval()
        other.load_state_dict(net.state_dict())
        changed(other, name)
        torch.testing.assert_close(found, other(x), rtol=0, atol=0)
    torch.testing.assert_close(net(x), first, rtol=0, atol=0)


@torch.no_grad()
def test_what_ran_before_does_not_run_again() -> None:
    net = nn.Sequential(Noted(4, 4), nn.Tanh(), nn.Sequential(Noted(4, 4), nn.Tanh()), Noted(4, 4))
    x = torch.randn(3, 4)
    replay, y = Replay.of(net, lambda: net(x))
    with replay.up_to([net[3]]):
        assert torch.equal(net(x), y)
    with replay.up_to([net[2][0], net[3]]):
        net(x)
    assert [net[0].n_calls, net[2][0].n_calls, net[3].n_calls] == [1, 2, 3]
    assert all("forward" not in vars(module) for module in net.modules())


@torch.no_grad()
def test_of_a_layer_that_was_not_seen_all_runs() -> None:
    net, x = nn.Sequential(Noted(4, 4), Noted(4, 4)), torch.randn(3, 4)
    replay, _ = Replay.of(net, lambda: net(x))
    with replay.up_to([net[1], nn.Linear(2, 2)]):
        net(x)
    assert net[0].n_calls == 2


@torch.no_grad()
def test_deep_modules_are_forgotten_first_where_all_are_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "_MOST_BYTES", 2 * 3 * 4 * torch.get_default_dtype().itemsize)
    net = nn.Sequential(nn.Sequential(Noted(4, 4), Noted(4, 4)), Noted(4, 4))
    x = torch.randn(3, 4)
    replay, y = Replay.of(net, lambda: net(x))
    with replay.up_to([net[1]]):
        assert torch.equal(net(x), y)
    assert net[0][0].n_calls == 1
    with replay.up_to([net[0][1]]):
        net(x)
    assert net[0][0].n_calls == 2
