"""Layers as plain functions of their cores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tensortrain.contract import ChainShape, plan_chain
from tensortrain.errors import ShapeError

__all__ = ["tt_linear"]


def tt_linear(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    r"""Apply a TT-matrix to a batch: ``y = x W^T + b`` without building ``W``.

    Args:
        x: ``(..., N)`` with ``N = j_1 .. j_d``, first mode slowest.
        cores: Cores ``(r, i_k, j_k, s)``, boundary ranks one.
        bias: ``(M,)`` with ``M = i_1 .. i_d``.

    Returns:
        Tensor: ``(..., M)``.

    Raises:
        ShapeError: Cores that are not of order four or do not chain, or an ``x`` of another size.

    Cost: O(d r^2 m max(M, N)) flops per row at rank r and mode size m; the plan may merge neighbouring cores.
    Source: Novikov et al., NIPS 2015, arXiv:1509.06569, section 4.

    Example:
        >>> import torch
        >>> cores = [torch.randn(1, 4, 2, 3), torch.randn(3, 4, 5, 1)]
        >>> tt_linear(torch.randn(7, 10), cores).shape
        torch.Size([7, 16])
    """
    chain = ChainShape.of(cores)
    if x.ndim == 0 or x.shape[-1] != chain.in_features:
        raise ShapeError(
            f"the input's last axis must match the input modes: found {tuple(x.shape)}, expected (..., "
            f"{chain.in_features}) for modes {chain.in_modes}. Check the layer before."
        )
    rows = x.numel() // max(1, x.shape[-1])
    bucket = 1 << max(0, rows - 1).bit_length()
    plan = plan_chain(chain, batch=bucket, dtype=x.dtype, device="cuda" if x.is_cuda else "cpu", force="factorized")
    return plan.execute(x, cores, bias=bias)
