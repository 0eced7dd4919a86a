"""A regression whose weight is a train of known ranks: who finds them?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import Task, find_ranks_, is_grown

import tensortrain as tt

__all__ = ["run"]


def run(name: str, given: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """The ranks that a method finds from one teacher, and the error on fresh inputs."""
    method = given["methods"][name]
    torch.manual_seed(seed)
    weight = teacher(given)
    task, test = (_task(weight, given, n) for n in (given["n_train"], given["n_test"]))
    layer = student(method, given)
    if method.get("rank") == "true":  # from the teacher itself: at the true ranks training may get stuck elsewhere
        dense = nn.Linear(*weight.shape, bias=False)
        dense.weight.data = weight
        modes = {"in_modes": given["modes"], "out_modes": given["modes"]}
        layer = tt.nn.Linear.from_dense(dense, rank=(1, *given["ranks"], 1), **modes)
        task.train(layer, **given["stages"]["finish"])
    else:
        find_ranks_(layer, task, method, given["stages"])
    with torch.no_grad():
        test_error = float(task.loss(layer(test.x), test.y))
    found = list(layer.ranks)
    return {"ranks": found, "is_exact": found == [1, *given["ranks"], 1], "test_error": test_error}


def teacher(given: dict[str, Any]) -> Tensor:
    """A random train, scaled so that outputs have variance one."""
    n = torch.tensor(given["modes"]).prod().item()
    layer = tt.nn.Linear(
        n, n, bias=False, in_modes=given["modes"], out_modes=given["modes"], rank=(1, *given["ranks"], 1)
    )
    weight = layer.to_dense().weight.detach()
    return weight / weight.square().sum(dim=1).mean().sqrt()


def _task(weight: Tensor, given: dict[str, Any], n: int) -> Task:
    x = torch.randn(n, weight.shape[1])
    y = x @ weight.T
    return Task(x, y + given["noise"] * torch.randn_like(y), nn.functional.mse_loss, given["batch_size"])


def student(method: dict[str, Any], given: dict[str, Any]) -> tt.nn.Linear:
    n = torch.tensor(given["modes"]).prod().item()
    rank = 1 if is_grown(method) else tuple(given["ranks"]) if method.get("rank") == "true" else given["start_rank"]
    rank = (1, *rank, 1) if isinstance(rank, tuple) else rank
    return tt.nn.Linear(n, n, bias=False, in_modes=given["modes"], out_modes=given["modes"], rank=rank)
