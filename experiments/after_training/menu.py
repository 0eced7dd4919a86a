"""Which formats do plans choose, and what does it cost to leave one of them off the menu?

Every model is calibrated once; then plans are made with the whole menu and with one format left out at a time. Beside
the loss that a plan predicts stands the one that is measured: the share of the original's output that the compressed
model spoils on batches that no plan has seen.

    python experiments/after_training/menu.py --out runs/menu              # all models, or what is left
    python experiments/after_training/menu.py --out runs/menu --subject listener
    python experiments/after_training/menu.py --out runs/menu --summary    # table and menu.json of what is there
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from run import SUBJECTS, formats_of  # noqa: E402
from study import by, file_name, once  # noqa: E402
from subject import Subject  # noqa: E402

from tensortrain.compression import CompressionPlan, count_params, provenance  # noqa: E402
from tensortrain.compression.api import plans_for  # noqa: E402
from tensortrain.compression.choose import planner  # noqa: E402
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS  # noqa: E402
from tensortrain.compression.proof import apply_proven  # noqa: E402
from tensortrain.compression.report.alone import loss_together  # noqa: E402
from tensortrain.compression.survey.task import task_on_batch  # noqa: E402
from tensortrain.errors import TTError  # noqa: E402
from tensortrain.system.observer import Silent  # noqa: E402

RATIOS = (1.5, 2.0)
LEFT_OUT = ("", *DEFAULT_FORMATS)
_HELD = 2  # batches that losses are measured on, after those of the calibration and those that plans hold back


def cells(name: str, subject: Subject, left_out: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Plans of one model at all sizes, for every format that is left out."""
    calibrate, known = planner._calibration, dict[None, Any]()

    def once_for_all(*given: Any) -> Any:
        if None not in known:
            known[None] = calibrate(*given)
        return known[None]

    held = _held(subject)
    with mock.patch.object(planner, "_calibration", once_for_all):
        for without, ratio in itertools.product(left_out, RATIOS):
            yield {"subject": name, "ratio": ratio, "without": without, **_planned(subject, ratio, without, held)}


def _held(subject: Subject) -> list[Any]:
    first = subject.options["n_batches"] + planner._HELD_BATCHES
    found = list(itertools.islice(subject.data, first, first + _HELD))
    return found or list(itertools.islice(subject.data, _HELD))


def _planned(subject: Subject, ratio: float, without: str, held: Sequence[Any]) -> dict[str, Any]:
    limit = int(count_params(subject.model) / ratio)
    formats = [name for name in DEFAULT_FORMATS if name != without]
    how = {**subject.options, "formats": formats}
    try:
        (plan,) = plans_for(subject.model, [{"params": limit}], heal=False, data=subject.data, **how)
    except TTError as error:
        return {"refused": str(error)}
    return {**_told(subject, plan, held), "limit": limit, "provenance": provenance(seed=0)}


def _told(subject: Subject, plan: CompressionPlan, held: Sequence[Any]) -> dict[str, Any]:
    built, plan, _ = apply_proven(subject.model, plan, inplace=False, observer=Silent())
    output = subject.options.get("output")
    task = task_on_batch(subject.model, held[0], task=subject.options.get("task"), output=output)
    return {
        "params_after": count_params(built),
        "formats": formats_of(plan),
        "predicted": sum(layer.loss or 0.0 for layer in plan.layers),
        "measured": loss_together(subject.model, built, plan, output, task, batches=held),
    }


def run(name: str, config: Mapping[str, Any], out: Path) -> None:
    """All cells of one model that are not recorded yet."""
    paths = {
        (without, ratio): out / f"{file_name(f'{name}-{ratio}-{without or DEFAULT_FORMATS}')}.json"
        for without, ratio in itertools.product(LEFT_OUT, RATIOS)
    }
    left_out = [without for without in LEFT_OUT if not all(paths[without, ratio].exists() for ratio in RATIOS)]
    if not left_out:
        return
    subject = SUBJECTS[name](config)
    for found in cells(name, subject, left_out):
        once(paths[found["without"], found["ratio"]], lambda found=found: found)
        print(_line(found), flush=True)


def _line(row: Mapping[str, Any]) -> str:
    without = f"without {row['without']}" if row["without"] else "all formats"
    start = f"{row['subject']:<9} {row['ratio']}x {without:<18}"
    if "refused" in row:
        return f"{start} refused: {row['refused'][:80]}"
    return f"{start} predicted {row['predicted']:.3g}, measured {row['measured']:.3g}, {row['formats']}"


def summarize(out: Path, target: Path) -> None:
    """Print the table, and write ``menu.json``."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    rows = []
    for _, group in by(found, "subject", "ratio").items():
        whole = next((one for one in group if not one["without"]), {})
        for one in group:
            row = {key: value for key, value in one.items() if key != "provenance"}
            for kind in ("predicted", "measured"):
                known = kind in one and whole.get(kind)
                row[f"{kind}_times"] = one[kind] / whole[kind] if known else None
            rows.append(row)
            print(_line(one))
    (target / "menu.json").write_text(json.dumps({"rows": rows, "provenance": provenance(seed=0)}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/menu"))
    parser.add_argument("--subject", action="append", choices=list(SUBJECTS), help="only these models")
    parser.add_argument("--summary", action="store_true", help="table and menu.json of what is there")
    parser.add_argument("--record", type=Path, default=HERE, help="where menu.json goes")
    given = parser.parse_args()
    config = json.loads((HERE / "config.json").read_text())["subjects"]
    given.out.mkdir(parents=True, exist_ok=True)
    for name in () if given.summary else given.subject or config:
        run(name, config[name], given.out)
    summarize(given.out, given.record)


if __name__ == "__main__":
    main()
