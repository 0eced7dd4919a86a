"""Recurrent layers with factorized maps: ``torch.nn.RNN``, ``GRU`` and ``LSTM`` over cells of our own.

The input map of a layer runs once, on all time steps together; the hidden map is made ready once and then
applied at every step. Where both run dense anyway, or torch's own kernel on dense weights is faster, it does the whole
sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence

from tensortrain.contract.grouped import can_group
from tensortrain.errors import DTypeError, ShapeError
from tensortrain.formats import Rank
from tensortrain.nn.base import Init
from tensortrain.nn.composite import CompositeLayer, CompositePlan, plan_map, weight_of
from tensortrain.nn.inputs import check_plain_layout, traceable
from tensortrain.nn.recurrent.cells import (
    Cell,
    GRUCell,
    LSTMCell,
    RNNCell,
    State,
    check_sizes,
    check_state,
    may_be_quick,
    remembered,
    torch_arguments,
    torch_weights,
)
from tensortrain.nn.recurrent.maps import MapOptions
from tensortrain.nn.recurrent.quick import keep_directions, keep_weights
from tensortrain.nn.recurrent.sequences import Direction, Spread, direction_of, serves
from tensortrain.nn.recurrent.ways import DENSE_STEPS, KERNEL, STEPS, differentiable_twice, fastest_way, ways_of
from tensortrain.system.native import library
from tensortrain.system.tracing import is_traced, is_transformed, sizes_of

__all__ = ["GRU", "LSTM", "RNN"]

Self = TypeVar("Self", bound="_Recurrent")


@dataclass(frozen=True)
class _Layout:
    """How time steps lie in a tensor: along an axis, or packed one after the other.

    Args:
        batch: Rows of the largest step.
        n_steps: Time steps.
        axis: Of time, in a padded ``(.., .., features)``.
        batch_sizes: Rows of every step in a packed ``(rows, features)``; None for a padded tensor.
    """

    batch: int
    n_steps: int
    axis: int = 0
    batch_sizes: Tensor | None = None

    def split(self, x: Tensor) -> Sequence[Tensor]:
        # unbind, since indexing would fill a whole sequence of zeros at every step of the backward pass
        return x.unbind(self.axis) if self.batch_sizes is None else x.split(self.batch_sizes.tolist())

    def first(self, x: Tensor, n_steps: int) -> tuple[Tensor, None, _Layout]:
        """The first steps of a sequence alone, without a state."""
        if n_steps >= self.n_steps:
            return x, None, self
        if self.batch_sizes is None:
            return x.narrow(self.axis, 0, n_steps), None, replace(self, n_steps=n_steps)
        some = self.batch_sizes[:n_steps]
        return x[: int(some.sum())], None, replace(self, n_steps=n_steps, batch_sizes=some)

    def spread(self) -> Spread:
        return Spread(self.n_steps, self.batch, self.axis == 0, self.batch_sizes)

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(steps), self.axis) if self.batch_sizes is None else torch.cat(list(steps))


class _Recurrent(CompositeLayer):
    cell_type: ClassVar[type[Cell]]
    proj_size: int = 0
    _short_way: Any = None  # of the kernels, for sizes met before; see quick.py
    _short_way_guard: Mapping[str, Any] | None = None
    # Without kernels: sizes and settings at which torch's kernel did all layers.
    _quick: frozenset[Any] = frozenset()
    torch_arguments: ClassVar[tuple[str, ...]] = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        cell_options: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        maps = MapOptions(**options)
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout = _check_dropout(dropout, num_layers)
        n_directions, proj_size = 1 + bidirectional, cell_options.get("proj_size", 0)
        for index in range(num_layers):
            below = input_size if index == 0 else n_directions * (proj_size or hidden_size)
            here = vars(maps.for_layer(index, n_directions, proj_size))
            for name in self._cell_names(index):
                self.add_module(name, self.cell_type(below, hidden_size, bias, **cell_options, **here))

    def reset_parameters(self, init: Init = "match", generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew; ``init`` is the variance of the factorized weights, as in ``Linear``."""
        for cell in self.cells().values():
            cell.reset_parameters(init, generator)

    def flatten_parameters(self) -> None:
        """Nothing to do: there is no flat copy of the weights. Here because code written for torch calls it."""

    # -- the cells -----------------------------------------------------------------------------------

    def _cell_names(self, index: int) -> tuple[str, ...]:
        return (f"l{index}", f"l{index}_reverse") if self.bidirectional else (f"l{index}",)

    def cells(self) -> dict[str, Cell]:
        """The cells by name: ``l0``, ``l0_reverse``, ``l1``, .., as torch ends its parameters' names."""
        names = [name for index in range(self.num_layers) for name in self._cell_names(index)]
        return {name: self.get_submodule(name) for name in names}  # type: ignore[misc]

    def _cell_list(self) -> list[Cell]:
        """The same in order, past a module's longer way to its children."""
        known: Any = self._modules
        return [known[name] for index in range(self.num_layers) for name in self._cell_names(index)]

    @property
    def _first(self) -> Cell:
        return self.get_submodule("l0")  # type: ignore[return-value]

    def plan(self, batch: int = 1, seq_len: int = 1) -> CompositePlan:
        """How every map runs on sequences of this batch and length: print it.

        Input maps are called once on all steps, hidden maps once per step.
        """
        plans = []
        for name, one in self.named_maps():
            once = name.endswith(".ih")
            plans.append(plan_map(name, one, batch * seq_len if once else batch, 1 if once else seq_len))
        return CompositePlan(tuple(plans))

    # -- forward -------------------------------------------------------------------------------------

    def _forward(self, x: Tensor | PackedSequence, state: State | None) -> tuple[Any, State]:
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, state)
        self._check_input(x, (2, 3))
        batch_axis = 0 if self.batch_first else 1
        batched = x if x.ndim == 3 else x.unsqueeze(batch_axis)
        if x.ndim == 2 and state is not None:
            self._check_states(state, ())
            state = tuple(s.unsqueeze(1) for s in state)
        layout = _Layout(batched.shape[batch_axis], sizes_of(batched)[1 - batch_axis], 1 - batch_axis)
        output, final = self._run(batched, state, layout)
        if x.ndim == 2:
            return output.squeeze(batch_axis), tuple(s.squeeze(1) for s in final)
        return output, final

    def _forward_packed(self, x: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = x
        self._check_input(data, (2,))
        if state is not None and sorted_indices is not None:
            self._check_states(state, (int(batch_sizes[0]),))
            state = tuple(s.index_select(1, sorted_indices) for s in state)
        counts = batch_sizes.clone(memory_format=torch.contiguous_format)  # the way back reads them too
        layout = _Layout(int(counts[0]), len(counts), batch_sizes=counts)
        output, final = self._run(data, state, layout)
        if unsorted_indices is not None:
            final = tuple(s.index_select(1, unsorted_indices) for s in final)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), final

    def _run(self, x: Tensor, state: State | None, layout: _Layout) -> tuple[Tensor, State]:
        """All layers, batched; states ``(n_layers * n_directions, b, size)``."""
        if layout.n_steps == 0:
            raise ShapeError(
                f"a sequence must have at least one time step: found an input of shape {tuple(x.shape)}. "
                "Drop empty sequences."
            )
        if state is not None:
            batch = layout.batch if layout.batch_sizes is not None else sizes_of(x)[1 - layout.axis]
            self._check_states(state, (batch,))
        n_directions, finals, given, ways = 1 + self.bidirectional, [], x, list[str]()
        for index in range(self.num_layers):
            cells: Any = [self.get_submodule(name) for name in self._cell_names(index)]
            here = None if state is None else tuple(s[index * n_directions :][:n_directions] for s in state)
            ways.append(self._way(cells, x, layout, ways))
            x, final = _run_by(ways[-1], cells, x, here, layout)
            finals.append(final)
            if self.dropout and index < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if layout.batch_sizes is None and can_group() and not (self.dropout and self.training):
            self._remember(ways, given, layout)
        return x, tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*finals, strict=True))

    def _remember(self, ways: list[str], x: Tensor, layout: _Layout) -> None:
        """Leave a short way to the next input of this size, where torch's kernel did all layers, or ours did."""
        cells, are_kernels = self._cell_list(), {way == KERNEL for way in ways}
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if trains and self._short_way is not None:
            self._short_way.forget()  # weights leave memory when training goes on
        if are_kernels == {True} and not trains:
            if library() is None:
                self._quick = remembered(self._quick, (tuple(x.shape), _settings(cells)))
            elif all(cell.output_size == cell.hidden_size for cell in cells):
                keep_weights(self, x, cells, self._guard(), self._names())
        elif len(are_kernels) == 1:
            n = 1 + self.bidirectional
            found = [_ready(way, cells[n * k : n * k + n], x, layout) for k, way in enumerate(ways)]
            if None not in found:
                directions = [one for layer in found for one in layer or ()]
                keep_directions(self, x, directions, self._guard(), self._names(), by_torch=are_kernels == {True})

    def _names(self) -> list[str]:
        return [name for index in range(self.num_layers) for name in self._cell_names(index)]

    def _guard(self) -> dict[str, Any]:
        """What of the layer a short way through it depends on."""
        names = ("input_size", "hidden_size", "num_layers", "batch_first", "bidirectional", "dropout")
        return {name: self.__dict__[name] for name in (*names, *(("training",) if self.dropout else ()))}

    def clear_cache(self) -> None:
        super().clear_cache()
        self._short_way = None

    def _shortly(self, x: Any, state: Any) -> Any:
        """What the layer returns, where an earlier call has left a short way to it; else None."""
        if self._short_way is not None:
            return self._short_way(self, x, state)
        found = self._quick_sequence(x, state)
        return found if found is None or len(found) == 2 else (found[0], found[1:])

    def _quick_sequence(self, x: Any, state: Any) -> Any:
        """All layers by torch's kernel, on weights that are kept: the short way at inference without our kernels."""
        if type(x) is not Tensor or x.ndim != 3 or not self._quick or not may_be_quick(x):
            return None
        cells = self._cell_list()
        if (self.dropout and self.training) or (tuple(x.shape), _settings(cells)) not in self._quick:
            return None
        states = self._quick_states(x, state)
        return None if states is None else self._by_kernel(x, states, cells)

    def _quick_states(self, x: Tensor, state: Any) -> tuple[Tensor, ...] | None:
        """The first states of all layers, if they are plain ones."""
        size = (self.num_layers * (1 + self.bidirectional), x.shape[1 - self.batch_first], self.hidden_size)
        n_states = self.cell_type.n_states
        if state is None:
            return (x.new_zeros(size),) * n_states
        parts = (state,) if n_states == 1 else tuple(state)
        if len(parts) != n_states:
            return None
        if any(type(part) is not Tensor or part.shape != size or part.dtype != x.dtype for part in parts):
            return None
        return parts

    def _by_kernel(self, x: Tensor, states: tuple[Tensor, ...], cells: list[Cell]) -> Any:
        weights: list[Tensor] = []
        for cell in cells:
            kept = cell.kept_weights()
            if kept is None or kept[0].dtype != x.dtype:
                return None
            weights += kept
        kernel: Any = getattr(torch, str(cells[0].kernel))
        first = states[0] if len(states) == 1 else states
        return kernel(x, first, weights, self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first)

    def _way(self, cells: list[Cell], x: Tensor, layout: _Layout, below: list[str]) -> str:
        """How one layer runs, in one or both directions, above others that ran in these ways."""
        # (under autocast on a CPU, oneDNN refuses an LSTM and a GRU comes out in float32)
        return STEPS if torch.is_autocast_enabled("cpu") else _way_of(cells, x, layout, below)

    # -- checks --------------------------------------------------------------------------------------

    def _check_input(self, x: Tensor, axes: tuple[int, ...]) -> None:
        kind = type(self).__name__
        check_plain_layout(x, kind)
        sizes = sizes_of(x)
        if len(sizes) not in axes or sizes[-1] != self.input_size:
            expected = "packed rows" if axes == (2,) else "(T, b, N), (b, T, N) with batch_first, or (T, N)"
            raise ShapeError(
                f"the input of {kind} must be {expected} with N = {self.input_size}: found {sizes}. "
                "Check the layer before."
            )
        dtype = next(self._first.hh.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise DTypeError(
                f"the input of {kind} must have the dtype of its parameters: found {x.dtype}, expected {dtype}. "
                f"Convert it with x.to({dtype})."
            )

    def _check_states(self, state: State, batch: tuple[int, ...]) -> None:
        n = self.num_layers * (1 + self.bidirectional)
        check_state(state, [(n, *batch, size) for size in self._first.state_sizes()], type(self).__name__)

    # -- to and from torch's layers ------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        cells = self.cells().items()
        return {f"{part}_{name}": tensor for name, cell in cells for part, tensor in cell._weights().items()}

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: Any,
        *,
        rank: Rank | None = None,
        eps: float | None = None,
        input_gram: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Approximate torch's layer; without ``rank`` and ``eps`` exact to dtype.

        Args:
            dense: The torch layer; it is not changed. Dtype, device, mode and ``requires_grad`` carry over.
            rank, eps: Caps on the ranks and relative tolerance, for every factorized map.
            input_gram: Second moment of the inputs, ``(N, N)`` or ``(N,)``, for the maps of the first layer.
            options: ``format``, ``compress``, ``in_modes``, ``out_modes``, ``implementation``.

        Raises:
            KindError: ``dense`` is of another kind.
            ShapeError, RankError, NonFiniteError: As for ``Linear.from_dense``.

        Source: TT-SVD: Oseledets 2011.
        """
        cls._check_dense_type(dense)
        with warnings.catch_warnings():  # torch has warned of a dropout without effect already
            warnings.simplefilter("ignore")
            build: Any = cls
            layer: Self = build(**torch_arguments(cls, dense), **options, rank=1, init=None, device="meta")
        for name, cell in layer.cells().items():
            gram = input_gram if name in layer._cell_names(0) else None
            cell.take(torch_weights(dense, f"_{name}"), rank=rank, eps=eps, input_gram=gram)
        return layer.train(dense.training)

    def to_dense(self) -> Any:
        """Torch's layer with the same weights.

        Raises:
            KindError: A GRU that resets before the hidden product, which torch does not have.
        """
        self._check_torch_has_it()
        weight = weight_of(self._first.hh)
        build: Any = self.dense_type
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dense = build(**torch_arguments(type(self), self), device=weight.device, dtype=weight.dtype)
        self._fill(dense)
        return dense

    def _check_torch_has_it(self) -> None:
        self._first.check_torch_has_it()

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        parts += ["bias=False"] if not self.bias else []
        parts += ["batch_first=True"] if self.batch_first else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["bidirectional=True"] if self.bidirectional else []
        return ", ".join([*parts, self._size_repr()])


def _settings(cells: Sequence[Cell]) -> tuple[Any, ...]:
    return tuple(setting for cell in cells for setting in cell.settings())


class _OneState(_Recurrent):
    """Base of the layers whose cells' output is their only state."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if not is_dynamo_compiling():
            found: tuple[Tensor, Tensor] | None = self._shortly(input, hx)
            if found is not None:
                return found
        return self._long_way(input, hx)

    @traceable
    def _long_way(self, x: Any, state: Tensor | None) -> tuple[Tensor | PackedSequence, Tensor]:
        output, (h,) = self._forward(x, None if state is None else (state,))
        return output, h


class RNN(_OneState):
    """``torch.nn.RNN`` with factorized maps; see ``GRU`` for the keywords and shapes."""

    dense_type = nn.RNN
    cell_type = RNNCell
    torch_arguments = (*_Recurrent.torch_arguments, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **options: Any,
    ) -> None:
        self.nonlinearity = nonlinearity
        mine = {"nonlinearity": nonlinearity}
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, mine, options)


