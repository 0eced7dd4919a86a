"""Layers made of several maps: what a recipe keeps of them, and how they take the place of torch's.

A recipe lists the factorized maps as layers of their own. Which of its maps are dense, and how the maps hang together,
follows from the class and its torch arguments, so a composite layer is built anew from those of the layer that it
replaces, which must be those of the recipe.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tensortrain import nn as layers
from tensortrain.errors import CheckpointError, TTError
from tensortrain.io.layers import check_counterpart, first_difference
from tensortrain.nn import CompositeLayer, FactorizedLayer
from tensortrain.system.store.recipe import LayerEntry, as_json

__all__ = ["COMPOSITES", "build_composite", "composite_entries", "dense_twin"]

Maps = Mapping[str, tuple[LayerEntry, FactorizedLayer]]
Narrow = Mapping[str, Mapping[str, Any]]  # sizes by name

COMPOSITES: dict[str, type[CompositeLayer]] = {
    cls.__name__: cls
    for cls in (
        *(layers.GRU, layers.LSTM, layers.RNN, layers.GRUCell, layers.LSTMCell, layers.RNNCell),
        *(layers.MultiheadAttention, layers.TransformerEncoderLayer),
    )
}
_KEPT_PARTS = ("norm1", "norm2", "dropout", "dropout1", "dropout2")  # the same in torch's encoder layer and ours
_OWN_OPTIONS = {"reset_after": True, "proj_size": 0}
_MAY_DIFFER = ("dropout", "activation")  # not a matter of the numbers


def composite_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    """The composite layers of a model, outer ones first. A subclass loads into a model that has it already."""
    names: dict[int, list[str]] = {}
    found: dict[int, CompositeLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompositeLayer) and COMPOSITES.get(type(module).__name__) is type(module):
            names.setdefault(id(module), []).append(name)
            found[id(module)] = module
    return tuple(
        LayerEntry(tuple(names[key]), type(module).__name__, as_json(_facts(type(module), module)))
        for key, module in found.items()
    )


def _facts(cls: type[CompositeLayer], module: Any) -> dict[str, Any]:
    """What a layer and its twin must agree in."""
    facts = {name: value for name, value in _arguments(cls, module).items() if name not in _MAY_DIFFER}
    return facts | {name: getattr(module, name, usual) for name, usual in _own_options(cls).items()}


def _own_options(cls: type[CompositeLayer]) -> dict[str, Any]:
    """Options that change the function and that torch's layer lacks, with the values that are as torch."""
    theirs = getattr(cls, "torch_arguments", ())
    known = inspect.signature(cls.__init__).parameters
    return {name: usual for name, usual in _OWN_OPTIONS.items() if name in known and name not in theirs}


def _arguments(cls: type[CompositeLayer], module: Any) -> dict[str, Any]:
    """The torch arguments of a layer, torch's or ours."""
    if issubclass(cls, layers.TransformerEncoderLayer):
        return cls._arguments_of(module)
    named: Any = cls
    arguments = {name: getattr(module, name) for name in named.torch_arguments}
    if issubclass(cls, layers.MultiheadAttention):
        with_bias = module.out_proj.bias is not None
        arguments |= {"bias": with_bias, "add_bias_kv": module.bias_k is not None}
    return arguments


def build_composite(
    old: nn.Module | None, entry: LayerEntry, maps: Maps, folder: Path, narrow: Narrow | None = None
) -> CompositeLayer | None:
    """The layer of a recipe on the meta device, in the place of ``old``; None where that has the form already.

    Args:
        maps: The factorized layers of the recipe, by all their names.
        narrow: Sizes of the narrowed layers of the recipe, by all their names: attention with fewer heads.
    """
    narrow = narrow or {}
    name = entry.names[0]
    cls = COMPOSITES.get(entry.kind)
    if cls is None or type(old) not in (cls, cls.dense_type):
        found = type(old).__name__ if old is not None else "nothing"
        raise CheckpointError(
            f"a layer of several maps must replace one of its kind: the model has {found} at {name!r:.80}, expected "
            f"the {entry.kind!r:.60} that {folder} names. Pass the model that was saved."
        )
    facts = as_json(_facts(cls, old)) | _fewer_heads(old, narrow.get(name, {}))
    if facts != entry.config:
        raise CheckpointError(
            f"a layer must have the arguments of the one it replaces: {name!r} in {folder} has "
            f"{first_difference(entry.config, facts)} in the model. Pass the model that was saved."
        )
    if isinstance(old, cls) and _has_form(name, old, maps, narrow):
        return None
    return _filled(name, _empty(cls, old, entry, folder), maps, folder, narrow)


