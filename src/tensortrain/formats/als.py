"""Alternating least squares on any network in which every output and input leg belongs to one core.

With the other cores fixed the weight is linear in one core, whose normal equations are as small as its inner
legs: no environment is ever unfolded. With a second moment of the inputs the error is that of the outputs, and a
core's input legs join its normal equations. For CP this is the classical algorithm (Kolda and Bader, SIAM Review
51(3), 2009, figure 3.3); for a ring it is TR-ALS (Zhao et al., arXiv:1606.05535, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.contract import ChainShape, Network
from tensortrain.contract.products import Legs, Product, contraction, contraction_flops, run

__all__ = ["alternate", "chain_network", "solve_normal", "sweep_flops"]

_RCOND = 1e-13  # eigenvalues of the normal equations below this share of the largest are noise
_LARGEST_EIGH = 128  # side above which a Cholesky factorization is tried first


def alternate(
    network: Network,
    target: Tensor,
    cores: Sequence[Tensor],
    *,
    gram: Tensor | None = None,
    n_sweeps: int = 50,
    tol: float = 1e-5,
) -> tuple[list[Tensor], float]:
    """Fit the cores of a network to a tensor, one after the other.

    Args:
        network: Its output and input legs are private to their cores.
        target: ``(*out_legs, *in_legs)``, float64.
        cores: Where to begin.
        gram: Second moment ``H`` of the inputs, ``(N, N)`` and positive: the error is then that of the outputs,
            ``tr(D H D^T)``, and the normal equations of a core hold its input legs too.
        n_sweeps: At most so many.
        tol: Stop once a sweep lowers the squared error by less than this share of it.

    Returns:
        The cores, and the relative error ``||(W - target) H^(1/2)|| / ||target H^(1/2)||``.

    Accuracy: the error never rises from one sweep to the next, up to rounding (about 1e-8 relative, the root
    of that of the normal equations).
    Cost: per core one contraction of the target, and one of ``gram``, with all others.
    """
    cores = list(cores)
    weighed = target if gram is None else (target.reshape(-1, gram.shape[0]) @ gram).reshape(target.shape)
    scale = (target * weighed).sum()
    if not bool(scale > 0):
        return cores if gram is not None else [torch.zeros_like(core) for core in cores], 0.0
    before = torch.full_like(scale, torch.inf)
    for _ in range(n_sweeps):
        for k in range(len(cores)):
            cores[k], fitted = _best_core(network, weighed, cores, k, gram)
        error = (scale - fitted).clamp_min(0)
        # One look per sweep at whether to go on.
        if bool(before - error <= tol * error.clamp_min(1e-14 * scale)):
            break
        before = error
    difference = network.to_dense(cores) - target.reshape(network.out_features, -1)
    error = (difference * (difference if gram is None else difference @ gram)).sum()
    return cores, float((error.clamp_min(0) / scale).sqrt())


def sweep_flops(network: Network, *, weighted: bool) -> int:
    """Floating-point operations of one sweep, the normal equations included."""
    total = 0
    for k in range(len(network.cores)):
        right, normal, side = _equations(network, k, weighted)
        total += contraction_flops(right) + contraction_flops(normal) + side**3
    return total


def _equations(network: Network, k: int, weighted: bool) -> tuple[tuple[Product, ...], tuple[Product, ...], int]:
    """Contractions of the right-hand side and of the normal equations of one core, and their side."""
    rows, columns = _split_legs(network, k, weighted)
    others = tuple(legs for n, legs in enumerate(network.cores) if n != k)
    right = contraction(((*network.out_legs, *network.in_legs), *others), (*rows, *columns), network.sizes)
    # The second copy keeps the outputs, which the error sums over, and has all else of its own.
    changed = {*network.inner_legs, *(network.in_legs if weighted else ())}
    prime = {leg: leg + "'" if leg in changed else leg for leg, _ in network.sizes}
    primed = tuple(tuple(prime[leg] for leg in legs) for legs in others)
    sizes = (*network.sizes, *((prime[leg], n) for leg, n in network.sizes if leg in changed))
    gram = ((*network.in_legs, *(prime[leg] for leg in network.in_legs)),) if weighted else ()
    normal = contraction((*gram, *others, *primed), (*columns, *(prime[leg] for leg in columns)), sizes)
    return right, normal, network.size(columns)


def _split_legs(network: Network, k: int, weighted: bool) -> tuple[Legs, Legs]:
    """Legs of a core that its normal equations do not couple, and those that they do."""
    coupled = {*network.inner_legs, *(network.in_legs if weighted else ())}
    legs = network.cores[k]
    return tuple(leg for leg in legs if leg not in coupled), tuple(leg for leg in legs if leg in coupled)


def _best_core(
    network: Network, weighed: Tensor, cores: Sequence[Tensor], k: int, gram: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The core that fits best, and by how much its weight lowers the squared error below that of zero."""
    rows, columns = _split_legs(network, k, gram is not None)
    right_steps, normal_steps, side = _equations(network, k, gram is not None)
    others = [core for n, core in enumerate(cores) if n != k]
    right = run(right_steps, [weighed, *others]).reshape(-1, side)
    moments = [] if gram is None else [gram.reshape([network.size(leg) for leg in network.in_legs * 2])]
    normal = run(normal_steps, [*moments, *others, *others]).reshape(side, side)
    solution = solve_normal((normal + normal.T) / 2, right)
    order = [(*rows, *columns).index(leg) for leg in network.cores[k]]
    shape = [network.size(leg) for leg in (*rows, *columns)]
    return solution.reshape(shape).permute(order).contiguous(), (solution * right).sum()


def solve_normal(normal: Tensor, right: Tensor) -> Tensor:
    """``right @ normal^-1``, of least norm where ``normal`` is singular to rounding."""
    if normal.shape[0] > _LARGEST_EIGH:
        factor, failed = torch.linalg.cholesky_ex(normal)
        diagonal = factor.diagonal().abs()
        if not bool(failed) and bool(diagonal.min() > _RCOND**0.5 * diagonal.max()):
            return torch.cholesky_solve(right.T, factor).T
    values, vectors = torch.linalg.eigh(normal)
    inverse = values.reciprocal().masked_fill(values <= _RCOND * values[-1], 0.0)
    return ((right @ vectors) * inverse) @ vectors.T


def chain_network(chain: ChainShape) -> Network:
    """The network of a TT-matrix with cores ``(r, i, j, s)``, the boundary ranks left out."""
    d = chain.order
    bonds = [f"r{k}" for k in range(1, d)]
    outs, ins = tuple(f"o{k}" for k in range(1, d + 1)), tuple(f"i{k}" for k in range(1, d + 1))
    cores = tuple((*bonds[max(k - 1, 0) : k], outs[k], ins[k], *bonds[k : k + 1]) for k in range(d))
    sizes = zip((*outs, *ins, *bonds), (*chain.out_modes, *chain.in_modes, *chain.ranks[1:-1]), strict=True)
    return Network(cores, outs, ins, tuple(sizes))
