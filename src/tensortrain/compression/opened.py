"""Layers of several maps in a model, taken apart for as long as it takes to plan and change their maps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tensortrain.compression.carry import gradient_hooks, move_hooks
from tensortrain.compression.survey.layers import LeftAlone, check_module
from tensortrain.compression.survey.reasons import Survey
from tensortrain.compression.swap import Built, swap
from tensortrain.compression.words import in_short
from tensortrain.errors import KindError
from tensortrain.nn import CompositeLayer, FactorizedLayer
from tensortrain.nn.opening import composite_of, fresh_twin, opened

__all__ = ["Opened", "close_composites", "open_layers", "opened_for_a_while"]


@dataclass
class Opened:
    """A model whose recurrent and attention layers stand apart as linear maps.

    Attributes:
        model: The model; the opened layer itself where that is the model.
        layers: Names, torch's layer, and ours in its place.
        names: First names of all that were opened.
        refused: Layers that could not be opened, and why.
    """

    model: nn.Module
    layers: list[Built] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    refused: list[LeftAlone] = field(default_factory=list)

    def left_alone(self, left: Sequence[LeftAlone]) -> tuple[LeftAlone, ...]:
        """What else is left alone, and the layers that could not be opened, each once."""
        told = {layer.name for layer in self.refused}
        return (*(layer for layer in left if layer.name not in told), *self.refused)

    def close(self, *, changed_too: bool = True) -> nn.Module:
        """Put torch's layers back; those of which a map was factorized only if asked to.

        Returns:
            Module: The model.
        """
        back = [(names, new, old) for names, old, new in self.layers if changed_too or not _is_changed(new)]
        for _, new, old in back:
            move_hooks(new, old)
            old.train(new.training)
        self.model = swap(self.model, back)
        self.layers = [one for one in self.layers if not changed_too and _is_changed(one[2])]
        return self.model


@contextmanager
def opened_for_a_while(model: nn.Module, only: Collection[str] | None = None) -> Iterator[Opened]:
    """Layers of several maps, or those named, taken apart inside; the model is as before afterwards."""
    found = open_layers(model, only)
    try:
        yield found
    finally:
        found.close()


def open_layers(model: nn.Module, only: Collection[str] | None = None) -> Opened:
    """Take layers of several maps apart, in place: their maps are linear layers that a plan can reach.

    Args:
        only: Names of those; all if left out.
    """
    check_module(model)
    found, aliases = Opened(model), _aliases(model)
    if not aliases:
        return found
    survey = Survey.of(model)
    try:
        for names, layer in aliases:
            if only is not None and not set(names) & set(only):
                continue
            reason = _why_not(layer, survey) or _open(found, names, layer)
            if reason:
                n = sum(p.numel() for p in layer.parameters())
                found.refused.append(LeftAlone(names[0], type(layer).__name__, reason, n))
    except BaseException:
        found.close()
        raise
    return found


def close_composites(model: nn.Module) -> nn.Module:
    """Put torch's layers in the place of all layers of several maps that hold nothing but dense ones.

    Returns:
        Module: The model, or torch's layer where the model is such a layer.
    """
    built: dict[int, tuple[list[str], CompositeLayer, nn.Module]] = {}
    taken: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CompositeLayer) or any(name.startswith(outer) for outer in taken):
            continue  # the cells of a layer go with it
        if id(module) not in built and not _is_changed(module):
            dense = _dense_twin(module)
            if dense is not None:
                built[id(module)] = ([], module, dense)
        if id(module) in built:
            built[id(module)][0].append(name)
        taken.append(f"{name}." if name else "")  # of one that stays, the cells stay too
    return swap(model, [(tuple(names), old, new) for names, old, new in built.values()])


def _dense_twin(layer: Any) -> nn.Module | None:
    """Torch's layer with the weights of one of ours; ``None`` where torch has none that computes the same."""
    try:
        with torch.random.fork_rng(devices=[]):  # a fresh layer draws its first weights
            dense: nn.Module = layer.to_dense()
    except KindError:
        return None
    move_hooks(layer, dense)
    return dense


def _aliases(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Layers of several maps with all their names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if composite_of(module) is not None:
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return [(tuple(names[key]), module) for key, module in modules.items()]


def _open(found: Opened, names: tuple[str, ...], layer: nn.Module) -> str:
    """Put the opened layer in place; why that fails, or ``""``."""
    try:
        new = opened(layer)
        move_hooks(layer, new)
        vars(new).update({name: vars(layer)[name] for name in _hung(layer, (vars(layer),))})
        found.model = swap(found.model, [(names, layer, new)])
    except Exception as error:  # held where nothing can be put, or of a dtype that our layers refuse
        return f"it cannot be taken apart ({in_short(error)})"
    found.layers.append((names, layer, new))
    found.names.append(names[0])
    return ""


def _why_not(layer: nn.Module, survey: Survey) -> str:
    hung = _hung(layer, (layer._parameters, layer._buffers, layer._modules))
    hung += [name for name in _hung(layer, (vars(layer),)) if hasattr(type(layer), name)]  # a forward, for instance
    if hung:
        return f"it carries a {hung[0]!r} of its own"
    if any(gradient_hooks(p) for p in layer.parameters()):
        return "hooks hang on its parameters themselves"
    if any(p.is_meta for p in layer.parameters()):
        return "its weights lie on the meta device, which holds no numbers"
    return next((why for part in layer.modules() if (why := survey.why_tied(part))), "")


def _hung(layer: nn.Module, registries: tuple[Any, ...]) -> list[str]:
    """Names on a layer that its constructor does not set."""
    usual = fresh_twin(layer)
    own = {*vars(usual), *usual._parameters, *usual._buffers, *usual._modules}
    return [name for registry in registries for name in registry if name not in own]


def _is_changed(layer: CompositeLayer) -> bool:
    return any(isinstance(one, FactorizedLayer) for one in layer.modules())
