"""Time each kind of contraction plan against ``torch.nn.Linear``.

    python benchmarks/chain.py --threads 2 --out chain.json

Every plan is checked against the dense weight first. Calls of all contestants are interleaved, so that
other work on the machine falls on all of them; the median and the 90th percentile are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tensortrain
from tensortrain.contract import (
    Chain,
    ContractionPlan,
    CostModel,
    chain_to_dense,
    measure_cost_model,
    plan_chain,
)


@dataclass(frozen=True)
class Case:
    """One layer: name, shapes, batch sizes."""

    name: str
    chain: Chain
    batches: tuple[int, ...]


CASES = (
    Case("25088 -> 4096, rank 4", Chain((4,) * 6, (2, 7, 8, 8, 7, 4), (1, 4, 4, 4, 4, 4, 1)), (1, 100)),
    Case("57600 -> 256, rank 4", Chain((4,) * 4, (8, 20, 20, 18), (1, 4, 4, 4, 1)), (1, 100)),
    Case("1024 -> 1024, rank 8", Chain((4, 8, 8, 4), (4, 8, 8, 4), (1, 8, 8, 8, 1)), (1, 100)),
    Case("2048 -> 384, rank 10", Chain((6, 8, 8), (8, 16, 16), (1, 10, 10, 1)), (1, 128)),
    Case("1024 -> 1024, low rank 16", Chain((1, 1024), (1024, 1), (1, 16, 1)), (1, 128)),
)
MAX_SLOWDOWN = 30  # plans predicted to be slower than nn.Linear by more are not timed
FORCES = ("left-to-right", "right-to-left", "merged", "dense")


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = measure_cost_model("cpu")
    rows = []
    for case in CASES:
        for batch in case.batches:
            for training in (False, True):
                row = time_case(case, batch, training, dtype, model, args.seconds)
                rows.append(row)
                print(_line(row), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(_record(args, model, rows), indent=1) + "\n")
    return 0


def time_case(
    case: Case, batch: int, training: bool, dtype: torch.dtype, model: CostModel, seconds: float
) -> dict[str, Any]:
    """Check, then time, all contestants for one layer, batch size and phase."""
    chain = case.chain
    cores = [torch.randn(s, dtype=dtype) / (s[0] * s[2]) ** 0.5 for s in chain.core_shapes]
    weight = chain_to_dense(cores).contiguous()
    x, g = (
        torch.randn(batch, chain.in_features, dtype=dtype),
        torch.randn(batch, chain.out_features, dtype=dtype),
    )
    plans = {
        force: plan_chain(chain, batch=batch, dtype=dtype, training=training, force=force, cost_model=model)  # type: ignore[arg-type]
        for force in FORCES
    }
    chosen = plan_chain(chain, batch=batch, dtype=dtype, training=training, cost_model=model)
    runs = {"nn.Linear": _linear_run(x, g, weight, training)}
    hopeless = [force for force, plan in plans.items() if plan.speed_up < 1 / MAX_SLOWDOWN]
    plans = {force: plan for force, plan in plans.items() if force not in hopeless}
    errors = {force: _rel_error(plan.execute(x, cores), F.linear(x, weight)) for force, plan in plans.items()}
    if max(errors.values()) > 1e3 * torch.finfo(dtype).eps:
        raise SystemExit(f"{case.name}: a plan disagrees with the dense weight: {errors}")
    runs.update({force: _plan_run(plan, x, g, cores, training) for force, plan in plans.items()})
    times = interleave(runs, seconds)
    return {
        "case": case.name,
        "batch": batch,
        "phase": "training step" if training else "inference",
        "chosen": chosen.kind,
        "left_out": hopeless,
        "contestants": {
            name: {
                "median_ms": statistics.median(ts) * 1e3,
                "p90_ms": sorted(ts)[int(0.9 * (len(ts) - 1))] * 1e3,
                "n_calls": len(ts),
                **(_plan_facts(plans[name], errors[name]) if name in plans else {}),
            }
            for name, ts in times.items()
        },
    }


def _linear_run(x: Tensor, g: Tensor, weight: Tensor, training: bool) -> Callable[[], object]:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if not training:
        return torch.no_grad()(lambda: layer(x))
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), (x, layer.weight), g)


def _plan_run(plan: ContractionPlan, x: Tensor, g: Tensor, cores: list[Tensor], training: bool) -> Callable[[], object]:
    if not training:
        prepared = plan.prepare(cores)
        return torch.no_grad()(lambda: plan.execute(x, cores, prepared))
    x, cores = x.clone().requires_grad_(), [core.clone().requires_grad_() for core in cores]
    return lambda: torch.autograd.grad(plan.execute(x, cores), (x, *cores), g)


def interleave(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Wall seconds of single calls, contestants taking turns, for about ``seconds`` in all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began, n_rounds = time.perf_counter(), 0
    while n_rounds < 5 or (time.perf_counter() - began < seconds and n_rounds < 500):
        # In a fixed order, whoever follows the dense layer would always find a cold cache.
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        n_rounds += 1
    return times


def _plan_facts(plan: ContractionPlan, rel_error: float) -> dict[str, Any]:
    return {
        "predicted_ms": plan.predicted_s * 1e3,
        "groups": plan.groups,
        "direction": plan.direction,
        "forms": [step.kind for step in plan.steps],
        "flops": plan.flops,
        "peak_bytes": plan.peak_bytes,
        "rel_error": rel_error,
    }


def _rel_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _line(row: dict[str, Any]) -> str:
    linear = row["contestants"]["nn.Linear"]["median_ms"]
    cells = [f"nn.Linear {linear:.3f} ms"]
    for force, contestant in list(row["contestants"].items())[1:]:
        speed_up, predicted = linear / contestant["median_ms"], contestant["predicted_ms"]
        cells.append(f"{force} {contestant['median_ms']:.3f} (x{speed_up:.3g}, predicted {predicted:.3f})")
    return f"{row['case']}, b {row['batch']}, {row['phase']}: {'; '.join(cells)}; chosen: {row['chosen']}"


def _record(args: argparse.Namespace, model: CostModel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": _commit(),
        "versions": {
            "tensortrain": tensortrain.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "dtype": args.dtype,
        "seed": args.seed,
        "cost_model": asdict(model),
        "rows": rows,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for one row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
