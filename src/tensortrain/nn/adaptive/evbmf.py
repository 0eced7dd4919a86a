"""The rank of a noisy matrix by empirical variational Bayes."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import NonFiniteError, ShapeError

__all__ = ["evbmf"]

_TAU = 2.5129  # of the threshold, times sqrt(alpha)
_ROUNDING = 1e-26  # squared singular values below this share are rounding: nothing is told from less noise than that


def evbmf(weight: Tensor) -> int:
    r"""Rank of a matrix above its noise: the global solution of empirical variational Bayes matrix factorization.

    What MUSCO takes for the rank of a layer when asked for none: of a kernel pass an unfolding of it.

    Args:
        weight: ``(m, n)``, real or complex, m and n at least 2.

    Returns:
        int: From 0, where nothing rises above the noise.

    Raises:
        ShapeError: Not a matrix, or one with a side below 2.
        NonFiniteError: NaN or Inf.

    Cost: one singular value decomposition and a search in one variable.
    Source: Nakajima, Sugiyama, Babacan and Tomioka, JMLR 14, 2013, theorems 6 and 7; its use for layers: Kim et al.,
    arXiv:1511.06530.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> planted = torch.randn(60, 3, generator=generator) @ torch.randn(3, 90, generator=generator)
        >>> evbmf(planted + 0.1 * torch.randn(60, 90, generator=generator))
        3
    """
    if weight.ndim != 2 or min(weight.shape) < 2:
        raise ShapeError(
            f"evbmf takes a matrix of at least 2 x 2: found the shape {tuple(weight.shape)}. Flatten a kernel to "
            "(outputs, inputs) first."
        )
    matrix = weight.detach().to(compute_dtype(weight.dtype)).cpu()
    if not bool(torch.isfinite(torch.view_as_real(matrix) if matrix.is_complex() else matrix).all()):
        raise NonFiniteError("a weight must be finite: found NaN or Inf. Look for the layer that diverged.")
    scale = float(matrix.abs().max())
    if scale == 0:
        return 0
    squares = torch.linalg.svdvals(matrix / scale).double().square()
    small, large = sorted(matrix.shape)
    variance = _noise_variance(squares.clamp_min(_ROUNDING * float(squares[0])), small, large)
    return int((squares > large * variance * _cutoff(small / large)).sum())


def _cutoff(alpha: float) -> float:
    """What a squared singular value must exceed, over the longer side times the variance of the noise."""
    tau = _TAU * math.sqrt(alpha)
    return (1 + tau) * (1 + alpha / tau)


def _noise_variance(squares: Tensor, small: int, large: int) -> float:
    """The variance at which the free energy is least."""
    alpha = small / large
    cutoff = _cutoff(alpha)
    most = min(max(math.ceil(small / (1 + alpha)) - 1, 1), small - 1)  # the rest of the values must be noise
    upper = float(squares.sum()) / (small * large)
    lower = max(float(squares[most]) / (large * cutoff), float(squares[most:].mean()) / large)
    if not 0 < lower < upper:
        return max(upper * 1e-12, lower if lower < upper else upper)

    def energy(log_variance: float) -> float:
        return _energy(squares / (large * math.exp(log_variance)), alpha, cutoff)

    found = minimize_scalar(energy, bounds=(math.log(lower), math.log(upper)), method="bounded")
    return math.exp(float(found.x))


def _energy(x: Tensor, alpha: float, cutoff: float) -> float:
    """The free energy at one variance, over the longer side and but for constants; ``x`` over that variance."""
    signal, noise = x[x > cutoff], x[x <= cutoff]
    sum_ = signal - (1 + alpha)
    tau = 0.5 * (sum_ + (sum_.square() - 4 * alpha).clamp_min(0).sqrt())
    shrunk = signal - tau + ((tau + 1) / signal).log() + alpha * (tau / alpha + 1).log()
    return float(noise.sum() - noise.log().sum() + shrunk.sum())
