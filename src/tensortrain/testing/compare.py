"""How far two results are apart, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_refused", "is_left_orthogonal", "rel_error", "wide"]


def rel_error(found: Tensor, exact: Tensor) -> float:
    """``||found - exact|| / ||exact||`` in float64; the absolute error where ``exact`` is zero."""
    wide = torch.complex128 if exact.is_complex() or found.is_complex() else torch.float64
    size = torch.linalg.vector_norm(exact.detach().to(wide))
    error = torch.linalg.vector_norm(found.detach().to(wide) - exact.detach().to(wide))
    return float(error / size) if size > 0 else float(error)


def is_left_orthogonal(core: Tensor, tol: float = 1e-12) -> bool:
    """Whether the columns of a core, unfolded to ``(r n, s)``, are orthonormal."""
    unfolding = core.flatten(0, -2)
    identity = torch.eye(unfolding.shape[1], dtype=core.dtype, device=core.device)
    return float((unfolding.mH @ unfolding - identity).abs().max()) <= tol


def wide(x: Tensor) -> Tensor:
    """A copy in double precision, cut off from autograd; whole numbers stay as they are."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def check_refused(error: type[Exception], call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Fail unless the call raises ``error``."""
    try:
        call(*args, **options)
    except error:
        return
    raise AssertionError(f"{call} took {args} {options}, expected {error.__name__}")
