"""Fitting a checkpoint to a model: everything is checked first, then all of it changes or nothing.

A layer that takes another form keeps its object, which becomes one of the other class: whoever holds it, a list, a
bound method, a hook, holds the new one. A tensor that has its form already is filled in place, so that an optimizer
and every other holder of a parameter sees the new numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.carry import carry
from tensortrain.errors import CheckpointError
from tensortrain.io.composites import build_composite, dense_twin
from tensortrain.io.heads import tied_to
from tensortrain.io.layers import check_counterpart, has_config
from tensortrain.io.narrowed import are_sizes, check_sizes, narrowed_twin
from tensortrain.nn import CompositeLayer, FactorizedLayer, TiedHead
from tensortrain.nn.counterparts import is_transformers_conv1d
from tensortrain.nn.opening import composite_of, fresh_twin
from tensortrain.system.store.recipe import (
    LayerEntry,
    Recipe,
    TensorEntry,
    TensorKind,
    dtype_named,
)
from tensortrain.system.store.storable import check_unsharded
from tensortrain.system.store.stored import StoredTensors, identity_of, listed, named_tensors

__all__ = ["Change", "changes", "commit", "device_of"]

Layers = Sequence[tuple[LayerEntry, FactorizedLayer]]
_KEPT = {name for name in vars(nn.Module()) if "hook" in name} | {"training"}


# -- changes ---------------------------------------------------------------------------------------------


class Change:
    """Something that gets another value once all is checked."""

    def make(self) -> None:
        """Do it."""
        raise NotImplementedError

    def undo(self) -> None:
        """Bring back what was there before, also after half of ``make``."""
        raise NotImplementedError


class Put(Change):
    """Another module or tensor as an attribute."""

    def __init__(self, owner: nn.Module, name: str, value: nn.Module | Tensor) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.old: nn.Module | Tensor | None = None

    def make(self) -> None:
        owner, name = self.owner, self.name
        self.old = owner._modules.get(name, owner._parameters.get(name, owner._buffers.get(name)))
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        if isinstance(self.old, nn.Module):
            self.owner._modules[self.name] = self.old  # past a __setattr__ that may have refused
        else:
            setattr(self.owner, self.name, self.old)


class Become(Change):
    """A layer takes the class and the parts of another; its hooks, mode and attributes of its own stay."""

    def __init__(self, module: nn.Module, new: nn.Module) -> None:
        self.module, self.new = module, new
        self.old_class, self.old_parts = type(module), dict(vars(module))
        # What torch's constructor sets and ours has on the class would hide that.
        self.stale = set(vars(fresh_twin(module))) - set(vars(new)) if composite_of(module) is not None else set()

    def make(self) -> None:
        module: Any = self.module
        kept = {name: _kept(value, vars(self.new).get(name)) for name, value in self.old_parts.items() if name in _KEPT}
        module.__class__ = type(self.new)
        for name in self.stale:
            vars(module).pop(name, None)
        if issubclass(self.old_class, (FactorizedLayer, CompositeLayer)) and self.old_class is not type(self.new):
            vars(module).clear()  # plans, caches and the like
        vars(module).update({**vars(self.new), **kept})

    def undo(self) -> None:
        module: Any = self.module
        module.__class__ = self.old_class
        vars(module).clear()
        vars(module).update(self.old_parts)


def _kept(old: Any, new: Any) -> Any:
    """The hooks of a layer, in the dict that the handles of their owners know, beside those that its class brings."""
    return {**old, **new} if isinstance(new, dict) and new and new is not old else old


class Fill(Change):
    """Other numbers in a tensor; where dtype or layout differ, in the same tensor object."""

    def __init__(self, tensor: Tensor, value: Tensor, requires_grad: bool) -> None:
        self.tensor, self.value, self.requires_grad = tensor, value, requires_grad
        self.old = (tensor.data, tensor.grad, tensor.requires_grad)
        self.numbers: Tensor | None = None

    @torch.no_grad()
    def make(self) -> None:
        if _same_form(self.tensor, self.value):
            self.numbers = self.tensor.detach().clone()
            self.tensor.copy_(self.value)
        else:
            self.tensor.grad = None
            self.tensor.data = self.value
        if self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)

    @torch.no_grad()
    def undo(self) -> None:
        self.tensor.data = self.old[0]
        if self.numbers is not None:
            self.tensor.copy_(self.numbers)
        self.tensor.requires_grad_(self.old[2])
        self.tensor.grad = self.old[1]


class Resize(Change):
    """Other sizes on a part of the model that holds no numbers of its own."""

    def __init__(self, module: nn.Module, sizes: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        known = vars(module).get("narrowed_from", {})
        self.module, self.new = module, {**sizes, "narrowed_from": {**before, **known}}
        self.old = {name: vars(module)[name] for name in self.new if name in vars(module)}

    def make(self) -> None:
        vars(self.module).update(self.new)

    def undo(self) -> None:
        for name in self.new:
            vars(self.module).pop(name, None)
        vars(self.module).update(self.old)


def _same_form(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def commit(todo: Sequence[Change], model: nn.Module) -> None:
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
    finally:
        for module in model.modules():
            if isinstance(module, FactorizedLayer):
                module.clear_cache()


# -- what has to change ----------------------------------------------------------------------------------


def changes(
    skeleton: nn.Module, recipe: Recipe, layers: Layers, stored: StoredTensors, folder: Path, *, adopt: bool
) -> list[Change]:
    """Everything that loading will do to the model; raises where the two do not fit.

    Args:
        adopt: Whether parameters that are filled in place take ``requires_grad`` from the checkpoint, too.
    """
    swaps = _swaps(skeleton, recipe, layers, stored, folder)
    targets = _targets(skeleton, swaps)
    _check_names(targets, stored, folder)
    return [
        *_surgery(skeleton, swaps),
        *_resizes(skeleton, recipe, folder),
        *_assignments(targets, stored, folder, adopt),
    ]


def _resizes(skeleton: nn.Module, recipe: Recipe, folder: Path) -> Iterator[Change]:
    """How many heads parts of the model count."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for entry in recipe.narrowed:
        if are_sizes(entry):
            part = modules.get(entry.names[0])
            before = check_sizes(part, entry, folder)
            assert part is not None
            if before != entry.config:
                yield Resize(part, entry.config, before)


