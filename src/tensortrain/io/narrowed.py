"""Dense layers with fewer hidden units than their model is built with: their sizes stand in the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortrain.compression.narrow import SIZES
from tensortrain.compression.narrow_whole_heads import HEAD_SIZES
from tensortrain.errors import CheckpointError
from tensortrain.io.partial import is_partial, partial_entry, partial_twin
from tensortrain.nn import FactorizedLayer, PartialLinear
from tensortrain.system.store.recipe import LayerEntry
from tensortrain.system.store.stored import StoredTensors

__all__ = ["are_sizes", "check_sizes", "narrowed_entries", "narrowed_twin"]


def narrowed_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    """The layers of a model of which hidden units were taken, with the sizes that they have now."""
    names: dict[int, list[str]] = {}
    layers: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        narrowed = any(size in getattr(module, "narrowed_from", ()) for size in (*SIZES, *HEAD_SIZES))
        if name and (narrowed or isinstance(module, PartialLinear)):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    return tuple(_entry(tuple(names[key]), layer) for key, layer in layers.items())


def _entry(names: tuple[str, ...], layer: Any) -> LayerEntry:
    if isinstance(layer, PartialLinear):
        return partial_entry(names, layer)
    return LayerEntry(names, _kind(layer), {size: int(getattr(layer, size)) for size in layer.narrowed_from})


def _kind(layer: Any) -> str:
    """The class of a layer; of one that was factorized after it was narrowed, that of the dense one."""
    if isinstance(layer, FactorizedLayer):
        return getattr(layer, "made_from", None) or layer.dense_type.__name__
    return type(layer).__name__


def narrowed_twin(old: Any, entry: LayerEntry, stored: StoredTensors, folder: Path) -> nn.Module | None:
    """A layer of the model with the sizes of the recipe, without memory; ``None`` where it has these already.

    Raises:
        CheckpointError: It is another layer, or has no more units than the checkpoint.
    """
    if is_partial(entry):
        return partial_twin(old, entry, folder)
    sizes = entry.config
    before = check_sizes(old, entry, folder, SIZES)
    if before == sizes:
        return None
    kind: Any = type(old)
    new: nn.Module = kind.__new__(kind)
    vars(new).update(vars(old))
    vars(new).update({**sizes, "narrowed_from": before})
    if isinstance(old, nn.RNNBase):  # which keeps its parameters in a list, too
        vars(new)["_flat_weights"] = list(old._flat_weights)
    for kind in ("_parameters", "_buffers"):
        vars(new)[kind] = {name: _empty(tensor, name, entry, stored) for name, tensor in vars(old)[kind].items()}
    return new


def are_sizes(entry: LayerEntry) -> bool:
    """Whether an entry of a recipe holds nothing but how many heads a part of a model counts."""
    return bool(entry.config) and all(size in HEAD_SIZES for size in entry.config)


def check_sizes(old: Any, entry: LayerEntry, folder: Path, known: Sequence[str] = HEAD_SIZES) -> dict[str, Any]:
    """The sizes of a part of the model under the names of a recipe.

    Raises:
        CheckpointError: It is another part, or has smaller sizes.
    """
    sizes = entry.config
    before = {size: getattr(old, size, None) for size in sizes}
    fits = type(old).__name__ == entry.kind and sizes and all(size in known for size in sizes)
    if not fits or not all(_is_narrower(sizes[size], before[size]) for size in sizes):
        raise CheckpointError(
            f"a narrowed layer must be one of its model: {entry.names[0]!r:.80} is a {entry.kind:.40} with "
            f"{sizes!s:.120} in {folder}, and a {type(old).__name__} with {before!s:.120} in the model. Pass the model "
            "that was saved, in the shape it had."
        )
    return before


def _is_narrower(now: object, before: object) -> bool:
    return type(now) is int and isinstance(before, int) and 1 <= now <= before


def _empty(tensor: Any, name: str, entry: LayerEntry, stored: StoredTensors) -> Any:
    """On the meta device, in the shape that is stored; as it is where nothing is stored of it."""
    first = stored.names.get(f"{entry.names[0]}.{name}")
    if tensor is None or first is None:
        return tensor
    empty = torch.empty(stored.entries[first].shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
