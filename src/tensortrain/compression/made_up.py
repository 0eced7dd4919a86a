"""Making up for what a smaller form of a weight takes from the mean and the variance of its layer's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.formats.weighting import times_moment

__all__ = ["Statistic", "make_up"]

Statistic = tuple[Tensor, Tensor]  # a buffer, and its new value


@torch.no_grad()
def make_up(
    model: nn.Module, old: Tensor, kept: Tensor, moments: LayerMoments, *, has_bias: bool
) -> tuple[Tensor, list[Statistic]]:
    """What to add to the bias; or, without one, to the running mean of the batch norm that follows.

    That norm's running variance shrinks as the output's does.

    Args:
        old, kept: The weight before and after, ``(outputs, inputs)``.
        moments: Of the inputs, with their mean.
        has_bias: Whether there is a bias to take up the mean.

    Returns:
        The shift of the bias, and statistics that are still to be changed, with their new values.
    """
    assert moments.mean is not None
    assert moments.gram is not None
    lost = (old.double() - kept.double()) @ moments.mean.to(old.device)
    norm: Any = model.get_submodule(moments.norm) if moments.norm is not None else None
    if norm is None or norm.running_mean is None:
        return lost, []
    weighting = moments.weighting.beside(old)
    before = _variances(old, weighting.times_inputs(old))
    after = _variances(kept, times_moment(kept, weighting.inputs))
    share = torch.where(before > 0, after / before, 1.0)
    changes = [(norm.running_var, norm.running_var * share)]
    return lost, changes if has_bias else [*changes, (norm.running_mean, norm.running_mean - lost)]


def _variances(matrix: Tensor, weighted: Tensor) -> Tensor:
    """Variance of every output of a linear map, given its product with the inputs' second moment about their mean."""
    return (weighted * matrix.double()).sum(dim=1).clamp_min(0)
