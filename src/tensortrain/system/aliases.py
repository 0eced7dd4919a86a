"""Where else a model holds its layers: in lists, helper objects, bound methods, closures, and what else Python has.

A model's forward may reach a layer past its registered name. Whoever replaces a layer has to replace it there too, or
leave it. The places are found by a walk over all objects that hang on the model's modules.
"""

from __future__ import annotations

import functools
import gc
import logging
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "Aliases",
    "Reference",
    "Undo",
    "find_aliases",
    "function_in",
    "reachable",
    "references_from",
    "replace_aliases",
    "wraps_own_forward",
]

Answer = TypeVar("Answer")

Undo = list[Callable[[], None]]

_MOST_OBJECTS = 200_000  # a data set that hangs on the model has no end; no layer was ever met that deep
_ATOMS = (
    *(str, bytes, bytearray, int, float, complex, bool, type(None), type(...), range, slice, memoryview),
    *(type, types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, torch.layout, torch.memory_format),
    *(threading.Thread, logging.Logger, logging.Handler, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    *(torch.utils.data.DataLoader, torch.utils.data.Dataset),
)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)  # they pass for what they stand for, and fail once it is gone
_FOREIGN = (  # objects of these hold no layers of a model, but much else
    *("torch._ops", "torch._C", "torch.fx", "torch._dynamo", "torch._inductor", "torch.jit", "torch.distributed"),
    *("tensortrain.contract", "tensortrain.formats", "logging", "threading", "concurrent", "multiprocessing"),
)
_SKIPPED = ("trainer", "_trainer", "param_groups")  # of trainers and what wraps optimizers: not used by a forward
_REGISTERED = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class Reference:
    """A place that holds a layer, besides the names it is registered under."""

    target: nn.Module
    place: _Place

    @property
    def path(self) -> str:
        return self.place.path()


@dataclass
class Aliases:
    """What the walk met: places of the layers asked for, and tensors that no module has registered."""

    references: list[Reference] = field(default_factory=list)
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)


def find_aliases(model: nn.Module, layers: Mapping[int, nn.Module]) -> Aliases:
    """Find the places that hold layers besides their names, and the tensors held outside of modules.

    Args:
        model: Walked from all its modules. Optimizers, data sets and trainers are passed over.
        layers: By their ids.

    Cost: one step per object, 200,000 at most.
    """
    walk = _Walk(layers)
    walk.start_at_modules(model)
    return walk.run()


def references_from(held: Any, layers: Mapping[int, nn.Module]) -> list[Reference]:
    """The places of layers that one object leads to."""
    walk = _Walk(layers)
    walk.todo.append(_Item(_Module("", nn.Module()), [held], 0))
    return walk.run().references


def reachable(model: nn.Module) -> set[int]:
    """Ids of all that can change and hangs on a model."""
    walk = _Walk({})
    walk.start_at_modules(model)
    walk.run()
    return walk.seen


def function_in(place: _Place, *, but_not: set[int]) -> tuple[_Place, Any] | None:
    """The outermost function that leads to a place by its variables, and the place that holds the function."""
    found = None
    while not isinstance(place, _Module):
        if isinstance(place, (_Cell, _Attribute)) and isinstance(place.holder, types.FunctionType):
            found = found if id(place.holder) in but_not else (place.up, place.holder)
        place = place.up
    return found


def wraps_own_forward(layer: nn.Module) -> bool:
    """Whether the forward that was set on a layer itself only wraps the one of its class, and would wrap another's."""
    references = references_from(vars(layer)["forward"], {id(layer): layer})
    return bool(references) and all(
        isinstance(reference.place, _Method) and reference.place.is_own("forward") for reference in references
    )


def replace_aliases(model: nn.Module, new: Mapping[int, tuple[nn.Module, nn.Module]], undo: Undo) -> None:
    """Put new layers in all places that hold the old ones but their names.

    Args:
        new: Old and new layer, by the old one's id.
        undo: Gets what puts back every change, in order.
    """
    references = find_aliases(model, {key: old for key, (old, _) in new.items()}).references
    for reference in sorted(references, key=lambda reference: reference.place.is_key()):
        reference.place.put(new[id(reference.target)][1], undo)


