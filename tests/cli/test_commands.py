"""The commands on small models: exit codes, one-line errors, JSON that parses, files that load."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tensortrain as tt
from tensortrain import networks as models
from tensortrain.cli import main
from tensortrain.cli.app import run
from tensortrain.cli.commands import read_budget_text, read_budgets_text
from tensortrain.cli.datasets import load_images, train_batches
from tensortrain.compression import Silent, cross_entropy_loss, fit
from tensortrain.compression.report.report import Report
from tensortrain.errors import BudgetError
from tensortrain.io import load_pretrained, save_pretrained
from tensortrain.system import native as kernels

Captured = pytest.CaptureFixture[str]


def own_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def needs_an_argument(n: int) -> nn.Module:
    return nn.Linear(n, n)


def gives_no_module() -> int:
    return 3


@pytest.fixture(autouse=True)
def _importable_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def call(line: str) -> int:
    return run(shlex.split(line))


def json_of(line: str, capsys: Captured) -> Any:
    assert call(f"{line} --json") == 0
    return json.loads(capsys.readouterr().out)


def fails(line: str, capsys: Captured) -> str:
    """The command ends with 2 and the last thing it says is one line; that line."""
    assert call(line) == 2
    captured = capsys.readouterr()
    *_, last = captured.err.splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    return last


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "mlp.safetensors"
    save_file(models.build("mlp").state_dict(), path)
    return path


@pytest.fixture
def trained_weights(tmp_path: Path) -> Path:
    """Of a network that has an idea of the labels; healing draws any other back to its own outputs, not to them."""
    torch.manual_seed(0)
    model, path = models.build("mlp"), tmp_path / "trained.safetensors"
    digits = load_images("digits", None, Silent())
    fit(model, train_batches(digits, batch_size=128, seed=0), loss=cross_entropy_loss(), epochs=3, lr=1e-3)
    save_file(model.state_dict(), path)
    return path


# -- inspect -----------------------------------------------------------------------------------------


def test_inspect_prints_a_table(capsys: Captured) -> None:
    assert call("inspect conv-fc") == 0
    out = capsys.readouterr().out
    assert "classifier.0" in out
    assert "1536×1568" in out
    assert max(map(len, out.splitlines())) <= 100


def test_inspect_gives_json(capsys: Captured) -> None:
    found = json_of("inspect mlp", capsys)
    assert found["params"] == 235_146
    assert [layer["name"] for layer in found["layers"]] == ["layers.0", "layers.2", "layers.4"]
    assert found["layers"][0]["flops"] == 2 * 784 * 256


def test_inspect_takes_an_importable_function(capsys: Captured) -> None:
    found = json_of("inspect test_commands:own_network --shape 1x28x28", capsys)
    assert [layer["shape"] for layer in found["layers"]] == [[32, 784], [10, 32]]


def test_random_weights_are_mentioned_and_seeded(capsys: Captured) -> None:
    tables = []
    for seed in (0, 0, 1):
        assert call(f"inspect mlp --seed {seed}") == 0
        tables.append(capsys.readouterr().out)
    assert "random weights" in tables[0]
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


# -- evaluate ----------------------------------------------------------------------------------------


def test_evaluate_reads_weights_of_either_kind(tmp_path: Path, weights: Path, capsys: Captured) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "mlp.pt")
    first = json_of(f"evaluate mlp --weights {weights} --dataset digits", capsys)
    second = json_of(f"evaluate mlp --weights {tmp_path / 'mlp.pt'} --dataset digits", capsys)
    assert first["accuracy"] == second["accuracy"]
    assert first["n_examples"] == 360
    assert first["dataset"] == "digits"
    other = json_of("evaluate mlp --seed 7 --dataset digits", capsys)
    assert other["accuracy"] != first["accuracy"]


def test_evaluate_reads_a_checkpoint_folder_alone_or_into_a_function(tmp_path: Path, capsys: Captured) -> None:
    torch.manual_seed(3)
    model = own_network()
    model[1] = tt.nn.Linear.from_dense(model[1], rank=8)
    save_pretrained(model, tmp_path / "own")
    found = json_of(f"evaluate test_commands:own_network --weights {tmp_path / 'own'} --dataset digits", capsys)
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert "Pass model=" in fails(f"evaluate {tmp_path / 'own'} --dataset digits", capsys)
    save_pretrained(models.build("mlp"), tmp_path / "mlp")
    assert call(f"evaluate {tmp_path / 'mlp'} --dataset digits --limit 50") == 0
    assert "of 50 test images" in capsys.readouterr().out


# -- compress ----------------------------------------------------------------------------------------


def test_compress_writes_a_checkpoint_and_a_report(tmp_path: Path, trained_weights: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    line = f"compress mlp --weights {trained_weights} --budget 4x --dataset digits --allow-slower --out {out}"
    found = json_of(f"{line} --epochs 2 --exclude layers.4 --formats tt,low_rank", capsys)
    report = Report.from_json((out / "report.json").read_text())
    assert found["params_after"] == report.params_after <= 235_146 // 4
    assert {layer.format for layer in report.layers} <= {"tt", "low_rank", "dense"}
    assert "layers.4" not in {layer.name for layer in report.layers}
    assert sorted(path.name for path in out.iterdir()) == [
        "heal.ckpt",
        "model",
        "plan.json",
        "report.html",
        "report.json",
    ]
    assert tt.CompressionPlan.from_json((out / "plan.json").read_text()).params_after == report.params_after
    again = json_of(f"evaluate {out / 'model'} --dataset digits", capsys)
    assert again["accuracy"] == report.metric_after
    assert again["params"] == report.params_after
    assert len(report.healing) == 2


def test_compress_without_data_heals_nothing(tmp_path: Path, capsys: Captured) -> None:
    line = f"compress test_commands:own_network --budget params=9_000 --allow-slower --out {tmp_path / 'out'}"
    assert call(line) == 0
    assert "nothing is healed" in capsys.readouterr().out
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.params_after <= 9000
    assert report.metric_after is None
    assert report.healing == ()
    assert load_pretrained(tmp_path / "out" / "model", own_network)(torch.zeros(1, 784)).shape == (1, 10)


def test_compress_to_several_budgets_writes_a_model_each_and_one_curve(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    line = f"compress mlp --budget 4x,0.1 --dataset digits --steps 2 --allow-slower --formats low_rank --out {out}"
    found = json_of(line, capsys)
    assert [row["budget"] for row in found["budgets"]] == ["4x", "0.1"]
    for folder, row in zip(("4x", "0.1"), found["budgets"], strict=True):
        plan = tt.CompressionPlan.from_json((out / folder / "plan.json").read_text())
        assert plan.params_after == row["params"]
        assert json_of(f"evaluate {out / folder / 'model'} --dataset digits", capsys)["accuracy"] == row["metric"]
    report = Report.from_json((out / "report.json").read_text())
    assert [point.label for point in report.curve][1:] == ["4x", "4x", "0.1", "0.1"]
    assert all((out / name).exists() for name in ("report.html", "curve.png"))


def test_several_budgets_print_a_table(tmp_path: Path, capsys: Captured) -> None:
    line = f"compress test_commands:own_network --budget 2x,3x --allow-slower --out {tmp_path / 'out'}"
    assert call(line) == 0
    out = capsys.readouterr().out
    assert "predicted loss" in out
    assert "3x model:" in out


# -- bench -------------------------------------------------------------------------------------------


def test_bench_times_two_models(tmp_path: Path, capsys: Captured) -> None:
    save_pretrained(models.build("mlp", hidden=(16,)), tmp_path / "small")
    found = json_of(f"bench mlp {tmp_path / 'small'} --batch 1,4 --repeats 2", capsys)
    rows = found["latency"]
    assert [(row["name"], row["batch"]) for row in rows] == [("mlp", 1), ("small", 1), ("mlp", 4), ("small", 4)]
    assert all(0 < row["median_ms"] <= row["p90_ms"] for row in rows)
    assert call("bench mlp mlp --batch 2 --repeats 2") == 0
    assert "mlp (2)" in capsys.readouterr().out


# -- errors ------------------------------------------------------------------------------------------

ERRORS = {
    "inspect": "Missing argument 'MODEL'",
    "bogus": "No such command 'bogus'",
    "inspect mlp --sed 3": "No such option",
    "inspect nope": "MODEL has 'nope', expected one of conv-fc, mlp",
    "inspect no.such:thing": "must be importable",
    "inspect test_commands:absent": "must be importable",
    "inspect test_commands:__doc__": "must be callable",
    "inspect test_commands:gives_no_module": "must return a module",
    "inspect test_commands:needs_an_argument": "must run without arguments",
    "inspect mlp --shape 3xx": "--shape has '3xx'",
    "inspect mlp --shape 5": "the data must fit the model: mlp fails on inputs of shape (5,)",
    "inspect mlp --weights none.pt": "there is no none.pt",
    "evaluate mlp --dataset cifar": "--dataset has 'cifar'",
    "evaluate mlp --dataset digits --data {tmp}": "the digits come with scikit-learn",
    "evaluate mlp --data {tmp}/none": "must hold all four IDX files",
    "evaluate mlp --dataset digits --limit 0": "must be positive",
    "evaluate mlp --dataset digits --limit x": "Invalid value for '--limit'",
    "evaluate {tmp}": "must have its two files",
    "evaluate conv-fc --weights {weights} --dataset digits": "weights must fit the model: ",
    "evaluate {tmp} --weights {weights}": "a checkpoint has its own weights",
    "compress mlp --budget 2x": "Missing option '--out'",
    "compress mlp --budget 0.5x --dataset digits --out {tmp}/o": "asks for growth",
    "compress mlp --budget params=x --dataset digits --out {tmp}/o": "--budget has 'params=x'",
    "compress mlp --budget latency=1 --dataset digits --out {tmp}/o": "must name 'params' or 'flops'",
    "compress mlp --budget params=1 --dataset digits --out {tmp}/o": "must be reachable",
    "compress mlp --budget 2x --dataset digits --out {tmp}/o --include head": "matches none of 3 layers",
    "compress mlp --budget 2x --dataset digits --out {tmp}/o --formats zip": "'zip'",
    "compress mlp --budget 2x --dataset digits --out {tmp}/o --epochs -1": "--epochs has -1",
    "compress mlp --budget 2x --dataset digits --out {weights}": "File exists",
    "bench mlp --batch 0": "--batch has '0'",
    "bench mlp --repeats 0": "--repeats has 0",
    "bench torch.nn:Identity": "Pass their shape",
    "demo --dataset digits --budget tiny --out {tmp}/o": "must be a ratio such as '20x'",
}


@pytest.mark.parametrize("line", ERRORS)
def test_bad_input_gets_one_line(line: str, tmp_path: Path, weights: Path, capsys: Captured) -> None:
    message = fails(line.format(tmp=tmp_path, weights=weights), capsys)
    assert ERRORS[line] in message


def test_weights_with_code_in_them_are_not_run(tmp_path: Path, capsys: Captured) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    torch.save({"layers.0.weight": Trap()}, tmp_path / "trap.pt")
    message = fails(f"inspect mlp --weights {tmp_path / 'trap.pt'}", capsys)
    assert "readable without running code" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_damaged_weights(tmp_path: Path, content: bytes, ending: str, capsys: Captured) -> None:
    path = tmp_path / f"broken.{ending}"
    path.write_bytes(content)
    assert "readable without running code" in fails(f"inspect mlp --weights {path}", capsys)


def test_json_errors_leave_stdout_empty(capsys: Captured) -> None:
    assert call("inspect nope --json") == 2
    assert capsys.readouterr().out == ""


def test_main_exits_with_the_code(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "nope"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert "compress" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, budget",
    [
        ("20x", "20x"),
        ("20", "20"),
        ("0.05", 0.05),
        (".5", 0.5),
        ("1.0", 1.0),
        ("params=100_000", {"params": 100_000}),
        ("params=0.25", {"params": 0.25}),
        ("flops=4x", {"flops": "4x"}),
        ("bytes=100,000", {"bytes": 100_000}),
        ("params=4x+latency_ms=2.5+batch_size=8", {"params": "4x", "latency_ms": 2.5, "batch_size": 8}),
        ("max_metric_drop=0.01", {"max_metric_drop": 0.01}),
    ],
)
def test_budgets_on_the_command_line(text: str, budget: Any) -> None:
    assert read_budget_text(text) == budget


def test_several_budgets_on_the_command_line() -> None:
    assert [each for _, each in read_budgets_text("1.5x, 2x,0.1")] == ["1.5x", "2x", 0.1]
    assert read_budgets_text("params=10,000") == [("params=10,000", {"params": 10_000})]
    assert read_budgets_text(",") == [(",", ",")]
    with pytest.raises(BudgetError, match="must differ"):
        read_budgets_text("2x,3x,2x")


def test_budget_without_number() -> None:
    with pytest.raises(BudgetError, match="must name a number"):
        read_budget_text("flops=")


def test_bench_builds_a_nameless_checkpoint_like_the_other_model(tmp_path: Path, capsys: Captured) -> None:
    save_pretrained(tt.compress(own_network(), budget="2x", measure=False, allow_slower=True).model, tmp_path / "small")
    found = json_of(f"bench test_commands:own_network {tmp_path / 'small'} --shape 784 --batch 1 --repeats 1", capsys)
    assert [row["name"] for row in found["latency"]] == ["test_commands:own_network", "small"]
    assert "--weights FOLDER" in fails(f"inspect {tmp_path / 'small'}", capsys)


def test_weights_with_python_objects_are_refused_plainly(tmp_path: Path, capsys: Captured) -> None:
    torch.save(own_network(), tmp_path / "whole.pt")
    said = fails(f"inspect test_commands:own_network --weights {tmp_path / 'whole.pt'}", capsys)
    assert "it holds Python objects other than tensors" in said
    (tmp_path / "empty.pt").write_bytes(b"")
    said = fails(f"inspect test_commands:own_network --weights {tmp_path / 'empty.pt'}", capsys)
    assert "empty or cut off" in said


def test_demo_refuses_an_impossible_budget_before_training(tmp_path: Path, capsys: Captured) -> None:
    said = fails(f"demo --quick --budget 100000x --dataset digits --out {tmp_path / 'demo'}", capsys)
    assert "no form of this model has fewer than" in said
    assert not (tmp_path / "demo").exists()


@pytest.mark.skipif(kernels.library() is None, reason="kernels are not built")
def test_build_kernels_finds_what_was_built(capsys: Captured) -> None:
    assert run(["build-kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["library"] == str(kernels.built_path())
    assert run(["build-kernels"]) == 0
    assert str(kernels.built_path()) in capsys.readouterr().out


def test_build_kernels_without_a_compiler_is_one_line(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(["build-kernels"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
