"""One time step of a recurrent network, with factorized maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tensortrain.contract.grouped import can_group
from tensortrain.errors import KindError, ShapeError
from tensortrain.formats import Rank
from tensortrain.nn.base import Init
from tensortrain.nn.composite import CompositeLayer, Map, is_watched, linear_of, weight_of
from tensortrain.nn.cores import are_plain, list_cores
from tensortrain.nn.cores import is_watched as is_called
from tensortrain.nn.inputs import check_plain_layout, is_plain_input, traceable
from tensortrain.nn.linear import Linear
from tensortrain.nn.recurrent.maps import Apply, MapOptions, blocks_of, dense_at, refill, repeated, reset_map
from tensortrain.nn.recurrent.quick import keep_directions
from tensortrain.nn.recurrent.sequences import Spread, direction_of, serves
from tensortrain.nn.recurrent.ways import fused_step_is_faster, may_take_kernel
from tensortrain.system.tracing import is_traced, sizes_of

__all__ = ["Cell", "GRUCell", "LSTMCell", "RNNCell"]

State = tuple[Tensor, ...]  # the output first: (h,) or (h, c)
Self = TypeVar("Self", bound="Cell")


class Cell(CompositeLayer):
    """Base of the cells: maps ``ih`` and ``hh`` to all gates at once, and a step that combines them.

    Attributes:
        ih: Map of the inputs, to ``n_gates * hidden_size`` numbers; bias as torch's ``bias_ih``.
        hh: Map of the hidden state; bias as torch's ``bias_hh``.
    """

    n_gates: ClassVar[int]
    n_states: ClassVar[int] = 1
    torch_arguments: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")

    ih: Map
    hh: Map
    _short_way: Any = None  # of the kernels, for sizes met before; see quick.py
    _short_way_guard: Mapping[str, Any] | None = None
    # Without kernels: rows and settings at which torch's function made a step of kept weights.
    _quick: frozenset[Any] = frozenset()

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **options: Any) -> None:
        super().__init__()
        maps = MapOptions(**options)
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.ih = maps.input_map(input_size, self.n_gates, hidden_size, bias)
        self.hh = maps.hidden_map(self.output_size, self.n_gates, hidden_size, bias)
        self._add_maps(maps)
        if maps.init is not None:
            self.reset_parameters(maps.init)

    def _add_maps(self, maps: MapOptions) -> None:
        """Add whatever maps the cell has besides."""

    def reset_parameters(self, init: Init = "match", generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew; ``init`` is the variance of the factorized weights, as in ``Linear``."""
        for _, one in self.named_maps():
            reset_map(one, self.hidden_size, init, generator)

    @property
    def output_size(self) -> int:
        """Numbers that a step gives out and feeds back."""
        return self.hidden_size

    # -- one step ------------------------------------------------------------------------------------

    @abstractmethod
    def step(self, gates: Tensor, state: State, *hidden: Apply) -> State:
        """The next state.

        Args:
            gates: What ``ih`` makes of the input, ``(b, n_gates * hidden_size)``.
            state: Tensors ``(b, size)``, the output first.
            hidden: What ``prepare`` gave.
        """

    @property
    @abstractmethod
    def kernel(self) -> str | None:
        """Name of torch's own kernel for the whole sequence, where there is one."""

    def blocks(self) -> tuple[int, ...]:
        """Sizes of the blocks of gates that ``step`` asks of the hidden map one by one."""
        return (self.n_gates * self.hidden_size,)

    def prepare(self, rows: int) -> tuple[Apply, ...]:
        """The hidden map, ready for many steps with at most so many rows."""
        return repeated(self.hh, rows, self.blocks())

    def state_sizes(self) -> tuple[int, ...]:
        """Sizes of the states, the output first."""
        return (self.output_size, *[self.hidden_size] * (self.n_states - 1))

    def zero_state(self, batch: int, like: Tensor) -> State:
        """The state before the first step."""
        return tuple(like.new_zeros(batch, size) for size in self.state_sizes())

    def named_maps(self) -> Iterator[tuple[str, Map]]:
        """Every linear map with its name, in order of definition; none of them lies deeper."""
        for name, one in self._modules.items():
            if isinstance(one, (Linear, nn.Linear)):
                yield name, one

    def is_watched(self) -> bool:
        """Whether a map must be called, since something hangs on its call."""
        return any(is_watched(one) for _, one in self.named_maps())

    def fits_kernel(self, rows: int, batch: int) -> bool:
        """Whether torch's kernel computes a sequence as this cell would: all maps dense, nobody watching."""
        if self.kernel is None or self.is_watched():
            return False
        return dense_at(self.ih, rows, kept=False) and dense_at(self.hh, batch, kept=True)

    def _run(self, x: Tensor, state: State | None) -> State:
        """One step from an input with or without a batch axis."""
        kind = type(self).__name__
        if x.is_nested:
            check_plain_layout(x, kind)
        sizes = sizes_of(x)
        if len(sizes) not in (1, 2) or sizes[-1] != self.input_size:
            raise ShapeError(
                f"the input of {kind} must be (b, {self.input_size}) or ({self.input_size},): found "
                f"{sizes}. Check the layer before, or pass one time step."
            )
        batched = x if x.ndim == 2 else x.unsqueeze(0)
        if state is not None:
            check_state(state, [(*sizes[:-1], size) for size in self.state_sizes()], kind)
            state = tuple(s.reshape(-1, s.shape[-1]) for s in state)
        state = self._next(x, batched, state)
        return state if x.ndim == 2 else tuple(s.squeeze(0) for s in state)

    def _next(self, x: Tensor, batched: Tensor, state: State | None) -> State:
        """The state after one from ``batched``, which is the input with a batch axis."""
        if serves(self, batched):
            found = self._step_by_kernels(x, batched, state)
            if found is not None:
                return found
        return self._fused_step(batched, state) if self.fits_fused_step(batched) else self._step_of(batched, state)

    def _step_by_kernels(self, x: Tensor, batched: Tensor, state: State | None) -> State | None:
        if state is None:
            state = self.zero_state(batched.shape[0], batched)
        way = direction_of(self, Spread(1, batched.shape[0]), reverse=False)
        found = None if way is None else way.run(batched, tuple(s.to(batched.dtype) for s in state))
        if found is None:
            return None
        keep_directions(self, x, [way], self.guard())  # type: ignore[list-item]
        return found[1]

    def guard(self) -> dict[str, Any]:
        """What of the cell a short way through it depends on."""
        names = ("hidden_size", "nonlinearity", "reset_after", "proj_size")
        return {name: self.__dict__[name] for name in names if name in self.__dict__}

    def _step_of(self, x: Tensor, state: State | None) -> State:
        gates = self.ih(x)
        if state is None:
            state = self.zero_state(x.shape[0], gates)
        else:
            state = tuple(s.to(gates.dtype) for s in state)
        # A single step calls the map as a module: it alone knows what it keeps between calls.
        return self.step(gates, state, *blocks_of(self.hh, self.blocks()))

    def clear_cache(self) -> None:
        super().clear_cache()
        self._short_way = None

    def _shortly(self, x: Any, state: Any) -> Any:
        """What the module returns, where an earlier call has left a short way to it; else None."""
        return self._quick_step(x, state) if self._short_way is None else self._short_way(self, x, state)

    def _quick_step(self, x: Tensor, state: Any) -> Any:
        """A step by torch's function on weights that are kept: the short way at inference, where it ran before."""
        if type(x) is not Tensor or x.ndim != 2 or not self._quick or not may_be_quick(x):
            return None
        if x.shape[1] != self.input_size or (x.shape[0], self.settings()) not in self._quick:
            return None
        weights, size = self.kept_weights(), (x.shape[0], self.hidden_size)
        if weights is None or weights[0].dtype != x.dtype:
            return None
        if state is None:
            state = x.new_zeros(size) if self.n_states == 1 else (x.new_zeros(size),) * self.n_states
        parts = (state,) if self.n_states == 1 else state
        if any(type(part) is not Tensor or part.shape != size or part.dtype != x.dtype for part in parts):
            return None
        return getattr(torch, f"{self.kernel}_cell")(x, state, *weights)

    def settings(self) -> tuple[Any, ...]:
        """What a user may set on the maps at any time."""
        return *_settings_of(self._modules["ih"]), *_settings_of(self._modules["hh"])

    def kept_weights(self) -> list[Tensor] | None:
        """The dense weights in torch's order, where they lie ready and nobody waits for the maps to be called."""
        if self.output_size != self.hidden_size:
            return None
        maps: list[Any] = [self._modules["ih"], self._modules["hh"]]  # past an attribute's longer way
        weights = [_kept_weight(one) for one in maps]
        if weights[0] is None or weights[1] is None:
            return None
        return weights + [one.bias for one in maps] if self.bias else weights  # type: ignore[return-value]

    def fits_fused_step(self, x: Tensor) -> bool:
        """Whether torch's function for one step computes the same from dense maps, and sooner."""
        if is_traced() or self.output_size != self.hidden_size or not may_take_kernel((self,), x):
            return False
        return fused_step_is_faster(self, x.shape[0], x.dtype)

    def _fused_step(self, x: Tensor, state: State | None) -> State:
        if state is None:
            state = self.zero_state(x.shape[0], x)
        state = tuple(s.to(x.dtype) for s in state)
        step: Any = getattr(torch, f"{self.kernel}_cell")
        weights = self._weights().values()
        if not torch.is_grad_enabled():
            self._quick = remembered(self._quick, (x.shape[0], self.settings()))
        found = step(x, state if self.n_states > 1 else state[0], *weights)
        return tuple(found) if self.n_states > 1 else (found,)

    # -- to and from torch's cells -------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        found = {"weight_ih": weight_of(self.ih), "weight_hh": weight_of(self.hh)}
        if self.ih.bias is not None and self.hh.bias is not None:
            found |= {"bias_ih": self.ih.bias, "bias_hh": self.hh.bias}
        return found

    def take(
        self,
        weights: Mapping[str, Tensor],
        *,
        rank: Rank | None = None,
        eps: float | None = None,
        input_gram: Tensor | None = None,
    ) -> None:
        """Fit the maps to dense weights, named as in ``dense_weights``; formats and modes stay."""
        bias_ih, bias_hh = weights.get("bias_ih"), weights.get("bias_hh")
        self.ih = refill(self.ih, weights["weight_ih"], bias_ih, rank=rank, eps=eps, gram=input_gram)
        self.hh = refill(self.hh, weights["weight_hh"], bias_hh, rank=rank, eps=eps)

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
        """Approximate torch's cell; without ``rank`` and ``eps`` exact to dtype.

        Args:
            dense: The torch cell; it is not changed. Dtype, device, mode and ``requires_grad`` carry over.
            rank, eps: Caps on the ranks and relative tolerance, for every factorized map.
            input_gram: Second moment of the inputs, for the input map.
            options: ``format``, ``compress``, ``in_modes``, ``out_modes``, ``implementation``.

        Raises:
            KindError: ``dense`` is of another kind.
            ShapeError, RankError, NonFiniteError: As for ``Linear.from_dense``.
        """
        cls._check_dense_type(dense)
        cell = cls(**torch_arguments(cls, dense), **options, rank=1, init=None, device="meta")
        cell.take(torch_weights(dense), rank=rank, eps=eps, input_gram=input_gram)
        return cell.train(dense.training)

    def to_dense(self) -> Any:
        """Torch's cell with the same weights.

        Raises:
            KindError: Torch has no such cell (reset before the hidden product, a projection).
        """
        self.check_torch_has_it()
        weight = weight_of(self.hh)
        build: Any = self.dense_type
        dense = build(**torch_arguments(type(self), self), device=weight.device, dtype=weight.dtype)
        self._fill(dense)
        return dense

    def check_torch_has_it(self) -> None:
        """Raise ``KindError`` where torch has no cell that computes the same."""

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias}, {self._size_repr()}"


