"""Layers compiled by ``torch.compile`` beside the same layers called as they are, and torch's dense ones likewise.

    python benchmarks/compiled.py --threads 2 --out benchmarks/results/compiled.json    # the record
    python benchmarks/compiled.py --quick                                               # does everything work?

A compiled program checks before each call that what it was made for still holds; of a small layer that takes as long as
the layer. What torch's own dense layer loses by it is the measure of what ours may lose.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import Turns, take_turns
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.system.files import write_text_atomic
from tensortrain.system.provenance import provenance

_N_IN_A_ROW, _N_ROUNDS = 100, 25
Case = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], Tensor]]


def _conv(ins: int, outs: int, side: int, batch: int, **how: Any) -> Case:
    return (
        lambda: tt.nn.Conv2d(ins, outs, 3, padding=1, **how),
        lambda: nn.Conv2d(ins, outs, 3, padding=1),
        lambda: torch.randn(batch, ins, side, side),
    )


def _linear(ins: int, outs: int, batch: int, **how: Any) -> Case:
    return (
        lambda: tt.nn.Linear(ins, outs, **how),
        lambda: nn.Linear(ins, outs),
        lambda: torch.randn(batch, ins),
    )


CASES: dict[str, Case] = {
    "conv 16 -> 32 at 8x8, low_rank 8, batch 1": _conv(16, 32, 8, 1, format="low_rank", rank=8),
    "conv 64 -> 64 at 7x7, tt 16, batch 1": _conv(64, 64, 7, 1, format="tt", rank=16),
    "conv 32 -> 32 at 14x14, tucker2 8, batch 4": _conv(32, 32, 14, 4, format="tucker2", rank=8),
    "conv 64 -> 64 at 28x28, tt 16, batch 8": _conv(64, 64, 28, 8, format="tt", rank=16),
    "linear 256 -> 256, tt 8, batch 1": _linear(256, 256, 1, rank=8),
    "linear 1024 -> 1024, tt 16, batch 64": _linear(1024, 1024, 64, rank=16),
    "embedding 5000 x 256, tt 16, 64 ids": (
        lambda: tt.nn.Embedding(5000, 256, rank=16),
        lambda: nn.Embedding(5000, 256),
        lambda: torch.randint(0, 5000, (64,)),
    ),
}


def row(name: str, quick: bool) -> dict[str, Any]:
    """Median microseconds of one case, at inference."""
    ours, dense, example = CASES[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, other, x = ours().eval(), dense().eval(), example()
    runs = {"layer": layer, "layer_compiled": torch.compile(layer), "dense": other}
    runs["dense_compiled"] = torch.compile(other)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(runs["layer_compiled"](x), layer(x), rtol=1e-3, atol=1e-4)
            runs["dense_compiled"](x)
        n_rounds = 3 if quick else _N_ROUNDS
        turns = {one: Turns(_called(run, x), n_rounds, n_in_a_row=_N_IN_A_ROW) for one, run in runs.items()}
        take_turns(turns)
    us = {f"{one}_us": 1e6 * turn.median_s for one, turn in turns.items()}
    ratios = {
        "ratio": us["layer_us"] / us["layer_compiled_us"],
        "torchs_ratio": us["dense_us"] / us["dense_compiled_us"],
    }
    return {"case": name, **us, **ratios}


def _called(run: Any, x: Tensor) -> Callable[[], Any]:
    return lambda: run(x)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="one of them; may be repeated")
    parser.add_argument("--quick", action="store_true", help="three rounds: does everything work?")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="file of the record")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.perf_counter()
    record: dict[str, Any] = {**provenance(seed=0), "quick": args.quick, "rows": []}
    for name in args.case or CASES:
        found = row(name, args.quick)
        record["rows"].append(found)
        print(
            f"{name:<46} {found['layer_us']:7.1f} / {found['layer_compiled_us']:7.1f} us compiled = "
            f"{found['ratio']:.2f}x   torch's dense {found['torchs_ratio']:.2f}x",
            flush=True,
        )
    record["wall_s"] = round(time.perf_counter() - began, 1)
    if args.out:
        write_text_atomic(args.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
