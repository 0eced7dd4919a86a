"""Time factorized layers beside ``nn.Linear``, torchTT, tednet and TensorLy-Torch, in one interleaved run.

    python benchmarks/layers.py --all --threads 2 --out benchmarks/results/layers.json     # the record
    python benchmarks/layers.py --report benchmarks/results/layers.json                    # docs/benchmarks-layers.md
    python benchmarks/layers.py --quick --all                                              # does everything work?

Without a part only the speed of layers is measured; ``--plans``, ``--memory``, ``--embedding``, ``--recurrent`` and
``--laws`` run one part each, ``--all`` everything. Nobody is timed before its output, and in training its gradients,
have been checked against the dense weight. README.md in this folder tells how each number is made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import layer_extras
import layer_report
import torch
import torch.nn.functional as F
from layer_cases import FIXED, GRID, PHASES, Case, every_plan, floor, plan_key
from layer_peers import DENSE, OURS, PEER_NAMES, Way, dense_way, our_way, peer_ways
from timing import Rates, Turns, take_turns
from torch import Tensor

import tensortrain as tt
from tensortrain.contract import (
    ContractionPlan,
    chain_to_dense,
)
from tensortrain.nn.runner import may_be_dense
from tensortrain.system import (
    native as kernels,
)
from tensortrain.system.files import write_text_atomic
from tensortrain.system.provenance import provenance
from tensortrain.system.timing import calls_in_a_row

PARTS = ("speed", "plans", "memory", "embedding", "recurrent", "laws")
# Relative Frobenius error of float32 against float64. Sweeps of some peers round more: 1.7e-5 was seen in the gradients
# of 25088 -> 4096 at batch 100. Cores laid out wrongly would differ by about 1.
TOL, PEER_TOL = 1e-5, 1e-4
MOST_ROUNDS = 200
HOPELESS = 4.0  # a way slower than its library's best by this factor is timed once more only
PLAN_FACTOR, MOST_PLANS = 2.0, 12  # plans within this factor of the fastest are timed carefully, at most so many


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.report:
        record = json.loads(Path(args.report).read_text(encoding="utf-8"))
        layer_report.show(record)
        layer_report.write(record, args.report, args.docs)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.memory_worker:
        print(json.dumps(layer_extras.memory_of(args.memory_worker)))
        return 0
    return _benchmark(args)


def _benchmark(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    rates = Rates(args.quick)
    rates.of(torch.float32)
    record = {
        **provenance(seed=args.seed),
        "quick": args.quick,
        "row_s": args.seconds,
        "peers": {},
        "kernels": kernels.library() is not None,
        "measured": rates.as_dict(),
    }
    runs: dict[str, Callable[[], None]] = {
        "speed": lambda: _speed(record, rates, args),
        "plans": lambda: _plans(record, args),
        "memory": lambda: _part(record, "memory", layer_extras.memory(__file__)),
        "embedding": lambda: _part(record, "embedding", layer_extras.embedding(args.quick, args.seed)),
        "recurrent": lambda: _part(record, "recurrent", layer_extras.recurrent(args.quick, args.seed)),
        "laws": lambda: _part(record, "laws", layer_extras.laws(args.quick)),
    }
    for part in args.parts:
        runs[part]()
        record["wall_s"] = round(time.perf_counter() - began, 1)
        if args.out:  # after each part, so that a run cut short leaves what it has
            write_text_atomic(args.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    broken = [f"{row['case']}, {row['phase']}: {row['broken']}" for row in record.get("rows", ()) if row["broken"]]
    if broken:
        print("ours failed: " + "; ".join(broken), file=sys.stderr)
    return 1 if broken else 0


def _part(record: dict[str, Any], name: str, found: Any) -> None:
    record[name] = found
    print("\n".join(layer_report.lines(name, found)), flush=True)


# -- speed --------------------------------------------------------------------------------------------


def _speed(record: dict[str, Any], rates: Rates, args: argparse.Namespace) -> None:
    record["peers"], record["rows"] = layer_extras.versions(args.peers, PEER_NAMES), []
    few = args.quick and not args.case
    for group, cases in (("fixed", FIXED[:: 2 if few else 1]), ("grid", GRID[: 4 if few else None])):
        for case in cases:
            if args.case and case.name not in args.case:
                continue
            for phase in PHASES:
                row = {"group": group, **time_case(case, phase, rates, args)}
                record["rows"].append(row)
                print(layer_report.line(row), flush=True)


def time_case(case: Case, phase: str, rates: Rates, args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time, all libraries on one layer, batch size and phase."""
    training = phase == PHASES[1]
    torch.manual_seed(args.seed)
    layer = case.build().train(training)
    problem = Problem(layer, case.batch, training)
    peers, absent = peer_ways(layer, args.peers)
    plan_of_ours: dict[str, Any] = {}
    times: dict[str, Turns] = {}
    failed: dict[str, str] = {}
    ways = [dense_way(problem.weight, problem.bias), our_way(layer), *peers]
    with torch.set_grad_enabled(training):
        for way in ways:
            reason = problem.check(way)
            if reason:
                failed[way.name] = reason
        ways = [way for way in ways if way.name not in failed]
        times = turns_of(ways, problem, args)
        take_turns(times, seed=args.seed)
        plan_of_ours = _plan_facts(layer.plan(case.batch))
    n_bytes, flops = floor(problem.chain, case.batch, training)
    floor_s = max(n_bytes / rates.bandwidth, flops / rates.of(torch.float32))
    return {
        "case": case.name,
        "layer": case.layer_name,
        "batch": case.batch,
        "phase": phase,
        "in_modes": case.in_modes,
        "out_modes": case.out_modes,
        "ranks": layer.ranks,
        "target": case.targets[phase],
        "plan": plan_of_ours,
        "floor": {"bytes": n_bytes, "flops": flops, "ms": floor_s * 1e3},
        "contestants": {
            way.name: {"library": way.library, **times[way.name].facts(), "rel_error": problem.errors[way.name]}
            for way in ways
        },
        "skipped": {**absent, **failed},
        "broken": failed.get(OURS, ""),
    }


