"""Parts of the layer benchmark beside speed: peak memory, an embedding, how time grows with rank, order and size."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import BARE_ALLOCATOR, Turns, measured, take_turns
from torch import Tensor, nn

import tensortrain as tt

__all__ = ["MEMORY_CASES", "MEMORY_TARGETS", "embedding", "laws", "memory", "memory_of", "recurrent", "versions"]

_PACKAGES = {"torchTT": "torchTT", "tednet": "tednet", "TensorLy-Torch": "tensorly-torch"}


def versions(peers: str, names: Sequence[str]) -> dict[str, str]:
    """Versions of the peers that take part and are installed."""
    found = {}
    for name in {"all": names, "none": ()}.get(peers, tuple(peers.split(","))):
        try:
            found[name] = importlib.metadata.version(_PACKAGES[name])
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- memory -------------------------------------------------------------------------------------------


def _training_ours() -> nn.Module:
    return tt.nn.Linear(1024, 1024, rank=16)


def _image_ours() -> nn.Module:
    return tt.nn.Linear(25088, 4096, in_modes=(2, 7, 8, 8, 7, 4), out_modes=(4,) * 6, rank=4).eval()


# Layer, rows, training.
MEMORY_CASES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "training, ours": (_training_ours, 4096, True),
    "training, dense": (lambda: nn.Linear(1024, 1024), 4096, True),
    "one image, ours": (_image_ours, 1, False),
    "one image, dense": (lambda: nn.Linear(25088, 4096).eval(), 1, False),
}
MEMORY_TARGETS = {"training": 1.3, "one image": 2**20}  # times dense; bytes beyond input and output


def memory(script: str) -> dict[str, Any]:
    """Peak memory of each case, measured in a process of its own."""
    cases = {}
    for name in MEMORY_CASES:
        words = [sys.executable, script, "--memory-worker", name, "--threads", str(torch.get_num_threads())]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **BARE_ALLOCATOR})
        if done.returncode:
            raise SystemExit(f"the memory of {name!r} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
        cases[name] = json.loads(done.stdout)
    ours, dense = cases["training, ours"], cases["training, dense"]
    image = cases["one image, ours"]
    beyond = image["peak_bytes"] - image["output_bytes"] + image["cache_bytes"]
    return {
        "cases": cases,
        "training_ratio": ours["peak_bytes"] / dense["peak_bytes"],
        "training_ratio_with_inputs": (ours["peak_bytes"] + ours["held_bytes"])
        / (dense["peak_bytes"] + dense["held_bytes"]),
        "image_bytes": beyond,
        "targets": MEMORY_TARGETS,
    }


def memory_of(name: str) -> dict[str, Any]:
    """What one case needs beyond what is resident before the call, results included."""
    build, rows, training = MEMORY_CASES[name]
    torch.manual_seed(0)
    layer: Any = build()
    x = torch.randn(rows, layer.in_features).requires_grad_(training)
    g = torch.randn(rows, layer.out_features) if training else torch.empty(0)
    inputs = (x, *layer.parameters())

    def run() -> Any:
        return torch.autograd.grad(layer(x), inputs, g) if training else layer(x)

    with torch.set_grad_enabled(training):
        run()  # plans are made and weights prepared at the first call
        result, _, peak = measured(run)
    return {
        "peak_bytes": peak,
        "held_bytes": sum(_bytes(tensor) for tensor in (*inputs, g)),
        "output_bytes": 0 if training else _bytes(result),
        "cache_bytes": getattr(layer, "resident_cache_bytes", 0),
        "plan": layer.how_it_ran() if isinstance(layer, tt.nn.FactorizedLayer) and not training else "",
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# -- embedding ----------------------------------------------------------------------------------------


def embedding(quick: bool, seed: int) -> dict[str, Any]:
    """Forward and backward of 10,000 Zipf-distributed ids in a table of a million rows, and the size of the table."""
    vocabulary, dim, rank, n_ids = 1_000_000, 64, 16, 10_000
    generator = torch.Generator().manual_seed(seed)
    law = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(law, n_ids, replacement=True, generator=generator)
    g = torch.randn(n_ids, dim, generator=generator)
    layer = tt.nn.Embedding(vocabulary, dim, rank=rank)
    naive = NaiveEmbedding(layer)
    _check_naive(layer, naive, ids, g)
    dense, sparse = nn.Embedding(vocabulary, dim), nn.Embedding(vocabulary, dim, sparse=True)
    contestants: dict[str, nn.Module] = {
        "tensortrain": layer,
        "gather and bmm": naive,
        "nn.Embedding": dense,
        "nn.Embedding, sparse gradient": sparse,
    }
    turns = {name: Turns(_step(module, ids, g), 2 if quick else 40) for name, module in contestants.items()}
    for entry in turns.values():
        entry.run()
    take_turns(turns, seed=seed)
    return {
        "vocabulary": vocabulary,
        "dim": dim,
        "ranks": layer.ranks,
        "in_modes": layer.in_modes,
        "out_modes": layer.out_modes,
        "n_ids": n_ids,
        "n_distinct": int(ids.unique().numel()),
        "contestants": {name: entry.facts() for name, entry in turns.items()},
        "over_naive": turns["gather and bmm"].median_s / turns["tensortrain"].median_s,
        "table_ratio": layer.compression,
        "table_bytes": 4 * layer.n_params,
        "dense_table_bytes": 4 * vocabulary * dim,
    }


class NaiveEmbedding(nn.Module):
    """The obvious way: pick a slice of every core for every id, multiply them one after the other."""

    def __init__(self, layer: tt.nn.Embedding) -> None:
        super().__init__()
        self.modes = layer.in_modes
        self.tables = nn.ParameterList(  # j r i s, so that a slice is one block of memory
            nn.Parameter(core.detach().permute(2, 0, 1, 3).contiguous()) for core in layer.cores
        )

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor | None = None
        for k, table in enumerate(self.tables):
            digit = ids // math.prod(self.modes[k + 1 :]) % self.modes[k]
            picked = F.embedding(digit, table.flatten(1)).reshape(-1, table.shape[1], table[0, 0].numel())  # b r (i s)
            rows = picked if rows is None else torch.bmm(rows, picked)
            rows = rows.reshape(len(ids), -1, table.shape[3])  # b i_1 .. i_k s
        assert rows is not None
        return rows.flatten(1)


def _check_naive(layer: tt.nn.Embedding, naive: NaiveEmbedding, ids: Tensor, g: Tensor) -> None:
    ours, theirs = layer(ids), naive(ids)
    pairs = [(ours, theirs)]
    core_grads = torch.autograd.grad(ours, list(layer.cores), g)
    table_grads = torch.autograd.grad(theirs, list(naive.tables), g)
    pairs += [(core, table.permute(1, 2, 0, 3)) for core, table in zip(core_grads, table_grads, strict=True)]
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if worst > 1e-5:
        raise SystemExit(f"the embedding and the naive one disagree by {worst:.2g}")


def _step(module: nn.Module, ids: Tensor, g: Tensor) -> Callable[[], Any]:
    parameters = list(module.parameters())
    return lambda: torch.autograd.grad(module(ids), parameters, g)


# -- recurrent ----------------------------------------------------------------------------------------


def recurrent(quick: bool, seed: int) -> dict[str, Any]:
    """A step of training on clips of video, optimizer included: ``nn.GRU`` and the same with its input map a train."""
    n_clips, n_frames, n_inputs, n_hidden = 16, 6, 57600, 256
    torch.manual_seed(seed)
    clips, labels = torch.randn(n_clips, n_frames, n_inputs), torch.randint(11, (n_clips,))
    train = {"format": "tt", "in_modes": (8, 20, 20, 18), "out_modes": (4, 4, 4, 4), "rank": 4}
    networks: dict[str, Any] = {
        "tensortrain": tt.nn.GRU(n_inputs, n_hidden, batch_first=True, **train),
        "nn.GRU": nn.GRU(n_inputs, n_hidden, batch_first=True),
    }
    rounds = {"tensortrain": 2 if quick else 30, "nn.GRU": 1 if quick else 10}
    turns = {name: Turns(_training(network, clips, labels), rounds[name]) for name, network in networks.items()}
    for entry in turns.values():
        entry.run()
    take_turns(turns, seed=seed)
    return {
        "n_inputs": n_inputs,
        "n_hidden": n_hidden,
        "n_clips": n_clips,
        "n_frames": n_frames,
        "input_weights": networks["tensortrain"].n_core_params,
        "dense_input_weights": 3 * n_hidden * n_inputs,
        "contestants": {name: entry.facts() for name, entry in turns.items()},
        "of_dense": turns["tensortrain"].median_s / turns["nn.GRU"].median_s,
    }


def _training(network: nn.Module, clips: Tensor, labels: Tensor) -> Callable[[], Any]:
    head = nn.Linear(256, 11)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(network(clips)[0][:, -1]), labels).backward()
        optimizer.step()

    return step


# -- how time grows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One size of a layer grows, the others stay.

    Attributes:
        law: Exponent that O(d r^2 m max(M, N)) per row gives for this sweep.
        points: ``(x, modes, rank, rows)``, input and output modes alike.
    """

    variable: str
    setting: str
    law: float
    points: tuple[tuple[int, tuple[int, ...], int, int], ...]


