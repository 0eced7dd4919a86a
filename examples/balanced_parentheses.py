"""A language from a few of its words: balanced parentheses, learnt in one pass without gradients.

Words of 20 parentheses that are never more than three deep: an automaton with four states knows them, and so does a
train of rank four. Reduced densities find it in a few per cent of the words. That all samples are words says little,
for failed runs do that too with very few words; the support says over how many the law is spread.

    python examples/balanced_parentheses.py --length 20 --depth 3
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import tensortrain as tt


def words(length: int, depth: int) -> Tensor:
    """All balanced words ``(n, length)``, 0 opens and 1 closes, never deeper than ``depth``."""
    found = torch.zeros(1, 0, dtype=torch.int64)
    height = torch.zeros(1, dtype=torch.int64)
    for k in range(length):
        bits = torch.tensor([0, 1]).repeat(len(found))
        found = torch.cat((found.repeat_interleave(2, 0), bits[:, None]), dim=1)
        height = height.repeat_interleave(2) + 1 - 2 * bits
        kept = (height >= 0) & (height <= depth) & (height <= length - k - 1)
        found, height = found[kept], height[kept]
    return found


def is_word(x: Tensor, depth: int) -> Tensor:
    height = (1 - 2 * x).cumsum(1)
    return (height >= 0).all(1) & (height <= depth).all(1) & (height[:, -1] == 0)


def learnt(every: Tensor, share: float, rank: int, generator: torch.Generator) -> tt.models.BornMachine:
    few = every[torch.randperm(len(every), generator=generator)[: max(1, int(share * len(every)))]]
    return tt.models.BornMachine.from_samples(few, max_bond=rank, dtype=torch.float64)


def support(model: tt.models.BornMachine, every: Tensor) -> float:
    """One over the sum of squared probabilities, as a share of all words: 1 for an even law."""
    with torch.no_grad():
        return float(1 / model.log_prob(every).exp().square().sum()) / len(every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    every = words(options.length, options.depth)
    generator = torch.Generator().manual_seed(options.seed)
    print(f"{len(every)} words of length {options.length}, at most {options.depth} deep")
    for share in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0):
        model = learnt(every, share, options.depth + 1, generator)
        drawn = model.sample(2000, generator=generator)
        valid = float(is_word(drawn, options.depth).double().mean())
        new = "".join("()"[bit] for bit in drawn[0].tolist())
        print(f"{share:4.0%} of them: support {support(model, every):.3f}, {valid:.1%} of samples are words: {new}")


if __name__ == "__main__":
    main()
