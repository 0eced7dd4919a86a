"""Nets on Fashion-MNIST: what does each method leave of the ranks, and of the accuracy?"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from study import file_name
from torch import Tensor, nn
from training import Task, is_grown, search_, start_

import tensortrain as tt
from tensortrain.data import fashion_mnist

__all__ = ["evaluate", "mlp", "run_mlp", "tasks"]


def run_mlp(name: str, given: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """784-625-10, dense or with two factorized layers: as a method leaves it, and cut to a budget of parameters."""
    method, stages = given["methods"][name], given["stages"]
    torch.manual_seed(seed)
    train, test = tasks(given["batch_size"], flat=True, held_out=given.get("held_out", 0))
    model = mlp(method, given)
    started_(model, folder / f"start-{seed}.pt", train, method, stages)
    search_(model, train, method, stages)
    cuts = []
    for budget in (None, *method.get("budgets", given["budgets"])):
        one = copy.deepcopy(model)
        if budget is not None:
            n_rest = sum(p.numel() for key, p in one.named_parameters() if "bias" in key)
            tt.nn.prune_ranks_(one, budget=budget - n_rest)
        at_once = evaluate(one, test)["accuracy"]
        train.train(one, **stages["finish"])
        cuts.append({"budget": budget, **counts(one), "accuracy_at_once": at_once, **evaluate(one, test)})
        torch.save(one, folder / f"{file_name(name)}-{budget or 'own'}-{seed}.pt")
    return {"cuts": cuts}


def started_(model: nn.Module, path: Path, task: Task, method: dict[str, Any], stages: dict[str, Any]) -> None:
    """The first steps; those of the net that most methods start from are done once."""
    is_common = method["how"] in ("prior", "gates") or (method["how"] == "fixed" and "rank" not in method)
    if is_common and path.exists():
        model.load_state_dict(torch.load(path))
    else:
        start_(model, task, method, stages)
    if is_common:
        torch.save(model.state_dict(), path)


def mlp(method: dict[str, Any], given: dict[str, Any]) -> nn.Sequential:
    """The net of Hawkins and Zhang; its ranks are one where they are to grow."""
    if method.get("rank") == "dense":
        return nn.Sequential(nn.Linear(784, 625), nn.ReLU(), nn.Linear(625, 10))
    rank = 1 if is_grown(method) else method.get("rank", given["start_rank"])
    first, second = (tt.nn.Linear(*sizes, rank=rank, **modes) for sizes, modes in _MLP)
    return nn.Sequential(first, nn.ReLU(), second)


_MLP = (
    ((784, 625), {"in_modes": (7, 4, 7, 4), "out_modes": (5, 5, 5, 5)}),
    ((625, 10), {"in_modes": (25, 25), "out_modes": (5, 2)}),
)


def counts(model: nn.Module) -> dict[str, Any]:
    """Parameters in all, biases included, and the ranks of each factorized layer."""
    ranks = {name: list(one.ranks) for name, one in model.named_modules() if hasattr(one, "spec")}
    return {"n_params": sum(p.numel() for p in model.parameters()), "ranks": ranks}


@torch.no_grad()
def evaluate(model: nn.Module, test: Task) -> dict[str, float]:
    """Accuracy, and the mean log-likelihood in nats."""
    logits = torch.cat([model(x) for x in test.x.split(1000)])
    right = (logits.argmax(dim=1) == test.y).double().mean()
    return {"accuracy": float(right), "log_likelihood": -float(test.loss(logits, test.y))}


@cache
def tasks(batch_size: int, flat: bool, held_out: int = 0) -> tuple[Task, Task]:
    """Training and test set, less the mean of the training images, and scaled to a standard deviation of one.

    Args:
        held_out: So many of the training images stand in for the test set: for choices that it may not know of.
    """
    images = fashion_mnist()
    known, unknown = (_scaled(x) for x in (images.train_images, images.test_images))
    labels, answers = (_labels(y) for y in (images.train_labels, images.test_labels))
    if held_out:
        known, unknown = known[:-held_out], known[-held_out:]
        labels, answers = labels[:-held_out], labels[-held_out:]
    mean, std = known.mean(dim=0), known.std()
    known, unknown = ((x - mean) / std for x in (known, unknown))
    if flat:
        known, unknown = known.flatten(1), unknown.flatten(1)
    loss = nn.functional.cross_entropy
    return Task(known, labels, loss, batch_size), Task(unknown, answers, loss, batch_size)


def _scaled(x: Any) -> Tensor:
    return torch.as_tensor(x).reshape(-1, 1, 28, 28).float() / 255


def _labels(y: Any) -> Tensor:
    return torch.as_tensor(y).long()
