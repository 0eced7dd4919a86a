"""What an experiment compresses: a trained model with its data and its judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.train.batches import run

__all__ = ["Judge", "Settle", "Subject", "binary_divergence", "divergence", "in_batches", "mean_cosine", "run"]

Judge = Callable[[nn.Module], dict[str, float]]
Settle = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Subject:
    """A trained model, and how it is calibrated and judged.

    Attributes:
        model: In evaluation mode.
        data: Calibration batches, without anything that judges.
        judge: Figures of a model, taken on what is not among ``data``; a loss each, or what the record explains.
        run: How a batch of ``data`` is put through.
        options: Further keywords of ``compress``.
        settle: What is done to every compressed model before it is judged; it needs no labels.
        whole: Maps that a rival may leave as they are.
    """

    model: nn.Module
    data: Iterable[Any]
    judge: Judge
    run: Callable[[nn.Module, Any], Any] = run
    options: Mapping[str, Any] = field(default_factory=dict)
    settle: Settle | None = None
    whole: tuple[str, ...] = ()


def divergence(original: Tensor, model: Tensor) -> float:
    """Mean over rows of KL(original, model) in nats; both logits, classes last."""
    log_p, log_q = (x.flatten(0, -2).log_softmax(-1) for x in (original, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def mean_cosine(original: Tensor, model: Tensor) -> float:
    return float(nn.functional.cosine_similarity(original, model, dim=-1).mean())


def binary_divergence(original: Tensor, model: Tensor) -> float:
    """Mean KL in nats of probabilities of yes."""
    p, q = (x.clamp(1e-6, 1 - 1e-6) for x in (original, model))
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def in_batches(model: nn.Module, x: Tensor, size: int = 100) -> Tensor:
    """Outputs of a model for many examples."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(size)])
