"""Statistics of several processes, each with a part of the data, added up: all have the same afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.compression.survey.tied import Spread
from tensortrain.system.parking import let_go
from tensortrain.system.processes import added_up, first_of, gathered, n_processes, summed_

__all__ = ["join_gradients", "join_inputs"]

_SUMS = ("gram", "mean", "output_gram")


def join_inputs(found: Calibration, spreads: Mapping[str, Spread], device: torch.device) -> None:
    """Add up what came to the layers; what is no sum is the first process's."""
    if n_processes() == 1:
        return
    _join(found, "gram", device)
    _join(found, "mean", device)
    rows = gathered({name: moments.n_rows for name, moments in found.layers.items()})
    rest = first_of({name: _not_sums(moments) for name, moments in found.layers.items()})
    for name, moments in found.layers.items():
        counts = [count for known in rows if (count := known[name]) is not None]
        vars(moments).update({**rest[name], "n_rows": sum(counts) if counts else None})
    found.n_examples = first_of(found.n_examples)
    for spread in spreads.values():
        if all(gathered(spread.total is not None)):
            assert spread.total is not None
            summed_(spread.total)


def join_gradients(found: Calibration, device: torch.device) -> None:
    """Add up the moments of gradients."""
    if n_processes() > 1:
        _join(found, "output_gram", device)


def _join(found: Calibration, figure: str, device: torch.device) -> None:
    """Add up one of the sums of all layers; processes that a layer did not run in add nothing."""
    totals = [getattr(moments, figure) for moments in found.layers.values()]
    for moments, total in zip(found.layers.values(), added_up(totals, device), strict=True):
        if total is not None:
            setattr(moments, figure, total)
            moments.park()
            let_go(getattr(moments, figure))


def _not_sums(moments: LayerMoments) -> dict[str, Any]:
    return {one.name: getattr(moments, one.name) for one in fields(moments) if one.name not in (*_SUMS, "parks")}
