"""Weights of a large model that lie in files while it is worked on, and in memory again afterwards."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tensortrain.system.copying import tensors_of
from tensortrain.system.parking import (
    are_large,
    can_park,
    is_parked,
    let_go,
    let_go_of_all,
    memory_given_back,
    park,
    tidy,
)
from tensortrain.system.storage import overlaps

__all__ = [
    "bring_back",
    "clear_away",
    "is_offloaded",
    "let_go_of_weights",
    "offload",
    "own_weights",
    "resting_in_files",
    "weights_offloaded",
]


@contextlib.contextmanager
def weights_offloaded(
    model: nn.Module,
    *,
    but_not: Callable[[nn.Module], bool] = lambda module: False,
    after_use: Callable[[nn.Module], object] = lambda module: None,
) -> Iterator[None]:
    """Inside, weights of a large model take memory only while their own module runs.

    They are the same parameters as before; what shares its memory with others stays where it is. After an error they
    are back in memory; else ``bring_back`` does that for those that are still needed.

    Args:
        but_not: Whether a module's own weights stay where they are.
        after_use: Is called with every module that has run, whichever model it is of: to drop what was made of its
            weights.
    """
    if not are_large(model.parameters()):
        yield
        return
    weights = _to_offload(model, but_not)
    try:
        with memory_given_back(model.parameters()), _let_go_by_module(after_use):
            _put_into_files(weights)
            yield
    except BaseException:
        _put_into_memory([*weights, *model.parameters()])
        raise


@contextlib.contextmanager
def resting_in_files(model: nn.Module) -> Iterator[None]:
    """Inside, a model's weights lie in files: they take memory from when they are read until they are let go."""
    _put_into_files(_to_offload(model, lambda module: False))
    try:
        yield
    finally:
        bring_back(model)


@contextlib.contextmanager
def _let_go_by_module(after_use: Callable[[nn.Module], object] = lambda module: None) -> Iterator[None]:
    """Inside, weights that lie in files take memory only while their own module runs, of whichever model it is.

    One hook serves all modules: one that hangs on a layer would go over to the layer that takes its place.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        after_use(module)
        let_go_of_weights(module)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def clear_away() -> None:
    """Give back the memory of garbage, of pages of files that were read, and of what the allocator keeps."""
    gc.collect()
    let_go_of_all()
    tidy()


def offload(module: nn.Module) -> None:
    """Put a new module's weights into files, those that are worth it."""
    _put_into_files(module.parameters())


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of a module's own weights lie in files."""
    return any(map(is_parked, own_weights(module)))


def bring_back(model: nn.Module) -> None:
    """Put the weights of a model that lie in files into memory."""
    _put_into_memory(model.parameters())


def let_go_of_weights(module: nn.Module, *args: Any) -> None:
    """Give back the memory of a module's own weights, where they lie in files. Serves as a hook, too."""
    let_go(*own_weights(module))


def own_weights(module: nn.Module) -> Iterator[Tensor]:
    """Of a module alone, without those of modules in it that run by themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, nn.ParameterList):  # which is no module that runs
            yield from child.parameters(recurse=False)


def _to_offload(model: nn.Module, but_not: Callable[[nn.Module], bool]) -> list[Tensor]:
    tensors = tensors_of(model)
    left = {id(one) for pair in overlaps([(tensor, tensor) for tensor in tensors]) for one in pair}
    left |= {id(weight) for module in model.modules() if but_not(module) for weight in own_weights(module)}
    return [weight for weight in model.parameters() if id(weight) not in left]


def _put_into_files(weights: Iterable[Tensor]) -> None:
    for weight in filter(can_park, weights):
        weight.data = park(weight.data)
    tidy()


def _put_into_memory(weights: Iterable[Tensor]) -> None:
    parked = list(filter(is_parked, weights))
    if parked:
        clear_away()  # or it would lie beside all the weights
    for weight in parked:
        old = weight.data
        weight.data = old.clone()
        let_go(old)  # which something else may still hold
    tidy()
