"""What the commands do, on parsed arguments; each ends by printing a table or JSON."""

from __future__ import annotations

import json as json_module
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tensortrain.cli.datasets import (
    accuracy_on_test,
    check_fits,
    example_images,
    first,
    load_images,
)
from tensortrain.cli.demo import DemoResult, DemoSettings, run_demo
from tensortrain.cli.material import Material, gather
from tensortrain.cli.output import print_json, print_rich
from tensortrain.cli.progress import observing
from tensortrain.cli.resolve import ResolvedModel, check_memory, example_inputs, resolve_model
from tensortrain.cli.texts import TEXT_SETS, load_snippets
from tensortrain.compression.api import CompressionResult
from tensortrain.compression.api import compress as compress_model
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS
from tensortrain.compression.curve import Pareto, pareto
from tensortrain.compression.report.measure import Latency, measure_latency
from tensortrain.compression.stages.heal import Heal
from tensortrain.compression.survey.inspect import LayerRow
from tensortrain.compression.survey.inspect import inspect as inspect_model
from tensortrain.compression.survey.layers import count_params
from tensortrain.errors import BudgetError, RankError, ShapeError
from tensortrain.io import save_pretrained
from tensortrain.system import native as kernels
from tensortrain.system.files import write_text_atomic
from tensortrain.system.observer import Observer
from tensortrain.viz import inspect_table, report_table, write_html
from tensortrain.viz.report.text import speed_text

__all__ = [
    "CompressOptions",
    "bench",
    "build_kernels",
    "compress",
    "demo",
    "evaluate",
    "inspect",
    "read_budget_text",
    "read_budgets_text",
]


def inspect(text: str, weights: Path | None, *, shape: str | None, seed: int, json: bool) -> None:
    """Print the layers that can be compressed."""
    with observing(json=json) as observer:
        found = resolve_model(text, weights, seed=seed, observer=observer)
        example = example_inputs(found.model, shape)
        if example is not None:
            check_fits(found.model, example, found.name)
        inspection = inspect_model(found.model, example)
    if json:
        print_json({"model": found.name, **inspection.to_dict()})
        return
    in_all = f"{inspection.params:,} parameters, {sum(r.params for r in inspection):,} in these layers"
    rest = [f"left alone: {layer.name} ({layer.kind}): {layer.reason}" for layer in inspection.left_alone]
    print_rich(inspect_table([_brief(row) for row in inspection], title=found.name), in_all, *rest)


def _brief(row: LayerRow) -> dict[str, Any]:
    """A row of ``inspect`` under headings short enough for a terminal."""
    return {
        "layer": row.name,
        "kind": row.kind,
        "shape": "×".join(map(str, row.shape)),
        "params": row.params,
        "share": f"{row.share:.1%}",
        "flops": row.flops,
        "rank": row.full_rank,
        "90 %": row.rank_90,
        "99 %": row.rank_99,
        "gain": f"{row.gain_99:.3g}×",
    }


def evaluate(
    text: str,
    weights: Path | None,
    *,
    data: Path | None,
    dataset: str | None,
    tokenizer: Path | None,
    limit: int | None,
    seed: int,
    json: bool,
) -> None:
    """Print the accuracy on test images, or of a probe on sentence vectors."""
    with observing(json=json) as observer:
        found = resolve_model(text, weights, seed=seed, observer=observer)
        if dataset in TEXT_SETS:
            result = _probed(found, data, tokenizer, limit, observer)
        else:
            result = _tested(found, data, dataset, limit, observer)
    if json:
        print_json(result)
    else:
        what = "test images" if dataset not in TEXT_SETS else "held-out snippets, by a probe on their vectors,"
        print_rich(
            f"{found.name}: {100 * result['accuracy']:.2f} % of {result['n_examples']:,} {what} right "
            f"({result['dataset']}), {result['params']:,} parameters"
        )


def _probed(
    found: ResolvedModel, data: Path | None, tokenizer: Path | None, limit: int | None, observer: Observer
) -> dict[str, Any]:
    snippets = load_snippets(data, (tokenizer, found.folder), observer)
    return {
        "model": found.name,
        "dataset": TEXT_SETS[0],
        "source": snippets.texts.source,
        "n_examples": snippets.n_tested(limit),
        "accuracy": snippets.probe_accuracy(found.model, limit=limit, observer=observer),
        "params": count_params(found.model),
    }


def _tested(
    found: ResolvedModel, data: Path | None, dataset: str | None, limit: int | None, observer: Observer
) -> dict[str, Any]:
    images = first(load_images(dataset, data, observer), n_test=limit)
    check_fits(found.model, example_images(images, 2), found.name)
    return {
        "model": found.name,
        "dataset": images.name,
        "source": images.source,
        "n_examples": images.test_labels.numel(),
        "accuracy": accuracy_on_test(found.model, images),
        "params": count_params(found.model),
    }


