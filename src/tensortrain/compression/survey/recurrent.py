"""Hidden units of recurrent layers: who reads them, found by how numbers flow.

A unit of a layer is made by all gates of both maps, and read by the hidden map of its own layer, by the input maps of
the layer above, and, from the last layer, by other layers of the model. If these readers see unit j in channel j and
nothing else sees it, units can be taken out of all of them together. What gets the final state (of cells, or of lower
layers) is code that expects its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tensortrain.compression.survey.hidden import Run, Trace, channel_axis, some_channels, traced
from tensortrain.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["RecurrentUnits", "find_recurrent_units"]

_KINDS = (GRU, LSTM, RNN)
_CELLS = (GRUCell, LSTMCell, RNNCell)


@dataclass(frozen=True)
class RecurrentUnits:
    """Hidden units of a recurrent layer, all layers and directions of which keep equally many.

    Attributes:
        layer: Its name.
        readers: Names of the layers that read the outputs of its last layer.
        n_units: Of one direction of one layer.
        n_layers, n_directions: Of the recurrent layer.
    """

    layer: str
    readers: tuple[str, ...]
    n_units: int
    n_layers: int
    n_directions: int

    def cells(self, index: int) -> tuple[str, ...]:
        """Names of the cells of one layer, by direction."""
        return tuple(f"{self.layer}.l{index}{end}" for end in ("", "_reverse")[: self.n_directions])

    @property
    def all_cells(self) -> tuple[str, ...]:
        """Names of all cells, layer by layer."""
        return tuple(name for index in range(self.n_layers) for name in self.cells(index))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the maps and of the readers."""
        maps = tuple(f"{cell}.{part}" for cell in self.all_cells for part in ("ih", "hh"))
        return (*maps, *self.readers)

    @property
    def reader(self) -> str:
        """The first map, where what becomes of all of them is told."""
        return self.names[0]

    def readers_of(self, index: int) -> tuple[str, ...]:
        """Names of the layers that read all directions of one layer."""
        if index == self.n_layers - 1:
            return self.readers
        return tuple(f"{cell}.ih" for cell in self.cells(index + 1))


def find_recurrent_units(
    model: nn.Module, run: Run, *, training: bool = False, notes: list[str] | None = None
) -> list[RecurrentUnits]:
    """Recurrent layers of a model (taken apart) whose hidden units can be narrowed, as far as gradients tell.

    Args:
        notes: Takes in why the others are left alone.

    Args, Cost: as ``find_hidden_units``; four backward passes for each recurrent layer.
    """
    seen = {name: _Seen(part) for name, part in model.named_modules() if name and type(part) in _KINDS}
    notes = [] if notes is None else notes
    for name, part in model.named_modules():
        if type(part) in _CELLS and name.rpartition(".")[0] not in seen:
            _note(notes, name, "the state of a cell is made and kept by other code")
    with ExitStack() as stack:
        for one in seen.values():
            stack.callback(one.layer.register_forward_hook(one.cut, with_kwargs=True).remove)
        with traced(model, run, training=training) as trace:
            found = []
            for name, one in seen.items():
                units = _units_of(trace, name, one)
                if isinstance(units, RecurrentUnits):
                    found.append(units)
                else:
                    _note(notes, name, units)
            return found


def _note(notes: list[str], name: str, why: str) -> None:
    """Say why a layer is left alone, once."""
    note = f"The hidden units of {name!r} are left as they are: {why}."
    if note not in notes:
        notes.append(note)


@dataclass
class _Seen:
    """The outputs of a recurrent layer, as leaves, so that every dependence ends there."""

    layer: Any
    n_calls: int = 0
    is_given: bool = False
    leaves: list[Tensor] = field(default_factory=list)  # outputs, then the final states

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.n_calls += 1
        self.is_given |= any(x is not None for x in (*args[1:], kwargs.get("hx")))
        y, states = output
        many = isinstance(states, tuple)
        packed = isinstance(y, PackedSequence)
        leaves = [x.detach().requires_grad_() for x in (y.data if packed else y, *(states if many else (states,)))]
        if self.n_calls == 1:
            self.leaves = leaves
        first, *rest = (leaf.clone() for leaf in leaves)
        again = PackedSequence(first, *y[1:]) if packed else first
        return again, tuple(rest) if many else rest[0]


