"""The report as data: JSON round trip, refusals, atomic saving, provenance."""

from __future__ import annotations

import json
import math
import os

import fresh
import pytest
import torch

from tensortrain.compression.report.report import (
    CurvePoint,
    LatencyRow,
    LayerReport,
    MemoryRow,
    Report,
)
from tensortrain.errors import DataError, TTError


def full_report() -> Report:
    layer = LayerReport(
        name="fc",
        kind="Linear",
        shape=(6, 8),
        format="tt",
        in_modes=[2, 4],
        out_modes=[2, 3],
        ranks=[1, 3, 1],
        params_before=54,
        params_after=54,
        rel_error=0.25,
        spectra=[[1.0, 0.5, 0.125]],
    )
    return Report(
        title="t",
        model="m",
        budget="2x",
        params_before=100,
        params_after=40,
        metric_name="accuracy",
        metric_before=0.5,
        layers=[layer],
        latency=[LatencyRow(1, 2.0, 0.5, 3.0, 0.75, 2, "float32")],
        memory=[MemoryRow(1, 10, 20, 30, 40)],
        healing=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "metric": 0.5}],
        curve=[CurvePoint("rank 2", "tt", 2.5, 0.5, 0.125, 3)],
        notes=["one", "two"],
        provenance={"seed": 0, "versions": {"torch": "x"}},
    )


def minimal(**changes: object) -> Report:
    return Report(**{"title": "t", "model": "m", "budget": "2x", "params_before": 4, "params_after": 2} | changes)


def test_json_round_trip_is_equal() -> None:
    report = full_report()
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.layers[0].spectra == ((1.0, 0.5, 0.125),)
    assert again.to_json() == report.to_json()


def test_json_has_the_documented_keys() -> None:
    value = json.loads(full_report().to_json())
    assert (value["params_before"], value["params_after"]) == (100, 40)
    assert value["layers"][0]["name"] == "fc"
    assert value["latency"][0]["dense_p90_ms"] == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(bad: float) -> None:
    row = LatencyRow(1, bad, 1.0, 1.0, 1.0, 1, "float32")
    report = minimal(metric_after=bad, healing=[{"step": 1, "loss": bad}], latency=[row])
    value = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert value["metric_after"] is None
    assert value["healing"][0]["loss"] is None
    again = Report.from_json(report.to_json())
    assert again.metric_after is None
    assert math.isnan(again.latency[0].dense_ms)


def test_scalars_of_torch_become_numbers() -> None:
    report = minimal(metric_after=torch.tensor(0.5), provenance={"dtype": torch.float32})
    value = json.loads(report.to_json())
    assert value["metric_after"] == 0.5
    assert value["provenance"]["dtype"] == "torch.float32"


def test_derived_numbers() -> None:
    report = full_report()
    assert report.compression == 2.5
    assert report.latency[0].speedup == 4.0
    assert report.layers[0].compression == 1.0


@pytest.mark.parametrize(
    "changes, inner, full",
    [
        ({"in_modes": (2, 4), "out_modes": (2, 3), "ranks": (1, 3, 1)}, (3,), (4,)),
        ({"in_modes": (2, 4), "out_modes": (2, 3), "ranks": (3,)}, (3,), (4,)),
        ({"in_modes": (2, 4), "out_modes": (2, 3), "ranks": (1, 1, 1)}, (1,), (4,)),
        ({"format": "low_rank", "ranks": (5,)}, (5,), (6,)),
        ({"format": "cp", "in_modes": (2, 4), "out_modes": (2, 3), "ranks": (7,)}, (7,), (12,)),
        ({"format": "dense"}, (), ()),
        (  # a convolution: kernel positions stand first
            {"shape": (6, 8, 3, 3), "in_modes": (2, 4), "out_modes": (2, 3), "ranks": (1, 5, 6, 1)},
            (5, 6),
            (9, 12),
        ),
        (  # two groups: each has half of the outputs
            {"shape": (6, 8, 3, 3), "format": "low_rank", "out_modes": (3,), "in_modes": (8,), "ranks": (1, 2, 1)},
            (2,),
            (3,),
        ),
        ({"shape": (6, 8, 3, 3), "format": "tucker2", "ranks": (4, 5)}, (4, 5), (8, 6)),
        (
            {"kind": "Embedding", "shape": (6, 8), "in_modes": (2, 3), "out_modes": (4, 2), "ranks": (1, 5, 1)},
            (5,),
            (6,),
        ),
        ({"format": "of a library that is not here", "ranks": (1, 5, 1)}, (1, 5, 1), ()),
    ],
)
def test_inner_and_full_ranks(changes: dict, inner: tuple, full: tuple) -> None:
    defaults = {"name": "a", "kind": "Linear", "shape": (6, 8), "format": "tt"}
    layer = LayerReport(params_before=1, params_after=1, **(defaults | changes))
    assert layer.inner_ranks == inner
    assert layer.full_ranks == full


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda v: v.pop("title"), "title"),
        (lambda v: v.update(surprise=1), "surprise"),
        (lambda v: v.update(params_before="many"), "params_before"),
        (lambda v: v.update(params_before=True), "params_before"),
        (lambda v: v["layers"][0].update(shape=3), r"layers\[0\].shape"),
        (lambda v: v["latency"][0].update(dense_ms="1"), r"latency\[0\].dense_ms"),
        (lambda v: v.update(provenance=[]), "provenance"),
        (lambda v: v["curve"].append(7), r"curve\[1\]"),
        (lambda v: v.update(model=None), "model"),
    ],
)
def test_edited_json_is_refused_by_name(edit, words: str) -> None:
    value = json.loads(full_report().to_json())
    edit(value)
    with pytest.raises(DataError, match=words):
        Report.from_json(json.dumps(value))


def test_truncated_json_is_refused() -> None:
    text = full_report().to_json()
    with pytest.raises(TTError, match="must be JSON"):
        Report.from_json(text[: len(text) // 2])


def test_save_writes_the_json(tmp_path) -> None:
    path = full_report().save(tmp_path / "new" / "report.json")
    assert Report.from_json(path.read_text(encoding="utf-8")) == full_report()
    assert os.listdir(path.parent) == ["report.json"]


def test_the_report_module_loads_no_plotting() -> None:
    code = (
        "import sys, tensortrain.compression.report.report; print('matplotlib' in sys.modules, 'rich' in sys.modules)"
    )
    done = fresh.run(code)
    assert done.stdout.split() == ["False", "False"]
