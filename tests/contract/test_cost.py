"""The cost model: monotone, kept in a file, and replaced in a block."""

from __future__ import annotations

import itertools
import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tensortrain.contract import Chain, CostModel, cost, cost_model, plan_chain, use_cost_model
from tensortrain.contract.price_chain import ChainPricer, _Product
from tensortrain.system.machine import Watch

MODEL = CostModel.reference("cpu")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache folder and process memory; measuring gives the reference, and is counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cost, "_KNOWN", {})
    monkeypatch.setattr(cost, "measure_cost_model", lambda device, **options: MODEL)
    return tmp_path / "tensortrain"


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: object, **options: object) -> CostModel:
        raise AssertionError("measured again")

    monkeypatch.setattr(cost, "measure_cost_model", fail)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_more_work_takes_longer(device_type: str) -> None:
    model = CostModel.reference(device_type)
    for side in range(3):
        small = [64, 64, 64]
        large = list(small)
        large[side] *= 2
        assert model.gemm_s(*small) < model.gemm_s(*large)
        assert model.gemm_s(*small, batch=8) < model.gemm_s(*large, batch=8)
    assert model.gemm_s(64, 64, 64, dtype=torch.float64) > model.gemm_s(64, 64, 64)
    assert model.copy_s(1e6) < model.copy_s(2e6)
    assert model.conv_s(1e9, 1e6) < model.conv_s(2e9, 1e6)


def test_thin_products_run_below_the_peak() -> None:
    flops = 2 * 4096**2 * 4
    for shape in ((4, 4096, 4096), (4096, 4, 4096), (4096, 4096, 4)):
        assert flops / MODEL.gemm_s(*shape) < 0.6 * MODEL.gemm_flops_s


def test_one_row_is_bound_by_reading_the_weight() -> None:
    seconds = MODEL.linear_s(1, 8192, 8192)
    assert seconds == pytest.approx(4 * 8192 * 8192 / MODEL.bandwidth_bytes_s, rel=0.01)


def test_measured_constants_are_sound() -> None:
    model = cost.measure_cost_model("cpu")
    assert cost._is_sound(model)
    assert all(float(f"{v:.2g}") == v for v in asdict(model).values() if isinstance(v, float))
    assert 1e8 < model.gemm_flops_s < 1e14
    assert 1e8 < model.bandwidth_bytes_s < 1e13


def test_use_cost_model_is_a_block_and_a_context() -> None:
    slow = replace(MODEL, gemm_flops_s=1.0)
    with use_cost_model(MODEL):
        with use_cost_model(slow) as inner:
            assert cost_model() is inner is slow
        assert cost_model() is MODEL
        seen: list[CostModel | None] = []
        worker = threading.Thread(target=lambda: seen.append(cost._OVERRIDE.get()))
        worker.start()
        worker.join()
        assert seen == [None]


def test_plans_follow_the_model_in_force() -> None:
    chain = Chain((4, 4), (4, 4), (1, 2, 1))
    with use_cost_model(MODEL):
        before = plan_chain(chain, batch=4)
    with use_cost_model(replace(MODEL, overhead_s=1.0)):
        after = plan_chain(chain, batch=4)
    assert after.predicted_s > 1.0 > before.predicted_s


