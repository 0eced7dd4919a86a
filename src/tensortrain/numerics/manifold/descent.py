"""Descent of a function of a train by conjugate gradients on the manifold of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tensortrain.errors import ConvergenceError
from tensortrain.numerics.manifold.autodiff import riemannian_grad
from tensortrain.numerics.manifold.point import Point
from tensortrain.numerics.manifold.projection import transport
from tensortrain.numerics.manifold.retraction import armijo
from tensortrain.numerics.manifold.tangent import TangentVector
from tensortrain.system.checkpoint import RunFile, start_signature
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
    figures: Callable[[Any], Mapping[str, Any]] | None = None,
    observer: Callable[[Any, History], object] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 20.0,
    inputs: Sequence[Tensor] = (),
) -> tuple[Any, History]:
    """Conjugate gradients (Polak-Ribiere, started anew where they lead up), with steps that are short enough.

    Args:
        f: From a train to a real 0-d tensor; it must depend on the tensor, not on its cores.
        x: Where to start; its ranks stay.
        n_steps: Steps at most.
        tol: End where the gradient's norm is at most this share of the first one.
        length: From a train and a direction to the first length that is tried, such as the exact minimum on the
            tangent line of least squares; twice the length before by default.
        figures: From the train to more figures for the history, after every step.
        observer: Called with the train and the history after every step.
        checkpoint: File with which the same call on the same start goes on after a kill, to the same bits.
        checkpoint_every_s: Least time between two writes, in seconds.
        inputs: What ``f`` depends on: a file of other inputs is refused.

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
    keeper = _Keeper(checkpoint, checkpoint_every_s, x, inputs, {"tol": tol})
    run = keeper.resumed() or _Run(x)
    if run.history.stop == "max_steps" and len(run.history) < n_steps:
        run.history.stop = None  # more steps are asked for than before
    while run.history.stop is None and len(run.history) < n_steps:
        run.history.stop = _step(f, run, tol, length)
        if run.history.stop is not None:
            break
        run.history.append(**run.figures, **(figures(run.x) if figures is not None else {}))
        keeper.keep(run)
        try:
            if observer is not None:
                observer(run.x, run.history)
        except BaseException:
            keeper.keep(run, at_once=True)
            raise
    run.history.stop = run.history.stop or "max_steps"
    keeper.keep(run, at_once=True)
    return run.x, run.history


@dataclass
class _Run:
    """Where a descent is: ``before`` holds the gradient and the direction of the last step."""

    x: Any
    t: float = 1.0
    first: float | None = None
    before: tuple[TangentVector, TangentVector] | None = None
    history: History = field(default_factory=History)
    figures: dict[str, float] = field(default_factory=dict)  # of the last step


def _step(f: Callable[[Any], Tensor], run: _Run, tol: float, length: Any) -> str | None:
    """One step; why there is none, otherwise."""
    gradient = riemannian_grad(f, run.x, check=run.before is None).detach()
    norm = float(gradient.norm())
    run.first = norm if run.first is None else run.first
    if norm <= tol * run.first or norm == 0.0:
        return "gradient"
    direction = _direction(gradient, run.before, run.x)
    t = _MOST_STEPS_UP * run.t if length is None else length(run.x, direction)
    try:
        found = armijo(f, run.x, gradient, direction=direction, t=t)
    except ConvergenceError:
        return "stagnated"
    run.x, run.t, run.before = found.value, found.t, (gradient, direction)
    run.figures = {"f": found.f, "gradient_norm": norm}
    return None


class _Keeper:
    """Writes a descent to its file, and reads it back."""

    def __init__(
        self, path: str | Path | None, every_s: float, x: Any, inputs: Sequence[Tensor], settings: Mapping[str, Any]
    ) -> None:
        self.like, self.file = x, None
        if path is not None:
            start = start_signature([*x.cores, *inputs])
            self.file = RunFile(Path(path), every_s, {"kind": "descent", **settings}, start)

    def keep(self, run: _Run, *, at_once: bool = False) -> None:
        if self.file is None or not (at_once or self.file.due()):
            return
        before = None
        if run.before is not None:
            gradient, direction = run.before
            before = (list(gradient.base.cores), list(gradient.deltas), list(direction.deltas))
        content = {"cores": list(run.x.cores), "t": run.t, "first": run.first, "before": before}
        self.file.write({**content, "history": run.history.to_state()})

    def resumed(self) -> _Run | None:
        if self.file is None or not self.file.path.exists():
            return None
        content, device = self.file.read(), self.like.device
        before = None
        if content["before"] is not None:
            base, *vectors = ([core.to(device) for core in cores] for cores in content["before"])
            point = Point.of(self.like._like(base))
            gradient, direction = (TangentVector(point, tuple(deltas)) for deltas in vectors)
            before = (gradient, direction)
        x = self.like._like([core.to(device) for core in content["cores"]])
        return _Run(x, content["t"], content["first"], before, History.from_state(content["history"]))


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
