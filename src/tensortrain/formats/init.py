"""How new cores are drawn, so that the dense weight that they stand for has a wanted variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["draw_", "draw_structured_", "std_of_entries"]


def std_of_entries(sigma: float, n_paths: int, n_cores: int) -> float:
    r"""Standard deviation of every core entry that gives dense entries the variance ``sigma**2``.

    An entry is a sum over ``n_paths`` products of one independent entry per core, so
    ``std**(2 n_cores) * n_paths = sigma**2``. (The root ``4d - 2`` printed in arXiv:1901.10787 is that
    of a chain of ``2d - 1`` cores and misses the variance of a TT-matrix by orders of magnitude.)
    """
    return (sigma**2 / n_paths) ** (1 / (2 * n_cores))


@torch.no_grad()
def draw_(
    cores: Sequence[Tensor],
    sigma: float,
    std: float,
    mean_square: Callable[[Sequence[Tensor]], float],
    generator: torch.Generator | None,
) -> None:
    """Fill cores so that the dense weight has mean square ``sigma**2``.

    Gaussian cores have the right variance only on average, and their product has heavy tails
    (kurtosis ``3 prod(1 + 2 / r_k)``), so the draw at hand is scaled to the target as a whole.
    """
    for core in cores:
        if core.is_meta:
            return
        core.normal_(0.0, std, generator=generator)
    drawn = mean_square(cores)
    if drawn > 0:
        scale = (sigma**2 / drawn) ** (1 / (2 * len(cores)))
        for core in cores:
            core.mul_(scale)


@torch.no_grad()
def draw_structured_(
    cores: Sequence[Tensor], fans: Sequence[tuple[int, int]], generator: torch.Generator | None
) -> None:
    """Fill every core with the standard deviation ``sqrt(1 / f_in) min(1, sqrt(f_out / f_in))``.

    Activations then keep their size whatever the width. Source: Qiu et al., ICML 2024, arXiv:2406.06248, section 3.
    """
    for core, (f_in, f_out) in zip(cores, fans, strict=True):
        if not core.is_meta:
            core.normal_(0.0, min(1.0, math.sqrt(f_out / f_in)) / math.sqrt(f_in), generator=generator)
