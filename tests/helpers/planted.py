"""A regression whose weight is a train of known ranks, and a layer that starts with more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import tensortrain as tt

RANKS = (1, 2, 3, 1)
_MODES = {"in_modes": (3, 3, 4), "out_modes": (3, 4, 3)}


class Planted:
    """``y = W x`` with a little noise, ``W`` a train of ``RANKS``, and how a layer is trained on it."""

    def __init__(self, seed: int, n: int = 4000) -> None:
        torch.manual_seed(seed)
        weight = tt.nn.Linear(36, 36, bias=False, rank=RANKS, **_MODES).to_dense().weight.detach()
        self.weight = weight / weight.norm() * 6
        self.x = torch.randn(n, 36)
        self.y = self.x @ self.weight.T + 1e-2 * torch.randn(n, 36)

    def layer(self, rank: int) -> tt.nn.Linear:
        return tt.nn.Linear(36, 36, bias=False, rank=rank, **_MODES)

    def error(self, layer: tt.nn.Linear) -> float:
        return float(torch.linalg.vector_norm(layer.to_dense().weight.detach() - self.weight) / self.weight.norm())

    def train(
        self,
        layer: tt.nn.Linear,
        epochs: int,
        lr: float,
        more: Iterable[Tensor] = (),
        penalty: Callable[[], Tensor | float] = lambda: 0.0,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        optimizer = torch.optim.Adam(itertools.chain(layer.parameters(), more), lr=lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.x)).split(200):
                loss = (layer(self.x[rows]) - self.y[rows]).square().mean() + penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                after()
