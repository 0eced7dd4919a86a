"""A core ``(.., r, n, s)`` read as a matrix, and matrices multiplied into it.

A TTMatrix joins its two modes to one before it calls what stands here, and splits it again. All axes before the last
three are batch axes, the same for every core.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["absorb_left", "absorb_right", "as_left", "as_right", "over_core"]


def as_left(core: Tensor) -> Tensor:
    """The left unfolding ``(.., r n, s)``."""
    return core.flatten(-3, -2)


def as_right(core: Tensor) -> Tensor:
    """The right unfolding ``(.., r, n s)``."""
    return core.flatten(-2, -1)


def absorb_left(carry: Tensor, core: Tensor) -> Tensor:
    """``(.., t, r) . (.., r, n, s) -> (.., t, n, s)``."""
    out = carry @ as_right(core)
    return out.reshape(*out.shape[:-1], *core.shape[-2:])  # unflatten takes as long as the product of small cores


def absorb_right(core: Tensor, carry: Tensor) -> Tensor:
    """``(.., r, n, s) . (.., s, t) -> (.., r, n, t)``."""
    out = as_left(core) @ carry
    return out.reshape(*out.shape[:-2], *core.shape[-3:-1], out.shape[-1])


def over_core(scalar: int | float | complex | Tensor) -> int | float | complex | Tensor:
    """A scalar, or one for each member of a batch, shaped to multiply a core of three axes."""
    return scalar[..., None, None, None] if isinstance(scalar, Tensor) and scalar.ndim else scalar
