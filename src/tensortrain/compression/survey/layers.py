"""Which layers of a model can be factorized: found by identity, so that shared modules stay shared."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tensortrain.compression.carry import cannot_carry
from tensortrain.compression.survey.reasons import Survey, why_not, why_unknown
from tensortrain.compression.survey.tied import Head
from tensortrain.errors import FilterError, KindError, NonFiniteError
from tensortrain.formats import WeightShape
from tensortrain.nn import FactorizedLayer, TiedHead, counterpart
from tensortrain.system.aliases import find_aliases
from tensortrain.system.finite import are_finite
from tensortrain.system.storage import count_numbers

__all__ = ["FoundLayer", "LeftAlone", "check_finite", "check_module", "count_params", "find_layers", "part_of"]


@dataclass(frozen=True)
class FoundLayer:
    """A layer with a factorized twin, under all the names it has in the model.

    Attributes:
        head: Of an embedding: the output layer that shares its table, and goes on sharing it.
    """

    names: tuple[str, ...]
    module: nn.Module
    weight: WeightShape
    head: Head | None = None

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
    def reader(self) -> type[FactorizedLayer]:
        """The class that reads the layer and builds its factorized twin."""
        kind = counterpart(self.module)
        assert kind is not None
        return kind

    @property
    def kernel(self) -> Tensor:
        """The weight as formats take it, without gradient."""
        return self.reader.kernel_of(self.module)


@dataclass(frozen=True)
class LeftAlone:
    """A layer, or another module with parameters of its own, that is not touched, and why.

    ``n_params`` counts its own parameters, also those that it shares with others.
    """

    name: str
    kind: str
    reason: str
    n_params: int = 0

    def __post_init__(self) -> None:
        if not (all(isinstance(text, str) for text in (self.name, self.kind, self.reason)) and self.n_params >= 0):
            raise TypeError(f"a layer left alone has values of the wrong type: {self.name!r}")

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.kind}, {self.n_params:,} parameters): {self.reason}"


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
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    survey = Survey.of(model)
    reasons = _reasons(model, survey)
    found: list[FoundLayer] = []
    left: list[LeftAlone] = []
    heads = _heads(survey, reasons, aliases)
    with_table = {id(head.module) for head in heads.values()}
    for module in survey.modules:
        reason = reasons.get(id(module), "")
        names = tuple(aliases[id(module)])
        if id(module) in with_table:
            continue
        if reason:
            left.append(LeftAlone(names[0], type(module).__name__, reason, survey.n_params(module)))
        elif counterpart(module) is not None:
            shape = counterpart(module).weight_shape_of(module)  # type: ignore[union-attr]
            found.append(FoundLayer(names, module, shape, heads.get(id(module))))
    return _filtered(found, left, include, exclude), left


def _reasons(model: nn.Module, survey: Survey) -> dict[int, str]:
    """Why modules are left alone, by their ids: those that look like layers, and those that hold parameters."""
    reasons = {id(module): why_not(module, survey) for module in survey.modules if survey.looks_like_a_layer(module)}
    fit = {key: module for module in survey.modules if reasons.get(key := id(module)) == ""}
    survey.add(find_aliases(model, fit))
    reasons |= {key: survey.why_held(module) for key, module in fit.items()}
    others = (module for module in survey.modules if id(module) not in reasons)
    return reasons | {id(module): why_unknown(module, survey) for module in others}


def _heads(survey: Survey, reasons: dict[int, str], aliases: dict[int, list[str]]) -> dict[int, Head]:
    """Output layers by the ids of the embeddings whose tables they share; where one cannot be changed, why both not."""
    found = {}
    for key, head in survey.heads.items():
        table = next(module for module in survey.modules if id(module) == key)
        why = {id(one): reasons.get(id(one), "") for one in (table, head)}
        why[id(head)] = why[id(head)] or cannot_carry(head, to=TiedHead)
        if not any(why.values()):
            found[key] = Head(tuple(aliases[id(head)]), head)
            continue
        for one, other in ((table, head), (head, table)):
            reasons[id(one)] = (
                why[id(one)] or f"its weight is tied: it shares memory with {survey.names[id(other)]}.weight"
            )
    return found


def part_of(model: nn.Module, name: str) -> nn.Module | None:
    """A part of a model by its name; ``None`` where it has none, as the maps of a layer that was not taken apart."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def check_module(model: object) -> None:
    """Raise ``KindError`` for anything but a module."""
    if not isinstance(model, nn.Module):
        raise KindError(
            f"a model must be a module: found {type(model).__name__}, expected torch.nn.Module. Pass the model itself."
        )


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ``NonFiniteError`` where a layer's weight holds NaN or Inf."""
    if not are_finite(weight):  # one host sync per layer
        raise NonFiniteError(
            f"weights must be finite: layer {name!r} holds NaN or Inf. Repair or retrain it, or exclude it."
        )


def count_params(model: nn.Module) -> int:
    """All parameters of a model; shared ones, and those that share memory, once."""
    return count_numbers(model.parameters())


def _filtered(
    found: list[FoundLayer],
    left: list[LeftAlone],
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
) -> list[FoundLayer]:
    kept = found
    if include is not None:
        patterns = _patterns(include)
        _check_patterns(patterns, found, left, "include")
        kept = [layer for layer in kept if _matches(layer, patterns)]
    if exclude is not None:
        patterns = _patterns(exclude)
        _check_patterns(patterns, found, left, "exclude")
        kept = [layer for layer in kept if not _matches(layer, patterns)]
    return kept


def _patterns(given: Sequence[str] | str) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _matches(layer: FoundLayer, patterns: Sequence[str]) -> bool:
    names = (*layer.names, *(layer.head.names if layer.head is not None else ()))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(patterns: Sequence[str], found: Sequence[FoundLayer], left: Sequence[LeftAlone], what: str) -> None:
    for pattern in patterns:
        if any(_matches(layer, [pattern]) for layer in found):
            continue
        alone = next((layer for layer in left if fnmatch.fnmatchcase(layer.name, pattern)), None)
        if alone is None or what == "include":
            raise _unmatched(pattern, found, alone, what)


def _unmatched(pattern: str, found: Sequence[FoundLayer], alone: LeftAlone | None, what: str) -> FilterError:
    names = [layer.name for layer in found]
    shown = ", ".join(names[:8]) + (", .." if len(names) > 8 else "")
    why = "" if alone is None else f" Left alone is {alone}."
    return FilterError(
        f"a pattern must match a layer: {what} has {pattern!r}, which matches none of {len(names)} layers "
        f"({shown}).{why} Run tensortrain.inspect(model) for the names."
    )
