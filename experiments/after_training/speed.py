"""How long does one example take through the models that ``run.py`` made, beside the original's time?

All models of a subject take turns on one example (``measure_latency``), so that a machine that slows down slows all.
The figures go beside the records; ``run.py --summary`` takes them in.

    python experiments/after_training/speed.py --out runs/after_training                 # what is not timed yet
    python experiments/after_training/speed.py --subject encoder --again                 # anew
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortrain.compression import provenance, write_text_atomic
from tensortrain.compression.report.measure import Latency, measure_latency

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # where classes of kept models are found


def time_subject(folder: Path, subject: str, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Milliseconds of one example through the original and through models kept in a folder."""
    original, example = torch.load(folder / f"{subject}-original.pt", weights_only=False)
    models: dict[str, nn.Module] = {"original": original}
    models |= {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}
    # Where a file's numbers come to lie is chance, and took one per cent of a small network's time.
    models = {name: copy.deepcopy(model) for name, model in models.items()}
    least = seconds * len(models)
    found = measure_latency(models, example, batches=(1,), repeats=40, min_time_s=least, max_time_s=3 * least)
    return {"times": {one.name: _figures(one) for one in found}, "provenance": provenance()}


def _figures(one: Latency) -> dict[str, Any]:
    shown = {"ms": round(one.median_ms, 4), "p90_ms": round(one.p90_ms, 4), "runs": one.n_runs, "threads": one.threads}
    return shown if one.speedup is None else {**shown, "times_faster": [round(x, 3) for x in one.speedup]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/after_training"))
    parser.add_argument("--subject", action="append", help="only these models")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing a model")
    parser.add_argument("--again", action="store_true", help="also what is timed already")
    given = parser.parse_args()
    models = given.out / "models"
    (given.out / "speed").mkdir(exist_ok=True)
    for original in sorted(models.glob("*-original.pt")):
        subject = original.stem.removesuffix("-original")
        path = given.out / "speed" / f"{subject}.json"
        names = sorted(p.stem for p in models.glob(f"{subject}-*.pt") if p != original)
        known = json.loads(path.read_text())["times"] if path.exists() else {}
        wanted = given.subject is None or subject in given.subject
        if wanted and (given.again or not set(names) <= set(known)):
            found = time_subject(models, subject, names, given.seconds)
            write_text_atomic(path, json.dumps(found, indent=1) + "\n")
            print(subject, json.dumps(found["times"]), flush=True)


if __name__ == "__main__":
    main()
