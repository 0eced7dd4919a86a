"""Exact and independent samples of the law that a chain holds, one site after the other, and their probabilities.

Two laws: ``"density"``, whose entries are probabilities up to their sum, and ``"born"``, with the squared moduli of the
entries. A site may be given, and is then a condition, wherever it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.canonical import norm_parts, orthogonalize_cores
from tensortrain.cores.environments import Data, Environments, SquaredData
from tensortrain.cores.scaling import split_pow2, times_pow2
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.cores.unfold import absorb_left
from tensortrain.errors import DataError, KindError, ModeIndexError
from tensortrain.system.native import library
from tensortrain.system.tracing import can_look

__all__ = ["log_prob", "sample"]

_ROUNDING = 1e3  # roundings of what is summed up to a weight that count as none


def sample(
    cores: Sequence[Tensor],
    n_samples: int,
    *,
    law: str = "density",
    given: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw samples, each by itself, from the law of a chain or from what it is under a condition.

    Args:
        cores: ``(r, n, s)`` each.
        n_samples: How many.
        law: ``"density"`` or ``"born"``.
        given: ``(d,)`` or ``(n_samples, d)`` int64; -1 where a site is free.
        generator: Of the random numbers.

    Returns:
        Tensor: ``(n_samples, d)`` int64.

    Raises:
        DataError: A marginal of a density is negative beyond rounding, or a condition has probability zero.
        KindError: The law has no such name.

    Cost: O(d n r^2) flops for each sample of a density; for each of a Born law O(d n r^2) where it is free of
        conditions and O(d n r^3) where every sample has its own.
    Source: Ferris and Vidal, Phys. Rev. B 85, 2012 (perfect sampling); Dolgov et al., arXiv:1810.01212.
    """
    chosen = _law(law)
    with torch.no_grad():
        wide = [core.to(compute_dtype(core.dtype)) for core in cores]
        condition = _condition(given, wide)
        device = wide[0].device
        draws = torch.rand(n_samples, len(wide), generator=generator, dtype=torch.float64, device=device)
        if law == "born" and len(condition) == 1:
            return _born_samples(wide, condition[0], draws)
        later = Environments(chosen.rows.of_values(condition, [core.shape[-2] for core in wide], wide[0].dtype), wide)
        state, values = wide[0].new_ones(n_samples, 1), []
        for k, core in enumerate(wide):
            ahead = absorb_left(state, core)  # b n s
            weights = _weights(chosen, ahead, later.right(k + 1).value, condition[:, k], k)
            values.append(_drawn(weights, draws[:, k]))
            state, _ = split_pow2(ahead[torch.arange(n_samples, device=device), values[-1]], 1)
        return torch.stack(values, dim=1)


def log_prob(cores: Sequence[Tensor], x: Tensor, *, law: str = "density") -> Tensor:
    """Logarithms of probabilities, in nats, normalised; differentiable in the cores.

    Args:
        cores: ``(r, n, s)`` each.
        x: ``(b, d)`` int64; -1 sums a site out, so that the probability is that of the others.
        law: As for ``sample``.

    Returns:
        Tensor: ``(b,)`` real; minus infinity where there is no mass.

    Raises:
        DataError: A probability of a density is negative beyond rounding.
        KindError: The law has no such name.
    """
    chosen = _law(law)
    mass, exponent = chosen.masses(cores, x)
    whole, of_whole = chosen.masses(cores, x.new_full((1, len(cores)), -1))
    exponent = exponent - of_whole
    share = (mass / whole).detach()
    rounding = _ROUNDING * torch.finfo(share.dtype).eps
    if bool((times_pow2(share, exponent.clamp_max(0)) < -rounding).any()):
        raise _negative("a probability", float(share.amin()))
    return _log(mass / whole) + exponent.to(share.dtype) * math.log(2)


def _born_samples(cores: Sequence[Tensor], condition: Tensor, draws: Tensor) -> Tensor:
    """Samples ``(b, d)`` of squared moduli under one condition for all, by numbers in [0, 1).

    With the values that are not given taken out and all cores but the first right-orthonormal, the weight of a value is
    the squared norm of what the state becomes by it.
    """
    allowed = [_slices(core, int(value)) for core, value in zip(cores, condition.tolist(), strict=True)]
    span = (0, len(cores) - 1)
    found, exponent = orthogonalize_cores(allowed, span, 0)
    if bool((condition >= 0).any()):
        size, of_size = norm_parts(cores, span)
        share = times_pow2(torch.linalg.vector_norm(found[0]) / size, exponent - of_size)
        if not bool(share > _ROUNDING * torch.finfo(share.dtype).eps):
            raise DataError(
                "a condition must have a probability: given has values that never come together, expected ones that "
                "do. Free some sites with -1."
            )
    least = torch.finfo(draws.dtype).eps ** 2 * _ROUNDING  # of squares
    kernels = library() if can_look(found[0]) else None
    if kernels is not None:
        values: Tensor | None = kernels.chain_drawn([core.contiguous() for core in found], draws, least)
        if values is not None:
            return values
    state, drawn = found[0].new_ones(len(draws), 1), []
    for k, core in enumerate(found):
        ahead = absorb_left(state, core)  # b n s
        weights = ahead.abs().square().sum(-1)
        weights = weights.where(weights > least * weights.sum(-1, keepdim=True), 0.0)
        drawn.append(_drawn(weights, draws[:, k]))
        state, _ = split_pow2(ahead[torch.arange(len(draws), device=draws.device), drawn[-1]], 1)
    return torch.stack(drawn, dim=1)


