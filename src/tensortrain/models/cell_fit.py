"""The polynomial of a cell by alternating least squares: all its cores meet one vector of past states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.models.least_squares import LeastSquares, labelled
from tensortrain.system.history import History

__all__ = ["fitted_cores"]

_STEPS = 200  # of conjugate gradients at most: local problems are small, and their solution shall be exact
_RIDGE = 1e-14  # the cores see one vector, so that parts of the weights have no say


def fitted_cores(cores: list[Tensor], seen: Tensor, following: Tensor, n_sweeps: int) -> tuple[list[Tensor], History]:
    """Cores ``(r, m, s)``, the last s the outputs, for which ``following`` is best said of ``seen``.

    Args:
        cores: The start; its largest rank is the cap.
        seen: ``(b, m)``, with a one in front.
        following: ``(b, n_outputs)``.
        n_sweeps: Sweeps there and back.

    Returns:
        The cores in float64, and a history of ``loss``, the mean square of one step.
    """
    wide = [core.double() for core in cores]
    seen, target = seen.double(), following.double().T.contiguous()
    # Mirrored, for the axis of outputs ends at the first core of a sweep, and a cell has it at its last.
    first = wide[-1].permute(2, 1, 0).unsqueeze(1)  # outputs 1 m r
    state = labelled([first, *(core.permute(2, 1, 0).contiguous() for core in reversed(wide[:-1]))], 0)
    rows = Data([seen] * len(wide))
    problem = LeastSquares(target, _STEPS, _RIDGE)

    def figures(state: Gauged) -> dict[str, Any]:
        return {"loss": float((Environments(rows, state.cores).at(0)(_center(state)) - target).square().mean())}

    history = sweep(
        state,
        Environments(rows, state.cores),
        problem.improved,
        n_sites=min(2, len(wide)),
        schedule=[Cuts(1e-13, max(core.shape[0] for core in wide))] * n_sweeps,
        figures=figures,
    )
    last = _center(state)[:, 0].permute(2, 1, 0)
    made = [*(core.permute(2, 1, 0).contiguous() for core in reversed(state.cores[1:])), last.contiguous()]
    return made, History({"loss": history.loss}, history.stop)


def _center(state: Gauged) -> Tensor:
    """The first core ``(outputs, 1, m, r)`` with the power of two in it."""
    return state.cores[0] * torch.exp2(state.exponent.to(state.cores[0].dtype))
