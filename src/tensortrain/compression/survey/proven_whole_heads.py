"""Whole attention heads that a model really can do without: tried on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tensortrain.compression.narrow_whole_heads import FewerHeads, narrow_whole_heads_
from tensortrain.compression.survey.hidden import Run
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven import is_like, numbers, proven
from tensortrain.compression.survey.whole_heads import WholeHeads, find_whole_heads
from tensortrain.nn import is_transformers_conv1d
from tensortrain.train.modes import evaluating

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
    chosen: list[WholeHeads] = []

    def remembered(found: list[WholeHeads]) -> list[WholeHeads]:
        chosen[:] = choose(found)
        return list(chosen)

    found = proven(model, calibration, find_whole_heads, remembered, _computes_the_same, notes, "Whole attention heads")
    stuck = [one.reader for one in chosen if one not in found]
    if stuck:
        notes.append(
            f"The attention heads before {', '.join(map(repr, stuck[:8]))} are all left: the model's code does not "
            "run with fewer, or computes something else."
        )
    return found


def _computes_the_same(model: nn.Module, found: Sequence[WholeHeads], on_batch: Run) -> bool:
    try:
        with evaluating(model), torch.no_grad():
            with _unseen(model, found):
                wanted = numbers(on_batch(model))
            with _without(model, found):
                given = numbers(on_batch(model))
    except Exception:
        return False
    return len(wanted) == len(given) and all(is_like(a, b) for a, b in zip(wanted, given, strict=True))


def _half(heads: WholeHeads) -> tuple[int, ...]:
    return tuple(range(0, heads.n_groups, 2)) if heads.n_groups > 2 else (1,)


@contextmanager
def _unseen(model: nn.Module, found: Sequence[WholeHeads]) -> Iterator[None]:
    with ExitStack() as stack:
        for heads in found:
            reader = model.get_submodule(heads.reader)
            stack.callback(reader.register_forward_pre_hook(_mask(heads)).remove)
        yield


def _mask(heads: WholeHeads) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args:
            return None
        seen = args[0].new_zeros(heads.n_read)
        seen[heads.read(_half(heads))] = 1
        return (args[0] * seen, *args[1:])

    return hook


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
