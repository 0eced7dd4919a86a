"""Recover a tensor of 160,000 entries from 12,000 of them: Riemannian descent beside Adam on the cores.

Both start at the same random train of the right ranks and make the same number of steps on the same loss; neither
step length is tuned. With far fewer samples both can end in a local minimum:

    python examples/riemannian_completion.py --order 5 --mode 12 --samples 6000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import tensortrain as tt


def entries(x: tt.TensorTrain, at: Tensor) -> Tensor:
    """Values ``(n,)`` at positions ``(n, d)``."""
    state = x.cores[0].new_ones((len(at), 1, 1))
    for core, index in zip(x.cores, at.T, strict=True):
        state = state @ core[:, index].movedim(1, 0)
    return state[:, 0, 0]


def fit(
    make: Callable[[tt.manifold.TTParameter], torch.optim.Optimizer],
    start: tt.TensorTrain,
    known: Tensor,
    values: Tensor,
    n_steps: int,
) -> tt.TensorTrain:
    model = tt.manifold.TTParameter(start)
    optimizer = make(model)
    for _ in range(n_steps):
        optimizer.zero_grad()
        # scaled so that, over all entries, the loss would be ||x - y||^2 / 2: a step length near 1 fits any size
        loss = (entries(model.value, known) - values).square().mean() * start.numel / 2
        loss.backward()
        optimizer.step()
    return model.value.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--mode", type=int, default=20)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--samples", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.mode,) * options.order
    truth = tt.randn(shape, options.rank, generator=generator, dtype=torch.float64)
    at = torch.randint(0, options.mode, (options.samples + 2000, options.order), generator=generator)
    known, unseen = at[:-2000], at[-2000:]
    start = tt.randn(shape, options.rank, generator=generator, dtype=torch.float64) * 0.1

    def rmse(x: tt.TensorTrain, at: Tensor) -> float:
        return float((entries(x, at) - entries(truth, at)).square().mean().sqrt())

    for name, make in (
        ("Riemannian SGD", lambda w: tt.manifold.RiemannianSGD(w, lr=0.3, momentum=0.5)),
        ("Adam on cores", lambda w: torch.optim.Adam(w.parameters(), lr=0.03)),
    ):
        found = fit(make, start, known, entries(truth, known), options.steps)
        print(
            f"{name:>15}: root mean square error {rmse(found, known):.1e} on {options.samples:,} known "
            f"entries, {rmse(found, unseen):.1e} on unseen ones, of {found.numel:,}"
        )


if __name__ == "__main__":
    main()