class _Walk:
    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self.layers = layers
        self.found = Aliases()
        self.seen: set[int] = set()
        self.todo: deque[_Place] = deque()

    def start_at_modules(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            self.seen |= {id(module), *(id(vars(module).get(key)) for key in _REGISTERED)}
            self._open_attributes(module, _Module(name, module))

    def run(self) -> Aliases:
        for _ in range(_MOST_OBJECTS):
            if not self.todo:
                break
            self._visit(self.todo.popleft())
        return self.found

    def _visit(self, place: _Place) -> None:
        held = place.get()
        if _is_proxy(held):
            self._queue(_in_proxy(held, place))
        elif id(held) in self.layers and held is self.layers[id(held)]:
            self.found.references.append(Reference(held, place))
        elif isinstance(held, Tensor):
            self.found.tensors.append((place.path(), held))
        elif not _is_atom(type(held)) and id(held) not in self.seen:
            # What cannot change is opened in every place that holds it, since each place gets a new one.
            if not isinstance(held, (tuple, frozenset, types.MethodType, weakref.ref)):
                self.seen.add(id(held))
            self._open(held, place)

    def _open(self, held: Any, place: _Place) -> None:
        if _is_foreign(type(held)):
            return
        open_one = _opener(type(held))
        if open_one is not None:
            self._queue(open_one(held, place))
        elif _attributes(held) is None and not _slots(type(held)):
            self._queue(_Opaque(place, found) for found in gc.get_referents(held))
        self._open_attributes(held, place)

    def _open_attributes(self, held: Any, place: _Place) -> None:
        attributes = _attributes(held)
        if attributes is not None:
            self.seen.add(id(attributes))
            skipped = (*_SKIPPED, *_REGISTERED) if isinstance(place, _Module) else _SKIPPED
            self._queue(_Item(place, attributes, name, f".{name}") for name in attributes if name not in skipped)
        self._queue(_Attribute(place, held, name) for name in _slots(type(held)))

    def _queue(self, places: Any) -> None:
        self.todo.extend(place for place in places if not _is_atom(type(place.get())))


def _once_per_type(function: Callable[[type], Answer]) -> Callable[[type], Answer]:
    """Remember what follows from a type alone."""
    return functools.lru_cache(maxsize=4096)(function)


# Asked of the type alone, and once: isinstance of so many classes, some with checks of their own, would take most of
# the walk. Proxies pass for what they stand for, their type does not.
@_once_per_type
def _is_atom(kind: type) -> bool:
    return issubclass(kind, _ATOMS) and kind not in _PROXIES


@_once_per_type
def _is_foreign(kind: type) -> bool:
    return kind.__module__.startswith(_FOREIGN) and not issubclass(kind, nn.Module)


@_once_per_type
def _opener(kind: type) -> Callable[[Any, _Place], Iterator[_Place]] | None:
    return next((open_one for base, open_one in _OPENERS if issubclass(kind, base)), None)


def _attributes(held: Any) -> dict[str, Any] | None:
    try:
        attributes = held.__dict__
    except Exception:  # whatever a class of somebody else raises
        return None
    return attributes if isinstance(attributes, dict) else None


@_once_per_type
def _slots(kind: type) -> tuple[str, ...]:
    bases = [base for base in kind.__mro__ if base.__module__ not in ("builtins", "collections", "functools")]
    slots = ((name, slot) for base in bases for name, slot in vars(base).items())
    return tuple(name for name, slot in slots if isinstance(slot, types.MemberDescriptorType))


# -- places ------------------------------------------------------------------------------------------------------


class _Place:
    """Holds one object, and can hold another in its stead.

    ``can_hold`` tells whether ``put`` would work; ``put`` notes what undoes it.
    """

    up: _Place

    def get(self) -> Any:
        raise NotImplementedError

    def put(self, value: Any, undo: Undo) -> None:
        raise NotImplementedError

    def can_hold(self, value_type: type) -> bool:
        return True

    def changes(self) -> int:
        """The id of what is changed by ``put``; 0 where that is nothing."""
        return 0

    def is_key(self) -> bool:
        """Whether a change here changes the keys by which other places find what they hold."""
        return False

    def path(self) -> str:
        return self.up.path() + self.label()

    def label(self) -> str:
        return ""


@dataclass(eq=False)
class _Module(_Place):
    """A registered module: where paths begin."""

    name: str
    module: nn.Module

    def get(self) -> Any:
        return self.module

    def path(self) -> str:
        return self.name or "the model"


@dataclass(eq=False)
class _InHolder(_Place):
    """A place in an object that can change."""

    up: _Place
    holder: Any

    def changes(self) -> int:
        return id(self.holder)


@dataclass(eq=False)
class _Item(_InHolder):
    """An entry of a dict (also that of an object's attributes), a list or a deque."""

    key: Any
    shown: str = ""

    def get(self) -> Any:
        try:
            return self.holder[self.key]
        except Exception:  # a dict subclass with ways of its own
            return None

    def put(self, value: Any, undo: Undo) -> None:
        old = self.holder[self.key]
        undo.append(lambda: self.holder.__setitem__(self.key, old))
        self.holder[self.key] = value

    def label(self) -> str:
        return self.shown or f"[{self.key!r:.40}]"


@dataclass(eq=False)
class _Attribute(_InHolder):
    """A slot, or an attribute of a function."""

    name: str

    def get(self) -> Any:
        return getattr(self.holder, self.name, None)

    def put(self, value: Any, undo: Undo) -> None:
        old = getattr(self.holder, self.name)
        undo.append(lambda: object.__setattr__(self.holder, self.name, old))
        object.__setattr__(self.holder, self.name, value)

    def label(self) -> str:
        return f".{self.name}"


@dataclass(eq=False)
class _Member(_InHolder):
    """A member of a set, or a key of a dict."""

    held: Any

    def get(self) -> Any:
        return self.held

    def put(self, value: Any, undo: Undo) -> None:
        before = list(self.holder.items() if isinstance(self.holder, dict) else self.holder)
        undo.append(lambda: self._fill(before))
        changed = [self._with(entry, value) for entry in before]
        self._fill(changed)

    def _with(self, entry: Any, value: Any) -> Any:
        if isinstance(self.holder, dict):
            return (value if entry[0] is self.held else entry[0], entry[1])
        return value if entry is self.held else entry

    def is_key(self) -> bool:
        return True

    def _fill(self, entries: list[Any]) -> None:
        self.holder.clear()
        self.holder.update(entries)

    def label(self) -> str:
        return f"{{{type(self.held).__name__}}}"


@dataclass(eq=False)
class _Cell(_InHolder):
    """A variable that a function closes over."""

    cell: types.CellType
    name: str

    def get(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not bound yet
            return None

    def put(self, value: Any, undo: Undo) -> None:
        old = self.cell.cell_contents
        undo.append(lambda: setattr(self.cell, "cell_contents", old))
        self.cell.cell_contents = value

    def changes(self) -> int:
        return id(self.cell)

    def label(self) -> str:
        return f" (closure over {self.name})"


@dataclass(eq=False)
class _Inside(_Place):
    """A part of something that cannot change: the place that holds it gets a new one, made with ``rebuild``."""

    up: _Place
    part: Any
    rebuild: Callable[[Any, Any], Any]  # what is held there now, the new part
    shown: str = ""
    rebuildable: bool = True

    def get(self) -> Any:
        return self.part

    def put(self, value: Any, undo: Undo) -> None:
        self.up.put(self.rebuild(self.up.get(), value), undo)
        self.part = value  # its own parts are rebuilt from this

    def can_hold(self, value_type: type) -> bool:
        return self.rebuildable and self.up.can_hold(type(self.up.get()))

    def changes(self) -> int:
        return self.up.changes()

    def is_key(self) -> bool:
        return self.up.is_key()

    def label(self) -> str:
        return self.shown


@dataclass(eq=False)
class _Method(_Inside):
    """The object that a bound method belongs to."""

    def can_hold(self, value_type: type) -> bool:
        name = self.up.get().__func__.__name__
        return (not self.is_own(name) or hasattr(value_type, name)) and super().can_hold(value_type)

    def is_own(self, name: str) -> bool:
        """Whether this is the method of that name of the object's class."""
        return getattr(type(self.part), name, None) is self.up.get().__func__


@dataclass(eq=False)
class _PartialState(_InHolder):
    """Function, arguments, keywords and attributes of a ``functools.partial``, as one tuple."""

    def get(self) -> Any:
        return self.holder.__reduce__()[2]

    def put(self, value: Any, undo: Undo) -> None:
        old = self.get()
        undo.append(lambda: self.holder.__setstate__(old))
        self.holder.__setstate__(value)


@dataclass(eq=False)
class _Opaque(_Place):
    """Something inside an object that shows no place for it, such as an iterator."""

    up: _Place
    held: Any

    def get(self) -> Any:
        return self.held

    def can_hold(self, value_type: type) -> bool:
        return False

    def label(self) -> str:
        return f" (inside {type(self.up.get()).__name__})"


# -- what holds objects, and its places ----------------------------------------------------------------------------


def _in_dict(held: Any, place: _Place) -> Iterator[_Place]:
    yield from (_Item(place, held, key) for key in list(held))
    yield from (_Member(place, held, key) for key in list(held))


def _in_list(held: Any, place: _Place) -> Iterator[_Place]:
    return (_Item(place, held, k) for k, entry in enumerate(held) if not _is_atom(type(entry)))


def _in_set(held: Any, place: _Place) -> Iterator[_Place]:
    return (_Member(place, held, entry) for entry in list(held))


def _in_tuple(held: Any, place: _Place) -> Iterator[_Place]:
    plain = type(held) is tuple or hasattr(held, "_make")

    def with_part(k: int) -> Callable[[Any, Any], Any]:
        def rebuild(now: Any, part: Any) -> Any:
            parts = [*now[:k], part, *now[k + 1 :]]
            return now._make(parts) if hasattr(now, "_make") else tuple(parts)

        return rebuild

    return (_Inside(place, part, with_part(k), f"[{k}]", plain) for k, part in enumerate(held))


def _in_frozenset(held: Any, place: _Place) -> Iterator[_Place]:
    def without(old: Any) -> Callable[[Any, Any], Any]:
        return lambda now, part: frozenset([*(entry for entry in now if entry is not old), part])

    return (_Inside(place, part, without(part), "{..}", type(held) is frozenset) for part in held)


def _in_method(held: Any, place: _Place) -> Iterator[_Place]:
    def rebind(now: Any, part: Any) -> Any:
        name = now.__func__.__name__
        own = getattr(type(now.__self__), name, None) is now.__func__
        return types.MethodType(getattr(type(part), name) if own else now.__func__, part)

    name = f" (the method {getattr(held.__func__, '__name__', '?')})"
    yield _Method(place, held.__self__, rebind, name)
    yield _Inside(place, held.__func__, lambda now, part: types.MethodType(part, now.__self__))


def _in_weakref(held: Any, place: _Place) -> Iterator[_Place]:
    plain = type(held) in (weakref.ref, weakref.KeyedRef)

    def renew(now: Any, part: Any) -> Any:
        if isinstance(now, weakref.KeyedRef):
            return weakref.KeyedRef(part, now.__callback__, now.key)
        return weakref.ref(part, now.__callback__)

    yield _Inside(place, held(), renew, " (weak)", plain)


def _in_proxy(held: Any, place: _Place) -> Iterator[_Place]:
    try:
        target = held.forward.__self__
    except (AttributeError, ReferenceError):  # of something else, or of nothing any more
        return
    yield _Inside(place, target, lambda now, part: weakref.proxy(part), " (weak)")


def _is_proxy(held: Any) -> bool:
    return type(held) in _PROXIES


def _in_partial(held: Any, place: _Place) -> Iterator[_Place]:
    state = _PartialState(place, held)
    yield from _in_tuple(state.get()[:2], state)
    yield from (_Item(place, held.keywords, key) for key in held.keywords)


def _in_function(held: Any, place: _Place) -> Iterator[_Place]:
    cells = zip(held.__closure__ or (), held.__code__.co_freevars, strict=True)
    yield from (_Cell(place, held, cell, name) for cell, name in cells)
    yield _Attribute(place, held, "__defaults__")
    yield _Attribute(place, held, "__kwdefaults__")
    for name in _global_names(held.__code__):
        value = held.__globals__.get(name)
        if isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module):
            yield _Inside(place, value, partial(_with_global, name), f" (the global {name})")


def _global_names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_global_names, inner))


def _with_global(name: str, function: types.FunctionType, value: Any) -> types.FunctionType:
    """The function with another value for one of its globals; the module that it came from keeps its own."""
    space = function.__globals__
    known, base = (dict(space), space.base) if isinstance(space, _Namespace) else ({}, space)
    own = _Namespace({"__builtins__": base.get("__builtins__"), **known, name: value}, base)
    made = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__, made.__qualname__, made.__doc__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__doc__,
    )
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    vars(made).update(vars(function))
    return made


class _Namespace(dict[str, Any]):
    """A few global names over those of a module, which are read when they are needed."""

    def __init__(self, own: dict[str, Any], base: dict[str, Any]) -> None:
        super().__init__(own)
        self.base = base

    def __missing__(self, name: str) -> Any:
        return self.base[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self or name in self.base else default


_OPENERS: tuple[tuple[Any, Callable[[Any, _Place], Iterator[_Place]]], ...] = (
    (dict, _in_dict),
    ((list, deque), _in_list),
    (set, _in_set),
    (tuple, _in_tuple),
    (frozenset, _in_frozenset),
    (types.MethodType, _in_method),
    (functools.partial, _in_partial),
    (types.FunctionType, _in_function),
    (weakref.ref, _in_weakref),
)
