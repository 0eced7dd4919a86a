"""The demonstration: train a network, compress it, heal it, and check its checkpoint in a new process.

Each stage leaves its result in the output folder, under a key made of everything that it depends on. A run
that was killed goes on from there, and ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import tensortrain
from tensortrain import networks as models
from tensortrain.cli.datasets import accuracy_on_test, first, load_images, train_batches
from tensortrain.compression.api import CompressionResult, compress
from tensortrain.compression.choose.budget import BudgetLike
from tensortrain.compression.choose.planner import check_reachable
from tensortrain.compression.report.report import Report
from tensortrain.compression.stages.heal import Heal
from tensortrain.compression.survey.layers import find_layers
from tensortrain.contract import CostModel, use_cost_model
from tensortrain.data import ImageData
from tensortrain.errors import CheckpointError, DataError
from tensortrain.io import load_pretrained, save_pretrained
from tensortrain.networks import DENSE_RECIPE
from tensortrain.system.files import write_text_atomic
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.loop import fit
from tensortrain.train.losses import cross_entropy_loss
from tensortrain.viz import write_html

__all__ = ["DEMO_HEAL", "DemoResult", "DemoSettings", "Stages", "run_demo"]

MODEL = "conv-fc"
# A third of the steps of the recorded experiments, on images as they are, and a twelfth of their healing: a
# demonstration must not take long, and so few passes learn more from images that are not moved about.
_DENSE_STEPS = 1100
DEMO_HEAL = Heal(epochs=1, lr=3e-3, weight_decay=0.0, schedule="cosine", alpha=0.5, temperature=2.0)

# The quick run takes a smaller network of the same kind: it shows and tests the way, not the gain.
_QUICK_IMAGES = {"n_train": 1024, "n_test": 360}
_QUICK_MODEL: dict[str, Any] = {"width": 0.125, "hidden": [768, 256]}
_QUICK_BATCH, _QUICK_DENSE_EPOCHS, _QUICK_HEAL_EPOCHS = 64, 3, 3
_DENSE, _COMPRESSED = "dense", "compressed"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What a demo was asked for; ``budget`` as for ``compress``."""

    out: Path
    data: Path | None = None
    dataset: str | None = None
    budget: BudgetLike = "40x"
    seed: int = 0
    quick: bool = False

    @property
    def model(self) -> dict[str, Any]:
        """Arguments of the network."""
        return _QUICK_MODEL if self.quick else {}

    @property
    def recipe(self) -> dict[str, Any]:
        """How the dense network is trained."""
        batches = {**DENSE_RECIPE["data"], "seed": self.seed, "augment": False}
        training = {**DENSE_RECIPE["fit"], "seed": self.seed, "epochs": None, "steps": _DENSE_STEPS}
        if self.quick:
            batches["batch_size"] = _QUICK_BATCH
            training["epochs"], training["steps"] = _QUICK_DENSE_EPOCHS, None
        return {**DENSE_RECIPE, "data": batches, "fit": training}

    @property
    def heal(self) -> Heal:
        """How the compressed network is healed."""
        return replace(DEMO_HEAL, epochs=_QUICK_HEAL_EPOCHS, steps=None) if self.quick else DEMO_HEAL


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Accuracies are fractions of the test images; ``reloaded_accuracy`` is that of a new process.

    ``seconds`` says how long each part took in this run; what was there already took next to nothing.
    """

    dense_accuracy: float
    compressed_accuracy: float
    reloaded_accuracy: float
    dataset: str
    source: str
    n_test: int
    quick: bool
    report: Report
    seconds: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether the checkpoint gives the very accuracy that was measured before it was written."""
        return self.reloaded_accuracy == self.compressed_accuracy

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "report"}
        return {
            **plain,
            "agrees": self.agrees,
            "params_before": self.report.params_before,
            "params_after": self.report.params_after,
            "compression": self.report.compression,
            "report": json.loads(self.report.to_json()),
        }