class GRU(_OneState):
    r"""``torch.nn.GRU`` with factorized maps, all gates in one weight.

    The weight of all gates has the output modes ``(3 m_1, m_2, .., m_d)``: the gates are blocks of the first
    mode and share all cores but the first.

    Args:
        input_size .. bidirectional: As ``torch.nn.GRU``.
        reset_after: True as torch, False as published; see ``GRUCell``.
        format: Name of a weight format that serves linear maps.
        rank: Of every factorized map: number, tuple, share of its dense parameters, or ``"same"``.
        compress: ``"input"`` factorizes the maps of the inputs, ``"hidden"`` those of the hidden state,
            ``"both"`` both, ``"none"`` neither. The spectrum of the hidden map is the memory of the network; a small
            one is best left dense.
        in_modes: Factors of ``input_size``, for the first layer.
        out_modes: Factors of ``hidden_size``, that is, of one gate.
        init: Variance of the factorized weights: ``"match"`` (torch's), ``"glorot"``, ``"he"``, a number;
            None leaves everything unset.
        implementation: ``"auto"``, ``"factorized"`` or ``"dense"``, of every factorized map.
        device, dtype: As torch.

    Shapes: input ``(T, b, N)``, ``(b, T, N)`` with ``batch_first``, ``(T, N)``, or a ``PackedSequence``;
    output likewise with ``n_directions * hidden_size`` features; state ``(n_layers * n_directions, b, H)``.

    Raises:
        ShapeError: Sizes, modes or states that do not fit, an empty sequence.
        DTypeError: An input of another dtype than the parameters.

    Cost: input map once on ``T b`` rows; hidden map ``T`` times on ``b`` rows; see ``plan(batch, seq_len)``.
    Source: Yang, Krompass, Tresp, ICML 2017, arXiv:1707.01786; hidden maps: Tjandra et al., arXiv:1802.10410.

    Example:
        >>> layer = GRU(57600, 256, in_modes=(8, 20, 20, 18), out_modes=(4, 4, 4, 4), rank=(1, 4, 4, 4, 1))
        >>> layer.n_core_params, layer.n_params
        (3232, 201376)
    """

    dense_type = nn.GRU
    cell_type = GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        **options: Any,
    ) -> None:
        self.reset_after = reset_after
        mine = {"reset_after": reset_after}
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, mine, options)


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` with factorized maps; see ``GRU`` for the keywords and shapes.

    The projection of ``proj_size`` stays dense.

    Example:
        >>> layer = LSTM(57600, 256, in_modes=(8, 20, 20, 18), out_modes=(4, 4, 4, 4), rank=(1, 4, 4, 4, 1))
        >>> layer.n_core_params
        3360
    """

    dense_type = nn.LSTM
    cell_type = LSTMCell
    torch_arguments = (*_Recurrent.torch_arguments, "proj_size")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        **options: Any,
    ) -> None:
        self.proj_size = proj_size
        mine = {"proj_size": proj_size}
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, mine, options)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        if not is_dynamo_compiling():
            found: tuple[Tensor, tuple[Tensor, Tensor]] | None = self._shortly(input, hx)
            if found is not None:
                return found
        return self._long_way(input, hx)

    @traceable
    def _long_way(self, x: Any, state: Any) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        output, (h, c) = self._forward(x, state)
        return output, (h, c)

    def _check_torch_has_it(self) -> None:
        """Torch's LSTM has all that ours has."""

    def extra_repr(self) -> str:
        return super().extra_repr() + f", proj_size={self.proj_size}" * bool(self.proj_size)


def _scan(
    cell: Cell, steps: Sequence[Tensor], hidden: Sequence[Any], initial: State, *, reverse: bool
) -> tuple[list[Tensor], State]:
    """Run a cell over the time steps, whose number of rows may shrink (packed sequences are sorted).

    Returns:
        tuple: Outputs in order of time, and the state of every row after its own last step.
    """
    order = range(len(steps))[:: -1 if reverse else 1]
    state = tuple(s[: steps[order[0]].shape[0]] for s in initial)
    outputs: list[Tensor] = [steps[0]] * len(steps)
    ended: list[State] = []
    for t in order:
        rows, before = steps[t].shape[0], state[0].shape[0]
        if rows < before:  # forward in time, the shortest sequences end first
            ended.append(tuple(s[rows:] for s in state))
            state = tuple(s[:rows] for s in state)
        elif rows > before:  # backward in time, they start last
            state = tuple(torch.cat((s, first[before:rows])) for s, first in zip(state, initial, strict=True))
        state = cell.step(steps[t], state, *hidden)
        outputs[t] = state[0]
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return outputs, state


def _step_by_step(way: str, cells: list[Cell], x: Tensor, state: State | None, layout: _Layout) -> tuple[Tensor, State]:
    """One layer, its input map on all steps at once; states ``(n_directions, b, size)``."""
    directions = _ready(way, cells, x, layout)
    found = None if directions is None else _by_kernels(directions, x, state, layout)
    if found is not None:
        return found
    gates = [cell.ih(x) for cell in cells]
    return _scan_all(cells, gates, [cell.prepare(layout.batch) for cell in cells], state, layout)


def _ready(way: str, cells: Sequence[Cell], x: Tensor, layout: _Layout) -> list[Direction] | None:
    """All directions of one layer made ready for our kernels; None where they do not serve.

    In training of an LSTM they also make the weights for torch's kernel, and lead the gradients back.
    """
    by_torch = way == KERNEL
    if by_torch and not (torch.is_grad_enabled() and _is_fused_lstm(cells[0], x, layout)):
        return None
    if not all(serves(cell, x) for cell in cells):
        return None
    spread, dense = layout.spread(), way == DENSE_STEPS
    found = [direction_of(cell, spread, reverse=k == 1, dense=dense, by_torch=by_torch) for k, cell in enumerate(cells)]
    return None if None in found else found  # type: ignore[return-value]


def _by_kernels(
    directions: list[Direction], x: Tensor, state: State | None, layout: _Layout
) -> tuple[Tensor, State] | None:
    """One layer, each direction in one call of the kernels; None where they do not serve these tensors."""
    found = []
    for k, one in enumerate(directions):
        first = one.cell.zero_state(layout.batch, x) if state is None else tuple(s[k].to(x.dtype) for s in state)
        ran = one.run(x, first)
        if ran is None:
            return None
        found.append(ran)
    return _together([output for output, _ in found], [final for _, final in found])


def _together(outputs: list[Tensor], finals: list[State]) -> tuple[Tensor, State]:
    """Outputs and last states of all directions."""
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _scan_all(
    cells: Sequence[Cell], gates: Sequence[Tensor], hidden: Sequence[Any], state: State | None, layout: _Layout
) -> tuple[Tensor, State]:
    """All directions, step by step."""
    outputs, finals = [], []
    for direction, cell in enumerate(cells):
        here = gates[direction]
        if state is None:
            initial = cell.zero_state(layout.batch, here)
        else:
            initial = tuple(s[direction].to(here.dtype) for s in state)
        steps, final = _scan(cell, layout.split(here), hidden[direction], initial, reverse=direction == 1)
        outputs.append(layout.join(steps))
        finals.append(final)
    return _together(outputs, finals)


def _way_of(cells: list[Cell], x: Tensor, layout: _Layout, below: list[str]) -> str:
    if torch._C._get_tracing_state() is not None:  # a loop would be recorded for one length
        return KERNEL if all(cell.kernel is not None and not cell.is_watched() for cell in cells) else STEPS
    if is_traced() or is_transformed():  # torch's kernel has no rule for a batch of batches
        return STEPS
    rows = x.numel() // x.shape[-1]
    names = ways_of(cells, x, are_dense=all(cell.fits_kernel(rows, layout.batch) for cell in cells))
    if below:  # two kinds of kernels in turns keep waking each other's threads
        alike = [name for name in names if (name == KERNEL) == (below[0] == KERNEL)]
        names = alike or names
    if len(names) == 1:
        return names[0]
    return fastest_way(
        names,
        cells,
        x,
        layout.batch,
        layout.n_steps,
        lambda name, some, numbers, n: _repeated(name, some, *layout.first(numbers, n)),
    )


def _repeated(way: str, cells: list[Cell], x: Tensor, _: State | None, layout: _Layout) -> Callable[[], Tensor]:
    """The outputs of a layer, as a later call of the same size makes them by this way: by what lies ready."""
    ready = _ready(way, cells, x, layout)
    if ready is not None and all(one.input is not None for one in ready):
        run: Any = partial(_by_kernels, ready, x, None, layout)
        return lambda: run()[0]
    if way == KERNEL and not torch.is_grad_enabled():
        first, weights = cells[0], [weight for cell in cells for weight in cell._weights().values()]
        zeros = tuple(x.new_zeros(len(cells), layout.batch, size) for size in first.state_sizes())
        return lambda: _fused(cells, layout, x, *zeros, *weights)[0]
    return lambda: _run_by(way, cells, x, None, layout)[0]


def _run_by(way: str, cells: list[Cell], x: Tensor, state: State | None, layout: _Layout) -> tuple[Tensor, State]:
    if way == KERNEL:
        return _torch_kernel(cells, x, state, layout)
    return _step_by_step(way, cells, x, state, layout)


def _torch_kernel(cells: list[Cell], x: Tensor, state: State | None, layout: _Layout) -> tuple[Tensor, State]:
    """One layer by torch's own kernel, from dense weights; states ``(n_directions, b, size)``."""
    first, ready = cells[0], _ready(KERNEL, cells, x, layout)
    found = None if ready is None or None in [one.input for one in ready] else _by_kernels(ready, x, state, layout)
    if found is not None:
        return found
    weights = [weight for cell in cells for weight in cell._weights().values()]
    if state is None:
        state = tuple(x.new_zeros(len(cells), layout.batch, size) for size in first.state_sizes())
    tensors = (x, *state, *weights)
    fused = partial(_fused, cells, layout)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not (records and _is_fused_lstm(first, x, layout)):
        output, *final = fused(*tensors)
    else:
        output, *final = differentiable_twice(fused, partial(_recorded, cells, layout), *tensors)
    return output, tuple(final)


def _fused(cells: Sequence[Cell], layout: _Layout, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    first, n = cells[0], cells[0].n_states
    hx: Any = tensors[:n] if n > 1 else tensors[0]
    kernel: Callable[..., Any] = getattr(torch, str(first.kernel))
    settings = (tensors[n:], first.bias, 1, 0.0, first.training, len(cells) == 2)
    if layout.batch_sizes is None:
        return tuple(kernel(x, hx, *settings, layout.axis == 1))
    return tuple(kernel(x, layout.batch_sizes, hx, *settings))


def _is_fused_lstm(cell: Cell, x: Tensor, layout: _Layout) -> bool:
    """Whether torch would take oneDNN's kernel, whose gradients have none."""
    if cell.kernel != "lstm" or layout.batch_sizes is not None or cell.output_size != cell.hidden_size:
        return False
    return can_group() and x.is_cpu and x.dtype == torch.float32


def _recorded(cells: Sequence[Cell], layout: _Layout, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same by operations of torch, all of which have gradients of any order."""
    n, each = cells[0].n_states, 4 if cells[0].bias else 2
    gates, hidden = [], []
    for at in range(n, len(tensors), each):
        weight_ih, weight_hh, *biases = tensors[at : at + each]
        bias_ih, bias_hh = biases or (None, None)
        gates.append(F.linear(x, weight_ih, bias_ih))
        hidden.append((partial(F.linear, weight=weight_hh, bias=bias_hh),))
    output, final = _scan_all(cells, gates, hidden, tensors[:n], layout)
    return output, *final


def _check_dropout(dropout: float, num_layers: int) -> float:
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ShapeError(f"dropout must be a probability in [0, 1]: found {dropout!r}. Pass 0 for none.")
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"dropout acts between layers: found dropout={dropout} with num_layers=1, so it has no effect.",
            stacklevel=4,
        )
    return float(dropout)