def bench(
    text: str,
    other: str | None,
    weights: Path | None,
    *,
    batch: str,
    repeats: int,
    shape: str | None,
    seed: int,
    json: bool,
) -> None:
    """Print latencies."""
    sizes = _batch_sizes(batch)
    if repeats < 1:
        raise RankError(f"a number of runs must be positive: --repeats has {repeats}. Ask for 1 or more.")
    with observing(json=json) as observer:
        found = resolve_model(text, weights, seed=seed, observer=observer)
        contestants: dict[str, nn.Module] = {found.name: found.model}
        if other is not None:
            second = resolve_model(other, seed=seed, observer=observer, like=text)
            contestants[second.name if second.name != found.name else f"{second.name} (2)"] = second.model
        example = example_inputs(found.model, shape)
        if example is None:
            raise ShapeError(
                f"a model must be given inputs: those of {found.name} are not known. Pass their shape, such as --shape "
                "3x224x224."
            )
        for name, model in contestants.items():
            check_fits(model, example.expand(2, *example.shape[1:]), name)
        check_memory(max(sizes) * example.nbytes, "--batch")
        rows = measure_latency(contestants, example, batches=sizes, repeats=repeats)
    if json:
        print_json({"shape": list(example.shape[1:]), "latency": [asdict(row) for row in rows]})
    else:
        print_rich(inspect_table([_timed(row) for row in rows], title="One forward pass, milliseconds"))