def run_demo(settings: DemoSettings, observer: Observer | None = None) -> DemoResult:
    """Run all stages, or what is left of them.

    Plans are made with fixed constants rather than timings, so that the same settings give the same model;
    the latencies in the report are measured.

    Raises:
        DataError: The data cannot be read.
        BudgetError: The budget cannot be met.
        CheckpointError: The new process cannot load the checkpoint.
    """
    observer = clock = _Clock(observer or Silent())
    _check_budget(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    with clock.part("data"):
        data = _images(settings, observer)
    stages = Stages(settings.out / "stages.json")
    with use_cost_model(CostModel.reference("cpu")):
        with clock.part("dense network"):
            dense, dense_key = _dense_model(settings, data, stages, observer)
        with clock.part("measuring and report"):
            report = _compression(settings, data, dense, dense_key, stages, observer)
    with clock.part("new process"):
        reloaded = _accuracy_in_new_process(settings, data, observer)
    assert report.metric_before is not None
    assert report.metric_after is not None
    return DemoResult(
        dense_accuracy=report.metric_before,
        compressed_accuracy=report.metric_after,
        reloaded_accuracy=reloaded,
        dataset=data.name,
        source=data.source,
        n_test=data.test_labels.numel(),
        quick=settings.quick,
        report=report,
        seconds=clock.seconds,
        files=_files(settings.out),
    )


class _Clock:
    """An observer that passes everything on, and adds up how long each part of a demo takes."""

    # Work that compress reports by name and that is a part of its own.
    _PARTS: ClassVar = {"calibrate": "planning", "candidates": "planning", "heal": "healing"}

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.seconds: dict[str, float] = {}
        self.open: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside, but for parts of their own that it holds."""
        began, others = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - others
        self.seconds[name] = round(time.perf_counter() - began - inside, 2)

    def on_start(self, name: str, total: int | None) -> None:
        self.open.append((name, time.perf_counter()))
        self.observer.on_start(name, total)

    def on_step(self, n: int, **figures: float) -> None:
        self.observer.on_step(n, **figures)

    def on_end(self) -> None:
        name, began = self.open.pop()
        part = self._PARTS.get(name)
        if part is not None:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - began, 2)
        self.observer.on_end()

    def message(self, text: str) -> None:
        self.observer.message(text)


class Stages:
    """Which stages are done, and for which settings: a small JSON file, replaced by rename."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.known: dict[str, Any] = found if isinstance(found, dict) else {}

    def begin(self, name: str, key: str, *, leftovers: Path) -> bool:
        """Tell whether the stage is done with this key; unfinished work under another key is removed."""
        entry = self.known.get(name)
        if isinstance(entry, dict) and entry.get("key") == key:
            return entry.get("done") is True
        leftovers.unlink(missing_ok=True)
        self._record(name, key, done=False)
        return False

    def finish(self, name: str, key: str) -> None:
        """Remember that the stage's files are in place."""
        self._record(name, key, done=True)

    def _record(self, name: str, key: str, *, done: bool) -> None:
        self.known[name] = {"key": key, "done": done}
        write_text_atomic(self.path, json.dumps(self.known, indent=1) + "\n")


# -- stages ------------------------------------------------------------------------------------------


def _check_budget(settings: DemoSettings) -> None:
    """Refuse a budget that cannot be read or reached before minutes go into training."""
    with torch.random.fork_rng(devices=[]):
        model = models.build(MODEL, **settings.model)
    check_reachable(model, find_layers(model)[0], settings.budget)


def _images(settings: DemoSettings, observer: Observer) -> ImageData:
    data = load_images(settings.dataset, settings.data, observer)
    if data.train_images.shape[1:] != (28, 28) or int(data.train_labels.max()) > 9:
        raise DataError(
            f"the demo's network takes 28 x 28 pixels and ten classes: {data.source} has "
            f"{tuple(data.train_images.shape[1:])} and {int(data.train_labels.max()) + 1}. Use "
            "Fashion-MNIST's files."
        )
    if settings.quick:
        data = first(data, **_QUICK_IMAGES)
        observer.message(f"Quick run: {data.train_labels.numel()} images, a smaller network; figures mean little.")
    return data


def _dense_model(settings: DemoSettings, data: ImageData, stages: Stages, observer: Observer) -> tuple[nn.Module, str]:
    """The trained dense network, from its checkpoint where there is one of these settings."""
    model = [MODEL, settings.model]
    key = _key(data=_fingerprint(data), model=model, recipe=settings.recipe, torch=torch.__version__)
    folder, unfinished = settings.out / _DENSE, settings.out / "dense.ckpt"
    done = stages.begin(_DENSE, key, leftovers=unfinished)
    if not (done and _loads(folder, observer)):
        save_pretrained(_train(settings, data, unfinished, observer), folder)
        stages.finish(_DENSE, key)
    # Read back even when it was trained just now, so that a resumed run goes the same way.
    return load_pretrained(folder), key


def _train(settings: DemoSettings, data: ImageData, checkpoint: Path, observer: Observer) -> nn.Module:
    recipe = settings.recipe
    observer.message(f"Training {MODEL} on {data.name} ({data.source}).")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = models.build(MODEL, **settings.model)
    if recipe["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(
        model,
        train_batches(data, **recipe["data"]),
        loss=cross_entropy_loss(),
        checkpoint=checkpoint,
        observer=observer,
        **recipe["fit"],
    )
    return model


def _compression(
    settings: DemoSettings,
    data: ImageData,
    dense: nn.Module,
    dense_key: str,
    stages: Stages,
    observer: Observer,
) -> Report:
    """Compress, heal and report, unless that is done; the checkpoint is in the folder after."""
    key = _key(
        dense=dense_key,
        budget=settings.budget,
        heal=asdict(settings.heal),
        seed=settings.seed,
        version=tensortrain.__version__,
    )
    unfinished = settings.out / "heal.ckpt"
    if stages.begin(_COMPRESSED, key, leftovers=unfinished) and _loads(settings.out / _COMPRESSED, observer):
        report = _saved_report(settings.out / "report.json")
        if report is not None:
            return report
    observer.message(f"Compressing to {settings.budget}.")
    result = compress(
        dense.to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # teaches a third faster
        budget=settings.budget,
        data=train_batches(data, **settings.recipe["data"]),
        heal=settings.heal,
        evaluate=_Accuracy(data),
        metric_name="accuracy",
        checkpoint=unfinished,
        seed=settings.seed,
        name=MODEL,
        observer=observer,
    )
    report = replace(
        result.report,
        title=f"{MODEL} on {data.name} at {result.plan.budget}",
        metric_noise=_noise(result.report, data.test_labels.numel()),
        notes=(*result.report.notes, *_notes(settings, data)),
    )
    _write(settings.out, result, report)
    stages.finish(_COMPRESSED, key)
    return report


class _Accuracy:
    """Accuracy on the test images, in the memory format that a checkpoint is read in; each state is run once."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self.known: dict[str, float] = {}

    def __call__(self, model: nn.Module) -> float:
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if key not in self.known:
            self.known[key] = accuracy_on_test(model, self.data)
        return self.known[key]


def _noise(report: Report, n_test: int) -> float:
    """What two accuracies on so many images may differ by chance: 1.96 standard errors of the difference.

    That both are measured on the same images makes it smaller than this.
    """
    shares = [share for share in (report.metric_before, report.metric_after) if share is not None]
    return 1.96 * math.sqrt(sum(share * (1 - share) for share in shares) / n_test)


def _write(out: Path, result: CompressionResult, report: Report) -> None:
    save_pretrained(result.model, out / _COMPRESSED)
    write_text_atomic(out / "plan.json", result.plan.to_json())
    report.save(out / "report.json")
    write_html(report, out / "report.html")


def _accuracy_in_new_process(settings: DemoSettings, data: ImageData, observer: Observer) -> float:
    """Evaluate the checkpoint in a Python that has seen nothing of this one."""
    observer.message("Reading the checkpoint in a new process.")
    command = [sys.executable, "-m", "tensortrain", "evaluate", str(settings.out / _COMPRESSED), "--json"]
    command += ["--limit", str(data.test_labels.numel()), "--dataset", data.name]
    if settings.data is not None:
        command += ["--data", str(settings.data)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=_environment(), check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CheckpointError(
            f"a new process must be able to load the checkpoint: {settings.out / _COMPRESSED} fails with: {reason}"
        )
    return float(json.loads(done.stdout)["accuracy"])


# -- small things ------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """For the new process: this very package, and as many threads, on which the rounding of sums depends."""
    package_root = str(Path(tensortrain.__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads, "PYTHONIOENCODING": "utf-8"}


def _key(**parts: Any) -> str:
    """A checksum of what a stage depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(data: ImageData) -> str:
    digest = hashlib.sha256(data.name.encode())
    for tensor in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _loads(folder: Path, observer: Observer) -> bool:
    """Whether a finished stage's checkpoint is still good."""
    try:
        load_pretrained(folder)
    except CheckpointError as error:
        observer.message(f"Making {folder.name} again: {error}")
        return False
    return True


def _saved_report(path: Path) -> Report | None:
    try:
        report = Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError):
        return None
    return report if report.metric_before is not None and report.metric_after is not None else None


def _notes(settings: DemoSettings, data: ImageData) -> list[str]:
    source = data.source.replace(os.path.expanduser("~"), "~")  # a report gets passed on
    notes = [f"Data: {data.name} ({source})."]
    if settings.quick:
        notes.append(
            f"Quick run on {data.train_labels.numel()} training and {data.test_labels.numel()} test images "
            "with a smaller network: the figures say nothing about the method."
        )
    return notes


def _files(out: Path) -> dict[str, str]:
    names = {"model": _COMPRESSED, "dense": _DENSE, "plan": "plan.json", "report": "report.json"}
    return {what: str(out / name) for what, name in {**names, "page": "report.html"}.items()}
