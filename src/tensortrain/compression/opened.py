"""Layers of several maps in a model, taken apart for as long as it takes to plan and change their maps.

So are layers whose weight is computed at every call: they stand with plain numbers for so long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tensortrain.compression.carry import gradient_hooks, move_hooks
from tensortrain.compression.computed import ComputedLayer, computed_layer, is_computed, plain_kind, why_not_computed
from tensortrain.compression.survey.layers import LeftAlone, check_module
from tensortrain.compression.survey.reasons import Survey
from tensortrain.compression.swap import Built, swap
from tensortrain.compression.words import in_short, named
from tensortrain.errors import KindError
from tensortrain.nn import CompositeLayer, FactorizedLayer
from tensortrain.nn.opening import composite_of, fresh_twin, opened

__all__ = ["Opened", "close_composites", "open_layers", "opened_for_a_while", "plain_weights"]


@dataclass
class Opened:
    """A model whose recurrent and attention layers stand apart as linear maps.

    Attributes:
        model: The model; the opened layer itself where that is the model.
        layers: Names, torch's layer, and ours in its place.
        computed: Layers whose weight was computed, with their names.
        names: First names of all that were opened or computed.
        refused: Layers that could not be opened, and why.
    """

    model: nn.Module
    layers: list[Built] = field(default_factory=list)
    computed: list[tuple[tuple[str, ...], ComputedLayer]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    refused: list[LeftAlone] = field(default_factory=list)

    def left_alone(self, left: Sequence[LeftAlone]) -> tuple[LeftAlone, ...]:
        """What else is left alone, and the layers that could not be opened, each once."""
        told = {layer.name for layer in self.refused}
        return (*(layer for layer in left if layer.name not in told), *self.refused)

    @property
    def beside(self) -> dict[str, tuple[int, int]]:
        """By name: what a layer holds more where its weight is computed, in parameters and in bytes."""
        return {names[0]: (one.n_beside, one.bytes_beside) for names, one in self.computed}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan says of the layers whose weight was computed."""
        if not self.computed:
            return ()
        by = ", ".join(dict.fromkeys(one.by for _, one in self.computed))
        names = named([names[0] for names, _ in self.computed])
        return (
            f"The weight of {names} is computed at every call (by {by}). It was computed once, as in eval mode: a "
            "layer that is replaced or narrowed has these numbers, and nothing more of what computed them.",
        )

    def close(self, *, changed_too: bool = True) -> nn.Module:
        """Put torch's layers back; those of which a map was factorized only if asked to.

        Returns:
            Module: The model.
        """
        if not changed_too:
            self._close_narrowed()
        back = [(names, new, old) for names, old, new in self.layers if changed_too or not _is_other(old, new)]
        for _, new, old in back:
            move_hooks(new, old)
            old.train(new.training)
        self.model = swap(self.model, back)
        self.layers = [one for one in self.layers if not changed_too and _is_other(*one[1:])]
        self._put_computed_back(changed_too)
        return self.model

    def _close_narrowed(self) -> None:
        """Put smaller layers of torch in the place of those that were narrowed and hold dense maps alone."""
        narrowed = [one for one in self.layers if _lost_units(*one[1:]) and not _is_changed(one[2])]
        built = [(names, new, _smaller(old, new)) for names, old, new in narrowed]
        self.model = swap(self.model, built)
        self.layers = [one for one in self.layers if not any(one is other for other in narrowed)]

    def _put_computed_back(self, changed_too: bool) -> None:
        """What computes a weight is back in its place, where the layer was not replaced or narrowed meanwhile."""
        by_id = {id(module) for module in self.model.modules()}
        back = [one for one in self.computed if changed_too or (id(one[1].plain) in by_id and not _is_narrow(one[1]))]
        for _, one in back:
            one.put_back()
            if one.old.training != one.plain.training:
                one.old.train(one.plain.training)
        self.model = swap(self.model, [(names, one.plain, one.old) for names, one in back])
        self.computed = [one for one in self.computed if not any(one is other for other in back)]


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
    found = Opened(model)
    try:
        _take(found, is_computed, why_not_computed, _compute, only)
        _take(found, _is_composite, _why_not, _open, only)
    except BaseException:
        found.close()
        raise
    return found


def _take(
    found: Opened,
    belongs: Callable[[nn.Module], bool],
    why_not: Callable[[nn.Module, Survey], str],
    take: Callable[[Opened, tuple[str, ...], nn.Module], str],
    only: Collection[str] | None,
) -> None:
    """Take the layers of one kind apart, or tell why they stay."""
    aliases = _aliases(found.model, belongs)
    survey = Survey.of(found.model) if aliases else None
    for names, layer in aliases:
        if survey is None or (only is not None and not set(names) & set(only)):
            continue
        reason = why_not(layer, survey) or take(found, names, layer)
        if reason:
            n = sum(p.numel() for p in layer.parameters())
            found.refused.append(LeftAlone(names[0], plain_kind(layer).__name__, reason, n))


def plain_weights(model: nn.Module, names: Collection[str]) -> Opened:
    """Layers below a model whose weight is computed, with plain numbers in its place, also where it has none yet.

    Args:
        names: Of those.
    """
    found = Opened(model)
    for own, layer in _aliases(model, is_computed):
        reason = _compute(found, own, layer) if set(own) & set(names) and layer is not model else ""
        if reason:
            found.close()
            raise KindError(
                f"a layer whose weight is computed must be one that can be replaced: {own[0]!r}: {reason}. Take off "
                "what computes it first."
            )
    return found


def _is_composite(layer: nn.Module) -> bool:
    return composite_of(layer) is not None


def _compute(found: Opened, names: tuple[str, ...], layer: nn.Module) -> str:
    """Put the layer with plain numbers in place; why that fails, or ``""``."""
    one = computed_layer(layer)
    try:
        found.model = swap(found.model, [(names, layer, one.plain)])
    except Exception as error:
        one.put_back()
        return f"it is held where no other layer can be put ({in_short(error)})"
    found.computed.append((names, one))
    found.names.append(names[0])
    return ""


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


def _aliases(model: nn.Module, belongs: Callable[[nn.Module], bool]) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Layers of a kind with all their names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if belongs(module):
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
    if names[0] not in found.names:
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


def _is_other(old: nn.Module, new: CompositeLayer) -> bool:
    """Whether torch's layer cannot stand for an opened one any more: a map was factorized, or heads are gone."""
    return _is_changed(new) or getattr(old, "num_heads", 0) != getattr(new, "num_heads", 0)


def _lost_units(old: nn.Module, new: nn.Module) -> bool:
    sizes = ("input_size", "hidden_size")
    return any(getattr(old, name, None) != getattr(new, name, None) for name in sizes)


def _smaller(old: nn.Module, new: Any) -> nn.Module:
    """Torch's layer of the sizes of an opened one, with what hung on the one that was opened."""
    with torch.random.fork_rng(devices=[]):
        found: nn.Module = new.to_dense()
    vars(found).update({name: vars(new)[name] for name in _hung(old, (vars(old),)) if name in vars(new)})
    vars(found)["narrowed_from"] = vars(new)["narrowed_from"]
    move_hooks(new, found)
    return found.train(new.training)


def _is_narrow(one: ComputedLayer) -> bool:
    return "narrowed_from" in vars(one.plain)


def _is_changed(layer: CompositeLayer) -> bool:
    return any(isinstance(one, FactorizedLayer) for one in layer.modules())
