"""Measurement: turns, statistics, restored modes, memory and flops with known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tensortrain.compression.report import measure
from tensortrain.compression.report.measure import (
    batch_of,
    count_flops,
    latency_rows,
    measure_latency,
    memory_rows,
    peak_memory,
    resident_bytes,
)
from tensortrain.errors import ShapeError


class Clock:
    """A clock that only the models move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(nn.Module):
    """Takes a set time per call and logs it."""

    def __init__(self, name: str, clock: Clock, seconds: list[float], log: list[str]) -> None:
        super().__init__()
        self.name, self.clock, self.seconds, self.log = name, clock, seconds, log
        self.n_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.clock.now += self.seconds[self.n_calls % len(self.seconds)]
        self.n_calls += 1
        self.log.append(self.name)
        return x


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter", clock)
    return clock


def test_models_take_turns_in_alternating_order(clock: Clock) -> None:
    log: list[str] = []
    models = {name: Timed(name, clock, [0.001], log) for name in "ab"}
    measure_latency(models, torch.zeros(1, 2), batches=(1,), repeats=8, min_time_s=0.0)
    turn = ["a"] * 5, ["b"] * 5  # one untimed run, four timed ones
    assert log == ["a", "b", *turn[0], *turn[1], *turn[1], *turn[0]]


def test_the_untimed_run_of_a_turn_is_not_counted(clock: Clock) -> None:
    log: list[str] = []
    # warm-up, then per turn one slow run and four of 1, 2, 3, 4 ms
    slow_first = Timed("a", clock, [9.0, 0.001, 0.002, 0.003, 0.004], log)
    slow_first.n_calls = 4  # so that the warm-up takes 4 ms and each turn starts slow
    (row,) = measure_latency({"a": slow_first}, torch.zeros(1, 2), batches=(1,), repeats=4, min_time_s=0.0)
    assert row.n_runs == 4
    assert row.median_ms == pytest.approx(2.5)
    assert row.p90_ms == pytest.approx(4.0)


def test_runs_until_the_least_time_is_filled(clock: Clock) -> None:
    models = {"a": Timed("a", clock, [0.001], []), "b": Timed("b", clock, [0.003], [])}
    rows = measure_latency(models, torch.zeros(1, 2), batches=(1,), repeats=1, min_time_s=0.1)
    assert [row.n_runs for row in rows] == [28, 28]  # 7 turns of 16 ms pass 100 ms


def test_a_slow_model_stops_at_the_time_limit(clock: Clock) -> None:
    models = {"a": Timed("a", clock, [3.0], [])}
    (row,) = measure_latency(models, torch.zeros(1, 2), batches=(1,), repeats=100, max_time_s=5.0)
    assert row.n_runs == 4


def test_latency_rows_pair_dense_with_compressed(clock: Clock) -> None:
    dense, compressed = Timed("d", clock, [0.004], []), Timed("c", clock, [0.001], [])
    rows = latency_rows(dense, compressed, torch.zeros(1, 2), batches=(1, 3), repeats=4, min_time_s=0.0)
    assert [row.batch for row in rows] == [1, 3]
    assert rows[0].speedup == pytest.approx(4.0)
    assert rows[0].threads == torch.get_num_threads()


def test_the_interval_of_paired_ratios_follows_both_models(clock: Clock) -> None:
    # The machine slows down to a third; the ratio of turns that follow each other stays between 1.9 and 2.1.
    slow = [1.0] * 6 + [3.0] * 30
    first = [0.002 * s for s in slow for _ in range(5)]
    second = [0.001 * s * (1.05 if k % 2 else 0.95) for k, s in enumerate(slow) for _ in range(5)]
    models = {"a": Timed("a", clock, first, []), "b": Timed("b", clock, second, [])}
    models["a"].n_calls = models["b"].n_calls = -1  # the warm-up
    rows = measure_latency(models, torch.zeros(1, 2), batches=(1,), repeats=80, min_time_s=0.0)
    assert rows[0].speedup is None
    assert rows[1].speedup is not None
    low, high = rows[1].speedup
    assert 1.9 <= low <= high <= 2.11


@pytest.mark.parametrize("repeats", [4, 80])
def test_equal_models_differ_by_nothing(clock: Clock, repeats: int) -> None:
    noise = [0.001, 0.0012, 0.0009, 0.0011, 0.001, 0.0013, 0.0008]
    models = [Timed(name, clock, noise, []) for name in "ab"]
    (row,) = latency_rows(*models, torch.zeros(1, 2), batches=(1,), repeats=repeats, min_time_s=0.0)
    assert row.speedup_low is not None
    assert row.speedup_high is not None
    assert row.speedup_low <= 1 <= row.speedup_high


def test_input_comes_from_the_function_at_each_batch() -> None:
    seen = []
    model = nn.Linear(2, 3, dtype=torch.float64)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))

    def make_input(batch: int) -> torch.Tensor:
        return torch.zeros(batch, 2, dtype=torch.float64)

    rows = measure_latency({"m": model}, make_input, batches=(1, 5), repeats=1, min_time_s=0.0)
    assert set(seen) == {1, 5}
    assert {row.dtype for row in rows} == {"float64"}
    assert all(0 < row.median_ms <= row.p90_ms for row in rows)


