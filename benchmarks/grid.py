"""Time the recorded shapes and a random grid of layers and trains, in one command, each asleep before its turn.

    python benchmarks/grid.py --out benchmarks/results/grid.json           # the record, half an hour at most
    python benchmarks/grid.py --report benchmarks/results/grid.json        # docs/benchmarks-grid.md and its plot
    python benchmarks/grid.py --quick                                      # does everything work?
    python benchmarks/grid.py --part conv --threads 2 --kernels with --minutes 5

The seed of the grid is the date of the run, so that nobody tunes for it; ``--seed`` repeats an older one. Each number
of threads runs in processes of its own, with kernels and without, all on the same cases in the same order: where time
is short, the last ones are left out, and the record says how many. README.md in this folder tells how a number is made.
"""

from __future__ import annotations

# Reads --threads from the command line, and has to do so before torch is loaded.
import tensor_core  # isort: skip
import argparse
import atexit
import datetime
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grid_cases
import grid_report
import layer_extras
import layers
import torch
from grid_layers import time_grid_layer
from layer_cases import FIXED, PHASES, Case, every_plan, plan_key
from layer_peers import PEER_NAMES as LAYER_PEERS
from peers import libraries
from tensor_cases import CASES, drawn_cases
from timing import Rates, Turns

from tensortrain.contract import CostModel, cost_model
from tensortrain.system import native as kernels
from tensortrain.system.files import write_text_atomic
from tensortrain.system.provenance import provenance
from tensortrain.system.timing import calls_in_a_row

PARTS = ("linear", "conv", "embedding", "recurrent", "core", "plans")
SIZES = {"linear": 24, "conv": 16, "embedding": 12, "recurrent": 10, "core": 25, "plans": 12}
QUICK_SIZES = {"linear": 2, "conv": 2, "embedding": 2, "recurrent": 2, "core": 5, "plans": 2}
OVERTIME_S = 120.0  # for the case that is at work when the time is up
MOST_PLANS = 40  # of one layer; where it has more, they are drawn
SHARES = {(2, "with"): 3.0, (1, "with"): 3.0, (2, "without"): 1.5, (1, "without"): 1.5}  # of the time
Item = tuple[str, Callable[[], Iterator[dict[str, Any]]]]


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.report:
        record = json.loads(Path(args.report).read_text(encoding="utf-8"))
        grid_report.write(record, args.report, args.docs)
        print("\n".join(grid_report.summary(record)))
        return 0
    warnings.simplefilter("ignore")
    return _work(args) if args.rows else _benchmark(args)


# -- all processes ------------------------------------------------------------------------------------


