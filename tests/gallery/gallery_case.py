"""What a model of the gallery is: a function that builds it, one that draws a batch for it, and a budget."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CASES", "Case", "case", "drawn_classes", "forward", "like_trained_", "needs"]


def forward(model: nn.Module, batch: Any) -> Any:
    """How a batch is most often given to a model: keywords without labels, ``x`` of ``(x, y)``, or all of it."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0]) if isinstance(batch, (tuple, list)) else model(batch)


def like_trained_(model: nn.Module, power: float = 1.2) -> nn.Module:
    """Give the weights of a fresh model what training gives them: singular values that fall, statistics of a norm.

    Activations keep their size from layer to layer, so that logits are neither all alike nor all certain.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1:
                u, s, v = torch.linalg.svd(parameter.float().flatten(1), full_matrices=False)
                fallen = torch.arange(1, s.numel() + 1) ** -power
                fallen *= (2 * len(parameter)) ** 0.5 / fallen.norm()
                parameter.copy_(((u * fallen) @ v).reshape(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def drawn_classes(logits: Tensor) -> Tensor:
    """``b c ..`` -> ``b ..``: labels as the model itself expects them, so that learning them leads nowhere else."""
    chances = F.softmax(logits.detach().float(), dim=1).movedim(1, -1)
    return torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1).reshape(chances.shape[:-1])


@dataclass(frozen=True)
class Case:
    """A model as somebody would bring it.

    Attributes:
        build: Makes the model, fresh each time; on the meta device too.
        batch: Draws one batch for the model; it runs without gradients, in eval mode.
        budget, include, exclude, task, output, heal: As ``compress`` takes them.
        run: ``(model, batch) -> outputs``, where ``forward`` above is not how it is done.
        data: Makes of the list of batches what is passed as ``data``.
        refuses: Part of the message where a clear error is the right answer.
        measure: Also time both models for the report.
        trained: Puts weights into the fresh model that compress as those of a trained one.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module], Any]
    budget: Any = "2x"
    run: Callable[[nn.Module, Any], Any] = forward
    data: Callable[[list[Any]], Any] = list
    heal: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 2})
    options: Mapping[str, Any] = field(default_factory=dict)
    refuses: str | None = None
    measure: bool = False
    trained: Callable[[nn.Module], nn.Module] = like_trained_
    extra: Callable[[nn.Module], list[Any]] = lambda model: []


CASES: dict[str, tuple[Callable[[], Case], str | None]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Hang a model in the gallery."""
    assert make.__name__ not in CASES, f"two cases are called {make.__name__}"
    CASES[make.__name__] = make, getattr(make, "needs", None)
    return make


def needs(package: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Skip the case where a package is not installed; goes below ``@case``."""

    def mark(make: Callable[[], Case]) -> Callable[[], Case]:
        make.needs = None if importlib.util.find_spec(package) else package  # type: ignore[attr-defined]
        return make

    return mark
