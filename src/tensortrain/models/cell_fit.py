"""The polynomial of a cell by alternating least squares: all its cores meet one vector of past states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.models.base import only_figures
from tensortrain.models.least_squares import LeastSquares, labelled
from tensortrain.models.supervised import Supervised
from tensortrain.system.history import History

__all__ = ["fitted_cores"]

_STEPS = 200  # of conjugate gradients at most: local problems are small, and their solution shall be exact
_RIDGE = 1e-14  # the cores see one vector, so that parts of the weights have no say


_FIGURES = ("loss", "validation_loss")


def fitted_cores(
    cores: list[Tensor], steps: Sequence[tuple[Tensor, Tensor]], job: Supervised
) -> tuple[list[Tensor], History]:
    """Cores ``(r, m, s)``, the last s the outputs, by which what follows is best said of what is seen.

    Args:
        cores: The start; its largest rank is the cap.
        steps: What is seen, ``(b, m)`` with a one in front, and what follows, ``(b, n_outputs)``; second what is held
            back, if anything is.
        job: The number of sweeps there and back, the file, and who watches.

    Returns:
        The cores in float64, and a history of ``loss`` and ``validation_loss``, the mean square of one step.
    """
    wide = [core.double() for core in cores]
    pairs = [(Data([seen.double()] * len(wide)), following.double().T.contiguous()) for seen, following in steps]
    rows, target = pairs[0]
    # Mirrored, for the axis of outputs ends at the first core of a sweep, and a cell has it at its last.
    first = wide[-1].permute(2, 1, 0).unsqueeze(1)  # outputs 1 m r
    state = labelled([first, *(core.permute(2, 1, 0).contiguous() for core in reversed(wide[:-1]))], 0)
    problem = LeastSquares(target, _STEPS, _RIDGE)

    def figures(state: Gauged) -> dict[str, Any]:
        return dict(zip(_FIGURES, (_mean_square(state, *pair) for pair in pairs), strict=False))

    def tell(history: History) -> None:
        if job.observer is not None:
            job.observer(only_figures(history, _FIGURES))

    history = sweep(
        state,
        Environments(rows, state.cores),
        problem.improved,
        n_sites=min(2, len(wide)),
        schedule=[Cuts(1e-13, max(core.shape[0] for core in wide))] * job.n_sweeps,
        figures=figures,
        observer=tell,
        checkpoint=job.checkpoint,
        inputs=steps[0],
    )
    last = _center(state)[:, 0].permute(2, 1, 0)
    made = [*(core.permute(2, 1, 0).contiguous() for core in reversed(state.cores[1:])), last.contiguous()]
    return made, only_figures(history, _FIGURES)


def _mean_square(state: Gauged, rows: Data, target: Tensor) -> float:
    return float((Environments(rows, state.cores).at(0)(_center(state)) - target).square().mean())


def _center(state: Gauged) -> Tensor:
    """The first core ``(outputs, 1, m, r)`` with the power of two in it."""
    return state.cores[0] * torch.exp2(state.exponent.to(state.cores[0].dtype))
