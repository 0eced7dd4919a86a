"""The layers of a recipe: every size is checked against the stored tensors before a layer is built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortrain.compression.carry import cannot_carry
from tensortrain.errors import CheckpointError, TTError
from tensortrain.formats.registry import current_name
from tensortrain.nn import COUNTERPARTS, FactorizedLayer, TiedHead
from tensortrain.system.store.folder import RECIPE
from tensortrain.system.store.recipe import LayerEntry, as_json, same_json
from tensortrain.system.store.storable import has_plain_cores
from tensortrain.system.store.stored import StoredTensors, listed

__all__ = [
    "LAYERS",
    "build_layer",
    "check_counterpart",
    "check_shapes",
    "dense_arguments",
    "first_difference",
    "has_config",
    "layer_entries",
]

LAYERS: dict[str, type[FactorizedLayer]] = {cls.__name__: cls for cls in COUNTERPARTS.values()}
_SET_HERE = {"self", "init", "device", "dtype"}  # constructor arguments that a recipe must not give
_LARGEST_SIZE = 2**40  # of a layer's inputs or outputs; factoring larger numbers, as messages do, takes seconds
_LARGEST_NUMBER = 2**31
_LONGEST_TEXT = 64
_MAY_BE_FRACTIONS = ("max_norm", "norm_type")
_IN, _OUT = ("in_features", "in_channels", "num_embeddings"), ("out_features", "out_channels", "embedding_dim")


# -- saving ----------------------------------------------------------------------------------------------


def layer_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    """The factorized layers of a model.

    Raises:
        CheckpointError: One that could not be built again.
    """
    names: dict[int, list[str]] = {}
    layers: dict[int, FactorizedLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorizedLayer):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    for key, listed_names in names.items():
        names[key] = [name for name in listed_names if not _is_of_head(model, name)] or listed_names
    return tuple(_layer_entry(tuple(names[key]), layer) for key, layer in layers.items())


def _is_of_head(model: nn.Module, name: str) -> bool:
    """Whether it is the name that a tied head has for its table."""
    parent, _, child = name.rpartition(".")
    return child == "embedding" and type(model.get_submodule(parent)) is TiedHead


def _layer_entry(names: tuple[str, ...], layer: FactorizedLayer) -> LayerEntry:
    if LAYERS.get(type(layer).__name__) is not type(layer):
        raise CheckpointError(
            f"a factorized layer must be of tensortrain.nn: {names[0]} is a {type(layer).__name__}, expected "
            f"one of {', '.join(LAYERS)}. Save the dense model after to_dense_()."
        )
    if not has_plain_cores(layer):
        raise CheckpointError(
            f"the cores of a layer that is saved must be plain parameters: those of {names[0]!r} are constrained by "
            "tensortrain.nn.orthogonal, parametrized or pruned. Make them plain with torch.nn.utils.parametrize."
            "remove_parametrizations(layer.cores, '0') or torch.nn.utils.prune.remove(layer.cores, '0') and so on; "
            "or save its state_dict(), or tensortrain.nn.Linear.from_dense(layer.to_dense(), rank=layer.ranks, "
            "in_modes=.., out_modes=..)."
        )
    return LayerEntry(names, type(layer).__name__, as_json(layer.config()))


# -- loading ---------------------------------------------------------------------------------------------


def build_layer(entry: LayerEntry, stored: StoredTensors, folder: Path) -> FactorizedLayer:
    """The layer of a recipe on the meta device, checked against its tensors."""
    cls = LAYERS.get(entry.kind)
    if cls is None:
        raise CheckpointError(
            f"a factorized layer must be of a known class: {entry.names[0]!r:.80} has {entry.kind!r:.60}, "
            f"expected one of {', '.join(LAYERS)}. Load {folder} with the tensortrain release that wrote it."
        )
    shapes = _shapes_of(entry, stored)
    _check_arguments(cls, entry, shapes, folder)
    _check_numbers(entry, shapes, folder)
    dtype = _dtype_of(entry, stored)
    try:
        build: Any = cls
        layer: FactorizedLayer = build(**entry.config, init=None, device="meta", dtype=dtype)
    except (TTError, ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _unbuildable(entry, folder, f"fails with: {error!s:.400}") from error
    if not has_config(layer, entry):
        raise CheckpointError(
            f"a layer's arguments must be those it was saved with: {entry.names[0]!r} in {folder / RECIPE} "
            f"builds {first_difference(as_json(layer.config()), entry.config)}. Save the model again."
        )
    return layer


def has_config(layer: FactorizedLayer, entry: LayerEntry) -> bool:
    """Whether a layer has the arguments of a recipe, in which formats may still be written with hyphens."""
    config, name = entry.config, entry.config.get("format")
    if isinstance(name, str):
        config = {**config, "format": current_name(name)}
    return same_json(as_json(layer.config()), config)


def check_shapes(entry: LayerEntry, layer: FactorizedLayer, stored: StoredTensors, folder: Path) -> None:
    """Refuse a layer whose cores are not those of its arguments."""
    lead = f"{entry.names[0]}." if entry.names[0] else ""
    for k, core in enumerate(layer.cores):
        name = f"{lead}cores.{k}"
        found = stored.entries[stored.names[name]].shape if name in stored.names else None
        if found != tuple(core.shape):
            raise CheckpointError(
                f"a layer must have the cores of its arguments: {name} in {folder} has shape {found}, expected "
                f"{tuple(core.shape)}. Build the layer anew with these cores' ranks and modes."
            )


def _shapes_of(entry: LayerEntry, stored: StoredTensors) -> dict[str, tuple[int, ...]]:
    """Shapes of the layer's own tensors, by their names in the layer."""
    lead = f"{entry.names[0]}." if entry.names[0] else ""
    shapes: dict[str, tuple[int, ...]] = {}
    for own in ("hot_weight", *(f"cores.{k}" for k in range(len(stored.names)))):
        first = stored.names.get(lead + own)
        if first is not None:
            shapes[own] = stored.entries[first].shape
        elif own != "hot_weight":
            break
    return shapes


