"""Models that are measured side by side, of which only what is needed at the moment takes memory.

Where the weights of a model lie in files, those of a module are read before it runs and let go when it has run, and
what this takes is no part of the model's time. What layers make of their weights stays as long as it is their model's
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tensortrain.system.offloading import own_weights
from tensortrain.system.parking import bring_in, is_parked, let_go, tidy

__all__ = ["Turns", "give_back"]


class Turns:
    """Whose turn it is; of models that lie in memory anyway nothing is done.

    Args:
        models: All that take turns.

    Attributes:
        paused_s: Seconds that were spent on files so far: no part of what a model takes.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.in_files = [model for model in models if _lies_in_files(model)]
        self.now: nn.Module | None = None
        self.paused_s = 0.0
        self._handles: list[RemovableHandle] = []
        self._read: set[int] = set()  # weights of modules that have run
        for model in self.in_files:
            give_back(model)
        tidy()

    def begin(self, model: nn.Module, run: Callable[[], object]) -> None:
        """From now on it is the model's turn: nothing of the others is in memory.

        Args:
            run: Runs the model: what its layers make of their weights is there afterwards.
        """
        if model is self.now:
            return
        self.end()
        self.now = model
        if any(model is one for one in self.in_files):
            self._watch(model)
            with torch.inference_mode(False), torch.no_grad():
                run()
            # What modules read of others, which never run by themselves, stays in memory from here on.
            bring_in(*(weight for weight in model.parameters() if id(weight) not in self._read))

    def end(self) -> None:
        """Give back the memory of the model whose turn it is: its weights, and what was made of them."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._read = [], set()
        if self.now is not None and any(self.now is one for one in self.in_files):
            give_back(self.now)
            tidy()
        self.now = None

    def _watch(self, model: nn.Module) -> None:
        for module in model.modules():
            # Lists of cores do not run, and would with a hook.
            if not isinstance(module, nn.ParameterList) and any(map(is_parked, own_weights(module))):
                self._handles.append(module.register_forward_pre_hook(self._before))
                self._handles.append(module.register_forward_hook(self._after))

    def _before(self, module: nn.Module, args: Any) -> None:
        start = perf_counter()
        bring_in(*own_weights(module))
        self.paused_s += perf_counter() - start

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        start = perf_counter()
        for weight in own_weights(module):
            let_go(weight)
            self._read.add(id(weight))
        self.paused_s += perf_counter() - start


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