def _slices(core: Tensor, value: int) -> Tensor:
    """The core with all slices but one zero; all of them where the value is negative."""
    if value < 0:
        return core
    kept = torch.zeros_like(core)
    kept[:, value] = core[:, value]
    return kept


@dataclass(frozen=True)
class _Law:
    """What a chain says of its entries.

    Attributes:
        rows: The environments of marginals.
        weigh: From ``(b, n, s)``, all up to a site, and what lies right of it, to the weights ``(b, n)`` of its values.
        masses: ``(m, e)`` with the masses ``m * 2**e`` of samples ``(b, d)``.
    """

    rows: type[Data] | type[SquaredData]
    weigh: Callable[[Tensor, Tensor], Tensor]
    masses: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]


def _values_of(rows: type[Data] | type[SquaredData], cores: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    made = rows.of_values(x, [core.shape[-2] for core in cores], cores[0].dtype)
    value, exponent = Environments(made, cores).left(len(cores))
    return value.flatten(), exponent


def _density_masses(cores: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    value, exponent = _values_of(Data, cores, x)
    return value.real if value.is_complex() else value, exponent


def _born_masses(cores: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    if bool((x < 0).any()):  # one host sync; without marginals amplitudes will do
        value, exponent = _values_of(SquaredData, cores, x)
        return value.real if value.is_complex() else value, exponent
    psi, exponent = _values_of(Data, cores, x)
    return (psi * psi.conj()).real if psi.is_complex() else psi.square(), 2 * exponent


_LAWS = {
    "density": _Law(Data, lambda ahead, right: (ahead @ right.unsqueeze(-1)).squeeze(-1), _density_masses),
    "born": _Law(SquaredData, lambda ahead, right: ((ahead @ right) * ahead.conj()).sum(-1), _born_masses),
}


def _law(name: str) -> _Law:
    if name not in _LAWS:
        raise KindError(
            f"a law must be known: law has {name!r}, expected one of {sorted(_LAWS)}. "
            "Use 'density' for probabilities and 'born' for amplitudes."
        )
    return _LAWS[name]


def _condition(given: Tensor | None, cores: Sequence[Tensor]) -> Tensor:
    """Values ``(b, d)``, -1 where free."""
    if given is None:
        return torch.full((1, len(cores)), -1, device=cores[0].device)
    condition = given.to(cores[0].device)
    condition = condition if condition.ndim == 2 else condition.unsqueeze(0)
    sizes = torch.tensor([core.shape[-2] for core in cores], device=condition.device)
    if condition.shape[-1] != len(cores) or bool(((condition < -1) | (condition >= sizes)).any()):
        raise ModeIndexError(
            f"a condition must give a value of each site, or -1: given has shape {tuple(given.shape)} and values "
            f"{int(given.min())} to {int(given.max())}, expected {len(cores)} sites of modes {tuple(sizes.tolist())}. "
            "Pass -1 where a site is free."
        )
    return condition


def _weights(law: _Law, ahead: Tensor, right: Tensor, given: Tensor, k: int) -> Tensor:
    """Weights ``(b, n)`` of the values of site k, none of them negative, and zero where another value is given."""
    found = law.weigh(ahead, right)
    weights = found.real if found.is_complex() else found
    rounding = _ROUNDING * torch.finfo(weights.dtype).eps * law.weigh(ahead.abs(), right.abs())
    if bool((weights < -rounding.amax(-1, keepdim=True)).any()):
        raise _negative(f"a marginal of site {k}", float(weights.amin()))
    # What rounding may have made of nothing counts as nothing.
    weights = weights.where(weights > rounding, 0.0)
    values = torch.arange(weights.shape[-1], device=weights.device)
    weights = weights * ((given[:, None] == values) | (given[:, None] < 0))
    if bool((weights.sum(-1) <= 0).any()):
        raise DataError(
            f"a condition must have a probability: given has the value at site {k} that never comes with the others, "
            "expected one that does. Free some sites with -1."
        )
    return weights


def _log(share: Tensor) -> Tensor:
    """Minus infinity where there is nothing, which leaves the derivatives of the others finite."""
    is_there = ~(share <= 0)
    return share.where(is_there, 1.0).log().where(is_there, -math.inf)


def _drawn(weights: Tensor, draws: Tensor) -> Tensor:
    """One value for each row of weights, by inversion of the distribution function."""
    upto = weights.cumsum(-1)
    found = (upto <= draws[:, None] * upto[:, -1:]).sum(-1)
    positive = torch.arange(weights.shape[-1], device=weights.device) * (weights > 0)
    return torch.minimum(found, positive.amax(-1))  # a product that is rounded up may pass the last one


def _negative(what: str, value: float) -> DataError:
    return DataError(
        f"a density must not be negative: {what} has {value:.3g} of the whole, expected 0 or more, to rounding. "
        "Round the train less, or sample its square with law='born'."
    )
