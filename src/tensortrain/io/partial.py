"""Dense layers that read some of their inputs or make some of their outputs: which ones stands in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortrain.errors import CheckpointError, TTError
from tensortrain.nn import PartialLinear, counterpart
from tensortrain.system.store.recipe import LayerEntry

__all__ = ["is_partial", "partial_entry", "partial_twin"]

_ARGUMENTS = ("in_features", "out_features", "bias", "read", "made")


def is_partial(entry: LayerEntry) -> bool:
    """Whether an entry of a recipe is that of a partial layer."""
    return entry.kind == PartialLinear.__name__


def partial_entry(names: tuple[str, ...], layer: PartialLinear) -> LayerEntry:
    """What a recipe keeps of a partial layer."""
    return LayerEntry(names, PartialLinear.__name__, _config(layer))


def partial_twin(old: Any, entry: LayerEntry, folder: Path) -> nn.Module | None:
    """The partial layer of a recipe on the meta device; ``None`` where the model has it already.

    Raises:
        CheckpointError: The layer of the model is another one, or the entry is not that of a partial layer.
    """
    config = entry.config
    if isinstance(old, PartialLinear) and _config(old) == config:
        return None
    try:
        if set(config) != set(_ARGUMENTS) or _sizes(old) != tuple(config[name] for name in _ARGUMENTS[:3]):
            raise _not_of_the_model(old, entry, folder)
        new = PartialLinear(**config, device="meta", dtype=old.weight.dtype)
    except (TypeError, ValueError, TTError) as error:
        raise error if isinstance(error, CheckpointError) else _not_of_the_model(old, entry, folder) from error
    device = old.weight.device if old.weight.device.type != "meta" else "cpu"
    for name, numbers in (("_read", new.read), ("_made", new.made)):  # no numbers of the checkpoint fill these
        new._buffers[name] = None if numbers is None else torch.tensor(numbers, device=device)
    new.weight.requires_grad_(old.weight.requires_grad)
    if new.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    return new.train(old.training)


def _config(layer: PartialLinear) -> dict[str, Any]:
    lists = {name: None if numbers is None else list(numbers) for name, numbers in _numbers(layer).items()}
    return {**dict(zip(_ARGUMENTS, _sizes(layer), strict=False)), **lists}


def _numbers(layer: PartialLinear) -> dict[str, tuple[int, ...] | None]:
    return {"read": layer.read, "made": layer.made}


def _sizes(layer: Any) -> tuple[int, int, bool]:
    """Inputs, outputs and whether there is a bias, of a dense linear layer of any kind."""
    has_bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, PartialLinear):
        return layer.in_features, layer.out_features, has_bias
    kind = counterpart(layer)
    if kind is None:
        raise TypeError("no dense layer")
    shape = kind.weight_shape_of(layer)
    return shape.in_features, shape.out_features, has_bias


def _not_of_the_model(old: Any, entry: LayerEntry, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"a narrowed layer must be one of its model: {entry.names[0]!r:.80} is a {entry.kind:.40} with "
        f"{entry.config!s:.120} in {folder}, and a {type(old).__name__} in the model. Pass the model that was saved, "
        "in the shape it had."
    )
