"""What a second layer remembers: ranks between the first and the last half of a sequence, and a task that needs them.

Recurrent arithmetic circuits multiply, and do nothing else. With one layer the rank between the halves is at most the
width, however long the sequence. With two it grows with the length, and so two layers tell whether both halves of a
string are 1 at an odd number of places, where one layer of the same number of parameters does not:

    python examples/memory_and_depth.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import tensortrain as tt


def ranks(width: int, n_features: int) -> None:
    print(f"rank between the halves, width {width}, {n_features} features:")
    for n_steps in (2, 4, 6, 8):
        found = []
        for depth in (1, 2, 3):
            circuit = tt.models.RecurrentArithmeticCircuit(n_features, width, depth)
            grid = circuit.grid_tensor(n_steps, generator=torch.Generator().manual_seed(0))
            found.append(tt.models.separation_rank(grid, range(n_steps // 2), modulus=2**31 - 1))
        print(f"  {n_steps} steps: " + ", ".join(f"{rank:3} with {k + 1} layers" for k, rank in enumerate(found)))


def overlaps(half: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Strings as unit vectors ``(n, 2 half, 2)``, and whether an odd number of places is 1 in both halves."""
    first, last = torch.randint(0, 2, (2, n, half), generator=generator)
    return nn.functional.one_hot(torch.cat((first, last), dim=1), 2).float(), (first * last).sum(1) % 2


def accuracy(depth: int, width: int, half: int, seed: int) -> tuple[float, int]:
    generator = torch.Generator().manual_seed(seed)
    x, y = overlaps(half, 3000, generator)
    x_test, y_test = overlaps(half, 2000, generator)
    model = tt.models.RecurrentArithmeticCircuit(2, width, depth, n_outputs=2, generator=generator)
    model.fit(x, y, n_sweeps=60, lr=0.02, generator=generator)
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean()
    return float(right), sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--half", type=int, default=4, help="bits of a half")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ranks(3, 3)
    for depth, width in ((1, 10), (2, 6)):
        right, n_params = accuracy(depth, width, options.half, options.seed)
        print(f"{depth} layer{'s' * (depth > 1)} of {width}: {n_params} parameters, {right:.1%} right")


if __name__ == "__main__":
    main()
