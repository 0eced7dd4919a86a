"""Fitting a checkpoint to a model: everything is checked first, then all attributes change or none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import CheckpointError, TTError
from tensortrain.io.folder import RECIPE
from tensortrain.io.recipe import Kind, LayerEntry, TensorEntry, as_json, dtype_named
from tensortrain.io.stored import StoredTensors, listed, named_tensors
from tensortrain.nn import COUNTERPARTS, FactorizedLayer

__all__ = ["LAYERS", "Change", "build_layer", "changes", "check_counterpart", "commit", "device_of"]

LAYERS: dict[str, type[FactorizedLayer]] = {cls.__name__: cls for cls in COUNTERPARTS.values()}
_SET_HERE = {"self", "init", "device", "dtype"}  # constructor arguments that a recipe must not give


def build_layer(entry: LayerEntry, stored: StoredTensors, folder: Path) -> FactorizedLayer:
    """The layer of a recipe on the meta device, checked against its tensors."""
    cls = LAYERS.get(entry.kind)
    if cls is None:
        raise CheckpointError(
            f"a factorized layer must be of a known class: {entry.names[0]!r} has {entry.kind!r:.60}, "
            "expected one of "
            f"{', '.join(LAYERS)}. Load {folder} with the tensortrain release that wrote it."
        )
    _check_arguments(cls, entry, stored, folder)
    lead = f"{entry.names[0]}." if entry.names[0] else ""
    first = stored.tensors.get(stored.names.get(f"{lead}cores.0", ""))
    try:
        build: Any = cls
        layer = build(**entry.config, init=None, device="meta", dtype=None if first is None else first.dtype)
    except (TTError, TypeError, ValueError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
        raise CheckpointError(
            f"a layer's arguments must build it: {entry.names[0]!r} ({entry.kind}) in {folder / RECIPE} "
            "fails with: "
            f"{error} Save the model again."
        ) from error
    if as_json(layer.config()) != entry.config:
        raise CheckpointError(
            f"a layer's arguments must be those it was saved with: {entry.names[0]!r} in {folder / RECIPE} "
            "builds "
            f"{_first_difference(as_json(layer.config()), entry.config)}. Save the model again."
        )
    return layer


def _check_arguments(cls: type[FactorizedLayer], entry: LayerEntry, stored: StoredTensors, folder: Path) -> None:
    unknown = sorted(entry.config.keys() - (inspect.signature(cls.__init__).parameters.keys() - _SET_HERE))
    modes = entry.config.get("in_modes")
    # More modes than tensors cannot be true, and planning for them could take for ever.
    too_long = isinstance(modes, list) and len(modes) > max(1, len(stored.names))
    if unknown or too_long:
        found = f"the arguments {listed(unknown)}" if unknown else f"{len(modes or ())} modes"
        raise CheckpointError(
            f"a layer must have the arguments of its class: {entry.names[0]!r} ({entry.kind}) in "
            f"{folder / RECIPE} "
            f"has {found}, which do not belong. Save the model again."
        )


class Change:
    """One attribute that gets another value once all is checked."""

    def __init__(self, owner: nn.Module, name: str, value: nn.Module | Tensor) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.old = owner._modules.get(name, owner._parameters.get(name, owner._buffers.get(name)))

    def make(self) -> None:
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        setattr(self.owner, self.name, self.old)


def changes(
    skeleton: nn.Module,
    layers: Sequence[tuple[LayerEntry, FactorizedLayer]],
    stored: StoredTensors,
    folder: Path,
    *,
    device: torch.device | None = None,
) -> list[Change]:
    """Everything that loading will do to the model; raises where the two do not fit.

    Args:
        device: For all tensors; by default each goes where the one it replaces is.
    """
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    swaps: list[Change] = []
    swapped: dict[str, FactorizedLayer] = {}
    for entry, layer in layers:
        for name in entry.names:
            old = modules.get(name)
            check_counterpart(name, old, entry, layer, folder)
            parent, _, child = name.rpartition(".")
            swaps.append(Change(modules[parent], child, layer))
            swapped[name] = layer
    targets = _targets(skeleton, swapped)
    _check_names(targets, stored, folder)
    return swaps + _assignments(targets, stored, folder, device)


@dataclass(frozen=True)
class _Target:
    """A place for a tensor: the module that owns it, what is there now, and where the tensor is to lie."""

    owner: nn.Module
    name: str
    tensor: Tensor
    kind: Kind
    device: torch.device


def _targets(skeleton: nn.Module, swapped: Mapping[str, FactorizedLayer]) -> dict[str, _Target]:
    """Every named place for a tensor in the model as it will be."""
    skip = tuple(f"{name}." for name in swapped)
    targets = {name: target for name, target in _own_targets(skeleton) if not name.startswith(skip)}
    for name, layer in swapped.items():
        device = device_of(skeleton.get_submodule(name))  # the new layer itself has no memory yet
        targets |= {f"{name}.{own}": replace(target, device=device) for own, target in _own_targets(layer)}
    return targets


def _own_targets(module: nn.Module) -> Iterator[tuple[str, _Target]]:
    owners = dict(module.named_modules(remove_duplicate=False))
    for name, tensor, kind in named_tensors(module):
        parent, _, child = name.rpartition(".")
        yield name, _Target(owners[parent], child, tensor, kind, tensor.device)


def _check_names(targets: Mapping[str, _Target], stored: StoredTensors, folder: Path) -> None:
    kinds = {name: stored.entries[first].kind for name, first in stored.names.items()}
    # Buffers outside the state dict may come and go with use; only one without data must be in the file.
    needed = {name for name, t in targets.items() if t.kind != "transient" or t.tensor.is_meta}
    missing = sorted(needed - kinds.keys())
    extra = sorted(name for name in kinds.keys() - targets.keys() if kinds[name] != "transient")
    if missing or extra:
        parts = [f"no {listed(missing)}"] * bool(missing) + [f"{listed(extra)} too many"] * bool(extra)
        raise CheckpointError(
            f"a checkpoint must have the tensors of its model: {folder} has {' and '.join(parts)}. "
            "Pass the model that was saved, in the shape it had."
        )


def _assignments(
    targets: Mapping[str, _Target], stored: StoredTensors, folder: Path, device: torch.device | None
) -> list[Change]:
    """New tensors for all places; places that share one in the checkpoint get the same object."""
    made: dict[tuple[str, torch.device], Tensor] = {}
    made_here: dict[tuple[int, str], Change] = {}
    for name, target in targets.items():
        if name not in stored.names:
            continue
        first = stored.names[name]
        entry = stored.entries[first]
        _check_fits(name, target, entry, folder)
        place = _with_memory(device or target.device)
        value = made.get((first, place))
        if value is None:
            value = stored.tensors[first].to(place)
            if entry.kind == "parameter":
                value = nn.Parameter(value, requires_grad=entry.requires_grad)
            made[first, place] = value
        known = made_here.setdefault((id(target.owner), target.name), Change(target.owner, target.name, value))
        if known.value is not value:
            raise CheckpointError(
                f"modules that the model shares must be shared in the checkpoint: {name} in {folder} has a "
                "value of "
                "its own. Pass the model that was saved, in the shape it had."
            )
    return list(made_here.values())


def _check_fits(name: str, target: _Target, entry: TensorEntry, folder: Path) -> None:
    if (entry.kind == "parameter") != (target.kind == "parameter"):
        raise CheckpointError(
            f"a tensor must be of the same kind in both: {name} is a {entry.kind} in {folder} and a "
            f"{target.kind} in "
            "the model. Pass the model that was saved."
        )
    if target.kind == "transient":
        return
    shape = tuple(target.tensor.shape)
    if entry.shape != shape:
        raise CheckpointError(
            f"a checkpoint must fit its model: {name} in {folder} has shape {entry.shape}, expected {shape}. "
            "Pass the model that was saved, in the shape it had."
        )
    if _number_kind(dtype_named(entry.dtype)) != _number_kind(target.tensor.dtype):
        raise CheckpointError(
            f"a checkpoint must fit its model: {name} in {folder} has dtype {entry.dtype}, expected a "
            "relative of "
            f"{str(target.tensor.dtype).removeprefix('torch.')}. Pass the model that was saved."
        )


def check_counterpart(
    name: str, old: nn.Module | None, entry: LayerEntry, layer: FactorizedLayer, folder: Path
) -> None:
    """Refuse to put a layer where the model has nothing, or something else."""
    found = type(old).__name__ if old is not None else "nothing"
    if type(old) not in (layer.dense_type, type(layer)):
        raise CheckpointError(
            f"a factorized layer must replace one of its kind: the model has {found} at {name!r}, expected "
            "the "
            f"{entry.kind} that {folder} names. Pass the model that was saved."
        )
    theirs, ours = as_json(layer.arguments_of(old)), as_json(layer.arguments_of(layer))
    if theirs != ours:
        raise CheckpointError(
            f"a factorized layer must have the sizes of the one it replaces: {name!r} in {folder} has "
            f"{_first_difference(ours, theirs)} in the model. Pass the model that was saved."
        )


def commit(todo: Sequence[Change]) -> None:
    """Make all changes, or none if one of them is refused; weights that layers derived are forgotten."""
    done: list[Change] = []
    try:
        for change in todo:
            done.append(change)
            change.make()
    except BaseException:
        for change in reversed(done):
            change.undo()
        raise
    for owner in {id(c.owner): c.owner for c in todo}.values():
        for module in owner.modules():
            if isinstance(module, FactorizedLayer):
                module.clear_cache()


def _first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    key = next(key for key in (*a, *b) if key not in a or key not in b or a[key] != b[key])
    return f"{key} {a.get(key)!r}, not {b.get(key)!r}"


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first tensor lies; meta for one without tensors."""
    tensor = next((t for _, t, _ in named_tensors(module)), None)
    return torch.device("meta") if tensor is None else tensor.device


def _with_memory(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _number_kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else str(dtype)
