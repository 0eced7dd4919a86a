"""Whole attention heads that a model really can do without: tried on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from tensortrain.compression.narrow_whole_heads import FewerHeads, narrow_whole_heads_
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven import Kind, masked, proven
from tensortrain.compression.survey.whole_heads import WholeHeads, find_whole_heads
from tensortrain.nn import is_transformers_conv1d

__all__ = ["proven_whole_heads"]


def proven_whole_heads(
    model: nn.Module,
    calibration: Calibration,
    choose: Callable[[list[WholeHeads]], list[WholeHeads]],
    notes: list[str],
) -> list[WholeHeads]:
    """Attention heads that can be taken out: found by gradients, and tried on a batch.

    Half of the groups go for a moment: the model has to give what it gives where their reader sees zeros.

    Args:
        model: As before afterwards.
        choose: Those that are worth trying, of all found; no two of them around one layer.
        notes: Takes in why heads are left alone.
    """
    kind = Kind("Whole attention heads", find_whole_heads, _unseen, _without)
    found, left = proven(model, calibration, kind, choose, notes)
    stuck = [one.reader for one in left]
    if stuck:
        notes.append(
            f"The attention heads before {', '.join(map(repr, stuck[:8]))} are all left: the model's code does not "
            "run with fewer, or computes something else."
        )
    return found


def _half(heads: WholeHeads) -> tuple[int, ...]:
    return tuple(range(0, heads.n_groups, 2)) if heads.n_groups > 2 else (1,)


def _unseen(model: nn.Module, found: Sequence[WholeHeads]) -> AbstractContextManager[None]:
    return masked(model, [(heads.reader, _read_by_half(heads)) for heads in found])


def _read_by_half(heads: WholeHeads) -> torch.Tensor:
    seen = torch.zeros(heads.n_read, dtype=torch.bool)
    seen[heads.read(_half(heads))] = True
    return seen


@contextmanager
def _without(model: nn.Module, found: Sequence[WholeHeads]) -> Iterator[None]:
    undo = []
    try:
        for heads in found:
            reader: Any = model.get_submodule(heads.reader)
            weight = reader.weight.T if is_transformers_conv1d(reader) else reader.weight
            kept = _half(heads)
            undo.append(narrow_whole_heads_(model, FewerHeads(heads, kept, weight.detach()[:, heads.read(kept)])))
        yield
    finally:
        for back in reversed(undo):
            back()