SWEEPS = (
    Sweep("rank r", "4096 -> 4096 as 8^4, 16 rows", 2.0, tuple((r, (8,) * 4, r, 16) for r in (2, 4, 8, 16, 32, 64))),
    Sweep(
        "order d",
        "modes 2, rank 16, rows x N = 2^18",
        1.0,
        tuple((d, (2,) * d, 16, 2 ** (18 - d)) for d in (4, 6, 8, 10, 12, 14, 16)),
    ),
    Sweep(
        "size N",
        "N -> N as m^3, rank 8, 8 rows: the law is m N = N^(4/3)",
        4 / 3,
        tuple((m**3, (m,) * 3, 8, 8) for m in (6, 8, 12, 16, 24, 32, 40)),
    ),
)
_FITTED = 4  # slopes are those of the largest points, where overhead no longer counts


def laws(quick: bool) -> list[dict[str, Any]]:
    """Time of forward and backward, core by core without merges, and the slopes on log-log axes."""
    found = []
    for sweep in SWEEPS:
        points = sweep.points[:3] if quick else sweep.points
        runs = [_LawPoint(modes, rank, rows) for _, modes, rank, rows in points]
        for _ in range(1 if quick else 11):
            for run in runs:
                run.time()
        xs = [x for x, *_ in points]
        series: dict[str, list[float]] = {
            "forward_ms": [_median(run.forward_s) * 1e3 for run in runs],
            "backward_ms": [_median(run.backward_s) * 1e3 for run in runs],
            "flops": [run.flops for run in runs],
        }
        slopes = {name.removesuffix("_ms"): _slope(xs[-_FITTED:], values[-_FITTED:]) for name, values in series.items()}
        found.append(
            {
                "variable": sweep.variable,
                "setting": sweep.setting,
                "law": sweep.law,
                "x": xs,
                **series,
                "slopes": slopes,
            }
        )
    return found


