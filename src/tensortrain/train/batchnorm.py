"""Batch-norm statistics anew: most of what a compression shifts, for the price of some forward passes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tensortrain.train.batches import device_of, n_examples, no_batches, opened, run, to_device
from tensortrain.train.modes import is_frozen_norm, is_norm, modes_kept

__all__ = ["reestimate_batchnorm_"]


def reestimate_batchnorm_(
    model: nn.Module, data: Iterable[Any], *, n_batches: int | None = None, like: nn.Module | None = None
) -> int:
    """Set the running mean and variance of every batch norm anew, as the plain mean over batches.

    Only batch norms run in train mode, so dropout stays off.

    Args:
        model: Changed in place; modes and momenta are put back. An error leaves the old statistics.
        data: Gives batches as for :func:`fit`; labels are not used.
        n_batches: Stop after this many; all when None.
        like: The model that this one was made from. Statistics are then moved by what differs between the two on the
            data, and not replaced: a few images tell what a compression has shifted, but not what those of a training
            have in common (MobileNetV2 alone, its norms set anew on 300 crops, keeps 41 % of its decisions).

    Returns:
        int: Batches used; 0 when the model has no batch norm with running statistics.

    Raises:
        DataError: The data gives no batches.
    """
    pairs = [(norm, _norm_before(norm, name, like)) for name, norm in _norms_to_set(model)]
    if not pairs:
        return 0
    with _statistics_kept(*(norm for pair in pairs for norm in pair if norm is not None)) as before:
        used = _forward_batches([net for net in (model, like) if net is not None], data, n_batches, pairs)
        found = [(norm, _moved(norm, old, before)) for norm, old in pairs] if used else []
    for norm, statistics in found:
        norm.load_state_dict(statistics, strict=False)
    if used == 0:
        raise no_batches("reestimate_batchnorm_")
    return used


_Statistics = dict[str, torch.Tensor]


def _norms_to_set(model: nn.Module) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if is_norm(m)]
    return [(name, norm) for name, norm in found if norm.track_running_stats and not is_frozen_norm(model, norm)]


def _norm_before(norm: Any, name: str, like: nn.Module | None) -> Any:
    """The norm that a model had in that place before; None where there is none."""
    old: Any = dict(like.named_modules()).get(name) if like is not None else None
    return old if old is not norm and is_norm(old) and old.track_running_stats else None


@contextlib.contextmanager
def _statistics_kept(*norms: Any) -> Iterator[dict[int, _Statistics]]:
    """What norms hold, by their ids, is put back with their momenta."""
    kept = {id(norm): {name: b.clone() for name, b in norm.named_buffers()} for norm in norms}
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        yield kept
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
            norm.load_state_dict(kept[id(norm)], strict=False)


def _moved(norm: Any, old: Any, before: Mapping[int, _Statistics]) -> _Statistics:
    """The statistics of a norm: as found on the data, or those before with what differs from an older norm's there."""
    found = {name: b.clone() for name, b in norm.named_buffers()}
    places = None if old is None else _channels_in(before[id(norm)], norm, before[id(old)], old)
    if places is None:
        return found
    mean, var = old.running_mean[places], old.running_var[places]
    anchor = before[id(old)]
    found["running_mean"] = anchor["running_mean"][places] + found["running_mean"] - mean
    ratio = found["running_var"] / var.clamp_min(torch.finfo(var.dtype).tiny)
    known = (var > 0) & torch.isfinite(ratio)
    found["running_var"] = anchor["running_var"][places] * torch.where(known, ratio, torch.ones_like(ratio))
    return found


def _channels_in(kept: _Statistics, norm: Any, whole: _Statistics, old: Any) -> torch.Tensor | None:
    """Where an older norm holds the channels of a norm that may have fewer; None where they are not the same ones."""
    if norm.num_features == old.num_features:
        return torch.arange(norm.num_features, device=kept["running_var"].device)
    columns = [
        torch.stack([each["running_var"], *(p.detach() for p in one.parameters(recurse=False))], dim=1)
        for each, one in ((kept, norm), (whole, old))
    ]
    if columns[0].shape[1] != columns[1].shape[1]:
        return None
    same = (columns[0][:, None] == columns[1].to(columns[0])[None]).all(dim=2)
    return same.double().argmax(dim=1) if bool(same.any(dim=1).all()) else None


def _forward_batches(
    models: Sequence[nn.Module], data: Iterable[Any], n_batches: int | None, pairs: Sequence[tuple[Any, Any]]
) -> int:
    """Run batches through; those of no or one example have no variance and are passed over."""
    used, seen = 0, 0
    with torch.no_grad(), modes_kept(*models), opened(data) as batches:
        for model in models:
            model.eval()
        for norm in (norm for pair in pairs for norm in pair if norm is not None):
            norm.reset_running_stats()
            norm.momentum = None  # torch then takes the plain mean over batches
            norm.train()
        for batch in batches:
            if used == n_batches or seen == 2 * (n_batches or math.inf):
                break
            seen += 1
            if n_examples(batch) > 1:
                for model in models:
                    run(model, to_device(batch, device_of(model)))
                used += 1
    return used
