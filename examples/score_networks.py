"""One task, four networks of tensor trains: recurrent, shallow, deep, and a train with activations.

The digits of scikit-learn, 8 x 8 pixels as 16 patches of 2 x 2, 1,437 to learn from and 360 to be tested on; then, for
the recurrent network, how wide a shallow one would have to be:

    python examples/score_networks.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tensortrain as tt


def patches() -> tuple[Tensor, Tensor]:
    """Examples ``(1797, 16, 4)`` in an order without meaning, and their labels."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = (x.float() / 16).reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return cut[order], y[order]


def score_network(kind: str, rank: int, seed: int) -> tt.models.ScoreNetwork:
    torch.manual_seed(seed)
    lift = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1))  # features that sum up to 1 keep the size of a state
    return tt.models.ScoreNetwork(16, 4, 10, format=kind, rank=rank, n_features=8, feature_map=lift)


def train_with_activations(x: Tensor, y: Tensor, n_epochs: int, seed: int) -> nn.Module:
    """Patches by the first core, four of them below each other by the second, the columns by the third."""
    torch.manual_seed(seed)
    model = tt.models.NonlinearTT((4, 4, 4), 10, rank=(16, 32), reading="modes")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(n_epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[rows].mT.flatten(1)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def told(name: str, model: nn.Module, scores: Tensor, labels: Tensor) -> None:
    n_params = sum(parameter.numel() for parameter in model.parameters())
    right = float((scores.argmax(1) == labels).float().mean())
    print(f"{name:34} {n_params:6} parameters, {right:.1%} of the test digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    x, y = patches()
    train, test = (x[:1437], y[:1437]), (x[1437:], y[1437:])
    for kind, rank, name in (("tt", 8, "recurrent"), ("cp", 64, "shallow"), ("ht", 8, "a binary tree")):
        model = score_network(kind, rank, options.seed)
        model.fit(*train, n_sweeps=options.epochs, lr=0.02, batch_size=64)
        with torch.no_grad():
            told(f"{kind}, {name}, rank {rank}", model, model(test[0]), test[1])
    model = train_with_activations(*train, options.epochs, options.seed)
    with torch.no_grad():
        told("train with activations", model, model(test[0].mT.flatten(1)), test[1])

    small = tt.models.ScoreNetwork(6, 3, 1, rank=3, n_features=3, feature_map=nn.Identity(), dtype=torch.float64)
    with torch.no_grad():
        for core in small.cores:
            core.normal_()
        grid = small.grid_tensor(torch.eye(3, dtype=torch.float64))[0]
    rank = tt.models.separation_rank(grid, (0, 2, 4))
    print(f"a recurrent network of rank 3 on 6 positions: a shallow one needs a width of {rank} or more")


if __name__ == "__main__":
    main()
