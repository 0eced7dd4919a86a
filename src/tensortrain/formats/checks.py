"""What must hold of a weight and of its modes before cores are looked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.errors import NonFiniteError, ShapeError
from tensortrain.system.finite import are_finite

from .spec import WeightShape

__all__ = ["check_dense", "check_modes"]


def check_dense(dense: Tensor, weight: WeightShape) -> None:
    """Raise ``ShapeError`` for a weight of another shape, ``NonFiniteError`` where it holds NaN or Inf."""
    if tuple(dense.shape) != weight.dense_shape:
        raise ShapeError(
            f"a dense weight must have its layer's shape: found {tuple(dense.shape)}, expected "
            f"{weight.dense_shape}. Pass the layer's own weight."
        )
    if not are_finite(dense):  # one host sync per decomposition
        raise NonFiniteError(
            f"a weight must be finite: found {int((~torch.isfinite(dense)).sum())} NaN or Inf among "
            f"{dense.numel()} entries. Repair or retrain the layer before it is compressed."
        )


def check_modes(
    modes: Sequence[int], size: int, what: str, *, pad: bool = False, most_padding: float | None = None
) -> tuple[int, ...]:
    """Modes as a tuple whose product is ``size``, or at least that with ``pad``, or within a share above it."""
    given = tuple(int(n) for n in modes)
    product = math.prod(given)
    limit = math.inf if pad else size * (1 + (most_padding or 0.0))
    if not given or min(given) < 1 or not size <= product <= limit:
        relation = "at least" if pad else "exactly"
        padded = f" (padded, up to {math.floor(limit)})" if most_padding else ""
        raise ShapeError(
            f"{what} must be positive and multiply to {relation} {size}{padded}: found {given} with product {product}. "
            f"Try tensortrain.nn.suggest_modes({size})."
        )
    return given
