"""A model and its smaller copy run side by side, part by part: what a layer was given then and is given now.

Models are often a chain of blocks of one kind. Where one block is given what the block before returned, only the block
at hand is run, on inputs that the block before left; else the whole model is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.layers import part_of
from tensortrain.system.processes import first_of

__all__ = ["Part", "Run", "Streams", "find_chain"]

Run = Callable[[nn.Module, Any], Any]  # (model, batch) -> outputs
_Place = int | str  # of an argument: its number or its name


@dataclass
class _Call:
    """How a block is called; the argument at ``place`` is what the block before returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: _Place

    def __call__(self, block: nn.Module, x: Tensor) -> Any:
        if isinstance(self.place, int):
            args = (*self.args[: self.place], x, *self.args[self.place + 1 :])
            return block(*args, **self.kwargs)
        return block(*self.args, **{**self.kwargs, self.place: x})

    def without_state(self) -> _Call:
        """The same call without what may remember earlier ones, such as a cache of keys and values."""
        args = tuple(x if k == self.place or _is_plain(x) else None for k, x in enumerate(self.args))
        kwargs = {name: x if name == self.place or _is_plain(x) else None for name, x in self.kwargs.items()}
        return _Call(args, kwargs, self.place)

    def input(self) -> Tensor:
        """What the block before returned."""
        found: Tensor = self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]
        return found

    def taken_out(self) -> Tensor:
        """The input itself, which is then held no longer."""
        found = self.input()
        if isinstance(self.place, int):
            self.args = (*self.args[: self.place], None, *self.args[self.place + 1 :])
        else:
            self.kwargs = {**self.kwargs, self.place: None}
        return found


def main_output(output: Any) -> Any:
    """What a block hands on: its output, or the first part of it."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


@dataclass(frozen=True)
class Part:
    """A part of both models, and how to run it on every batch.

    Attributes:
        name: Of the block; ``""`` is the whole model.
        run_original, run_small: ``run(k)`` runs the part on batch k; a layer in it can be listened to meanwhile.
    """

    name: str
    run_original: Callable[[int], Any]
    run_small: Callable[[int], Any]


@dataclass
class Streams:
    """Both models on some batches, from the front to the back.

    Attributes:
        chain: Names of the blocks, in order; none where the model is no chain.
    """

    original: nn.Module
    small: nn.Module
    batches: Sequence[Any]
    run: Run
    chain: Sequence[str] = ()
    _calls: dict[int, list[list[_Call]]] = field(default_factory=dict)  # by model, block and batch
    _values: dict[int, list[Tensor]] = field(default_factory=dict)  # by model and batch: what the block is given
    _here: int = 0

    @classmethod
    def of(cls, original: nn.Module, small: nn.Module, batches: Sequence[Any], run: Run) -> Streams:
        """Find the chain; a few blocks of one batch show whether they can be run by themselves."""
        found = cls(original, small, batches, run)
        chain = find_chain(original, lambda: run(original, batches[0])) if batches else []
        nets = (original, small)
        if chain and all(part_of(small, name) is not None for name in chain):
            calls = [found._calls_on(net, chain, batches[0], check=True) for net in nets]
            found.chain = chain if all(one is not None for one in calls) else ()
        found.chain = first_of(found.chain)  # what comes is done chain link by chain link in all processes
        return found

    def part_of(self, layer: str) -> Part:
        """The part of the models that a layer lies in; the streams go on to it, for there is no way back."""
        block = next((k for k, name in enumerate(self.chain) if f"{layer}.".startswith(f"{name}.")), None)
        if block is None or block < self._here:
            return Part("", partial(self._whole, self.original), partial(self._whole, self.small))
        if not self._calls:  # now: what stands before the blocks may have been changed until now
            self._start()
        while self._here < block:
            self._step()
        return Part(self.chain[block], *(self._runner(net) for net in (self.original, self.small)))

    def _whole(self, net: nn.Module, k: int) -> Any:
        return self.run(net, self.batches[k])

    def _runner(self, net: nn.Module) -> Callable[[int], Any]:
        block, calls = net.get_submodule(self.chain[self._here]), self._calls[id(net)][self._here]
        # A copy, since blocks may write to what they are given.
        return lambda k: main_output(calls[k](block, self._values[id(net)][k].clone()))

    def _step(self) -> None:
        """Both streams one block further."""
        for net in (self.original, self.small):
            run = self._runner(net)
            self._values[id(net)] = [run(k) for k in range(len(self.batches))]
        self._here += 1

    def _start(self) -> None:
        """Note how the blocks are called on every batch, and what the first one is given."""
        for net in (self.original, self.small):
            calls: list[list[_Call]] = [[] for _ in self.chain]
            given = []
            for batch in self.batches:
                found = self._calls_on(net, self.chain, batch)
                if found is None:
                    raise RuntimeError("blocks were called one after another on the first batch, and are not on all")
                values = [call.taken_out() for call in found]  # of later blocks they come from the blocks before
                given.append(values[0])
                for k, call in enumerate(found):
                    calls[k].append(call)
            self._calls[id(net)], self._values[id(net)] = calls, given

    def _calls_on(self, net: nn.Module, chain: Sequence[str], batch: Any, *, check: bool = False) -> list[_Call] | None:
        """How the blocks are called on a batch; None where they are no chain there.

        Args:
            check: Whether each is run by itself, to see that it gives the same.
        """
        seen = _watched(net, chain, partial(self.run, net, batch))
        places = _places(seen, chain)
        if places is None:
            return None
        calls = []
        for place, name in zip(places, chain, strict=True):
            args, kwargs, output = seen[name][0]
            call = _Call(args, kwargs, place).without_state()
            if check and not _gives(call, net.get_submodule(name), main_output(output)):
                return None
            calls.append(call)
        return calls


def _is_plain(value: Any) -> bool:
    """Whether an argument is the same at every call: a tensor, a number, or a tuple of some."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _gives(call: _Call, block: nn.Module, output: Any) -> bool:
    """Whether a block gives what it gave in the model when it is called by itself."""
    try:
        again = main_output(call(block, call.input().clone()))
    except Exception:  # it needs what was left out
        return False
    return isinstance(again, Tensor) and again.shape == output.shape and torch.allclose(again, output, equal_nan=True)


