"""Time the tensor-train core beside torchTT, tntorch, teneva and tensorly, in one interleaved run.

    python benchmarks/tensor_core.py --threads 2 --out benchmarks/results/tensor_core.json
    python benchmarks/tensor_core.py --report benchmarks/results/tensor_core.json
    python benchmarks/tensor_core.py --quick --case "dot, rank 10"

Nobody is timed before its answer has been checked. The check runs in a process of its own, with a time limit, and
measures peak memory there; then all contenders that reached the tolerance take turns, round after round, so that
other work on the machine falls on all of them. README.md in this folder tells how each number is made.
"""

from __future__ import annotations

import os
import sys


def _set_threads() -> None:
    """NumPy's and torch's pools read their size when they are loaded, hence before the imports below."""
    given = [sys.argv[at + 1] for at, word in enumerate(sys.argv[:-1]) if word == "--threads"]
    if given and given[0].isdigit():
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = given[0]


_set_threads()

import argparse  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import queue  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Sequence  # noqa: E402
from dataclasses import dataclass, field, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import tensor_report  # noqa: E402
import torch  # noqa: E402
from peers import PEER_NAMES, Call, Job, Library, default_dtype, libraries  # noqa: E402
from tensor_cases import CASES, Case, Problem, drawn_cases  # noqa: E402
from timing import BARE_ALLOCATOR, MOST_REST_S, Rates, measured, p90, rest  # noqa: E402

from tensortrain.errors import TTError  # noqa: E402
from tensortrain.system.files import write_text_atomic  # noqa: E402
from tensortrain.system.provenance import provenance  # noqa: E402

