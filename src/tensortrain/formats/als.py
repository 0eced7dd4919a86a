"""Alternating least squares on any network in which every output and input leg belongs to one core.

With the other cores fixed the weight is linear in one core, whose normal equations are as small as its inner
legs: no environment is ever unfolded. For CP this is the classical algorithm (Kolda and Bader, SIAM Review
51(3), 2009, figure 3.3); for a ring it is TR-ALS (Zhao et al., arXiv:1606.05535, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.contract import Network
from tensortrain.contract.network import contraction, run

__all__ = ["alternate"]

_RCOND = 1e-13  # eigenvalues of the normal equations below this share of the largest are noise


def alternate(
    network: Network,
    target: Tensor,
    cores: Sequence[Tensor],
    *,
    n_sweeps: int = 50,
    tol: float = 1e-5,
) -> tuple[list[Tensor], float]:
    """Fit the cores of a network to a tensor, one after the other.

    Args:
        network: Its output and input legs are private to their cores.
        target: ``(*out_legs, *in_legs)``, float64.
        cores: Where to begin.
        n_sweeps: At most so many.
        tol: Stop once a sweep lowers the squared error by less than this share of it.

    Returns:
        The cores, and the relative error ``||W - target|| / ||target||``.

    Accuracy: the error never rises from one sweep to the next, up to rounding (about 1e-8 relative, the root
    of that of the normal equations).
    Cost: per core one contraction of the target with all others.
    """
    cores = list(cores)
    scale = target.square().sum()
    if not bool(scale > 0):
        return [torch.zeros_like(core) for core in cores], 0.0
    before = torch.full_like(scale, torch.inf)
    for _ in range(n_sweeps):
        for k in range(len(cores)):
            cores[k], fitted = _best_core(network, target, cores, k)
        error = (scale - fitted).clamp_min(0)
        # One look per sweep at whether to go on.
        if bool(before - error <= tol * error.clamp_min(1e-14 * scale)):
            break
        before = error
    difference = network.to_dense(cores).reshape(target.shape) - target
    return cores, float(torch.linalg.vector_norm(difference) / scale.sqrt())


def _best_core(network: Network, target: Tensor, cores: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The core that fits best, and by how much its weight lowers the squared error below that of zero."""
    others = [n for n in range(len(cores)) if n != k]
    private, inner_set = network.private_legs(k), set(network.inner_legs)
    inner = tuple(leg for leg in network.cores[k] if leg in inner_set)
    legs = tuple(network.cores[n] for n in others)
    steps = contraction(((*network.out_legs, *network.in_legs), *legs), (*private, *inner), network.sizes)
    fixed = [cores[n] for n in others]
    right = run(steps, [target, *fixed]).reshape(network.size(private), network.size(inner))
    primed = tuple(tuple(leg + "'" if leg in inner_set else leg for leg in one) for one in legs)
    sizes = (*network.sizes, *((leg + "'", n) for leg, n in network.sizes if leg in inner_set))
    steps = contraction((*legs, *primed), (*inner, *(leg + "'" for leg in inner)), sizes)
    gram = run(steps, [*fixed, *fixed]).reshape(right.shape[1], right.shape[1])
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    kept = values > _RCOND * values[-1]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    solution = ((right @ vectors) * inverse) @ vectors.T
    shape = [network.size(leg) for leg in (*private, *inner)]
    order = [(*private, *inner).index(leg) for leg in network.cores[k]]
    return solution.reshape(shape).permute(order).contiguous(), (solution * right).sum()