class _LawPoint:
    """One layer, run right to left."""

    def __init__(self, modes: tuple[int, ...], rank: int, rows: int) -> None:
        size = math.prod(modes)
        ranks = (1, *(rank,) * (len(modes) - 1), 1)
        layer = tt.nn.Linear(
            size, size, bias=False, rank=ranks, in_modes=modes, out_modes=modes, implementation="factorized"
        )
        self.plan = layer.plan(rows, force="right-to-left")
        with torch.no_grad():
            self.flops = layer.plan(rows, force="right-to-left").flops  # of the forward pass alone
        self.cores = list(layer.cores)
        self.x = torch.randn(rows, size, requires_grad=True)
        self.g = torch.randn(rows, size)
        self.forward_s: list[float] = []
        self.backward_s: list[float] = []
        self._step()  # the first call finds cold caches

    def time(self) -> None:
        forward_s, backward_s = self._step()
        self.forward_s.append(forward_s)
        self.backward_s.append(backward_s)

    def _step(self) -> tuple[float, float]:
        start = time.perf_counter()
        y = self.plan.execute(self.x, self.cores)
        middle = time.perf_counter()
        torch.autograd.grad(y, (self.x, *self.cores), self.g)
        return middle - start, time.perf_counter() - middle


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares on log-log axes."""
    us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(us) / len(us), sum(vs) / len(vs)
    spread = sum((u - mean_u) ** 2 for u in us)
    return sum((u - mean_u) * (v - mean_v) for u, v in zip(us, vs, strict=True)) / spread