class Problem:
    """Input, output gradient, and what the dense weight makes of them in float64."""

    def __init__(self, layer: tt.nn.Linear, batch: int, training: bool) -> None:
        assert layer.bias is not None
        self.training = training
        self.bias = layer.bias.detach()
        self.x = torch.randn(batch, layer.in_features).requires_grad_(training)
        self.g = torch.randn(batch, layer.out_features)
        self.errors: dict[str, float] = {}
        self.chain = layer.plan(batch).chain
        inputs = [tensor.detach().double() for tensor in (self.x, self.bias, *layer.cores)]
        x, bias, *cores = (tensor.requires_grad_(training) for tensor in inputs)
        weight = chain_to_dense(cores)
        self.weight = weight.detach().float()
        y = F.linear(x, weight, bias)
        self.expected = [y.detach()]
        if training:
            self.expected += torch.autograd.grad(y, inputs, self.g.double())

    def run(self, way: Way) -> Callable[[], Any]:
        """The timed call: a forward pass, or forward and backward to input and parameters."""
        x, g, forward = self.x, self.g, way.forward
        if not self.training:
            return lambda: forward(x)
        inputs = (x, way.bias, *way.cores)
        return lambda: torch.autograd.grad(forward(x), inputs, g)

    def check(self, way: Way) -> str:
        """Why this way is not timed, or ""."""
        try:
            if way.enter is not None:
                way.enter()
            y = way.forward(self.x)
            found = [y.detach()]
            if self.training:
                dx, dbias, *dcores = torch.autograd.grad(y, (self.x, way.bias, *way.cores), self.g)
                found += [dx, dbias.reshape(-1)]
                if way.in_our_layout is not None:
                    found += [way.in_our_layout(core, k) for k, core in enumerate(dcores)]
        except Exception as error:  # a peer may fail in any way; that must not end the run
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        errors = [_rel_error(a, b) for a, b in zip(found, self.expected, strict=False)]
        self.errors[way.name] = max(errors)
        tol = PEER_TOL if way.library not in (OURS, DENSE) else TOL
        return "" if max(errors) <= tol else f"differs from the dense weight by {max(errors):.2g}"


def _rel_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def turns_of(ways: Sequence[Way], problem: Any, args: argparse.Namespace) -> dict[str, Turns]:
    """How often each way runs: about equal time for each, little for those that do not stand for their library."""
    times = {way.name: Turns(problem.run(way), 1, way.enter) for way in ways}
    once: dict[str, float] = {}
    for way in ways:
        once[way.name] = once_of(times[way.name], HOPELESS * _best(ways, once, way.library))
    for way in ways:
        entry, seconds = times[way.name], once[way.name]
        if seconds <= HOPELESS * _best(ways, once, way.library):
            _set_length(entry, seconds, args.seconds / len(ways), 1 if args.quick else 3, args)
        else:
            entry.n_rounds, entry.seconds = 0, [seconds]
    return times


def _best(ways: Sequence[Way], once: dict[str, float], library: str) -> float:
    """Seconds of the fastest way of a library so far."""
    return min((once[way.name] for way in ways if way.library == library and way.name in once), default=math.inf)


def once_of(entry: Turns, enough_s: float) -> float:
    """Seconds of one call, the fastest of three; of two where it is slower than ``enough_s``, of one where it is slow.

    Never of one alone where it is quick: waking the threads takes a hundred times as long now and then.
    """
    best = math.inf
    for turn in range(3):
        best = min(best, entry.take_one())
        if best > (0.2 if turn == 0 else min(0.2, enough_s)):
            break
    return best


