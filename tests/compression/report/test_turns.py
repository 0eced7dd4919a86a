"""Models that take turns: of those in files only what runs is in memory, and no time holds what brings it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.report import measure as measure_
from tensortrain.compression.report import turns as turns_
from tensortrain.compression.report.measure import latency_rows, measure_latency, memory_rows, resident_bytes
from tensortrain.compression.report.turns import Turns, give_back
from tensortrain.system.offloading import resting_in_files
from tensortrain.system.parking import is_parked

N = 512
LAYER = 4 * N * N  # bytes of a weight


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(N, N) for _ in range(3))).float().eval()


def smaller() -> nn.Sequential:
    """Layers that keep a dense weight at many rows, and none at one."""
    torch.manual_seed(0)
    layers = [tt.nn.Linear(N, N, format="low_rank", rank=200, dtype=torch.float32) for _ in range(3)]
    for layer in layers:
        layer.implementation = "dense"
    return nn.Sequential(*layers).eval()


def held(model: nn.Module) -> int:
    """Bytes of a model's weights that lie in memory, of files that they are mapped from."""
    places = {p.untyped_storage().data_ptr() for p in model.parameters() if is_parked(p)}
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(each, 16) for each in first.split("-"))
            counts = any(start <= place < end for place in places)
        elif counts and first == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


class Looks(nn.Module):
    """Notes, when a layer has run, how much of each of some models is in memory."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net, self.seen = net, list[tuple[int, ...]]()
        self.others: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            handle = layer.register_forward_hook(self._look, prepend=True)
            x = layer(x)
            handle.remove()
        return x

    def _look(self, *args: Any) -> None:
        self.seen.append(tuple(map(held, (self.net, *self.others))))


linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is in memory")


@linux
@pytest.mark.parametrize("measure", [latency_rows, memory_rows])
def test_one_layer_of_two_models_in_files_is_in_memory(measure) -> None:
    one, other = Looks(dense()), Looks(dense())
    one.others, other.others = (other.net,), (one.net,)
    x = torch.randn(1, N, dtype=torch.float32)
    wanted = one(x)
    one.seen.clear()
    with resting_in_files(one), resting_in_files(other):
        measure(one, other, x, batches=(1, 3))
        assert one.seen
        assert other.seen
        for own, others in (*one.seen, *other.seen):
            assert LAYER <= own < 2 * LAYER
            assert others == 0
    assert not any(map(is_parked, (*one.parameters(), *other.parameters())))
    torch.testing.assert_close(one(x), wanted)


@linux
def test_what_is_made_of_weights_stands_in_their_place() -> None:
    original, model = dense(), smaller()
    x = torch.randn(4, N, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(x)
    with resting_in_files(original), resting_in_files(model):
        turns = Turns((original, model))
        assert sum(layer.resident_cache_bytes for layer in model) == 0
        turns.begin(model, lambda: model(x))
        assert sum(layer.resident_cache_bytes for layer in model) >= 3 * LAYER
        assert held(model) == 0
        turns.begin(original, lambda: original(x))
        assert sum(layer.resident_cache_bytes for layer in model) == held(model) == 0
        turns.end()
        assert held(original) == 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


def test_nothing_is_done_in_memory() -> None:
    original, model, runs = dense(), smaller(), list[str]()
    turns = Turns((original, model))
    with torch.no_grad():
        model(torch.randn(4, N, dtype=torch.float32))
    kept = resident_bytes(model)
    for _ in range(2):
        turns.begin(original, lambda: runs.append("original"))
        turns.begin(model, lambda: runs.append("model"))
    assert not any(module._forward_hooks for module in model.modules())
    turns.end()
    give_back(model)
    assert not runs
    assert turns.paused_s == 0
    assert resident_bytes(model) == kept


def test_what_is_spent_on_files_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock, model = Clock(), dense()

    def slow(*tensors: Tensor) -> None:
        clock.now += 5.0

    class Runs(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 0.25
            return super().forward(x)

    for layer in model:
        layer.__class__ = Runs
    for module, name in ((turns_, "bring_in"), (turns_, "let_go")):
        monkeypatch.setattr(module, name, slow)
    for module in (turns_, measure_):
        monkeypatch.setattr(module, "perf_counter", clock)
    with resting_in_files(model):
        x = torch.randn(1, N, dtype=torch.float32)
        (row,) = measure_latency({"m": model}, x, batches=(1,), repeats=4, max_time_s=1e9)
    assert row.median_ms == pytest.approx(750)


class Reads(nn.Module):
    """Reads the weight of a layer that it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.second.weight)


@linux
def test_weights_of_layers_that_do_not_run_themselves_are_there_before() -> None:
    model, x = Reads().float(), torch.randn(1, N, dtype=torch.float32)
    with resting_in_files(model):
        turns = Turns((model,))
        turns.begin(model, lambda: model(x))
        assert LAYER <= held(model) < 2 * LAYER
        with torch.no_grad():
            model(x)
        assert LAYER <= held(model) < 2 * LAYER
        turns.end()
        assert held(model) == 0