def _swaps(
    skeleton: nn.Module, recipe: Recipe, layers: Layers, stored: StoredTensors, folder: Path
) -> dict[str, nn.Module]:
    """Name -> the module that is to be there, for all names that get another, or one of another form."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    maps = {name: (entry, layer) for entry, layer in layers for name in entry.names}
    narrow = {name: entry.config for entry in recipe.narrowed for name in entry.names}
    swaps: dict[str, nn.Module] = {}
    for entry in recipe.narrowed:  # some of which were factorized after that
        if are_sizes(entry) or _is_inside(entry, recipe.composites):
            continue
        old = modules.get(entry.names[0])
        _swap_all(entry, narrowed_twin(old, entry, stored, folder), swaps, modules)
    for entry in recipe.composites:
        new = build_composite(modules.get(entry.names[0]), entry, maps, folder, narrow)
        _swap_all(entry, new, swaps, modules)
    for entry, layer in layers:
        if all(modules.get(name) is layer for name in entry.names):
            continue  # a map of a composite layer
        for name in entry.names:
            check_counterpart(name, modules.get(name), entry, layer, folder)
        if not isinstance(modules[entry.names[0]], FactorizedLayer):
            _take_over(modules[entry.names[0]], layer)
        _swap_all(entry, None if _is_like(modules[entry.names[0]], entry) else layer, swaps, modules)
    for entry in recipe.heads:
        _swap_all(entry, tied_to(modules.get(entry.names[0]), entry, modules, folder), swaps, modules)
    listed_entries = (*recipe.composites, *recipe.layers, *recipe.narrowed, *recipe.heads)
    known = {name for entry in listed_entries for name in entry.names}
    for name, module in list(modules.items()):
        if name not in known and name in modules and _is_dense_in(name, module, stored):
            _swap(name, dense_twin(module), swaps, modules)
    return swaps


def _is_inside(entry: LayerEntry, composites: Sequence[LayerEntry]) -> bool:
    """Whether a layer is a map of one of several maps, which is built with it."""
    return any(entry.names[0].startswith(f"{name}.") for one in composites for name in one.names)


def _take_over(old: nn.Module, new: FactorizedLayer) -> None:
    """What hangs on a dense layer belongs to the model, and is in the checkpoint; so is the kind to go back to."""
    carry(old, new)
    if is_transformers_conv1d(old):
        new.made_from = "Conv1D"


def _swap_all(
    entry: LayerEntry, new: nn.Module | None, swaps: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> None:
    """One module at all names of a layer: the new one, or the first name's where that has the form already."""
    first = modules[entry.names[0]]
    if new is not None or any(modules.get(name) is not first for name in entry.names):
        for name in entry.names:
            _swap(name, new or first, swaps, modules)


