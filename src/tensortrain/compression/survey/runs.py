"""Whether layers really run: a forward may reach its layers by ways that no replacement finds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from tensortrain.compression.survey.layers import part_of
from tensortrain.train.modes import evaluating

__all__ = ["check_new_layers_run", "layers_that_run"]

Run = Callable[[nn.Module], object]


def layers_that_run(model: nn.Module, names: Sequence[str], run: Run) -> set[str]:
    """The layers, of those named, whose forward runs when the model does.

    A call of a bound ``layer.forward`` counts too, which no hook sees. The model runs in eval mode without gradients,
    and has its modes back afterwards.

    Args:
        names: Dotted names of layers; ``""`` is the model.
        run: ``run(model)`` calls the model on one batch.
    """
    names = [name for name in names if part_of(model, name) is not None]  # of a layer that stands whole, no maps
    layers = {id(layer): name for name in names for layer in [model.get_submodule(name)]}
    ran: set[str] = set()
    handles = [model.get_submodule(name).register_forward_pre_hook(_note(name, ran)) for name in names]
    before = sys.getprofile()
    try:
        with evaluating(model), torch.no_grad():
            sys.setprofile(_watch(model, names, layers, ran))
            run(model)
    finally:
        _put_back(before)
        for handle in handles:
            handle.remove()
    return ran


def _put_back(profiler: Any) -> None:
    """Let a profiler go on; that of ``cProfile`` is an object that starts itself."""
    sys.setprofile(None)
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        profiler.enable()


def check_new_layers_run(
    model: nn.Module, names: Sequence[str], run: Run, *, ran_before: Collection[str] | None = None
) -> list[str]:
    """Names of replaced layers that do not run, though those that they replaced did.

    Args:
        model: After the swap.
        names: Of its replaced layers.
        run: ``run(model)`` calls the model on one batch.
        ran_before: What ``layers_that_run`` gave for the model before the swap; all names when left out.
    """
    ran = layers_that_run(model, names, run)
    return [name for name in names if name not in ran and (ran_before is None or name in ran_before)]


def _note(name: str, ran: set[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        ran.add(name)

    return hook


def _watch(model: nn.Module, names: Sequence[str], layers: dict[int, str], ran: set[str]) -> Callable[..., None]:
    """A profiler that notes whose forward is called."""
    forwards: list[Any] = [type(model.get_submodule(name)).forward for name in names]
    codes = {forward.__code__ for forward in forwards if hasattr(forward, "__code__")}

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code in codes:
            name = layers.get(id(frame.f_locals.get("self")))
            if name is not None:
                ran.add(name)

    return profile