def _units_of(trace: Trace, name: str, seen: _Seen) -> RecurrentUnits | str:
    """The units of a recurrent layer, or why they stay."""
    layer = seen.layer
    why = _why_not_at_all(seen)
    if why:
        return why
    if _reaches(seen, [x for x in trace.ends if x.requires_grad], range(len(seen.leaves))):
        return "what it gives is an output of the model, or goes into code that is no layer"
    inputs = {reader: x for reader, x in trace.inputs.items() if x.requires_grad}
    if _reaches_lower(seen, list(inputs.values())):
        return "its final state is given to other code"
    readers = tuple(reader for reader, x in inputs.items() if _reaches(seen, [x], (0, 1)))
    if not readers:
        return "no layer reads it"
    if not all(_reads_plainly(trace, reader, seen) for reader in readers):
        return f"{', '.join(readers)} reads its units otherwise than one by one"
    return RecurrentUnits(name, readers, layer.hidden_size, layer.num_layers, 1 + layer.bidirectional)


def _why_not_at_all(seen: _Seen) -> str:
    if seen.n_calls != 1:
        return "it is never called" if not seen.n_calls else "it is called more than once"
    if seen.layer.proj_size:
        return "its outputs are projected"
    if not all(type(one) is nn.Linear for _, one in seen.layer.named_maps()):
        return "some of its maps are compressed already"
    return "its first state is given by other code" if seen.is_given else ""


def _grads(seen: _Seen, tensors: Sequence[Tensor], some: Tensor | None = None, axis: int = -1) -> list[Tensor]:
    """Gradients of the leaves, zeros where there are none."""
    chosen = [x if some is None else x.movedim(axis, -1)[..., some] for x in tensors if x.is_floating_point()]
    if not chosen:
        return [torch.zeros_like(leaf) for leaf in seen.leaves]
    total = torch.stack([(x * (torch.rand_like(x) + 0.5)).sum() for x in chosen]).sum()
    grads = torch.autograd.grad(total, seen.leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, seen.leaves, strict=True)]


def _reaches(seen: _Seen, tensors: Sequence[Tensor], places: Sequence[int]) -> bool:
    return any(bool(_grads(seen, [x])[k].any()) for x in tensors for k in places)


def _reaches_lower(seen: _Seen, tensors: Sequence[Tensor]) -> bool:
    """Whether something depends on the state of cells, or on the outputs of lower layers at their end."""
    grads = _grads(seen, tensors)
    n = 1 + seen.layer.bidirectional
    return bool(grads[1][:-n].any()) or any(bool(g.any()) for g in grads[2:])


def _reads_plainly(trace: Trace, reader: str, seen: _Seen) -> bool:
    """Whether channel j of a layer's input is unit j of the last layer's outputs, or of its final state."""
    x, axis, n = trace.inputs[reader], channel_axis(trace.parts[reader]), seen.leaves[0].shape[-1]
    if reader in trace.twice or x.shape[axis] != n or trace.between(x) != []:
        return False
    some = some_channels(n, x.device)
    return all(_stay_apart(seen, x, axis, half) for half in (some, ~some))


def _stay_apart(seen: _Seen, x: Tensor, axis: int, some: Tensor) -> bool:
    y, h, *_ = _grads(seen, [x], some, axis)
    n = 1 + seen.layer.bidirectional
    last = h[-n:].movedim(0, -2).flatten(-2)  # directions side by side, as in the outputs
    return not any(bool(g[..., ~some].any()) for g in (y, last))