def _swap(name: str, new: nn.Module | None, swaps: dict[str, nn.Module], modules: dict[str, nn.Module]) -> None:
    assert new is not None
    lead = f"{name}." if name else ""
    for below in [other for other in modules if other.startswith(lead)]:
        del modules[below]
    swaps[name] = new
    modules.update({_joined(name, own): module for own, module in new.named_modules(remove_duplicate=False)})


def _joined(name: str, own: str) -> str:
    return f"{name}.{own}" if name and own else name or own


def _is_like(old: nn.Module, entry: LayerEntry) -> bool:
    """Whether a layer of the model has the form of the recipe's."""
    if not isinstance(old, FactorizedLayer) or type(old).__name__ != entry.kind:
        return False
    return has_config(old, entry)


def _is_dense_in(name: str, module: nn.Module, stored: StoredTensors) -> bool:
    """Whether a layer that is factorized in the model is torch's own in the checkpoint."""
    if not isinstance(module, (FactorizedLayer, CompositeLayer)):
        return False
    own = {_joined(name, other) for other, _, _ in named_tensors(module)}
    twin = None if own <= stored.names.keys() else dense_twin(module)
    return twin is not None and {_joined(name, other) for other, _, _ in named_tensors(twin)} <= stored.names.keys()


def _surgery(skeleton: nn.Module, swaps: Mapping[str, nn.Module]) -> list[Change]:
    """Every old layer becomes the new one, and stands at all its names."""
    todo: list[Change] = []
    becomes: dict[int, nn.Module] = {}  # by new module: the object that becomes it
    taken: dict[int, nn.Module] = {}  # by that object: the new module
    for name, new in swaps.items():
        old = skeleton.get_submodule(name)
        module = becomes.get(id(new))
        if module is None:
            module = becomes[id(new)] = old
            if taken.setdefault(id(old), new) is not new:
                raise _unshared_modules(name)
            todo += [Become(old, new)] if old is not new else []
        if name:
            parent, _, child = name.rpartition(".")
            todo.append(Put(skeleton.get_submodule(parent), child, module))
    for new in {id(new): new for new in swaps.values()}.values():
        if isinstance(new, TiedHead):
            table = new.embedding
            todo.append(Put(becomes[id(new)], "embedding", becomes.get(id(table), table)))
    return todo


def _unshared_modules(name: str, where: object = "the checkpoint") -> CheckpointError:
    return CheckpointError(
        f"modules that the model shares must be shared in the checkpoint: {name} in {where} has a value of "
        "its own. Pass the model that was saved, in the shape it had."
    )


# -- tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """A place for a tensor: the module that owns it, what is there now, and where the tensor is to lie."""

    owner: nn.Module
    name: str
    tensor: Tensor
    kind: TensorKind
    device: torch.device


