"""A few copies of the cut net that follow the posterior: how much more likely do they make the test set?"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from images import counts, evaluate, tasks
from study import file_name
from torch import nn

import tensortrain as tt

__all__ = ["run_particles"]


def run_particles(name: str, given: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Particles around a net that the part on perceptrons left; beside it that net, trained as many passes more."""
    method = given["methods"][name]
    train, test = tasks(given["batch_size"], flat=True)
    path = folder.parent / "fashion" / f"{file_name(given['net'])}-{given['budget']}-{seed}.pt"
    model = torch.load(path, weights_only=False)
    torch.manual_seed(seed)
    start = evaluate(model, test)
    if method["how"] == "map":
        prior = tt.nn.RankPrior(model, given["kind"])
        penalty = lambda: prior.loss() / len(train.x)  # noqa: E731
        train.train(model, **given["stage"], penalty=penalty, after=prior.update_)
        return {**counts(model), "start": start, **evaluate(model, test)}
    posterior = tt.nn.SVGD(model, tt.nn.RankPrior(model, given["kind"]), **method["options"])
    model.train()
    n_steps, lr = given["stage"]["epochs"] * -(-len(train.x) // train.batch_size), posterior.lr
    batches = itertools.chain.from_iterable(train.batches() for _ in range(given["stage"]["epochs"]))
    for k, (x, y) in enumerate(batches):
        posterior.lr = lr * (0.02 + 0.49 * (1 + math.cos(math.pi * k / n_steps)))  # as Task.train
        posterior.step(lambda net, x=x, y=y: train.loss(net(x), y), len(train.x))
    model.eval()
    log_p = torch.cat([posterior.log_prob(lambda net, x=x: net(x)) for x in test.x.split(1000)])
    right = float((log_p.argmax(dim=1) == test.y).double().mean())
    likelihood = -float(nn.functional.nll_loss(log_p, test.y))
    return {**counts(model), "start": start, "accuracy": right, "log_likelihood": likelihood}
