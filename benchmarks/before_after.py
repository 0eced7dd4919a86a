"""Time the layers of two source trees in turns: has a change made them slower?

    python benchmarks/before_after.py ../before/src src                  # the shapes of layers.py, and 16 -> 10
    python benchmarks/before_after.py ../before/src src --few --out r.json

Each tree runs in a process of its own that stays; one of them computes at a time, burst by burst, and both layers have
the same numbers. A ratio above one means that the second tree is slower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PHASES = ("inference", "training")
SMALL = {"in_modes": (4, 4), "out_modes": (2, 5), "rank": 4, "batch": 1}  # 16 -> 10: all overhead
BURST_S = 5e-3
TOL = 1e-5  # relative, of the sum of all outputs and gradients in float32


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", help="folder with tensortrain in it")
    parser.add_argument("after", help="the other one")
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each tree for one case (default 30)")
    parser.add_argument("--few", action="store_true", help="every fifth case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file to write")
    if sys.argv[1:2] == ["--worker"]:
        return _worker(int(sys.argv[2]))
    args = parser.parse_args()
    workers = [_Worker(source, args.threads) for source in (args.before, args.after)]
    rows = [_compared(case, phase, workers, args.rounds) for case in _cases(args) for phase in PHASES]
    for phase in PHASES:
        logs = [math.log(row["ratio"]) for row in rows if row["phase"] == phase]
        print(f"{phase}: geometric mean {math.exp(statistics.fmean(logs)):.4f} over {len(logs)} cases")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(Path(args.after).resolve()))
    from layer_cases import FIXED, GRID

    yield SMALL
    for case in (*FIXED, *GRID)[:: 5 if args.few else 1]:
        yield {"in_modes": case.in_modes, "out_modes": case.out_modes, "rank": case.rank, "batch": case.batch}


def _compared(case: dict[str, Any], phase: str, workers: list[_Worker], rounds: int) -> dict[str, Any]:
    """Bursts of both trees in turns, the order changing from round to round."""
    sums = [worker.ask(case={**case, "phase": phase}) for worker in workers]
    if not math.isclose(*sums, rel_tol=TOL, abs_tol=TOL):
        raise SystemExit(f"{case}, {phase}: the two trees compute {sums}, which differ. Find out why before timing.")
    calls = max(1, int(BURST_S / min(worker.ask(calls=3) for worker in workers)))
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        for k in (0, 1) if turn % 2 else (1, 0):
            seconds[k].append(workers[k].ask(calls=calls))
    before, after = (statistics.median(times) for times in seconds)
    ratio = statistics.median(new / old for old, new in zip(*seconds, strict=True))
    sizes = f"{math.prod(case['in_modes'])} -> {math.prod(case['out_modes'])}, rank {case['rank']}, b {case['batch']}"
    print(
        f"{sizes:<36} {phase:<10} {before * 1e6:>10.2f} us {after * 1e6:>10.2f} us "
        f"{(after - before) * 1e6:>+8.2f} us  x {ratio:.3f}",
        flush=True,
    )
    return {**case, "phase": phase, "before_s": before, "after_s": after, "ratio": ratio}


class _Worker:
    """One tree in a process of its own."""

    def __init__(self, source: str, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(source).resolve())}
        command = [sys.executable, __file__, "--worker", str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, **question: Any) -> float:
        """The sum of the outputs of a new case, or seconds of one call of so many."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return float(json.loads(self.process.stdout.readline()))


def _worker(threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    call: Callable[[], Any] = int
    for line in sys.stdin:
        question = json.loads(line)
        if "case" in question:
            call = _call(**question["case"])
            call()  # finds the plan
            found = call()
            answer = sum(float(tensor.detach().double().sum()) for tensor in found)
        else:
            start = time.perf_counter()
            for _ in range(question["calls"]):
                call()
            answer = (time.perf_counter() - start) / question["calls"]
        print(json.dumps(answer), flush=True)
    return 0


def _call(in_modes: list[int], out_modes: list[int], rank: int, batch: int, phase: str) -> Callable[[], Any]:
    """A forward pass, or forward and backward to the parameters."""
    import torch

    import tensortrain as tt

    torch.manual_seed(0)
    n, m = math.prod(in_modes), math.prod(out_modes)
    layer = tt.nn.Linear(n, m, in_modes=in_modes, out_modes=out_modes, rank=rank)
    x, parameters = torch.randn(batch, n), list(layer.parameters())
    if phase == "inference":
        return torch.no_grad()(lambda: (layer(x),))
    g = torch.randn(batch, m)
    return lambda: torch.autograd.grad(layer(x), parameters, g)


if __name__ == "__main__":
    sys.exit(main())
