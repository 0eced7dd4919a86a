"""Four convolutions and two linear layers on Fashion-MNIST: ten times fewer parameters at what loss?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from images import counts, evaluate, tasks
from torch import nn
from training import Task, search_, start_

import tensortrain as tt

__all__ = ["run_convolutions"]


def run_convolutions(name: str, given: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """The net, dense or factorized, on the first training images."""
    method, stages = given["methods"][name], given["stages"]
    torch.manual_seed(seed)
    everything, test = tasks(given["batch_size"], flat=False)
    n = given["n_train"]
    train = Task(everything.x[:n], everything.y[:n], everything.loss, everything.batch_size)
    model = network(method.get("rank", given["start_rank"]))
    start_(model, train, method, stages)
    search_(model, train, method, stages)
    if "cut_to" in method:
        n_rest = sum(p.numel() for key, p in model.named_parameters() if "cores" not in key)
        tt.nn.prune_ranks_(model, budget=method["cut_to"] - n_rest)
    train.train(model, **stages["finish"])
    return {**counts(model), **evaluate(model, test)}


def network(rank: int | str) -> nn.Sequential:
    """16-16-32-32 channels, the first with stride 2, then 1568 -> 128 -> 10; the first and last layer stay dense."""

    def conv(a: int, b: int) -> nn.Module:
        return nn.Conv2d(a, b, 3, padding=1) if rank == "dense" else tt.nn.Conv2d(a, b, 3, padding=1, rank=rank)

    hidden = nn.Linear(1568, 128) if rank == "dense" else tt.nn.Linear(1568, 128, rank=rank)
    relu, first, last = nn.ReLU(), nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Linear(128, 10)
    convs = [first, relu, conv(16, 16), relu, conv(16, 32), relu, nn.MaxPool2d(2), conv(32, 32), relu]
    return nn.Sequential(*convs, nn.Flatten(), hidden, relu, last)
