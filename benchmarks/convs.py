"""Time factorized convolutions beside torch's and beside the peers' chains, and predictions beside measurements.

    python benchmarks/convs.py --threads 2 --out benchmarks/results/convs.json      # the record
    python benchmarks/convs.py --random 30 --seed 20261128                          # other shapes
    python benchmarks/convs.py --small 30 --seed 20261128 --training                # small ones, forward and backward
    python benchmarks/convs.py --show benchmarks/results/convs.json                 # the table of docs/formats.md

Every contender sleeps before its turn, since the threads of the one before spin for a while and would slow it down.
Nobody is timed before its output has been checked against torch's convolution with the dense kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conv_cases import FIXED, FORMATS, ConvCase, dense_of, layer_of, peers_of, random_cases, small_cases
from timing import Turns, take_turns

from tensortrain.system.files import write_text_atomic
from tensortrain.system.provenance import provenance

TOL = 1e-5  # of the output, relative Frobenius
SLEEP_S = 0.02
BURST_S, MOST_IN_A_ROW = 1e-3, 20


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.show:
        print(table(json.loads(Path(args.show).read_text(encoding="utf-8"))))
        return 0
    torch.manual_seed(args.seed)
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    if args.cpu_time:
        time.perf_counter = time.thread_time  # for the trials of layers, too
    chosen = random_cases(args.seed, args.random) if args.random else small_cases(args.seed, args.small) or FIXED
    cases = [case for case in chosen if args.case in case.name]
    record: dict[str, Any] = {
        "clock": "cpu" if args.cpu_time else "wall",
        "provenance": provenance(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "cases": [],
    }
    for case in cases:
        record["cases"].append(measure(case, args.formats, args.rounds, training=args.training))
        print(_line(record["cases"][-1]), flush=True)
        if args.out:
            write_text_atomic(Path(args.out), json.dumps(record, indent=1))
    _summarize(record["cases"])
    return 0


def measure(case: ConvCase, formats: Sequence[str], rounds: int, *, training: bool = False) -> dict[str, Any]:
    """Times of one case: torch's layer, ours in every format, the peers' chains."""
    dense, x = dense_of(case), case.input().requires_grad_(training)
    layers = {name: layer_of(case, name) for name in formats}
    with torch.set_grad_enabled(training):
        for name, layer in layers.items():
            error = _error(layer(x), layer.to_dense()(x))
            if error > TOL:
                raise SystemExit(f"{case.name}: {name} errs by {error:.1e}")
        peers = peers_of(case)
        calls = {"dense": dense, **layers, **peers}
        turns = {name: _turns(call, x, rounds, training) for name, call in calls.items()}
        take_turns(turns)
        plans = {name: layer.plan(case.batch, case.spatial) for name, layer in layers.items()}
    found: dict[str, Any] = {"case": case.name, "training": training}
    for name, turn in turns.items():
        facts = {"ms": turn.median_s * 1e3}
        if name in plans:
            plan = plans[name]
            facts |= {"predicted_ms": plan.predicted_s * 1e3, "way": plan.words, "n_params": layers[name].n_params}
            facts |= {"is_measured": plan.is_measured, "is_peer": False}
        found[name] = {**facts, "is_peer": name in peers}
    return found


def _turns(call: Callable[..., Any], x: torch.Tensor, rounds: int, training: bool) -> Turns:
    run = (lambda: call(x).sum().backward()) if training else (lambda: call(x))
    for _ in range(2):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    in_a_row = max(1, min(MOST_IN_A_ROW, int(BURST_S / seconds)))

    def enter() -> None:
        time.sleep(SLEEP_S)
        run()  # wakes the threads and fills the caches

    return Turns(run, rounds, enter, in_a_row)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found - exact).norm() / exact.norm().clamp_min(1e-30)).detach())


def _ours(found: dict[str, Any]) -> dict[str, Any]:
    return {name: facts for name, facts in found.items() if isinstance(facts, dict) and "way" in facts}


def _best_peer(found: dict[str, Any]) -> float | None:
    times = [facts["ms"] for facts in found.values() if isinstance(facts, dict) and facts["is_peer"]]
    return min(times) if times else None


def _line(found: dict[str, Any]) -> str:
    dense, peer = found["dense"]["ms"], _best_peer(found)
    ours = sorted(_ours(found).items(), key=lambda item: item[1]["ms"])
    told = [f"{name} {dense / facts['ms']:.2f}x" for name, facts in ours]
    beside = "" if peer is None else f", best peer {dense / peer:.2f}x"
    return f"{found['case']}: dense {dense:.3f} ms{beside}; {', '.join(told)}"


def _summarize(cases: list[dict[str, Any]]) -> None:
    speeds = [found["dense"]["ms"] / facts["ms"] for found in cases for facts in _ours(found).values()]
    off = [facts["predicted_ms"] / facts["ms"] for found in cases for facts in _ours(found).values()]
    within = sum(1 / 1.5 <= ratio <= 1.5 for ratio in off) / len(off)
    pairs = [(_best_peer(found), min(f["ms"] for f in _ours(found).values())) for found in cases]
    gains = [peer / best for peer, best in pairs if peer is not None]
    print(f"slowest of ours {min(speeds):.2f}x dense; below 0.9x: {sum(s < 0.9 for s in speeds)} of {len(speeds)}")
    print(f"predicted within 1.5x of measured: {within:.0%}")
    if gains:
        print(f"best of ours over best peer: {math.exp(statistics.mean(map(math.log, gains))):.2f}x in the mean")


def table(record: dict[str, Any]) -> str:
    """The table of docs/formats.md."""
    names = list(_ours(record["cases"][0]))
    lines = ["| convolution | dense, ms | " + " | ".join(f"`{name}`" for name in names) + " | best peer |"]
    lines += ["|---" * (len(names) + 3) + "|"]
    for found in record["cases"]:
        dense, peer = found["dense"]["ms"], _best_peer(found)
        cells = [f"{dense / found[name]['ms']:.1f}" for name in names]
        beside = "" if peer is None else f"{dense / peer:.1f}"
        lines.append(f"| {found['case']} | {dense:.2f} | " + " | ".join(cells) + f" | {beside} |")
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random convolutions, not the fixed ones")
    parser.add_argument("--small", type=int, default=0, metavar="N", help="N small convolutions, not the fixed ones")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--cpu-time", action="store_true", help="one thread by its CPU time, on a busy machine")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--show", metavar="JSON", help="print the table of a record")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