def _targets(skeleton: nn.Module, swaps: Mapping[str, nn.Module]) -> dict[str, _Target]:
    """Every named place for a tensor in the model as it will be."""
    skip = tuple(f"{name}." if name else "" for name in swaps)
    targets = {name: target for name, target in _own_targets(skeleton) if not name.startswith(skip)}
    holders: dict[int, nn.Module] = {}
    for name, new in swaps.items():
        old = holders.setdefault(id(new), skeleton.get_submodule(name))
        device = device_of(old)  # the new layer itself has no memory yet
        for own, target in _own_targets(new):
            here = replace(target, device=device if target.tensor.is_meta else target.device)
            # What the new layer owns will be the old one's, which becomes the new one.
            targets[_joined(name, own)] = replace(here, owner=old) if target.owner is new else here
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


class _Assignments:
    """Numbers for all places; places that share a tensor in the checkpoint share an object afterwards."""

    def __init__(self, stored: StoredTensors, *, adopt: bool) -> None:
        self.stored, self.adopt = stored, adopt
        self.todo: list[Change] = []
        self.made: dict[tuple[str, torch.device], Tensor] = {}  # what holds a stored tensor on a device
        self.filled: dict[Any, str] = {}  # a tensor of the model -> the stored one that goes into it

    def add(self, first: str, target: _Target) -> None:
        """Bring a stored tensor to its place: into the tensor that is there, where it serves, or in its stead."""
        own, place = target.tensor, _with_memory(target.device)
        value, known = self.stored.tensors[first], self.made.get((first, place))
        if known is own:
            return
        if _can_be_filled(own, value, place) and self._is_free(own, known, first, target.kind):
            self.made.setdefault((first, place), own)
            trains = self.stored.entries[first].requires_grad if self.adopt else own.requires_grad
            self.todo.append(Fill(own, value.to(place), trains))
            return
        if known is None:
            known = self.made[first, place] = _new_tensor(value.to(place), self.stored.entries[first])
        self.todo.append(Put(target.owner, target.name, known))

    def _is_free(self, own: Tensor, known: Tensor | None, first: str, kind: TensorKind) -> bool:
        """Whether a tensor of the model may get this stored one: no other goes there, nor this one elsewhere."""
        here = identity_of(own, kind)
        return (known is None or identity_of(known, kind) == here) and self.filled.setdefault(here, first) == first


def _assignments(targets: Mapping[str, _Target], stored: StoredTensors, folder: Path, adopt: bool) -> list[Change]:
    found = _Assignments(stored, adopt=adopt)
    seen: dict[tuple[int, str], str] = {}
    for name, target in targets.items():
        if name not in stored.names:
            continue
        first = stored.names[name]
        _check_fits(name, target, stored.entries[first], folder)
        if seen.setdefault((id(target.owner), target.name), first) != first:
            raise _unshared_modules(name, folder)
        found.add(first, target)
    return found.todo


def _new_tensor(value: Tensor, entry: TensorEntry) -> Tensor:
    return nn.Parameter(value, requires_grad=entry.requires_grad) if entry.kind == "parameter" else value


def _can_be_filled(own: Tensor, value: Tensor, place: torch.device) -> bool:
    if own.is_meta or nn.parameter.is_lazy(own) or own.is_inference() or own.device != place:
        return False
    return own.layout == value.layout and torch._has_compatible_shallow_copy_type(own, value)


def _check_fits(name: str, target: _Target, entry: TensorEntry, folder: Path) -> None:
    check_unsharded(name, target.tensor)
    if (entry.kind == "parameter") != (target.kind == "parameter"):
        raise CheckpointError(
            f"a tensor must be of the same kind in both: {name} is a {entry.kind} in {folder} and a "
            f"{target.kind} in the model. Pass the model that was saved."
        )
    if target.kind == "transient":
        return
    shape = tuple(target.tensor.shape)
    if entry.shape != shape and not nn.parameter.is_lazy(target.tensor):
        raise CheckpointError(
            f"a checkpoint must fit its model: {name} in {folder} has shape {entry.shape}, expected {shape}. "
            "Pass the model that was saved, in the shape it had."
        )
    if _number_kind(dtype_named(entry.dtype)) != _number_kind(target.tensor.dtype):
        raise CheckpointError(
            f"a checkpoint must fit its model: {name} in {folder} has dtype {entry.dtype}, expected a "
            f"relative of {str(target.tensor.dtype).removeprefix('torch.')}. Pass the model that was saved."
        )


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