def _check_arguments(
    cls: type[FactorizedLayer], entry: LayerEntry, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    unknown = sorted(entry.config.keys() - (inspect.signature(cls.__init__).parameters.keys() - _SET_HERE))
    # More modes than tensors cannot be true, and planning for them could take for ever.
    most = len(shapes) + 8
    long = [name for name, value in entry.config.items() if isinstance(value, list) and len(value) > most]
    if not unknown and not long:
        return
    if unknown:
        found = f"the arguments {listed(unknown):.200}"
    else:
        found = f"{len(entry.config[long[0]])} {'modes' if 'modes' in long[0] else 'entries'} in {long[0]}"
    raise CheckpointError(
        f"a layer must have the arguments of its class: {entry.names[0]!r} ({entry.kind}) in "
        f"{folder / RECIPE} has {found}, which do not belong. Save the model again."
    )


def _check_numbers(entry: LayerEntry, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    config = entry.config
    largest_core = max((math.prod(shape) for own, shape in shapes.items() if own != "hot_weight"), default=0)
    if not largest_core:
        return  # without cores, or with empty ones: the comparison of names and shapes says so
    for name, value in config.items():
        if name in _MAY_BE_FRACTIONS and isinstance(value, float):
            continue
        most = _most(name, config, largest_core, shapes)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, list) and one:
                one = max(map(_size, one)) if all(isinstance(x, int) for x in one) else math.inf
            if _size(one) > most:
                raise _unbuildable(entry, folder, f"has {name} {one!r:.40}, more than its tensors hold ({most:,})")


def _size(value: Any) -> float:
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, str):
        return 0 if len(value) <= _LONGEST_TEXT else math.inf
    return math.inf if isinstance(value, (dict, float, list)) else 0


