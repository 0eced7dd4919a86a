"""A small model of factorized layers, and its training: in one process, or in several that each see a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tensortrain as tt

N_WORDS, LENGTH, WIDTH, N_EXAMPLES, N_STEPS = 40, 16, 16, 8, 3


class SmallModel(nn.Module):
    """Ids, rows of a table, a convolution over their square, one layer met twice, logits from the table's cores."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = tt.nn.Embedding(N_WORDS, WIDTH, rank=4, init=0.5, dtype=dtype)
        self.conv = tt.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, rank=4, dtype=dtype)
        self.first = tt.nn.Linear(WIDTH, WIDTH, rank=4, dtype=dtype)
        self.second = self.first
        self.head = tt.nn.tied_head(self.table, bias=True)

    def forward(self, ids: Tensor) -> Tensor:  # b 16
        x = self.table(ids).mT.unflatten(-1, (4, 4))  # b c 4 4
        x = F.relu(self.conv(x)).mean(dim=(-2, -1))
        return self.head(self.second(torch.tanh(self.first(x))))


def make_model(seed: int, dtype: torch.dtype) -> SmallModel:
    torch.manual_seed(seed)
    return SmallModel(dtype)


def make_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randint(N_WORDS, (N_EXAMPLES, LENGTH), generator=generator),
            torch.randint(N_WORDS, (N_EXAMPLES,), generator=generator),
        )
        for _ in range(N_STEPS)
    ]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """A few steps of SGD; the loss before each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for ids, targets in batches:
        loss = F.cross_entropy(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_part(rank: int, n_processes: int, folder: str, timeout_s: float) -> None:
    """What each process does: train on its part of every batch, and save what came out."""
    with fresh.process_group(rank, n_processes, folder, timeout_s):
        for dtype in (torch.float32, torch.float64):
            torch.save(_train_in_parallel(rank, n_processes, dtype), Path(folder) / f"{dtype}-{rank}.pt")


def _train_in_parallel(rank: int, n_processes: int, dtype: torch.dtype) -> dict[str, Any]:
    # Every process starts from weights of its own, and has derived weights in its caches before it gets those of
    # the first process.
    model = make_model(rank, dtype)
    batches = [(ids[rank::n_processes], targets[rank::n_processes]) for ids, targets in make_batches()]
    with torch.no_grad():
        model(batches[0][0])
    parallel = DistributedDataParallel(model)
    with torch.no_grad():
        first_logits = model(batches[0][0])
    losses = train(parallel, batches)
    with torch.no_grad():
        logits = parallel(batches[0][0])
    return {"state": parallel.state_dict(), "first_logits": first_logits, "logits": logits, "losses": losses}
