"""How much memory and time does it take to compress a decoder of 0.4 GB in place?

A decoder of the Llama kind with random weights (rotary, grouped heads, gated units, RMS norms, a tied table), float32,
sequences of random words one by one. Of every stage: the highest resident memory above that of a process that has only
imported torch, as a multiple of the model's own bytes, and its seconds. Linux alone tells the peak of a while.

    pip install transformers
    OMP_NUM_THREADS=1 python experiments/large_models/run.py --out runs/large_models
    OMP_NUM_THREADS=1 python experiments/large_models/run.py --out runs/large_models --set n_sequences=32
    OMP_NUM_THREADS=1 python experiments/large_models/run.py --out runs/large_models --set measure=true
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import tensortrain as tt
from tensortrain.compression import provenance, write_text_atomic

HERE = Path(__file__).parent
_RESIDENT = "next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmRSS'))"


def resident(figure: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` the highest since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{figure}:"))


def of_torch_alone() -> int:
    """Bytes of a process that has imported torch and done nothing."""
    command = [sys.executable, "-c", f"import torch; print({_RESIDENT})"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Stages:
    """An observer that notes peak and seconds of every stage, and of what lies between them."""

    def __init__(self, before: int, n_bytes: int) -> None:
        self.before, self.n_bytes = before, n_bytes
        self.rows: list[dict[str, Any]] = []
        self._begin("before")

    def _begin(self, name: str) -> None:
        self.name, self.start, self.cpu = name, time.perf_counter(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")

    def _close(self, name: str) -> None:
        row = {
            "stage": self.name,
            "peak": round((resident("VmHWM") - self.before) / self.n_bytes, 3),
            "wall_s": round(time.perf_counter() - self.start, 1),
            "cpu_s": round(time.process_time() - self.cpu, 1),
        }
        self.rows.append(row)
        print(f"{row['stage']:18} {row['peak']:6.2f}x {row['wall_s']:8.1f} s {row['cpu_s']:8.1f} s of processor")
        self._begin(name)

    def on_start(self, name: str, total: int | None) -> None:
        self._close(name)

    def on_step(self, n: int, **figures: float) -> None: ...

    def on_end(self) -> None:
        self._close(f"after {self.name}")

    def message(self, text: str) -> None:
        print(text)


def made(config: Mapping[str, Any]) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The decoder, and its sequences one by one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config["seed"])
    model = LlamaForCausalLM(LlamaConfig(**config["model"])).eval()
    size = (config["n_sequences"], 1, config["length"])
    ids = torch.randint(config["model"]["vocab_size"], size, generator=torch.Generator().manual_seed(1))
    return model, [{"input_ids": one, "labels": one} for one in ids]


def measured(config: Mapping[str, Any], work_dir: str | None) -> dict[str, Any]:
    """Peaks and seconds of one compression."""
    from transformers import LlamaForCausalLM  # noqa: F401  (what the import takes is told apart)

    before = of_torch_alone()
    imported = resident("VmRSS")
    model, data = made(config)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    n_ids = sum(batch["input_ids"].numel() for batch in data)
    pass_s = _seconds_of_a_pass(model, data)
    passes = 0.0

    def count(module: Any, args: Any, keywords: Mapping[str, Any]) -> None:
        nonlocal passes
        passes += keywords["input_ids"].numel() / n_ids

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    stages = Stages(before, n_bytes)
    more = {} if work_dir is None else {"work_dir": work_dir}
    start, cpu = time.perf_counter(), time.process_time()
    asked = {name: config.get(name, False) for name in ("measure", "measure_losses")}
    options: dict[str, Any] = {"inplace": True, "heal": False, "observer": stages, **asked, **more}
    result = tt.compress(model, budget=config["budget"], data=data, n_batches=len(data), **options)
    stages.on_end()
    handle.remove()
    return {
        "params": n_bytes // 4,
        "params_after": result.plan.params_after,
        "imports": round((imported - before) / n_bytes, 3),
        "peak": max(row["peak"] for row in stages.rows),
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "forward_passes": round(passes, 2),
        "cpu_s_of_a_forward_and_a_backward_pass": round(3 * pass_s, 1),
        "threads": torch.get_num_threads(),
        "stages": stages.rows,
    }


@torch.no_grad()
def _seconds_of_a_pass(model: Any, data: Any) -> float:
    """Processor seconds of a forward pass over the data; a backward pass takes twice as long."""
    model(**data[0])
    start = time.process_time()
    model(**data[0])
    return (time.process_time() - start) * len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=NUMBER", help="another figure of the config"
    )
    parser.add_argument("--work-dir", help="where a killed planning goes on")
    parser.add_argument("--record", type=Path, help="where results.json goes; by default --out")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    for name, _, value in (one.partition("=") for one in args.set):
        config[name] = json.loads(value)
    found = measured(config, args.work_dir)
    record = args.record or args.out
    record.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**found, "config": config, "provenance": provenance(seed=config["seed"])}, indent=1)
    write_text_atomic(record / "results.json", text + "\n")


if __name__ == "__main__":
    main()