def test_file_round_trip(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost_model("cpu") == MODEL
    (file,) = empty_cache.iterdir()
    assert file.name.startswith("cost-model-5-")
    assert file.suffix == ".json"
    cost._KNOWN.clear()
    forbid_measuring(monkeypatch)
    assert cost_model("cpu") == MODEL
    file.unlink()
    assert cost_model("cpu") == MODEL  # from process memory


def _with(**changes: object) -> str:
    return json.dumps({"constants": {**asdict(MODEL), **changes}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"constants": null}',
        '{"constants": {}}',
        _with(extra=1.0),
        _with(gemm_flops_s="fast"),
        _with(gemm_flops_s=0.0),
        _with(bandwidth_bytes_s=-1.0),
        _with(overhead_s=float("nan")),
        _with(overhead_s=float("inf")),
        _with(gemm_half=[1.0, 2.0]),
        _with(gemm_half=1.0),
        _with(gemm_table=[1.0, 1.0]),
        _with(batched_table=[1.0]),
        _with(overhead_s=[1.0, 1.0, 1.0]),
        "\x00\xff",
    ],
)
def test_damaged_file_is_replaced(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    cost_model("cpu")
    (file,) = empty_cache.iterdir()
    file.write_text(text, encoding="latin-1")
    cost._KNOWN.clear()
    other = replace(MODEL, overhead_s=1e-6)
    monkeypatch.setattr(cost, "measure_cost_model", lambda device, **options: other)
    assert cost_model("cpu") == other
    assert json.loads(file.read_text())["constants"]["overhead_s"] == 1e-6


def test_unwritable_cache_is_passed_over(empty_cache: Path) -> None:
    empty_cache.write_text("a file where the folder should be")
    assert cost_model("cpu") == MODEL


def test_devices_without_a_clock_get_the_reference(empty_cache: Path) -> None:
    assert cost_model("meta") == MODEL
    assert not empty_cache.exists()


def test_what_was_measured_beside_other_programs_is_the_best_of_a_few_and_holds_for_a_while(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(MODEL, gemm_flops_s=MODEL.gemm_flops_s / 9, overhead_s=MODEL.overhead_s * 9)
    tries = [slow, MODEL]
    monkeypatch.setattr(cost, "measure_cost_model", lambda device, **options: tries.pop(0))
    monkeypatch.setattr(Watch, "is_alone", lambda self: False)
    assert cost.cost_model() == MODEL
    assert not tries
    cost._KNOWN.clear()
    assert cost.cost_model() == MODEL  # from the file
    cost._KNOWN.clear()
    (file,) = empty_cache.glob("cost-model-5-*.json")
    os.utime(file, (0, 0))
    tries.extend([replace(slow, gemm_half=(200.0, 200.0, 200.0)), MODEL])
    assert cost.cost_model() == MODEL
    assert not tries  # measured again


def test_a_table_gives_what_was_measured_at_its_sizes_and_lies_between_them_elsewhere() -> None:
    sizes = list(itertools.product(*cost._GEMM_AT))
    factors = tuple(1.0 + k % 7 for k in range(len(sizes)))
    flat = replace(MODEL, gemm_table=(1.0,) * len(sizes), fresh_bytes_s=1e30)  # large results pay for their pages too
    model = replace(flat, gemm_table=factors)
    for size, factor in zip(sizes, factors, strict=True):
        assert model.gemm_s(*size) == pytest.approx(factor * flat.gemm_s(*size))
    for size in ((30, 60, 60), (3, 5, 700), (10**6, 1, 10**5)):
        assert 1.0 <= model.gemm_s(*size) / flat.gemm_s(*size) <= 7.0
    edge = model.gemm_s(10**5, 4000, 4000) / flat.gemm_s(10**5, 4000, 4000)
    assert edge == pytest.approx(factors[-1])  # beyond the grid, as at its edge


def test_products_of_a_batch_have_a_table_of_their_own() -> None:
    n_single, n = (len(list(itertools.product(*grid))) for grid in (cost._GEMM_AT, cost._BATCHED_AT))
    model = replace(MODEL, gemm_table=(1.0,) * n_single, batched_table=(1.0,) * n)
    twice = replace(model, batched_table=(2.0,) * n)
    assert twice.gemm_s(9, 9, 9) == model.gemm_s(9, 9, 9)
    assert twice.gemm_s(9, 9, 9, batch=70) == pytest.approx(2 * model.gemm_s(9, 9, 9, batch=70))
    assert twice.gemm_s(9, 9, 9, batched=True) == pytest.approx(2 * model.gemm_s(9, 9, 9, batched=True))


def test_a_machine_is_measured_at_every_size_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = cost._Stopwatch(torch.device("cpu"))
    monkeypatch.setattr(watch, "seconds", lambda *call, **options: 1.0)
    for grid in (cost._GEMM_AT, cost._BATCHED_AT):
        table = watch.table(MODEL, grid)
        assert len(table) == len(list(itertools.product(*grid)))
        assert all(factor > 0 for factor in table)


def test_a_measured_training_step_has_its_way_back_priced_once() -> None:
    chain, n = Chain((4, 4, 4), (4, 4, 4), (1, 2, 2, 1)), len(list(itertools.product(*cost._GEMM_AT)))
    model = replace(MODEL, gemm_table=(1.0,) * n)
    slow = replace(model, backward_s=1.0)
    for force in ("dense", "left-to-right"):
        options = {"batch": 4, "force": force}
        before, after = (plan_chain(chain, cost_model=one, training=True, **options) for one in (model, slow))
        assert after.predicted_s - before.predicted_s == pytest.approx(1.0, rel=1e-3)
        assert plan_chain(chain, cost_model=slow, **options) == plan_chain(chain, cost_model=model, **options)


def _price(batch: int, training: bool, by_kernels: bool) -> ChainPricer:
    tables = {
        name: (1.0,) * len(list(itertools.product(*grid)))
        for name, grid in (("gemm_table", cost._GEMM_AT), ("batched_table", cost._BATCHED_AT))
    }
    chain = Chain((6, 5, 4), (3, 4, 6), (1, 7, 5, 1))
    model = replace(MODEL, **tables)
    return ChainPricer(chain, batch, torch.float32, "cpu", training, model, by_kernels)


@pytest.mark.parametrize("training", [False, True])
def test_small_layers_of_kernels_pay_for_every_product_of_a_batch(training: bool) -> None:
    pricer = _price(2, training, by_kernels=True)
    few, many = (_Product(lead, 30, 20, 4, batched=True) for lead in (4, 400))
    assert pricer.is_small(few)
    assert pricer.is_small(many)
    ratio = pricer.small_product_s(many, is_copied=False) / pricer.small_product_s(few, is_copied=False)
    assert 20 < ratio <= 100
    assert pricer.small_product_s(few, is_copied=True) > pricer.small_product_s(few, is_copied=False)


def test_columns_narrower_than_a_vector_take_as_long_as_a_whole_one() -> None:
    pricer = _price(2, False, by_kernels=True)
    narrow, whole, wider = (_Product(9, 50, 60, width, batched=True) for width in (3, 16, 17))
    assert pricer.small_product_s(narrow, is_copied=False) == pricer.small_product_s(whole, is_copied=False)
    assert pricer.small_product_s(wider, is_copied=False) > pricer.small_product_s(whole, is_copied=False)


def test_large_layers_and_layers_without_kernels_keep_their_prices() -> None:
    product = _Product(4, 30, 20, 4, batched=True)
    assert not _price(2, True, by_kernels=False).is_small(product)
    assert not _price(2**18, True, by_kernels=True).is_small(product)
    assert not _price(2, True, by_kernels=True).is_small(_Product(4, 3000, 2000, 4, batched=True))
    whole = _Product(2, 120, 72, 1, batched=False)  # at inference a dense layer's product
    assert _price(2, True, by_kernels=True).is_small(whole)
    assert not _price(2, False, by_kernels=True).is_small(whole)


def test_beside_other_programs_the_least_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([0.5, 0.5, 0.5, 1e-5, 0.5])
    for is_busy, expected in ((False, 0.5), (True, 1e-5)):
        watch = cost._Stopwatch(torch.device("cpu"), is_busy)
        monkeypatch.setattr(watch, "timed", lambda call: next(times))
        monkeypatch.setattr(watch._watch, "is_alone", lambda: True)
        assert watch.seconds(lambda: None) == expected
    watch = cost._Stopwatch(torch.device("cpu"))
    monkeypatch.setattr(watch, "timed", lambda call: next(times))
    monkeypatch.setattr(watch._watch, "is_alone", lambda: False)
    assert watch.seconds(lambda: None) == 1e-5  # found out meanwhile
