"""The demonstration on a tiny network: the same result again, after a kill, and in a new process."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch

from tensortrain.cli import demo
from tensortrain.cli.app import run
from tensortrain.cli.demo import DemoSettings, Stages, run_demo
from tensortrain.compression.report.report import Report

TINY = {
    "_QUICK_IMAGES": {"n_train": 512, "n_test": 200},
    "_QUICK_MODEL": {"width": 0.0625, "hidden": [96, 48]},
    "_QUICK_BATCH": 32,
    "_QUICK_DENSE_EPOCHS": 5,
}

# Runs the demo in a process that can be killed; the page, and yet another process, are left to other tests.
SCRIPT = """
import sys, torch
from pathlib import Path
from tensortrain.cli import demo
torch.set_num_threads({threads})
vars(demo).update({tiny!r})
demo._accuracy_in_new_process = demo.write_html = lambda *arguments: 0.0
demo.run_demo(demo.DemoSettings(out=Path(sys.argv[1]), dataset="digits", budget="8x", quick=True))
"""


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(demo, name, value)
        yield


class Said:
    """Keeps the messages and the names of the work."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.work: list[str] = []

    def on_start(self, name: str, total: int | None) -> None:
        self.work.append(name)

    def on_step(self, n: int, **figures: float) -> None: ...

    def on_end(self) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def settings(out: Path, **changes: Any) -> DemoSettings:
    return DemoSettings(**{"out": out, "dataset": "digits", "budget": "8x", "quick": True, **changes})


def tensors_of(out: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((out / name / "model.safetensors").read_bytes()).hexdigest()
        for name in ("dense", "compressed")
    }


def figures_of(out: Path) -> tuple[Any, ...]:
    report = Report.from_json((out / "report.json").read_text())
    return report.metric_before, report.metric_compressed, report.metric_after, report.params_after


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, _tiny: Any) -> tuple[Path, dict[str, Any]]:
    """A demo from start to end through the command line, and the JSON it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--quick", "--dataset", "digits", "--budget", "8x", "--out", str(out), "--json"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[Any] = []
        patch.setattr("tensortrain.cli.commands.print_json", printed.append)
        assert run(arguments) == 0
    return out, json.loads(json.dumps(printed[0]))


def test_reloaded_accuracy_is_the_same_to_the_last_digit(finished: tuple[Path, dict[str, Any]]) -> None:
    _, printed = finished
    assert printed["agrees"] is True
    assert printed["reloaded_accuracy"] == printed["compressed_accuracy"]
    assert printed["dense_accuracy"] > 0.3  # ten classes: the tiny network has learnt something
    assert printed["compression"] >= 8
    assert printed["n_test"] == 200
    assert all(Path(path).exists() for path in printed["files"].values())
    assert any("Quick run" in note for note in printed["report"]["notes"])


def test_second_run_reuses_what_is_there(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, printed = finished
    monkeypatch.setattr(demo, "_accuracy_in_new_process", lambda *arguments: printed["reloaded_accuracy"])
    before = tensors_of(out), (out / "report.json").read_bytes()
    said = Said()
    result = run_demo(settings(out), said)
    assert said.work == []
    assert result.agrees
    assert result.compressed_accuracy == printed["compressed_accuracy"]
    assert (tensors_of(out), (out / "report.json").read_bytes()) == before


def test_damaged_stage_is_made_again_to_the_same_bits(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_accuracy_in_new_process", lambda *arguments: 0.0)
    monkeypatch.setattr(demo, "write_html", lambda *arguments: None)  # the page of the first demo stands for all
    out, _ = finished
    before = tensors_of(out), figures_of(out)
    for name in ("dense", "compressed"):
        path = out / name / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    said = Said()
    run_demo(settings(out), said)
    assert sum("again" in message for message in said.messages) == 2
    assert (tensors_of(out), figures_of(out)) == before


def test_another_budget_keeps_the_dense_network(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_accuracy_in_new_process", lambda *arguments: 0.0)
    monkeypatch.setattr(demo, "write_html", lambda *arguments: None)  # the page of the first demo stands for all
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = tensors_of(out)
    said = Said()
    result = run_demo(settings(out, budget="4x"), said)
    assert not any("Training" in message for message in said.messages)
    assert tensors_of(out)["dense"] == before["dense"]
    assert tensors_of(out)["compressed"] != before["compressed"]
    assert result.report.params_after > result.report.params_before / 8
    assert not result.agrees  # the stand-in for the new process said 0.0


def test_mismatch_is_exit_code_one(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_accuracy_in_new_process", lambda *arguments: 0.0)
    out, _ = finished
    assert run(["demo", "--quick", "--dataset", "digits", "--budget", "8x", "--out", str(out)]) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_demo_goes_on_to_the_same_bits(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    delay_s = random.Random().uniform(0.0, 2.5)
    process = start(out)
    while not (out / "stages.json").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(delay_s)
    process.kill()
    process.join()
    reached = (out / "stages.json").read_text()
    again = start(out)
    again.join(120)
    assert again.exitcode == 0
    assert tensors_of(out) == tensors_of(finished[0]), f"killed {delay_s:.3f} s after the first stage began: {reached}"
    assert figures_of(out) == figures_of(finished[0])


def start(out: Path) -> BaseProcess:
    return fresh.start(SCRIPT.format(tiny=TINY, threads=torch.get_num_threads()), str(out))


def test_stages_remember_by_key(tmp_path: Path) -> None:
    path, leftovers = tmp_path / "stages.json", tmp_path / "fit.ckpt"
    leftovers.write_text("half")
    assert not Stages(path).begin("fit", "a", leftovers=leftovers)
    assert not leftovers.exists()
    leftovers.write_text("half")
    assert not Stages(path).begin("fit", "a", leftovers=leftovers)  # a kill came: the same stage goes on
    assert leftovers.exists()
    Stages(path).finish("fit", "a")
    assert Stages(path).begin("fit", "a", leftovers=leftovers)
    assert not Stages(path).begin("fit", "b", leftovers=leftovers)
    assert not leftovers.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"fit": 3}', "\x00"])
def test_unreadable_stages_start_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    assert not Stages(tmp_path / "stages.json").begin("fit", "a", leftovers=tmp_path / "fit.ckpt")
