"""Hidden units of recurrent layers that a model really can do with fewer of: narrowed on a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from tensortrain.compression.narrow_recurrent import cut_maps, narrow_recurrent_
from tensortrain.compression.survey.hidden import some_channels
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven import Kind, proven
from tensortrain.compression.survey.recurrent import RecurrentUnits, find_recurrent_units

__all__ = ["proven_recurrent"]


def proven_recurrent(
    model: nn.Module,
    calibration: Calibration,
    choose: Callable[[list[RecurrentUnits]], list[RecurrentUnits]],
    notes: list[str],
) -> list[RecurrentUnits]:
    """Recurrent layers whose units can be taken out: found by gradients, and tried on a batch.

    Half of the units go for a moment: the model has to give what it gives where nobody reads these.

    Args:
        model: With its recurrent layers taken apart; as before afterwards.
        choose: Those that are worth trying, of all found; no two of them around one layer.
        notes: Takes in why layers are left alone.
    """
    find = partial(find_recurrent_units, notes=notes)
    kind = Kind("Recurrent units", find, partial(_cut, zeroed=True), partial(_cut, zeroed=False))
    found, left = proven(model, calibration, kind, choose, notes)
    notes += [
        f"The hidden units of {one.layer!r} are left as they are: with half of them the model does not compute what it "
        "should."
        for one in left
    ]
    return found


@contextmanager
def _cut(model: nn.Module, found: Sequence[RecurrentUnits], *, zeroed: bool) -> Iterator[None]:
    undo = []
    try:
        for units in found:
            half = some_channels(units.n_units, torch.device("cpu")).nonzero().flatten().tolist()
            kept = [half] * len(units.all_cells)
            undo.append(narrow_recurrent_(model, units, cut_maps(model, units, kept, zeroed=zeroed)))
        yield
    finally:
        for back in reversed(undo):
            back()