def test_mixed_modes_are_restored_also_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    measure_latency({"m": model}, torch.zeros(1, 2), batches=(1,), repeats=1, min_time_s=0.0)
    peak_memory(model, torch.zeros(1, 2))
    count_flops(model, torch.zeros(1, 2))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        measure_latency({"m": model}, torch.zeros(1, 3), batches=(1,))
    assert [module.training for module in model.modules()] == modes


def test_tensors_cached_by_a_measured_model_stay_usable_for_training() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.cache is None:
                self.cache = torch.ones(2, 2)
            return x @ self.cache

    model = Caching()
    measure_latency({"m": model}, torch.zeros(1, 2), batches=(1,), repeats=1, min_time_s=0.0)
    model(torch.zeros(1, 2, requires_grad=True)).sum().backward()  # an inference tensor would raise


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_inputs_of_several_tensors(kind: str) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert x.shape == y.shape == (4, 2)
            return x + y

    x = torch.zeros(3, 2)
    example = (x, x) if kind == "tuple" else {"x": x, "y": x}
    assert measure_latency({"m": Sum()}, example, batches=(4,), repeats=1, min_time_s=0.0)[0].batch == 4


def test_batch_of_repeats_and_cuts() -> None:
    x = torch.arange(3)
    assert batch_of(x, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert batch_of({"a": x, "b": [x, "text"]}, 2)["b"][0].tolist() == [0, 1]
    with pytest.raises(ShapeError, match="entry to repeat"):
        batch_of(torch.zeros(0, 2), 1)


def test_peak_memory_of_a_chain_is_its_widest_neighbours() -> None:
    sizes = (8, 64, 128, 32, 16)
    chain = nn.Sequential(*(nn.Linear(n, m, dtype=torch.float64) for n, m in itertools.pairwise(sizes)))
    x = torch.zeros(10, 8, dtype=torch.float64)
    assert peak_memory(chain, x) == 8 * 10 * (64 + 128)  # both alive while the second is computed


def test_peak_memory_counts_no_freed_scratch_twice_and_no_first_use() -> None:
    class Scratch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.built: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.built is None:
                self.built = torch.zeros(100_000)
            for _ in range(3):
                scratch = torch.zeros(500, dtype=torch.float64)
                del scratch
            return torch.zeros(10, dtype=torch.float64)

    assert peak_memory(Scratch(), torch.zeros(1)) == 8 * 500


def test_resident_bytes_counts_shared_storage_once_and_caches() -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = nn.Parameter(a.weight.data)  # another parameter on the same storage
    assert resident_bytes(nn.Sequential(a, b)) == 4 * 16

    a.resident_cache_bytes = 1000
    b.resident_cache_bytes = lambda: 10
    assert resident_bytes(nn.Sequential(a, b, a)) == 4 * 16 + 1010

    with_buffers = nn.BatchNorm1d(3)
    assert resident_bytes(with_buffers) == 4 * 4 * 3 + 8


def test_resident_bytes_on_the_meta_device() -> None:
    assert resident_bytes(nn.Linear(4, 3, device="meta")) == 4 * (12 + 3)


def test_memory_rows() -> None:
    small, large = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))
    (row,) = memory_rows(large, small, torch.zeros(1, 4), batches=(2,))
    assert row.dense_peak_bytes == 4 * 2 * 68
    assert row.compressed_peak_bytes == 4 * 2 * 4
    assert row.dense_resident_bytes == resident_bytes(large)
    assert row.compressed_resident_bytes == 4 * 20


def test_count_flops_counts_a_multiply_add_as_two() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert count_flops(model, torch.zeros(5, 8)) == 2 * 5 * (8 * 16 + 16 * 4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 64)).cuda()
    x = torch.zeros(128, 64, device="cuda")
    expected = 4 * 128 * (4096 + 64)
    assert expected <= peak_memory(model, x) < expected + 2**25  # cuBLAS takes a workspace beside it
    rows = latency_rows(model, model, x, batches=(1,), repeats=4, min_time_s=0.0)
    assert rows[0].dense_ms > 0


def test_slow_models_take_turns_of_one_run(clock: Clock) -> None:
    log: list[str] = []
    models = {name: Timed(name, clock, [1.0], log) for name in "ab"}
    rows = measure_latency(models, torch.zeros(1, 2), batches=(1,), max_time_s=7.0, fewest_runs=2)
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]  # the first two warm up
    assert [row.n_runs for row in rows] == [3, 3]
    (row,) = measure_latency({"a": models["a"]}, torch.zeros(1, 2), batches=(1,), max_time_s=0.1, fewest_runs=2)
    assert row.n_runs == 2


def test_models_that_have_run_are_not_warmed_up_again() -> None:
    model, x = nn.Linear(3, 4), torch.zeros(2, 3)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    fresh = memory_rows(model, model, x, batches=(2,))
    assert len(calls) == 4
    assert memory_rows(model, model, x, batches=(2,), have_run=True) == fresh
    assert len(calls) == 6
