"""Ranks that are found while a model trains: does each method find planted ranks, and what does it leave of real nets?

python experiments/ranks/run.py --out runs/ranks --part planted     # one part (planted, fashion, svgd, conv)
python experiments/ranks/run.py --out runs/ranks                    # all of them, or what is left
python experiments/ranks/run.py --out runs/ranks --summary          # tables, results.json and plot of what is there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import convolutions  # noqa: E402
import images  # noqa: E402
import particles  # noqa: E402
import planted  # noqa: E402
from study import file_name, once  # noqa: E402
from summary import summarize  # noqa: E402

from tensortrain.compression import provenance  # noqa: E402

PARTS = {
    "planted": planted.run,
    "fashion": images.run_mlp,
    "svgd": particles.run_particles,
    "conv": convolutions.run_convolutions,
}


def timed(part: str, name: str, given: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """One run, with the seconds of this process that it took."""
    start = time.process_time()
    found = PARTS[part](name, given, seed, folder)
    seconds = round(time.process_time() - start, 1)
    return {
        "part": part,
        "method": name,
        "seed": seed,
        **found,
        "cpu_seconds": seconds,
        "provenance": provenance(seed=seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these parts")
    parser.add_argument("--method", action="append", help="only these methods")
    parser.add_argument("--summary", action="store_true", help="tables and figure of what is there")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--record", type=Path, help="sum up at the end: where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    if given.summary:
        summarize(given.out, config, given.record or HERE)
        return
    for part in given.part or PARTS:
        settings = config[part]
        for seed in given.seed or settings["seeds"]:
            for name in given.method or settings["methods"]:
                folder = given.out / part
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{file_name(name)}-{seed}.json"
                found = once(path, partial(timed, part, name, settings, seed, folder))
                shown = {key: value for key, value in found.items() if key not in ("provenance", "part", "method")}
                print(part, name, shown, flush=True)
    if given.record:
        summarize(given.out, config, given.record)


if __name__ == "__main__":
    main()
