"""Train mode and eval mode: put back what a user had set, and what a model is trained in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tensortrain.train.batches import n_examples

__all__ = ["TrainModes", "evaluating", "is_frozen_norm", "is_norm", "modes_kept"]


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Put the train or eval mode of every module back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set eval mode; afterwards every module has the mode it had."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, of any number of axes."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_frozen_norm(model: nn.Module, norm: nn.Module) -> bool:
    """Whether the user keeps a batch norm from learning: in eval mode within a model in train mode, or its weights."""
    if model.training and not norm.training:
        return True
    own = list(norm.parameters(recurse=False))
    frozen = bool(own) and not any(p.requires_grad for p in own)
    return frozen and any(p.requires_grad for p in model.parameters())


class TrainModes:
    """The modes a model is trained in: the user's own where it is in train mode, else train mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = [(module, module.training) for module in model.modules()] if model.training else None
        self.frozen = [m for m in model.modules() if is_norm(m) and is_frozen_norm(model, m)]
        self.norms = [m for m in model.modules() if is_norm(m) and m not in self.frozen]

    def set(self) -> None:
        """Put the model into them."""
        self.model.train()
        for module, training in self.own or ():
            module.training = training
        for norm in self.frozen:
            norm.training = False

    @contextlib.contextmanager
    def fitting(self, batch: Any) -> Iterator[None]:
        """One example has no variance: batch norms then use their running statistics."""
        norms = [norm for norm in self.norms if norm.training] if n_examples(batch) == 1 else []
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True