UNIT = "x.clone()"
# A peer whose tolerance does not mean the relative error of the whole is asked for less until it gets there.
TIGHTEN = (1.0, 0.3, 0.1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Contender:
    """One call of one library."""

    library: Library
    call: Call

    @property
    def name(self) -> str:
        return f"{self.library.name} {self.call.label}".strip()

    def load(self, problem: Problem) -> list[Any]:
        load = self.call.load or self.library.load
        return [load(kind, data) for kind, data in problem.args]

    def unload(self, result: Any) -> Any:
        return (self.call.unload or self.library.unload)(result)


@dataclass
class Times:
    """Wall seconds of one contender, and how many rounds it takes part in."""

    run: Callable[[], Any]
    n_rounds: int
    seconds: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.report:
        record = json.loads(Path(args.report).read_text(encoding="utf-8"))
        tensor_report.show(record)
        write_text_atomic(args.docs, tensor_report.markdown(record, args.report, args.docs))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.worker:
        return _work(args)
    return _benchmark(args)


def _benchmark(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    found, absent = libraries(args.peers)
    rates = Rates(args.quick)
    checker = Checker(args)
    rows = []
    try:
        for name in args.case or CASES:
            row = run_case(CASES[name], found, checker, rates, args)
            rows.append(row)
            print(tensor_report.line(row), flush=True)
    finally:
        checker.close()
    record = {
        **provenance(seed=0),
        "wall_s": round(time.perf_counter() - began, 1),
        "quick": args.quick,
        "rounds": args.rounds,
        "limit_s": args.limit,
        "case_s": args.case_seconds,
        "peers": {library.name: library.version for library in found if not library.ours},
        "absent": absent,
        "measured": rates.as_dict(),
        "rows": rows,
    }
    if args.out:
        write_text_atomic(args.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    broken = [f"{row['case']}: {name} ({row['skipped'][name]})" for row in rows for name in row["broken"]]
    if broken:
        print("ours failed: " + "; ".join(broken), file=sys.stderr)
    return 1 if broken else 0


def run_case(
    case: Case, found: Sequence[Library], checker: Checker, rates: Rates, args: argparse.Namespace
) -> dict[str, Any]:
    """Check every contender, time those that agree, and say why the others are missing."""
    problem = case.make(args.quick)
    rate = rates.of(problem.dtype)
    skipped = {
        library.name: library.lacks.get(case.operation, "has no such operation")
        for library in found
        if case.operation not in library.calls
    }
    checked: dict[str, dict[str, Any]] = {}
    broken = []
    entrants = _contenders(case, found)
    for contender in entrants:
        reason = _hopeless(contender, problem, rate, skipped, args)
        answer = {"reason": reason} if reason else checker.check(case, contender)
        if "reason" in answer:
            skipped[contender.name] = answer["reason"]
            if contender.library.ours and answer.get("broken"):
                broken.append(contender.name)
        else:
            checked[contender.name] = answer
    entrants = [contender for contender in entrants if contender.name in checked]
    with default_dtype(problem.dtype):
        times = _interleave(case, problem, entrants, checked, args)
    n_bytes, flops = problem.floor
    floor_s = max(n_bytes / rates.bandwidth, flops / rate)
    unit = statistics.median(times[UNIT].seconds) if case.unit else None
    results = {}
    for contender in entrants:
        seconds = times[contender.name].seconds
        median = statistics.median(seconds)
        results[contender.name] = {
            "library": contender.library.name,
            "ours": contender.library.ours,
            "median_ms": median * 1e3,
            "p90_ms": p90(seconds) * 1e3,
            "n_calls": len(seconds),
            "over_floor": median / floor_s,
            **({"over_clone": median / unit} if unit else {}),
            **checked[contender.name],
        }
    return {
        "case": case.name,
        "operation": case.operation,
        "dtype": str(problem.dtype).removeprefix("torch."),
        **problem.shapes,
        "eps": problem.job.eps,
        "max_rank": problem.job.max_rank,
        "input_bytes": sum(_bytes_of(data) for _, data in problem.args),
        "floor": {"bytes": n_bytes, "flops": flops, "ms": floor_s * 1e3},
        "clone_ms": unit and unit * 1e3,
        "contenders": results,
        "skipped": skipped,
        "broken": broken,
    }


def _contenders(case: Case, found: Sequence[Library]) -> list[Contender]:
    return [Contender(library, call) for library in found for call in library.calls.get(case.operation, ())]


def _hopeless(
    contender: Contender, problem: Problem, rate: float, skipped: dict[str, str], args: argparse.Namespace
) -> str:
    """Why a contender need not even be tried, or ""."""
    call = contender.call
    if call.missing:
        return call.missing
    faster = f"{contender.library.name} {call.slower_than}"
    if call.slower_than and "over the limit" in skipped.get(faster, ""):
        return f"{faster}, the faster way, is over the limit already"
    n_bytes, flops = problem.predicted.get(call.forms, (0, 0))
    if n_bytes > args.memory_limit:
        return f"forms {n_bytes / 1e9:.3g} GB, over the limit of {args.memory_limit / 1e9:.3g} GB"
    if flops / rate > args.limit:
        return f"takes {flops:.2g} flops, {flops / rate:.0f} s at the GEMM rate, over the limit of {args.limit:g} s"
    return ""


# -- timing -------------------------------------------------------------------------------------------


def _interleave(
    case: Case, problem: Problem, entrants: Sequence[Contender], checked: dict[str, Any], args: argparse.Namespace
) -> dict[str, Times]:
    """Rounds in which every contender runs once, each round starting with another one."""
    times: dict[str, Times] = {}
    share = args.case_seconds / max(1, len(entrants))
    for contender in entrants:
        seconds = checked[contender.name]["first_s"]
        n_rounds = max(1, min(args.rounds, int(share / max(seconds, 1e-9))))
        times[contender.name] = Times(_prepared(contender, problem, checked[contender.name]["tighten"]), n_rounds)
    if case.unit:
        x = problem.args[0][1]
        times[UNIT] = Times(x.clone, args.rounds)
    for entry in times.values():
        if entry.n_rounds > 1:
            entry.run()  # the first call finds cold caches and unread libraries
    names = list(times)
    for turn in range(args.rounds if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            entry = times[name]
            if turn < entry.n_rounds:
                gc.collect()
                rest(MOST_REST_S)
                start = time.perf_counter()
                entry.run()
                entry.seconds.append(time.perf_counter() - start)
    return times


def _prepared(contender: Contender, problem: Problem, tighten: float) -> Callable[[], Any]:
    operands = contender.load(problem)
    job = _tightened(problem.job, tighten)
    return torch.no_grad()(lambda: contender.call.run(*operands, job))


def _tightened(job: Job, factor: float) -> Job:
    return job if job.eps is None else replace(job, eps=job.eps * factor)


# -- checking, in a process of its own ------------------------------------------------------------------


class Checker:
    """The other side of ``--worker``: asks for one check at a time and ends a worker that takes too long."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._worker: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def check(self, case: Case, contender: Contender) -> dict[str, Any]:
        """``first_s``, ``peak_bytes``, ``rel_error``, ``ranks`` and ``tighten``, or a ``reason``."""
        if self._worker is None:
            self._start()
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps({"case": case.name, "contender": contender.name}) + "\n")
        self._worker.stdin.flush()
        limit = 60.0 + self._args.limit  # the inputs are made first
        while True:
            try:
                line = self._lines.get(timeout=limit)
            except queue.Empty:
                self.close()
                return {"reason": f"over the limit of {self._args.limit:g} s"}
            if not line:
                status = self._worker.wait()
                self.close()
                return {"reason": f"its process ended with status {status}, as when memory runs out"}
            answer = json.loads(line)
            if "calling" not in answer:
                return answer
            limit = self._args.limit  # for each call anew

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker = None

    def _start(self) -> None:
        words = [sys.executable, __file__, "--worker", "--peers", self._args.peers]
        words += ["--quick"] * self._args.quick
        words += ["--drawn", *map(str, self._args.drawn)] if self._args.drawn else []
        words += ["--threads", str(torch.get_num_threads()), "--limit", str(self._args.limit)]
        self._worker = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **BARE_ALLOCATOR}
        )
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._worker.stdout, self._lines), daemon=True).start()


def _forward(source: Iterable[str], lines: queue.SimpleQueue[str]) -> None:
    for line in source:
        lines.put(line)
    lines.put("")


def _work(args: argparse.Namespace) -> int:
    """Answer requests until the input ends: ``{"calling": true}`` before each call, then the result of the check."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    found, _ = libraries(args.peers)
    cases = {**CASES, **(drawn_cases(*args.drawn) if args.drawn else {})}
    name, problem = "", None
    for line in sys.stdin:
        request = json.loads(line)
        if request["case"] != name or problem is None:
            name, problem = request["case"], None
            problem = cases[name].make(args.quick)
        (contender,) = (c for c in _contenders(cases[name], found) if c.name == request["contender"])
        answer(_checked(contender, problem, lambda: answer({"calling": True}), args.limit))
    return 0


def _checked(contender: Contender, problem: Problem, announce: Callable[[], None], limit_s: float) -> dict[str, Any]:
    try:
        with default_dtype(problem.dtype), torch.no_grad():
            return _check(contender, problem, announce, limit_s)
    except MemoryError:
        return {"reason": "out of memory"}
    except Exception as error:  # a peer may fail in any way; that must not end the run
        words = str(error).strip().split("\n")[0][:200]
        return {"reason": f"{type(error).__name__}: {words}", "broken": not isinstance(error, TTError)}


def _check(contender: Contender, problem: Problem, announce: Callable[[], None], limit_s: float) -> dict[str, Any]:
    operands = contender.load(problem)
    error, began = math.inf, time.perf_counter()
    for tighten in (1.0,) if contender.library.ours or problem.job.eps is None else TIGHTEN:
        job = _tightened(problem.job, tighten)
        run = functools.partial(contender.call.run, *operands, job)
        announce()
        result, seconds, peak = measured(run)
        if seconds < 1.0:  # once more, without what only a first call allocates
            announce()
            result, seconds, peak = measured(run)
        unloaded = contender.unload(result)
        error = problem.error(unloaded)
        if error <= problem.tol * (1 + 1e-9):
            return {
                "first_s": seconds,
                "peak_bytes": peak,
                "rel_error": error,
                "max_rank_found": _max_rank(unloaded),
                "tighten": tighten,
            }
        if not math.isfinite(error) or time.perf_counter() - began > limit_s:
            break
    return {"reason": f"reached a relative error of {error:.2g}, not {problem.tol:.2g}", "broken": True}


def _max_rank(found: Any) -> int | None:
    if isinstance(found, torch.Tensor):
        return None
    cores = found[0] if isinstance(found[0], list) else found
    return max(core.shape[0] for core in cores)


def _bytes_of(data: Any) -> int:
    if isinstance(data, torch.Tensor):
        return data.numel() * data.element_size()
    return sum(_bytes_of(part) for part in data)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only this case; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per case (default 9)")
    parser.add_argument("--quick", action="store_true", help="small inputs and 2 rounds: does everything work?")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEER_NAMES)}")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds one call may take (default 30)")
    parser.add_argument("--case-seconds", type=float, default=20.0, help="time for the rounds of a case (default 20)")
    parser.add_argument("--memory-limit", type=float, default=8e9, help="bytes a call may need (default 8e9)")
    parser.add_argument("--report", metavar="JSON", help="no run: print this record and write --docs from it")
    parser.add_argument("--docs", default="docs/benchmarks-tensor.md", help="page written by --report")
    parser.add_argument("--drawn", nargs=2, type=int, metavar=("SEED", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(CASES))
        parser.exit()
    unknown = set(args.peers.split(",")) - {"all", "none", *PEER_NAMES}
    if unknown:
        parser.error(f"--peers has {', '.join(sorted(unknown))}, expected all, none or some of {','.join(PEER_NAMES)}")
    if args.quick:
        args.rounds, args.limit = min(args.rounds, 2), min(args.limit, 10.0)
    return args


if __name__ == "__main__":
    sys.exit(main())
