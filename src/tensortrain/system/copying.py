"""A copy of a model that stands on its own: what shared memory shares it again, closures see the copy's layers."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensortrain.system.aliases import Reference, find_aliases, function_in, reachable, references_from
from tensortrain.system.parking import can_park, is_parked, let_go, park
from tensortrain.system.storage import overlaps, repeats

__all__ = ["copy_model", "tensors_of"]

M = TypeVar("M", bound=nn.Module)
_MOST_ROUNDS = 8  # closures within closures
Memo = dict[int, Any]


def copy_model(model: M, *, parks: bool = False) -> M:
    """Copy a model as ``copy.deepcopy`` does, and what that misses.

    Parameters that share memory (``head.weight.data = table.weight.data``) share it in the copy too. Functions and weak
    references that hang on the model and see its layers see those of the copy.

    Args:
        parks: Large tensors of the copy lie in files.

    Cost: the model's memory once more, and a walk over what hangs on it.
    """
    memo: Memo = {}
    tensors = tensors_of(model)
    _copy_shared(tensors, memo)
    _copy_odd(tensors, memo)
    if parks:
        worth = [t for t in tensors if id(t) not in memo and (can_park(t) or is_parked(t))]
        memo.update({id(t): _like(_parked(t), t) for t in worth})
    copied = copy.deepcopy(model, memo)
    try:
        _detach(model, copied, memo)
    except Exception:  # a closure over what cannot be copied: the layers that do not run then are told by others
        return copied
    return copied


def _copy_shared(tensors: Sequence[Tensor], memo: Memo) -> None:
    """Copies of all tensors that share numbers, or repeat them, on one copy of what they stand on."""
    storages: dict[tuple[str, int], torch.UntypedStorage] = {}
    shared = [tensor for tensor, _ in overlaps([(tensor, tensor) for tensor in tensors])]
    for tensor in [*shared, *(tensor for tensor in tensors if repeats(tensor))]:
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage._cdata)
        if key not in storages:
            storages[key] = storage.clone()
        if id(tensor) not in memo:
            placed = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            placed.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
            memo[id(tensor)] = _like(placed, tensor)


def _copy_odd(tensors: Sequence[Tensor], memo: Memo) -> None:
    """Copies of what ``copy.deepcopy`` refuses: sparse parameters, and tensors that were computed from others.

    The latter are what weight norm and pruning leave on a layer; every forward computes them anew.
    """
    for tensor in tensors:
        sparse = type(tensor) is nn.Parameter and tensor.layout is not torch.strided
        if (sparse or tensor.grad_fn is not None) and id(tensor) not in memo:
            memo[id(tensor)] = _like(tensor.detach().clone(), tensor)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Every tensor that hangs on a model, once."""
    loose = [tensor for _, tensor in find_aliases(model, {}).tensors]
    unique = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *loose)}
    return [tensor for tensor in unique.values() if not is_lazy(tensor)]


def _parked(tensor: Tensor) -> Tensor:
    """A copy in a file; of what lies in one too, no memory is held on."""
    found = park(tensor)
    let_go(tensor)
    return found


def _like(copied: Tensor, old: Tensor) -> Tensor:
    new = nn.Parameter(copied, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else copied
    vars(new).update(vars(old))
    if old.is_leaf and old.grad is not None:
        new.grad = old.grad.clone()
    return new


def _detach(model: nn.Module, copied: nn.Module, memo: Memo) -> None:
    """Give the copy functions and weak references of its own where those of the original see the original's modules."""
    originals = {id(module): module for module in model.modules()}
    shared = reachable(model)
    clones: dict[int, types.FunctionType] = {}
    own: set[int] = set()

    def clone_of(function: types.FunctionType) -> types.FunctionType:
        if id(function) not in clones:
            clones[id(function)] = _cloned(function, originals, memo)
            own.add(id(clones[id(function)]))
        return clones[id(function)]

    for _ in range(_MOST_ROUNDS):
        references = find_aliases(copied, originals).references
        changed = [_detach_one(reference, shared, own, clone_of, memo) for reference in references]
        if not any(changed):
            break


def _detach_one(
    reference: Reference, shared: set[int], own: set[int], clone_of: Callable[[Any], Any], memo: Memo
) -> bool:
    """Returns whether something was changed."""
    found = function_in(reference.place, but_not=own)
    if found is None:
        if reference.place.changes() in shared:  # an object that belongs to both models is not ours to change
            return False
        reference.place.put(memo[id(reference.target)], [])
        return True
    place, function = found
    if place.changes() in shared:
        return False
    if place.get() is function:  # else another of its variables was met before, and the clone stands here already
        place.put(clone_of(function), [])
    return True


def _cloned(function: types.FunctionType, originals: dict[int, nn.Module], memo: Memo) -> types.FunctionType:
    """The function with variables of its own, where they see what was copied."""
    cells = tuple(_cloned_cell(cell, originals, memo) for cell in function.__closure__ or ())
    defaults = copy.deepcopy(function.__defaults__, memo)
    clone = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    clone.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    clone.__qualname__, clone.__doc__ = function.__qualname__, function.__doc__
    vars(clone).update(vars(function))
    return clone


def _cloned_cell(cell: types.CellType, originals: dict[int, nn.Module], memo: Memo) -> types.CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # not bound yet
        return cell
    return types.CellType(copy.deepcopy(held, memo)) if references_from(held, originals) else cell
