"""The optimizer of a run: by name or from a factory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from tensortrain.errors import KindError

__all__ = ["OptimizerFactory", "OptimizerName", "check_optimizer", "make_optimizer"]

OptimizerName = Literal["adamw", "sgd"]
OptimizerFactory = Callable[..., torch.optim.Optimizer]


def make_optimizer(
    model: nn.Module,
    optimizer: OptimizerName | OptimizerFactory,
    param_groups: Sequence[dict[str, Any]] | None,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
) -> torch.optim.Optimizer:
    """An optimizer of the parameters that require a gradient, or of the groups that are given in their place.

    Raises:
        KindError: Nothing can be trained, or the optimizer is unknown.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise KindError(
            f"a model must have something to train: {type(model).__name__} has no parameter that requires "
            "grad, expected at least one. Call model.requires_grad_()."
        )
    check_optimizer(optimizer)
    if callable(optimizer):
        return optimizer(param_groups or params, lr=lr)
    # The fused update reads and writes each number once; on the CPU too it is several times as fast.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    groups = param_groups or _decay_groups(params, weight_decay)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)


def check_optimizer(optimizer: object) -> None:
    """Raise ``KindError`` for what is neither a name nor a factory."""
    if not callable(optimizer) and optimizer not in ("adamw", "sgd"):
        raise KindError(
            f"an optimizer must be known: optimizer has {optimizer!r}, expected 'adamw', 'sgd' or a factory. "
            "Pass a torch.optim class for others."
        )


def _decay_groups(params: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norm layers, which have one axis, are not drawn to zero."""
    weights = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