def _benchmark(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    ways = list(itertools.product(args.threads, args.kernels))
    total = sum(SHARES.get(way, 1.0) for way in ways)
    record: dict[str, Any] = {
        **provenance(seed=args.seed),
        "quick": args.quick,
        "minutes": args.minutes,
        "kernels": kernels.library() is not None,
        "peers": _peers(args.peers),
        "sizes": _sizes(args),
        "runs": [],
    }
    for n_threads, with_kernels in ways:
        seconds = 60 * args.minutes * SHARES.get((n_threads, with_kernels), 1.0) / total
        record["runs"].append(_run(args, n_threads, with_kernels, seconds))
        record["wall_s"] = round(time.perf_counter() - began, 1)
        if args.out:  # after each run, so that one cut short leaves what it has
            write_text_atomic(args.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    print("\n".join(grid_report.summary(record)))
    broken = [f"{row['case']}: {row['broken']}" for run in record["runs"] for row in run["rows"] if row.get("broken")]
    if broken:
        print("ours failed: " + "; ".join(broken), file=sys.stderr)
    return 1 if broken else 0


def _run(args: argparse.Namespace, n_threads: int, with_kernels: str, seconds: float) -> dict[str, Any]:
    """One number of threads, with kernels or without, in a process of its own."""
    print(f"-- {n_threads} threads, {with_kernels} kernels, {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        words = [sys.executable, __file__, "--threads", str(n_threads), "--rows", str(rows), "--kernels", with_kernels]
        words += ["--seed", str(args.seed), "--run-s", str(seconds), "--peers", args.peers]
        words += ["--quick"] * args.quick + [word for part in args.part for word in ("--part", part)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
        if with_kernels == "without":
            environment["TENSORTRAIN_KERNELS"] = "off"
        began = time.perf_counter()
        status = _ended(words, environment, seconds + OVERTIME_S)
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    run: dict[str, Any] = {"threads": n_threads, "kernels": with_kernels, "status": status}
    run.update(measured={}, n_left_out=None)
    run["rows"] = [row for row in found if "case" in row]
    for row in found:
        run.update(row if "case" not in row else {})
    run["wall_s"] = round(time.perf_counter() - began, 1)
    return run


def _ended(words: list[str], environment: dict[str, str], most_s: float) -> int | None:
    """The exit status of a process; None of one that had to be ended."""
    try:
        return subprocess.run(words, env=environment, check=False, timeout=most_s).returncode
    except subprocess.TimeoutExpired:
        return None


def _peers(peers: str) -> dict[str, str]:
    core = {library.name: library.version for library in libraries(_of_core(peers))[0] if not library.ours}
    return {**layer_extras.versions("all" if peers == "all" else "none", LAYER_PEERS), **core}


def _of_core(peers: str) -> str:
    return "all" if peers == "all" else "none"


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    return {part: n for part, n in (QUICK_SIZES if args.quick else SIZES).items() if part in args.part}


# -- one process --------------------------------------------------------------------------------------


def _work(args: argparse.Namespace) -> int:
    """Time case after case until the time is up; a line of JSON for each row."""
    end = time.perf_counter() + args.run_s
    torch.set_num_threads(args.threads[0])
    if args.kernels == ["with"] and kernels.library() is None:
        print("The kernels are not built: nothing to time. Run tensortrain build-kernels.", file=sys.stderr)
        return 1
    with open(args.rows, "a", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()

        rates = Rates(args.quick)
        rates.of(torch.float32), rates.of(torch.float64)
        write({"measured": rates.as_dict()})
        items = _items(args, rates)
        for done, (_, run) in enumerate(items):
            if time.perf_counter() > end:
                write({"n_left_out": len(items) - done})
                return 0
            for row in run():
                print(grid_report.line(row), flush=True)
                write(row)
        write({"n_left_out": 0})
    return 0


def _items(args: argparse.Namespace, rates: Rates) -> list[Item]:
    """What there is to time, the parts in turns, so that a run cut short has something of each."""
    makers = {"core": _core_items, "plans": _plan_items, "linear": _linear_items}
    columns = [
        makers[part](args, rates, n) if part in makers else _layer_items(part, args, rates, n)
        for part, n in _sizes(args).items()
    ]
    turns = max(map(len, columns), default=0)
    places = [(k * turns / len(column), column[k]) for column in columns for k in range(len(column))]
    return [item for _, item in sorted(places, key=lambda place: place[0])]


def _linear_items(args: argparse.Namespace, rates: Rates, n: int) -> list[Item]:
    known = [("recorded", case) for case in FIXED[:: 4 if args.quick else 1]]
    return [_linear_item(*one, args, rates) for one in known + [("drawn", c) for c in _drawn("linear", args, n)]]


def _linear_item(group: str, case: Case, args: argparse.Namespace, rates: Rates) -> Item:
    def run() -> Iterator[dict[str, Any]]:
        for phase in PHASES:
            yield {"kind": "linear", "group": group, **layers.time_case(case, phase, rates, args)}

    return "linear", run


def _layer_items(kind: str, args: argparse.Namespace, rates: Rates, n: int) -> list[Item]:
    def item(case: Any) -> Item:
        def run() -> Iterator[dict[str, Any]]:
            for phase in PHASES:
                yield {"group": "drawn", **time_grid_layer(kind, case, phase, rates, args)}

        return kind, run

    return [item(case) for case in _drawn(kind, args, n)]


def _drawn(kind: str, args: argparse.Namespace, n: int) -> list[Any]:
    return grid_cases.draw(kind, args.seed, n)


def _core_items(args: argparse.Namespace, rates: Rates, n: int) -> list[Item]:
    args.drawn = (args.seed, n)
    found, _ = libraries(_of_core(args.peers))
    checker = tensor_core.Checker(args)
    atexit.register(checker.close)
    recorded = [("recorded", case) for case in CASES.values()][:: 8 if args.quick else 2]

    def item(group: str, case: Any) -> Item:
        def run() -> Iterator[dict[str, Any]]:
            row = tensor_core.run_case(case, found, checker, rates, args)
            yield {"kind": "core", "group": group, "phase": row["operation"], **row}

        return "core", run

    drawn = [("drawn", case) for case in drawn_cases(args.seed, n).values()]
    mixed = [pair for pairs in itertools.zip_longest(drawn, recorded) for pair in pairs if pair is not None]
    return [item(*one) for one in mixed]


def _plan_items(args: argparse.Namespace, rates: Rates, n: int) -> list[Item]:
    """All plans of the drawn linear layers: what was predicted, and what they took."""

    def item(case: Case) -> Item:
        def run() -> Iterator[dict[str, Any]]:
            for training in (False, True):
                yield {"kind": "plans", "group": "drawn", **time_every_plan(case, training, args)}

        return "plans", run

    return [item(case) for case in _drawn("linear", args, n)]


def time_every_plan(case: Case, training: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured time of the plans of one layer, each the fastest of a few calls."""
    torch.manual_seed(args.seed)
    layer, model = case.build(), cost_model("cpu")
    cores = [core.detach().requires_grad_(training) for core in layer.cores]
    x = torch.randn(case.batch, layer.in_features).requires_grad_(training)
    g = torch.randn(case.batch, layer.out_features)
    with torch.set_grad_enabled(training):
        plans = list(every_plan(layer.plan(case.batch).chain, case.batch, training, model=model))
        plans = random.Random(args.seed).sample(plans, min(MOST_PLANS, len(plans)))
        found = []
        for plan in sorted(plans, key=lambda plan: plan.predicted_s):
            turns = Turns(layers.plan_run(plan, x, g, cores, training), 1, n_in_a_row=calls_in_a_row(plan.predicted_s))
            turns.run()  # without what only a first call costs
            found.append((plan_key(plan), plan.predicted_s * 1e3, layers.once_of(turns, 0.05) * 1e3))
            if found[-1][2] > 1e3:
                break
    return {"case": case.name, "phase": PHASES[training], "plans": found, "model": _name_of(model)}


def _name_of(model: CostModel) -> str:
    return str(model)[:200]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=27.0, help="time for all of it (default 27)")
    parser.add_argument("--threads", type=_numbers, default=[2, 1], help="numbers of threads (default 2,1)")
    parser.add_argument("--kernels", choices=("both", "with", "without"), default="both")
    parser.add_argument("--seed", type=int, default=int(datetime.date.today().strftime("%Y%m%d")), help="the date")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: does everything work?")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--peers", choices=("all", "none"), default="all")
    parser.add_argument("--report", metavar="JSON", help="no run: write --docs from this record")
    parser.add_argument("--docs", default="docs/benchmarks-grid.md", help="page written by --report")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--run-s", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.part = args.part or list(PARTS)
    if args.kernels == "both":
        args.kernels = ["with", "without"] if kernels.library() is not None else ["without"]
    else:
        args.kernels = [args.kernels]
    if args.rows:
        _set_limits(args)
    return args


def _set_limits(args: argparse.Namespace) -> None:
    """What the parts ask of their arguments: seconds and rounds of a row, limits of a check."""
    args.seconds, args.rounds = (0.05, 2) if args.quick else (1.2, 15)
    args.case_seconds, args.limit, args.memory_limit, args.drawn = (0.2 if args.quick else 4.0), 8.0, 4e9, None


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
