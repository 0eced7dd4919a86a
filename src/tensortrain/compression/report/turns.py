"""Models that are measured side by side: of those whose weights lie in files, one at a time takes memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from tensortrain.system.offloading import let_go_by_module
from tensortrain.system.parking import is_parked, let_go, tidy

__all__ = ["Turns", "give_back"]


class Turns:
    """Whose turn it is; of models that lie in memory anyway nothing is done.

    Args:
        models: All that take turns.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.in_files = [model for model in models if _lies_in_files(model)]
        self.now: nn.Module | None = None
        for model in self.in_files:
            give_back(model)
        tidy()

    def begin(self, model: nn.Module, run: Callable[[], object]) -> None:
        """From now on it is the model's turn: what it needs is in memory, and nothing of the others.

        Args:
            run: Runs the model, which brings its weights in: no time that is taken later may hold that.
        """
        if model is self.now:
            return
        self.end()
        self.now = model
        if not self._comes_from_files():
            return
        with torch.inference_mode(False), torch.no_grad():
            if any(True for _ in _ways_to_forget(model)):
                with let_go_by_module():  # of weights that are made, the parts are not needed once these are there
                    run()
            run()

    def end(self) -> None:
        """Give back the memory of the model whose turn it is: its weights, and what was made of them."""
        if self.now is not None and self._comes_from_files():
            give_back(self.now)
            tidy()
        self.now = None

    def _comes_from_files(self) -> bool:
        return any(self.now is one for one in self.in_files)


def give_back(model: nn.Module) -> None:
    """Of a model whose weights lie in files give back their memory, and that of what was made of them."""
    if _lies_in_files(model):
        for forget in _ways_to_forget(model):
            forget()
        let_go(*model.parameters(), *model.buffers())


def _lies_in_files(model: nn.Module) -> bool:
    return any(map(is_parked, model.parameters()))


def _ways_to_forget(model: nn.Module) -> Iterator[Callable[[], object]]:
    """Of each layer that keeps something made of its weights."""
    found = (getattr(module, "clear_cache", None) for module in model.modules())
    return (forget for forget in found if callable(forget))