_Seen = dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]]


def _watched(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> _Seen:
    """Arguments and outputs of some modules in one run of the model."""
    seen: _Seen = {name: [] for name in names}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[name].append((args, kwargs, output))

        return hook

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
            stack.callback(handle.remove)
        run()
    return seen


def _places(seen: _Seen, chain: Sequence[str]) -> list[_Place] | None:
    """Where every block is given what the one before returned; None where the blocks are no chain."""
    if any(len(seen[name]) != 1 for name in chain):
        return None
    places: list[_Place] = []
    for before, name in itertools.pairwise(chain):
        given = main_output(seen[before][0][2])
        args, kwargs, _ = seen[name][0]
        keys: list[tuple[_Place, Any]] = [*enumerate(args), *kwargs.items()]
        place = next((key for key, value in keys if value is given), None)
        if place is None or not isinstance(given, Tensor):
            return None
        places.append(place)
    args, kwargs, _ = seen[chain[0]][0]
    first = places[0]
    value = args[first] if isinstance(first, int) and first < len(args) else kwargs.get(str(first))
    return [first, *places] if isinstance(value, Tensor) else None


@torch.no_grad()
def find_chain(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """The blocks of a model: children of the container that holds most of it, each given what the last one returned.

    Args:
        run: Runs the model on one batch.
    """
    containers = [
        (name, one) for name, one in model.named_modules() if isinstance(one, (nn.ModuleList, nn.Sequential)) and one
    ]
    containers = [(name, one) for name, one in containers if len(one) > 1 and (name or isinstance(one, nn.Sequential))]
    containers.sort(key=lambda pair: -sum(p.numel() for p in pair[1].parameters()))
    children = {name: [f"{name}.{k}" if name else k for k, _ in one.named_children()] for name, one in containers}
    seen = _watched(model, [child for names in children.values() for child in names], run)
    for names in children.values():
        if any(True for name in names for _ in model.get_submodule(name).parameters()) and _places(seen, names):
            return names
    return []