def _timed(row: Latency) -> dict[str, Any]:
    """A row of ``bench``; beside a second model, what the paired turns say of the two."""
    shown = {key: value for key, value in asdict(row).items() if key != "speedup"}
    if row.speedup is None:
        return {**shown, "beside the first": ""}
    low, high = row.speedup
    return {**shown, "beside the first": speed_text(math.sqrt(low * high), low, high)}


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What ``compress`` was asked for, beside model and data."""

    budget: str
    out: Path
    epochs: int = 1
    steps: int | None = None
    lr: float | None = None
    heal: bool = True
    formats: list[str] | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    allow_slower: bool = False
    seed: int = 0


def compress(
    text: str,
    weights: Path | None,
    options: CompressOptions,
    *,
    data: Path | None,
    dataset: str | None,
    tokenizer: Path | None,
    shape: str | None,
    json: bool,
) -> None:
    """Compress, write checkpoint and report, and print the latter."""
    budgets = read_budgets_text(options.budget)
    if options.epochs < 0 or (options.steps or 0) < 0 or not (options.lr is None or 0 < options.lr < math.inf):
        raise RankError(
            f"healing must have a length and a rate: --epochs has {options.epochs}, --steps {options.steps} and --lr "
            f"{options.lr}. Pass a length of 0 or more and a positive rate."
        )
    options.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known before the work
    with observing(json=json) as observer:
        found = resolve_model(text, weights, seed=options.seed, observer=observer)
        material = gather(
            found, data=data, dataset=dataset, tokenizer=tokenizer, shape=shape, seed=options.seed, observer=observer
        )
        keywords = _keywords(found, material, options, observer)
        if len(budgets) == 1:
            result = _annotated(compress_model(found.model, budget=budgets[0][1], **keywords), found, material)
            files = _write(result, options.out, material)
            told, shown = _told_of_one(result), report_table(result.report)
        else:
            results = pareto(found.model, [budget for _, budget in budgets], **keywords).results
            curve = Pareto(tuple(_annotated(each, found, material) for each in results))
            files = _write_all(curve, budgets, options.out, material)
            told, shown = _told_of_all(curve), str(curve)
    if json:
        print_json({**told, "files": files})
    else:
        print_rich(shown, *(f"{what}: {path}" for what, path in files.items()))


def _told_of_one(result: CompressionResult) -> dict[str, Any]:
    told: dict[str, Any] = json_module.loads(result.report.to_json())
    return told


def _told_of_all(curve: Pareto) -> dict[str, Any]:
    return {"budgets": [asdict(row) for row in curve.rows]}


def _keywords(found: ResolvedModel, material: Material, options: CompressOptions, observer: Observer) -> dict[str, Any]:
    """What the library is called with, beside model and budget."""
    return {
        "data": material.batches,
        "heal": _healing(material, options),
        "evaluate": material.evaluate,
        "metric_name": material.metric_name,
        "example_inputs": material.example,
        "formats": options.formats or DEFAULT_FORMATS,
        "include": options.include,
        "exclude": options.exclude,
        "allow_slower": options.allow_slower,
        "output": material.output,
        "checkpoint": options.out / "heal.ckpt",
        "seed": options.seed,
        "name": found.name,
        "observer": observer,
    }


def _annotated(result: CompressionResult, found: ResolvedModel, material: Material) -> CompressionResult:
    notes = [] if found.trained else ["The weights before compression were random or set by the model's function."]
    notes += [material.note] if material.note else []
    return replace(result, report=replace(result.report, notes=(*result.report.notes, *notes)))


def _healing(material: Material, options: CompressOptions) -> Heal | bool:
    if not options.heal:
        return False
    epochs = options.epochs if options.steps is None else None
    rate = material.lr if options.lr is None else options.lr
    return Heal(epochs=epochs, steps=options.steps, lr=rate, loss=material.loss)


def _write(result: CompressionResult, out: Path, material: Material) -> dict[str, str]:
    save_pretrained(result.model, out / "model")
    if material.save_beside is not None:
        material.save_beside(out / "model")
    write_text_atomic(out / "plan.json", result.plan.to_json())
    result.report.save(out / "report.json")
    write_html(result.report, out / "report.html")
    return {
        "model": str(out / "model"),
        "plan": str(out / "plan.json"),
        "report": str(out / "report.json"),
        "page": str(out / "report.html"),
    }


def _write_all(curve: Pareto, budgets: Sequence[tuple[str, Any]], out: Path, material: Material) -> dict[str, str]:
    """A folder for every budget, and one report with the curve over them."""
    files: dict[str, str] = {}
    for (text, _), result in zip(budgets, curve.results, strict=True):
        written = _write(result, out / re.sub(r"[^0-9A-Za-z.]", "", text), material)
        files |= {f"{text} {what}": path for what, path in written.items()}
    report = curve.report
    report.save(out / "report.json")
    write_html(report, out / "report.html")
    curve.plot(out / "curve.png")
    beside = {"report": "report.json", "page": "report.html", "curve": "curve.png"}
    return files | {what: str(out / name) for what, name in beside.items()}


def demo(
    out: Path,
    *,
    data: Path | None,
    dataset: str | None,
    budget: str,
    seed: int,
    quick: bool,
    json: bool,
) -> bool:
    """Run the demo and print its result; tell whether the reloaded model agrees."""
    settings = DemoSettings(
        out=out, data=data, dataset=dataset, budget=read_budget_text(budget), seed=seed, quick=quick
    )
    with observing(json=json) as observer:
        result = run_demo(settings, observer)
    if json:
        print_json(result.to_dict())
    else:
        print_rich(report_table(result.report), *_demo_lines(result))
    return result.agrees


def _demo_lines(result: DemoResult) -> list[str]:
    verdict = "the same to the last digit" if result.agrees else "NOT THE SAME"
    return [
        f"accuracy, dense:                       {result.dense_accuracy!r}",
        f"accuracy, compressed:                  {result.compressed_accuracy!r}",
        f"accuracy, reloaded in a new process:   {result.reloaded_accuracy!r}  ({verdict})",
        *(f"{what}: {path}" for what, path in result.files.items()),
        "seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in result.seconds.items()),
    ]


def build_kernels(*, force: bool, json: bool) -> None:
    """Compile what runs contraction plans without Python between their products."""
    start = time.perf_counter()
    path = kernels.build(force=force)
    seconds = round(time.perf_counter() - start, 1)
    if json:
        print_json({"library": str(path), "seconds": seconds})
    else:
        print(f"The kernels are ready ({seconds:g} s): {path}")


def read_budgets_text(text: str) -> list[tuple[str, Any]]:
    """One budget, or several with commas between them as in ``1.5x,2x,3x``; each with its text.

    Raises:
        BudgetError: One of them cannot be read, or stands there twice.
    """
    if "=" in text:  # there, commas stand between the digits of a number
        return [(text, read_budget_text(text))]
    parts = [part.strip() for part in text.split(",") if part.strip()] or [text]
    if len(set(parts)) < len(parts):
        raise BudgetError(f"budgets must differ: --budget has {text!r}. Leave out what stands there twice.")
    return [(part, read_budget_text(part)) for part in parts]


def read_budget_text(text: str) -> str | float | dict[str, Any]:
    """A budget from the command line: ``20x``, ``0.05``, ``params=10000``, ``flops=4x``, ``bytes=2x+latency_ms=5``.

    Raises:
        BudgetError: It cannot be read.
    """
    if "=" in text:
        pairs = [part.partition("=") for part in text.split("+")]
        return {measure.strip(): _budget_value(value.strip(), text) for measure, _, value in pairs}
    if re.fullmatch(r"0?\.\d+|1(\.0*)?", text.strip()):
        return float(text)
    return text


def _budget_value(value: str, text: str) -> int | float | str:
    if re.fullmatch(r"[0-9_,]{1,30}", value):
        return int(re.sub("[_,]", "", value) or 0)
    if re.fullmatch(r"\d*\.\d+", value):
        return float(value)
    if re.fullmatch(r"\d+(\.\d+)?[xX]", value):
        return value
    raise BudgetError(
        f"a budget must name a number: --budget has {text!r}, expected such as params=100000 or flops=4x. "
        "Write the number after the equals sign."
    )


def _batch_sizes(text: str) -> list[int]:
    if not re.fullmatch(r"\s*[1-9][0-9]{0,14}(\s*,\s*[1-9][0-9]{0,14})*\s*", text):
        raise ShapeError(
            f"batch sizes must be positive numbers: --batch has {text!r}, expected such as 1,128. Put commas between."
        )
    return [int(size) for size in text.split(",")]
