"""Does the planning of a decoder of 0.4 GB, killed with ``kill -9`` in one stage after another, end with the same plan?

The model and the data of ``run.py``. A process plans from a working folder and is killed in the middle of a stage; the
next one goes on from the folder and is killed in the next stage, until one comes to its end. Its plan is set beside the
one of a process that was left alone in a folder of its own. Times of layers are predicted for a fixed machine.

    OMP_NUM_THREADS=1 python experiments/large_models/killed.py --out runs/large_models_killed
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from run import HERE, made

from tensortrain.compression import Silent, plan_compression, provenance, write_text_atomic
from tensortrain.contract import CostModel, use_cost_model

KILLS = (("gradients", 3), ("widths", 5), ("candidates", 30))


class Killed(Silent):
    """An observer that ends its own process as ``kill -9`` does, at a step of a stage."""

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step, self.name = where, step, ""
        self.begun: list[str] = []

    def on_start(self, name: str, total: int | None) -> None:
        self.name = name
        self.begun.append(name)

    def on_step(self, n: int, **figures: float) -> None:
        if (self.name, n) == (self.where, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def plan(folder: Path, where: str, step: int) -> None:
    """Plan from a folder; the plan goes there too."""
    config = json.loads((HERE / "config.json").read_text())
    model, data = made(config)
    observer = Killed(where, step)
    with use_cost_model(CostModel.reference("cpu")):
        keywords: dict[str, Any] = {"n_batches": len(data), "work_dir": folder, "observer": observer}
        found = plan_compression(model, budget=config["budget"], data=data, **keywords)
    write_text_atomic(folder / "plan.json", found.to_json())
    print(json.dumps({"stages": observer.begun}))


def process(folder: Path, where: str = "", step: int = 0) -> dict[str, Any]:
    """How a process of its own ended."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--out", str(folder), "--kill", where, "--step", str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"killed_in": where, "step": step, "ended_by": done.returncode}
    print(row, done.stderr[-500:] if done.returncode not in (0, -signal.SIGKILL) else "", flush=True)
    return row | {"wall_s": round(time.perf_counter() - start, 1), "said": done.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--alone", type=Path, help="working folder of a planning that was left alone, to go on from")
    parser.add_argument("--kill", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kill is not None:
        plan(args.out, args.kill, args.step)
        return
    alone, killed = args.alone or args.out / "alone", args.out / "killed"
    alone.mkdir(parents=True, exist_ok=True)
    killed.mkdir(parents=True, exist_ok=True)
    rows = [process(killed, *each) for each in (*KILLS, ("", 0))]
    rows.append({"alone": True, **process(alone)})
    same = (alone / "plan.json").read_bytes() == (killed / "plan.json").read_bytes()
    found = {
        "equal_plans": same,
        "processes": rows,
        "threads": torch.get_num_threads(),
        "provenance": provenance(seed=0),
    }
    write_text_atomic(args.out / "killed.json", json.dumps(found, indent=1) + "\n")
    print("equal plans" if same else "OTHER PLANS")


if __name__ == "__main__":
    main()