def _set_length(entry: Turns, once: float, seconds: float, least: int, args: argparse.Namespace) -> None:
    """Rounds, and calls in a row, that fill the time given."""
    entry.n_in_a_row = calls_in_a_row(once)
    entry.n_rounds = max(least, min(args.rounds, int(seconds / (once * entry.n_in_a_row))))


def _plan_facts(plan: ContractionPlan) -> dict[str, Any]:
    return {"name": plan_key(plan), "predicted_ms": plan.predicted_s * 1e3, "flops": plan.flops}


# -- plans --------------------------------------------------------------------------------------------


def _plans(record: dict[str, Any], args: argparse.Namespace) -> None:
    record["plans"] = []
    for case in GRID[: 4 if args.quick else None : 2]:
        for phase in PHASES:
            row = time_plans(case, phase == PHASES[1], args)
            record["plans"].append(row)
            print("\n".join(layer_report.lines("plans", [row])), flush=True)


def time_plans(case: Case, training: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Time every plan of a layer once, the fastest ones and the picked one side by side."""
    torch.manual_seed(args.seed)
    layer = case.build()
    cores = [core.detach().requires_grad_(training) for core in layer.cores]
    x = torch.randn(case.batch, layer.in_features).requires_grad_(training)
    g = torch.randn(case.batch, layer.out_features)
    with torch.set_grad_enabled(training):
        picked = layer.plan(case.batch)
        plans = {plan_key(plan): plan for plan in every_plan(picked.chain, case.batch, training)}
        if not may_be_dense(layer) and not picked.uses_dense:
            del plans["dense"]  # larger than a layer may keep unless told to
        turns = {key: Turns(plan_run(plan, x, g, cores, training), 1) for key, plan in plans.items()}
        once: dict[str, float] = {}
        for key in sorted(turns, key=lambda key: plans[key].predicted_s):
            turns[key].run()  # without what only a first call costs
            once[key] = once_of(turns[key], PLAN_FACTOR * min(once.values(), default=math.inf))
        name, best_s = plan_key(picked), min(once.values())
        ranking = sorted(once, key=lambda key: once[key])
        close = [key for key in ranking if once[key] <= PLAN_FACTOR * best_s][:MOST_PLANS]
        finalists = {key: turns[key] for key in dict.fromkeys([*close, name])}
        for key, entry in finalists.items():
            _set_length(entry, once[key], args.seconds / len(finalists), 1 if args.quick else 5, args)
        take_turns(finalists, seed=args.seed)
    best = min(finalists, key=lambda key: finalists[key].median_s)
    return {
        "case": case.name,
        "phase": PHASES[training],
        "n_plans": len(plans),
        "n_finalists": len(finalists),
        "picked": {"name": name, **finalists[name].facts(), "predicted_ms": picked.predicted_s * 1e3},
        "best": {"name": best, **finalists[best].facts(), "predicted_ms": plans[best].predicted_s * 1e3},
        "ratio": finalists[name].median_s / finalists[best].median_s,
    }


def plan_run(plan: ContractionPlan, x: Tensor, g: Tensor, cores: Sequence[Tensor], training: bool) -> Callable[[], Any]:
    if not training:
        prepared = plan.prepare(cores)
        return lambda: plan.execute(x, cores, prepared)
    return lambda: torch.autograd.grad(plan.execute(x, cores), (x, *cores), g)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="every part")
    for part in PARTS[1:]:
        parser.add_argument(f"--{part}", action="append_const", dest="parts", const=part, help=f"the part {part}")
    parser.add_argument("--speed", action="append_const", dest="parts", const="speed", help="layers (the default)")
    parser.add_argument("--case", action="append", help="of the speed part, only this case; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--seconds", type=float, default=2.5, help="time for one row (default 2.5)")
    parser.add_argument(
        "--rounds", type=int, default=MOST_ROUNDS, help=f"most calls of one way (default {MOST_ROUNDS})"
    )
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: does everything work?")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEER_NAMES)}")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", metavar="JSON", help="no run: print this record and write --docs from it")
    parser.add_argument("--docs", default="docs/benchmarks-layers.md", help="page written by --report")
    parser.add_argument("--memory-worker", choices=tuple(layer_extras.MEMORY_CASES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = [case.name for case in (*FIXED, *GRID)]
    if args.list:
        print("\n".join(names))
        parser.exit()
    _check(parser, "--peers", args.peers.split(","), ("all", "none", *PEER_NAMES))
    _check(parser, "--case", args.case or (), names)
    args.parts = PARTS if args.all else [part for part in PARTS if part in (args.parts or ["speed"])]
    if args.quick:
        args.seconds, args.rounds = min(args.seconds, 0.05), min(args.rounds, 2)
    return args


def _check(parser: argparse.ArgumentParser, option: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        parser.error(f"{option} has {', '.join(unknown)}, expected some of {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
