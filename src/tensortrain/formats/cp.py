"""CP: a sum of products of one vector per mode.

``W[i, j] = sum_a O_1[i_1, a] .. O_d[i_d, a] X[x, a] I_1[j_1, a] .. I_e[j_e, a]``. With one mode for the channels
on either side a convolution is pointwise, depthwise, pointwise. Source: Lebedev et al., ICLR 2015,
arXiv:1412.6553; as CP3 in MUSCO, arXiv:1903.09973.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import ContractionPlan
from tensortrain.tensor import unfolding_spectra

from .base import Spatial, pointwise
from .cp_als import alternate_cp
from .fit import equal_norms
from .layout import single_modes
from .multilinear import hooi, tucker_ranks
from .network import Modes, NetworkFormat, balanced_spectrum
from .registry import register
from .spec import FactorSpec, Kind, WeightShape
from .weighting import PLAIN, Weighting

__all__ = ["CP", "cp_factors"]

_N_STARTS = 3  # the first from the singular vectors, the others random
_N_SWEEPS = 100
_TOL = 1e-6  # of the squared error, per sweep: CP fits often pause before they go on
_N_LAST = 500  # more for the best start, where they cost little: convergence is slow near the end
_SMALL = 300_000
_N_POLISH = 12  # on the whole tensor, after the fit to its compressed core
_GROWTH = 1.25


@register
class CP(NetworkFormat):
    """One factor ``(n, r)`` per mode, inputs first (kernel positions slowest of all); ranks ``(r,)``.

    By default a convolution has one mode per side, other layers have several. Fitted by alternating least
    squares from several starts, which finds good factors but promises no best ones; weights of two modes get
    the truncated SVD.

    Example:
        >>> CP().spec(WeightShape("conv", 128, 64, (3, 3)), rank=16).n_params == 16 * (64 + 9 + 128)
        True
    """

    name: ClassVar[str] = "cp"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "a sum of products of one vector per mode"
    rank_words = "cp takes one rank (r,)"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return single_modes(weight, out_modes, in_modes)

    def caps(self, draft: FactorSpec) -> tuple[int, ...]:
        sizes = (*self.out_legs(draft).values(), *self.in_legs(draft).values())
        return (math.prod(sizes) // max(sizes),)  # so many fibres along the longest mode

    def core_legs(self, spec: FactorSpec) -> tuple[tuple[str, ...], ...]:
        return tuple((leg, "a") for leg in (*self.in_legs(spec), *self.out_legs(spec)))

    def rank_legs(self, spec: FactorSpec) -> dict[str, int]:
        return {"a": spec.ranks[0]}

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        return min(spec.ranks[0], super().max_matrix_rank(spec))

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        """Of the weight as a matrix: below its rank no CP rank can be exact. Padded with zeros to the cap."""
        values = balanced_spectrum(self.whitened_tensor(dense, spec, weighting), len(spec.out_modes))
        return [torch.nn.functional.pad(values, (0, max(0, self.caps(spec)[0] - len(values))))]

    def ranks_within(self, tensor: Tensor, spec: FactorSpec, eps: float) -> tuple[int, ...]:
        """The first of a growing list of ranks at which the fit is good enough."""
        cap = spec.ranks[0]
        # No matricization of the weight has a higher rank than the CP rank.
        least = [tucker_ranks([values], eps)[0] for values in unfolding_spectra(tensor)]
        rank = min(cap, max(1, *least))
        if sum(n > 1 for n in tensor.shape) <= 2:
            return (rank,)
        most = tensor.numel() // sum(tensor.shape)  # beyond it nothing is saved, and fibres are exact
        n_starts = _N_STARTS  # a weight may well have the least rank itself
        while rank < cap and rank <= most:
            if cp_factors(tensor, rank, n_starts=n_starts, enough=eps)[1] <= eps:
                return (rank,)
            n_starts = 1
            rank = min(cap, max(rank + 1, math.ceil(_GROWTH * rank)))
        return (cap,)

    def fit_tensor(self, tensor: Tensor, spec: FactorSpec) -> list[Tensor]:
        factors, _ = cp_factors(tensor, spec.ranks[0])
        n_out = len(spec.out_modes)
        return [*factors[n_out:], *factors[:n_out]]

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        if len(cores) != 3 or "x" not in self.in_legs(spec):
            return super().convolve(x, cores, spec, spatial, plan)
        positions, inner, outer = cores
        depthwise = positions.T.reshape(-1, 1, *spec.weight.kernel)
        return pointwise(spatial(pointwise(x, inner.T), depthwise, None, depthwise.shape[0]), outer)

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        if len(spec.out_modes) > 1 or len(spec.in_modes) > 1 or math.prod(spec.weight.kernel) == 1:
            return super().conv_work(spec, in_positions, out_positions)
        weight, rank = spec.weight.one_group(), spec.ranks[0]
        c, s, k = weight.in_features, weight.out_features, math.prod(weight.kernel)
        return [
            (2 * c * rank * in_positions, (c + rank) * in_positions),
            (2 * rank * k * out_positions, rank * (in_positions + out_positions)),
            (2 * rank * s * out_positions, (rank + s) * out_positions),
        ]


def cp_factors(
    tensor: Tensor, rank: int, *, n_starts: int = _N_STARTS, enough: float = 0.0
) -> tuple[list[Tensor], float]:
    """Factors ``(n_k, rank)`` of a tensor, and the relative error.

    Two modes are a truncated SVD, and a rank as large as the number of fibres is exact; else alternating least
    squares, first on the core of a Tucker decomposition (Bro and Andersson, Chemometrics 42, 1998), with
    random starts from a fixed seed.

    Args:
        tensor: Order two or more, float64.
        rank: Terms.
        n_starts: How many starts the best is taken of.
        enough: Relative error at which to stop.

    Cost: per sweep two products of the tensor with half of the factors.
    """
    long = [k for k, n in enumerate(tensor.shape) if n > 1]
    if len(long) < tensor.ndim:
        squeezed = tensor.reshape([tensor.shape[k] for k in long] or [1])
        if len(long) > 1:
            found, error = cp_factors(squeezed, rank, n_starts=n_starts, enough=enough)
        else:
            found, error = _vector(squeezed, rank)
        ones = iter(found)
        factors = [next(ones) if k in long else tensor.new_ones(1, rank) for k in range(tensor.ndim)]
        if not long:
            factors[0] = found[0]
        return factors, error
    if tensor.ndim == 2:
        return _matrix(tensor, rank)
    if rank >= tensor.numel() // max(tensor.shape):
        return _fibres(tensor, rank), 0.0
    return _alternated(tensor, rank, n_starts, enough)


def _vector(tensor: Tensor, rank: int) -> tuple[list[Tensor], float]:
    factor = tensor.new_zeros(tensor.shape[0], rank)
    factor[:, 0] = tensor
    return [factor], 0.0


def _matrix(tensor: Tensor, rank: int) -> tuple[list[Tensor], float]:
    u, s, vh = torch.linalg.svd(tensor, full_matrices=False)
    root = s[:rank].sqrt()
    factors = [u[:, :rank] * root, vh[:rank].T * root]
    missing = rank - len(root)
    factors = [torch.nn.functional.pad(factor, (0, missing)) for factor in factors]
    norm = torch.linalg.vector_norm(s)
    return factors, float(torch.linalg.vector_norm(s[rank:]) / norm.clamp_min(1e-300))


def _fibres(tensor: Tensor, rank: int) -> list[Tensor]:
    """The tensor itself: one term per fibre along its longest mode."""
    long = max(range(tensor.ndim), key=lambda k: tensor.shape[k])
    others = [k for k in range(tensor.ndim) if k != long]
    sizes = [tensor.shape[k] for k in others]
    n_fibres = math.prod(sizes)
    digits = torch.unravel_index(torch.arange(n_fibres, device=tensor.device), sizes)
    factors = [tensor.new_zeros(n, rank) for n in tensor.shape]
    for k, digit in zip(others, digits, strict=True):
        factors[k][digit, torch.arange(n_fibres, device=tensor.device)] = 1.0
    factors[long][:, :n_fibres] = tensor.movedim(long, 0).reshape(tensor.shape[long], -1)
    return factors


def _alternated(tensor: Tensor, rank: int, n_starts: int, enough: float) -> tuple[list[Tensor], float]:
    core, bases = hooi(tensor, [min(n, rank) for n in tensor.shape])
    whole = core.numel() == tensor.numel()
    best = _best_start(core, rank, n_starts, enough if whole else 0.0)
    factors = [basis @ factor for basis, factor in zip(bases, best[0], strict=True)]
    if whole:
        return equal_norms(factors), best[1]
    factors, error = alternate_cp(tensor, factors, n_sweeps=_N_POLISH, enough=enough)
    return equal_norms(factors), error


def _best_start(core: Tensor, rank: int, n_starts: int, enough: float) -> tuple[list[Tensor], float]:
    """The best fit from several starts; the first that is good enough ends the search."""
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device finds the same
    best: tuple[list[Tensor], float] | None = None
    for number in range(n_starts):
        start = _start(core, rank, number, generator)
        found = alternate_cp(core, start, n_sweeps=_N_SWEEPS, tol=_TOL, enough=enough)
        if best is None or found[1] < best[1]:
            best = found
        if best[1] <= enough:
            return best
    assert best is not None
    if n_starts > 1 and core.numel() * rank <= _SMALL:
        best = alternate_cp(core, best[0], n_sweeps=_N_LAST, tol=_TOL * 1e-2, enough=enough)
    return best


def _start(core: Tensor, rank: int, number: int, generator: torch.Generator) -> list[Tensor]:
    """Random factors; those of the first start begin with the singular vectors of every mode."""
    drawn = [torch.randn(n, rank, generator=generator, dtype=core.dtype).to(core.device) for n in core.shape]
    if number > 0:
        return drawn
    for factor, size in zip(drawn, core.shape, strict=True):
        kept = min(size, rank)
        factor[:, :kept] = torch.eye(size, kept, dtype=core.dtype, device=core.device)  # the core's own axes
    return drawn
