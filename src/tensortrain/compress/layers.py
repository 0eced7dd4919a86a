"""Which layers of a model can be factorized: found by identity, so that shared modules stay shared."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from tensortrain.errors import FilterError, KindError, NonFiniteError
from tensortrain.formats import WeightShape
from tensortrain.nn import COUNTERPARTS, FactorizedLayer

__all__ = ["FoundLayer", "LeftAlone", "check_finite", "check_module", "count_params", "find_layers"]


@dataclass(frozen=True)
class FoundLayer:
    """A layer with a factorized twin, under all the names it has in the model."""

    names: tuple[str, ...]
    module: nn.Module
    weight: WeightShape

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.module.parameters(recurse=False))

    @property
    def kernel(self) -> Tensor:
        """The weight as formats take it, without gradient."""
        return COUNTERPARTS[type(self.module)].kernel_of(self.module)


@dataclass(frozen=True)
class LeftAlone:
    """A layer that looks like one we know, and why it is not touched."""

    name: str
    kind: str
    reason: str


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> tuple[list[FoundLayer], list[LeftAlone]]:
    """List the layers that can be factorized, and those that only look as if they could.

    Args:
        include, exclude: Names or fnmatch patterns on the dotted names; the bare model has the name ``""``.

    Raises:
        FilterError: A pattern matches no layer.
        KindError: The model is not a module.
    """
    check_module(model)
    aliases: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    owners = _owners(modules)
    found: list[FoundLayer] = []
    left: list[LeftAlone] = []
    for key, module in modules.items():
        reason = _why_not(module, owners)
        if reason == "":
            found.append(FoundLayer(tuple(aliases[key]), module, COUNTERPARTS[type(module)].weight_shape_of(module)))
        elif reason is not None:
            left.append(LeftAlone(aliases[key][0], type(module).__name__, reason))
    return _filtered(found, include, exclude), left


def check_module(model: object) -> None:
    """Raise ``KindError`` for anything but a module."""
    if not isinstance(model, nn.Module):
        raise KindError(
            f"a model must be a module: found {type(model).__name__}, expected torch.nn.Module. Pass the model itself."
        )


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ``NonFiniteError`` where a layer's weight holds NaN or Inf."""
    if not bool(torch.isfinite(weight).all()):  # one host sync per layer
        raise NonFiniteError(
            f"weights must be finite: layer {name!r} holds NaN or Inf. Repair or retrain it, or exclude it."
        )


def count_params(model: nn.Module) -> int:
    """All parameters of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _owners(modules: dict[int, nn.Module]) -> dict[int, int]:
    """How many distinct modules hold each parameter."""
    counts: dict[int, int] = {}
    for module in modules.values():
        for parameter in {id(p) for p in module._parameters.values() if p is not None}:
            counts[parameter] = counts.get(parameter, 0) + 1
    return counts


def _why_not(module: nn.Module, owners: dict[int, int]) -> str | None:
    """``""`` if the layer can be factorized, ``None`` if it is of another kind, else the reason."""
    if isinstance(module, FactorizedLayer):
        return None
    if type(module) not in COUNTERPARTS:
        if isinstance(module, tuple(COUNTERPARTS)) and is_parametrized(module):
            return "a parametrization computes one of its parameters"
        if isinstance(module, tuple(COUNTERPARTS)):
            return f"{type(module).__name__} is a subclass that may have a forward of its own"
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization, not a parameter"
    if type(weight) is nn.parameter.UninitializedParameter or not isinstance(weight, Tensor):
        return "its weight is not initialised yet; run the model once"
    for name, parameter in module._parameters.items():
        if parameter is not None and owners[id(parameter)] > 1:
            return f"its {name} is tied to another layer's"
    if not weight.is_floating_point() or weight.is_meta:
        return f"its weight has no floating-point data ({weight.dtype}, {weight.device})"
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(module, _ConvNd) and module.in_channels == module.groups > 1:
        return "depthwise: each group is a single filter, there is nothing to factorize"
    return ""


def _filtered(
    found: list[FoundLayer], include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> list[FoundLayer]:
    kept = found
    if include is not None:
        patterns = _patterns(include)
        _check_patterns(patterns, found, "include")
        kept = [layer for layer in kept if _matches(layer, patterns)]
    if exclude is not None:
        patterns = _patterns(exclude)
        _check_patterns(patterns, found, "exclude")
        kept = [layer for layer in kept if not _matches(layer, patterns)]
    return kept


def _patterns(given: Sequence[str] | str) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _matches(layer: FoundLayer, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in layer.names for pattern in patterns)


def _check_patterns(patterns: Sequence[str], found: Sequence[FoundLayer], what: str) -> None:
    for pattern in patterns:
        if not any(_matches(layer, [pattern]) for layer in found):
            names = [layer.name for layer in found]
            shown = ", ".join(names[:8]) + (", .." if len(names) > 8 else "")
            raise FilterError(
                f"a pattern must match a layer: {what} has {pattern!r}, which matches none of {len(names)} layers "
                f"({shown}). Run tensortrain.inspect(model) for the names."
            )
