"""Find products of four signs among sixteen that decide a label, and read them out of the weights.

Linear models and trees see nothing: each sign, pair and triple by itself is independent of the label. An exponential
machine has a weight for each of the 65,536 sets of signs; the gradient by all of them shows the few that matter:

    python examples/hidden_interactions.py --figure weights.png
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import tensortrain as tt

N_SIGNS, ORDER = 16, 4


def labelled(n: int, n_terms: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Signs ``(n, 16)``, labels, and which signs each product has."""
    x = torch.randint(0, 2, (n, N_SIGNS), generator=generator) * 2.0 - 1
    terms = torch.stack([torch.randperm(N_SIGNS, generator=generator)[:ORDER].sort().values for _ in range(n_terms)])
    weights = 0.5 + 0.5 * torch.rand(n_terms, generator=generator)
    return x, (x[:, terms].prod(-1) @ weights > 0).float(), terms


def draw(path: str, sizes: Tensor, n_terms: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(1, 41), sizes[:40].clamp_min(1e-4), "o", markersize=4)
    axes.axvline(n_terms + 0.5, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="sets of signs, the largest weight first", ylabel="size of the weight")
    axes.set_title(f"left of the line: the {n_terms} products that decide", fontsize=10, loc="left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-terms", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file to draw to")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(options.seed)
    x, y, terms = labelled(20_000, options.n_terms, generator)
    model = tt.models.ExponentialMachine(N_SIGNS, rank=8, generator=generator)
    history = model.fit(
        x[:10_000],
        y[:10_000],
        loss="logistic",
        method="gradient",
        order=ORDER,
        n_sweeps=1,
        validation=(x[10_000:], y[10_000:]),
    )
    print(f"right on new examples: {history.validation_accuracy[-1]:.4f}, ranks {max(model.ranks)} or less")
    weights = model.tensor.to_dense()
    weights[(0,) * N_SIGNS] = 0.0  # the constant
    sizes, places = weights.abs().flatten().sort(descending=True)
    for place in places[: options.n_terms]:
        index = torch.unravel_index(place, weights.shape)
        signs = tuple(k for k, i in enumerate(index) if i)
        is_true = list(signs) in terms.tolist()
        print(f"{float(weights[index]):+.3f} times the signs {signs}, {'as' if is_true else 'not'} in the law")
    if options.figure:
        draw(options.figure, sizes, options.n_terms)


if __name__ == "__main__":
    main()