def _fewer_heads(old: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The number of heads of attention that does without some."""
    n = sizes.get("num_heads")
    return {"num_heads": n} if type(n) is int and 1 <= n <= getattr(old, "num_heads", 0) else {}


def _has_form(name: str, old: CompositeLayer, maps: Mapping[str, Any], narrow: Narrow) -> bool:
    lead = f"{name}." if name else ""
    return all(
        isinstance(one, FactorizedLayer) == (lead + own in maps)
        and all(getattr(one, size, None) == n for size, n in narrow.get(lead + own, {}).items())
        for own, one in old.named_maps()
    )


def _empty(cls: type[CompositeLayer], old: Any, entry: LayerEntry, folder: Path) -> CompositeLayer:
    build: Any = cls
    options = {name: entry.config[name] for name in _own_options(cls)}
    try:
        with warnings.catch_warnings():  # torch has warned of a dropout without effect already
            warnings.simplefilter("ignore")
            new: CompositeLayer = build(**_arguments(cls, old), **options, rank=1, init=None, device="meta")
    except (TTError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"a layer's arguments must build it: {entry.names[0]!r} ({entry.kind}) in {folder} fails with: "
            f"{error!s:.400}. Save the model again."
        ) from error
    if isinstance(old, (nn.TransformerEncoderLayer, layers.TransformerEncoderLayer)):
        for part in _KEPT_PARTS:
            setattr(new, part, getattr(old, part))
        new.self_attn.dropout = old.self_attn.dropout  # type: ignore[union-attr]
    return new


def _filled(name: str, new: CompositeLayer, maps: Maps, folder: Path, narrow: Narrow) -> CompositeLayer:
    lead = f"{name}." if name else ""
    for own, one in list(new.named_maps()):
        parent, _, child = own.rpartition(".")
        known = maps.get(lead + own)
        if known is not None:
            check_counterpart(lead + own, one, *known, folder)
            setattr(new.get_submodule(parent), child, known[1])
        elif isinstance(one, FactorizedLayer):
            whole = {"in_features": one.in_features, "out_features": one.out_features}
            sizes = {size: _no_more(narrow.get(lead + own, {}).get(size, n), n) for size, n in whole.items()}
            dense = nn.Linear(**sizes, bias=one.bias is not None, device="meta")
            if sizes != whole:
                vars(dense)["narrowed_from"] = {size: n for size, n in whole.items() if sizes[size] != n}
            setattr(new.get_submodule(parent), child, dense)
    return new


def _no_more(n: Any, most: int) -> int:
    return n if type(n) is int and 1 <= n <= most else most


def dense_twin(old: nn.Module) -> nn.Module | None:
    """Torch's layer in the form of a factorized or composite one, on the meta device; None where there is none."""
    if isinstance(old, FactorizedLayer):
        build: Any = old.dense_type
        return build(**old.arguments_of(old), device="meta")
    cls = type(old)
    if not isinstance(old, CompositeLayer) or COMPOSITES.get(cls.__name__) is not cls:
        return None
    if any(getattr(old, name) != usual for name, usual in _own_options(cls).items()):
        return None
    build = old.dense_type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new: nn.Module = build(**_arguments(cls, old), device="meta")
    if isinstance(old, layers.TransformerEncoderLayer):
        for part in _KEPT_PARTS:
            setattr(new, part, getattr(old, part))
        new.self_attn.dropout = old.self_attn.dropout  # type: ignore[union-attr]
    return new
