"""Descent of a function of a train by conjugate gradients on the manifold of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tensortrain.errors import ConvergenceError
from tensortrain.numerics.manifold.autodiff import riemannian_grad
from tensortrain.numerics.manifold.projection import transport
from tensortrain.numerics.manifold.retraction import armijo
from tensortrain.numerics.manifold.tangent import TangentVector
from tensortrain.system.history import History
from tensortrain.tensor.base import CoreChain

__all__ = ["descend"]

_MOST_STEPS_UP = 4.0  # a step may be so many times as long as the one before


def descend(
    f: Callable[[Any], Tensor],
    x: Any,
    *,
    n_steps: int,
    tol: float = 0.0,
    length: Callable[[Any, TangentVector], float] | None = None,
    observer: Callable[[Any, History], object] | None = None,
) -> tuple[Any, History]:
    """Conjugate gradients (Polak-Ribiere, started anew where they lead up), with steps that are short enough.

    Args:
        f: From a train to a real 0-d tensor; it must depend on the tensor, not on its cores.
        x: Where to start; its ranks stay.
        n_steps: Steps at most.
        tol: End where the gradient's norm is at most this share of the first one.
        length: From a train and a direction to the first length that is tried, such as the exact minimum on the
            tangent line of least squares; twice the length before by default.
        observer: Called with the train and the history after every step.

    Returns:
        The train, and a history of ``f`` and ``gradient_norm``, one entry a step; ``stop`` is ``"max_steps"``,
        ``"gradient"`` or ``"stagnated"``: no step was short enough to lead down, as at the end of the arithmetic.

    Cost: per step one derivative and one or more values of ``f`` at ranks up to ``2 r``, and O(d n r^3) flops.
    Source: Steinlechner, SIAM J. Sci. Comput. 38(5), 2016, algorithm 1; Absil et al., "Optimization Algorithms on
        Matrix Manifolds", 2008, chapter 8.

    Example:
        >>> import tensortrain as tt
        >>> z = tt.randn((4, 5, 6), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> x = tt.randn((4, 5, 6), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        >>> found, history = descend(lambda y: (y - z).norm() ** 2, x, n_steps=200, tol=1e-9)
        >>> bool((found - z).norm() <= 1e-6 * z.norm())
        True
    """
    history = History()
    before: tuple[TangentVector, TangentVector] | None = None  # gradient and direction
    t, first = 1.0, None
    for k in range(n_steps):
        gradient = riemannian_grad(f, x, check=k == 0).detach()
        norm = float(gradient.norm())
        first = norm if first is None else first
        if norm <= tol * first or norm == 0.0:
            history.stop = "gradient"
            break
        direction = _direction(gradient, before, x)
        t = _MOST_STEPS_UP * t if length is None else length(x, direction)
        try:
            found = armijo(f, x, gradient, direction=direction, t=t)
        except ConvergenceError:
            history.stop = "stagnated"
            break
        x, t, before = found.value, found.t, (gradient, direction)
        history.append(f=found.f, gradient_norm=norm)
        if observer is not None:
            observer(x, history)
    history.stop = history.stop or "max_steps"
    return x, history


def _direction(gradient: TangentVector, before: Any, x: CoreChain) -> TangentVector:
    if before is None:
        return -gradient
    old, direction = (transport(vector, to=gradient.point) for vector in before)
    square = float(before[0].inner(before[0]).real)
    share = float(gradient.inner(gradient - old).real) / square if square > 0 else 0.0
    turned = -gradient + max(0.0, share) * direction
    # One that leads up, or hardly down, starts anew.
    down = float(gradient.inner(turned).real)
    return turned if down < -1e-4 * float(gradient.norm()) * float(turned.norm()) else -gradient