def _most(name: str, config: Mapping[str, Any], largest_core: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest number that an argument can have, given the shapes of the cores."""
    if name in ("in_modes", "out_modes", "groups", "kernel_size"):
        return largest_core
    if name in _IN or name in _OUT:
        modes = config.get("in_modes" if name in _IN else "out_modes")
        plain = isinstance(modes, list) and all(isinstance(mode, int) for mode in modes)
        groups = config.get("groups", 1)
        capped = [min(abs(mode), largest_core) for mode in modes] if plain and modes else [_LARGEST_SIZE]
        return min(_LARGEST_SIZE, math.prod(capped) * (abs(groups) if isinstance(groups, int) else 1))
    if name == "hot_rows":
        return shapes.get("hot_weight", (0,))[0]
    return 2**63 if name == "rank" else _LARGEST_NUMBER


def _dtype_of(entry: LayerEntry, stored: StoredTensors) -> torch.dtype | None:
    """The dtype of a layer's cores, which they share."""
    lead = f"{entry.names[0]}.cores." if entry.names[0] else "cores."
    found: dict[torch.dtype, str] = {}
    for name, first in stored.names.items():
        if name.startswith(lead):
            found.setdefault(stored.tensors[first].dtype, name)
    if len(found) > 1:
        (one, name), (two, other) = list(found.items())[:2]
        raise CheckpointError(
            f"the cores of a layer must have one dtype: {name} has {one}, {other} has {two}, expected the same. "
            "Convert the layer with layer.to(dtype), and save the model again."
        )
    return next(iter(found), None)


def _unbuildable(entry: LayerEntry, folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"a layer's arguments must build it: {entry.names[0]!r} ({entry.kind}) in {folder / RECIPE} {why}. "
        "Save the model again."
    )


# -- the layer that is replaced --------------------------------------------------------------------------


def check_counterpart(
    name: str, old: nn.Module | None, entry: LayerEntry, layer: FactorizedLayer, folder: Path
) -> None:
    """Refuse to put a layer where the model has nothing, or something else."""
    found = type(old).__name__ if old is not None else "nothing"
    theirs = None if old is None else dense_arguments(old, layer)
    if old is None or theirs is None:
        raise CheckpointError(
            f"a factorized layer must replace one of its kind: the model has {found} at {name!r}, expected "
            f"the {entry.kind} that {folder} names. Pass the model that was saved."
        )
    theirs, ours = as_json(theirs), as_json(layer.arguments_of(layer))
    if theirs != ours:
        raise CheckpointError(
            f"a factorized layer must have the sizes of the one it replaces: {name!r} in {folder} has "
            f"{first_difference(ours, theirs)} in the model. Pass the model that was saved."
        )
    odd = _oddity(old)
    if odd:
        raise CheckpointError(
            f"a layer that is replaced must be an ordinary one: {name!r} ({found}) of the model has something that the "
            f"factorized layer would lose: {odd}. Pass a model without it."
        )


def dense_arguments(old: nn.Module, layer: FactorizedLayer) -> dict[str, Any] | None:
    """The torch arguments of a layer that ``layer`` can replace, None for one of another kind."""
    if type(old) in (layer.dense_type, type(layer)):
        return layer.arguments_of(old)
    weight = old._parameters.get("weight")
    if type(old).__name__ == "Conv1D" and type(old).__module__ == "transformers.pytorch_utils" and weight is not None:
        n_in, n_out = old.nx, old.nf  # a linear map with the transposed weight
        return {"in_features": n_in, "out_features": n_out, "bias": old.bias is not None} if layer.has_bias else None
    return None


def _oddity(old: nn.Module) -> str | None:
    if isinstance(old, FactorizedLayer):
        if "forward" in vars(old):
            return "a forward of its own"
        return None if has_plain_cores(old) else "cores that are functions of others"
    if "weight" not in old._parameters:
        return "its weight is computed, by pruning or a parametrization"
    return cannot_carry(old) or None


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Where two mappings differ first, in words."""
    key = next(key for key in (*a, *b) if key not in a or key not in b or not same_json(a[key], b[key]))
    return f"{key} {a.get(key)!r:.100}, not {b.get(key)!r:.100}"