class _OneState(Cell):
    """Base of the cells whose output is their only state."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if not is_dynamo_compiling():
            found: Tensor | None = self._shortly(input, hx)
            if found is not None:
                return found
        return self._forward(input, hx)

    @traceable
    def _forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        return self._run(x, None if state is None else (state,))[0]


class RNNCell(_OneState):
    """``torch.nn.RNNCell`` with factorized maps: ``h' = act(W x + b + U h + c)``.

    Args:
        input_size, hidden_size, bias, nonlinearity: As ``torch.nn.RNNCell``.
        options: Keyword arguments of ``tensortrain.nn.GRU``.

    Shapes: input ``(b, input_size)`` or ``(input_size,)``, state ``(b, hidden_size)`` or ``(hidden_size,)``.
    """

    dense_type = nn.RNNCell
    n_gates = 1
    torch_arguments = (*Cell.torch_arguments, "nonlinearity")

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", **options: Any
    ) -> None:
        if nonlinearity not in _NONLINEARITIES:
            raise ShapeError(
                f"nonlinearity must be one of {tuple(_NONLINEARITIES)}: found {nonlinearity!r}. Pass 'tanh'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, **options)

    @property
    def kernel(self) -> str | None:
        return f"rnn_{self.nonlinearity}"

    def step(self, gates: Tensor, state: State, *hidden: Apply) -> State:
        return (_NONLINEARITIES[self.nonlinearity](gates + hidden[0](state[0])),)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", nonlinearity={self.nonlinearity}" * (self.nonlinearity != "tanh")


class GRUCell(_OneState):
    r"""``torch.nn.GRUCell`` with factorized maps.

    With gates r, z, n stacked in this order,

    - ``reset_after=True`` (torch): ``n = tanh(W_n x + b_n + r * (U_n h + c_n))``;
    - ``reset_after=False`` (published): ``n = tanh(W_n x + b_n + U_n (r * h) + c_n)``;

    and ``h' = (1 - z) * n + z * h``. (arXiv:1707.01786 writes the same with ``1 - z`` for ``z``.)

    Args:
        input_size, hidden_size, bias: As ``torch.nn.GRUCell``.
        reset_after: Where the reset gate acts.
        options: Keyword arguments of ``tensortrain.nn.GRU``.

    Cost: with ``reset_after=False`` a factorized hidden map runs twice per step, a dense one once.
    Source: Cho et al., arXiv:1406.1078; Yang et al., arXiv:1707.01786, section 3.
    """

    dense_type = nn.GRUCell
    n_gates = 3

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, reset_after: bool = True, **options: Any
    ) -> None:
        self.reset_after = reset_after
        super().__init__(input_size, hidden_size, bias, **options)

    @property
    def kernel(self) -> str | None:
        return "gru" if self.reset_after else None

    def blocks(self) -> tuple[int, ...]:
        size = self.hidden_size
        return (3 * size,) if self.reset_after else (2 * size, size)

    def step(self, gates: Tensor, state: State, *hidden: Apply) -> State:
        (h,), sizes = state, (2 * self.hidden_size, self.hidden_size)
        x_rz, x_n = gates.split(sizes, dim=-1)
        if self.reset_after:
            h_rz, h_n = hidden[0](h).split(sizes, dim=-1)
            r, z = torch.sigmoid(x_rz + h_rz).chunk(2, dim=-1)
            n = torch.tanh(torch.addcmul(x_n, r, h_n))
        else:
            r, z = torch.sigmoid(x_rz + hidden[0](h)).chunk(2, dim=-1)
            n = torch.tanh(x_n + hidden[1](r * h))
        return (torch.lerp(n, h, z),)

    def check_torch_has_it(self) -> None:
        if not self.reset_after:
            raise KindError(
                "torch's GRU resets after the hidden product: this one has reset_after=False, expected True. "
                "Read dense_weights(), or train with reset_after=True."
            )

    def extra_repr(self) -> str:
        return super().extra_repr() + ", reset_after=False" * (not self.reset_after)


class LSTMCell(Cell):
    r"""``torch.nn.LSTMCell`` with factorized maps.

    With gates i, f, g, o stacked in this order, ``c' = f * c + i * g`` and ``h' = o * tanh(c')``;
    i, f, o are sigmoids and g a tanh of ``W x + b + U h + c``.

    Args:
        input_size, hidden_size, bias: As ``torch.nn.LSTMCell``.
        proj_size: Size to which the output is projected (by a dense map); 0 leaves it alone. Torch has this in
            ``torch.nn.LSTM`` only.
        options: Keyword arguments of ``tensortrain.nn.GRU``.

    Source: Hochreiter and Schmidhuber 1997; Yang et al., arXiv:1707.01786, section 3.
    """

    dense_type = nn.LSTMCell
    n_gates = 4
    n_states = 2

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, proj_size: int = 0, **options: Any
    ) -> None:
        if not 0 <= proj_size < hidden_size:
            raise ShapeError(
                f"proj_size must be 0 or smaller than hidden_size: found {proj_size}, expected less than "
                f"{hidden_size}. Pass 0 for no projection."
            )
        self.proj_size = proj_size
        super().__init__(input_size, hidden_size, bias, **options)

    def _add_maps(self, maps: MapOptions) -> None:
        if self.proj_size:
            self.hr = nn.Linear(self.hidden_size, self.proj_size, bias=False, device=maps.device, dtype=maps.dtype)

    def _weights(self) -> dict[str, Tensor]:
        found = super()._weights()
        return {**found, "weight_hr": self.hr.weight} if self.proj_size else found

    def take(self, weights: Mapping[str, Tensor], **how: Any) -> None:
        super().take(weights, **how)
        if self.proj_size:
            self.hr = linear_of(weights["weight_hr"], None)

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def kernel(self) -> str | None:
        return "lstm"

    def step(self, gates: Tensor, state: State, *hidden: Apply) -> State:
        h, c = state
        size = self.hidden_size
        i_f, g, o = (gates + hidden[0](h)).split((2 * size, size, size), dim=-1)
        i, f = torch.sigmoid(i_f).chunk(2, dim=-1)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (self.hr(h) if self.proj_size else h), c

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if not is_dynamo_compiling():
            found: tuple[Tensor, Tensor] | None = self._shortly(input, hx)
            if found is not None:
                return found
        return self._forward(input, hx)

    @traceable
    def _forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        h, c = self._run(x, state)
        return h, c

    def check_torch_has_it(self) -> None:
        if self.proj_size:
            raise KindError(
                f"torch's LSTMCell has no projection: this one has proj_size={self.proj_size}, expected 0. "
                "Use tensortrain.nn.LSTM, whose to_dense() keeps it."
            )


# -- the short way at inference -----------------------------------------------------------------------

_MOST_REMEMBERED = 64


def may_be_quick(x: Tensor) -> bool:
    """Whether no gradients are recorded, and nothing looks on that would have to see every product."""
    return not torch.is_grad_enabled() and x.is_cpu and is_plain_input(x) and can_group()


def remembered(known: frozenset[Any], one: Any) -> frozenset[Any]:
    """The same sizes and one more; few, whatever sizes come."""
    return known if one in known else frozenset({one} if len(known) >= _MOST_REMEMBERED else {*known, one})


def _settings_of(one: Any) -> tuple[Any, ...]:
    if isinstance(one, Linear):
        return one.implementation, one.dense_limit_bytes, one.may_time_plans
    return ()


def _kept_weight(one: Any) -> Tensor | None:
    if not isinstance(one, Linear):
        weight: Tensor | None = one._parameters.get("weight") if type(one) is nn.Linear and not is_called(one) else None
        return weight
    cores = one._modules["cores"]
    if one.stand_ins is not None or is_called(one) or cores is None or not are_plain(cores):
        return None
    kept: Tensor | None = one.runner.cache.peek(list_cores(cores), "dense")
    return kept


_NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


def torch_arguments(cls: Any, layer: Any) -> dict[str, Any]:
    """The torch arguments that build a layer like this one, torch's or ours."""
    return {name: getattr(layer, name) for name in cls.torch_arguments}


def torch_weights(dense: nn.Module, end: str = "") -> dict[str, Tensor]:
    """The tensors of one of torch's cells, named without the ``end`` that they have in a layer."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found = {part: getattr(dense, part + end, None) for part in parts}
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def check_sizes(**sizes: int) -> None:
    """Raise ``ShapeError`` for a size below one."""
    for name, size in sizes.items():
        if not hasattr(size, "__index__") or size < 1:
            raise ShapeError(f"{name} must be a whole number of at least 1: found {size!r}. Pass a positive size.")


def check_state(state: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], kind: str) -> None:
    """Raise ``ShapeError`` where an initial state does not fit the input."""
    # a GRU's state wrapped in a tuple, an LSTM's that is not: torch's users mix them up
    parts = state if isinstance(state, (tuple, list)) else [state]
    found = [sizes_of(s) if isinstance(s, Tensor) else type(s).__name__ for s in parts]
    if found != list(shapes):
        raise ShapeError(
            f"the initial state of {kind} must fit its input: found {found}, expected {list(shapes)}. "
            "Pass None for zeros."
        )
