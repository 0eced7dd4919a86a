"""Batch-norm statistics anew: most of what a compression shifts, for the price of some forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tensortrain.train.batches import device_of, n_examples, no_batches, opened, run, to_device
from tensortrain.train.modes import is_frozen_norm, is_norm, modes_kept

__all__ = ["reestimate_batchnorm_"]


def reestimate_batchnorm_(model: nn.Module, data: Iterable[Any], *, n_batches: int | None = None) -> int:
    """Set the running mean and variance of every batch norm anew, as the plain mean over batches.

    Only batch norms run in train mode, so dropout stays off.

    Args:
        model: Changed in place; modes and momenta are put back. An error leaves the old statistics.
        data: Gives batches as for :func:`fit`; labels are not used.
        n_batches: Stop after this many; all when None.

    Returns:
        int: Batches used; 0 when the model has no batch norm with running statistics.

    Raises:
        DataError: The data gives no batches.
    """
    norms = _norms_to_set(model)
    if not norms:
        return 0
    before = [(norm, norm.momentum, {k: b.clone() for k, b in norm.named_buffers()}) for norm in norms]
    used = 0
    try:
        with torch.no_grad(), modes_kept(model):
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch then takes the plain mean over batches
                norm.train()
            used = _forward_batches(model, data, n_batches)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if used == 0:
                norm.load_state_dict(buffers, strict=False)
    if used == 0:
        raise no_batches("reestimate_batchnorm_")
    return used


def _norms_to_set(model: nn.Module) -> list[Any]:
    found: list[Any] = [m for m in model.modules() if is_norm(m) and m.track_running_stats]
    return [norm for norm in found if not is_frozen_norm(model, norm)]


def _forward_batches(model: nn.Module, data: Iterable[Any], n_batches: int | None) -> int:
    """Run batches through; those of no or one example have no variance and are passed over."""
    device, used, seen = device_of(model), 0, 0
    with opened(data) as batches:
        for batch in batches:
            if used == n_batches or seen == 2 * (n_batches or math.inf):
                break
            seen += 1
            if n_examples(batch) > 1:
                run(model, to_device(batch, device))
                used += 1
    return used
