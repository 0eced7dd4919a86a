"""Recurrent cells whose next state is a polynomial in several past ones, with weights in TT form."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.errors import DataError, KindError
from tensortrain.models.base import TensorModel
from tensortrain.models.cell_steps import ACTIVATIONS, Course, next_state, polynomial, serves, taken
from tensortrain.models.checks import checked_dtype, checked_inputs, checked_sizes
from tensortrain.networks import register
from tensortrain.nn.cores import list_cores

__all__ = ["HOTTLSTMCell", "HOTTRNNCell", "HigherOrderCell"]

_PRODUCTS = 0.2  # of a linear layer's entries, in the factors of products at first


class HigherOrderCell(TensorModel):
    """``TT(1, h_{t-1}, .., h_{t-L}) + W x_t + b``, of as many numbers as the cell has gates."""

    n_gates = 1
    kind: str | None  # "lstm", or the name of the activation

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        n_lags: int,
        degree: int,
        rank: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (input_size,) = checked_sizes(least=0, input_size=input_size)
        hidden_size, n_lags, degree, rank = checked_sizes(
            hidden_size=hidden_size, n_lags=n_lags, degree=degree, rank=rank
        )
        self.input_size, self.hidden_size = input_size, hidden_size
        self.n_lags, self.degree, self.rank = n_lags, degree, rank
        dtype = checked_dtype(dtype)
        n_out, n_seen = self.n_gates * hidden_size, 1 + n_lags * hidden_size

        def draw(*shape: int, std: float) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
            return nn.Parameter(drawn * std)

        # It starts as a linear layer of the lags, of usual variance, with small products: lags are far from 1 at first,
        # so that products of parts which vanish with them would leave nothing to learn from.
        self.cores = nn.ParameterList()
        for _ in range(degree - 1):
            core = draw(1 if not len(self.cores) else rank, n_seen, rank, std=_PRODUCTS / math.sqrt(n_seen))
            with torch.no_grad():
                core[:, 0] = torch.eye(rank).to(core) if len(self.cores) else 1.0
            self.cores.append(core)
        last = rank if degree > 1 else 1
        self.cores.append(draw(last, n_seen, n_out, std=1 / math.sqrt(last * n_seen)))
        self.weight = draw(n_out, input_size, std=1 / math.sqrt(max(input_size, 1)))
        self.bias = draw(n_out, std=0.0)

    @property
    def config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("input_size", "hidden_size", "n_lags", "degree", "rank")}

    def gates(self, x: Tensor, lags: Tensor) -> Tensor:
        """``(b, n_gates hidden_size)`` of an input ``(b, input_size)`` and the lags ``(b, n_lags, hidden_size)``."""
        seen = F.pad(lags.flatten(1), (1, 0), value=1.0)  # b m
        return F.linear(x, self.weight, self.bias) + polynomial(list(self.cores), seen)

    def step(self, x: Tensor, lags: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The lags and the cell after a step; the latter of an LSTM."""
        cores = list_cores(self.cores)
        if serves(x, (self.weight, self.bias, *cores)) and lags.dtype == x.dtype:
            gates = F.linear(x, self.weight, self.bias).unsqueeze(1)
            found = taken(Course(self.kind, 1), gates, lags, c, cores)
            return found.lags, found.c
        h, c = next_state(self.kind, self.gates(x, lags), c)
        return torch.cat((h[:, None], lags[:, :-1]), dim=1), c

    def checked(self, x: object, lags: object) -> tuple[Tensor, Tensor]:
        """A step and the lags given, or zeros, in the cell's dtype.

        Raises:
            DataError: What the cell does not take.
        """
        x = checked_inputs(x, ("b", self.input_size), self.bias.dtype, "Pass one step of every series", finite=False)
        return x, self._state(lags, (x.shape[0], self.n_lags, self.hidden_size), "lags")

    def _state(self, state: object, shape: tuple[int, ...], name: str) -> Tensor:
        if state is None:
            return self.bias.new_zeros(shape)
        way = "Pass what the step before gave, newest first"
        return checked_inputs(state, shape, self.bias.dtype, way, name=name, finite=False)

    def extra_repr(self) -> str:
        """What a print of the cell shows."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


@register("hottrnn-cell", needs_arguments=True)
class HOTTRNNCell(HigherOrderCell):
    r"""``h = f(W x + b + TT(1, h_{t-1}, .., h_{t-L}))``: a polynomial of some degree in the last L states.

    Args:
        input_size, hidden_size: As of ``torch.nn.RNNCell``.
        n_lags: L.
        degree: Of the polynomial; all lower degrees are among it.
        rank: TT ranks of its weights.
        activation: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or None: linear in its output.
        generator, device, dtype: Of the first parameters.

    Shapes: ``cores`` ``(r, 1 + n_lags hidden_size, s)``, the last s the state.

    Cost: O(degree n_lags hidden_size rank^2) multiplications a step and sample; no outer product is formed.

    Source: Yu, Zheng, Anandkumar, Yue, arXiv:1711.00073.

    Example:
        >>> cell = HOTTRNNCell(3, 5, n_lags=2, degree=2, rank=4)
        >>> lags = cell(torch.rand(7, 3))
        >>> lags.shape, cell(torch.rand(7, 3), lags).shape  # newest first
        (torch.Size([7, 2, 5]), torch.Size([7, 2, 5]))
    """

    def __init__(self, input_size: int, hidden_size: int, *, activation: str | None = "tanh", **options: Any) -> None:
        if activation not in ACTIVATIONS:
            raise KindError(f"an activation must be known: it is {activation!r}, expected one of {list(ACTIVATIONS)}.")
        super().__init__(input_size, hidden_size, **options)
        self.activation = self.kind = activation

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"activation": self.activation}

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """The next lags ``(b, n_lags, hidden_size)``, newest first, of an input ``(b, input_size)`` and the lags."""
        return self.step(*self.checked(x, state), None)[0]

    def newest(self, state: Tensor) -> Tensor:
        """The last ``h``, ``(b, hidden_size)``."""
        return state[:, 0]


@register("hottlstm-cell", needs_arguments=True)
class HOTTLSTMCell(HigherOrderCell):
    r"""An LSTM cell whose gates ``i, g, f, o`` are polynomials in the last L states, one train for all of them.

    ``c' = c sigmoid(f) + sigmoid(i) tanh(g)`` and ``h = sigmoid(o) tanh(c')``.

    Args, shapes and cost: as of ``HOTTRNNCell``, without ``activation``; the last s of the cores is the four gates.

    Source: Yu, Zheng, Anandkumar, Yue, arXiv:1711.00073 (TLSTM).

    Example:
        >>> cell = HOTTLSTMCell(3, 5, n_lags=2, degree=2, rank=4)
        >>> lags, c = cell(torch.rand(7, 3))
        >>> lags.shape, c.shape
        (torch.Size([7, 2, 5]), torch.Size([7, 5]))
    """

    n_gates = 4
    kind = "lstm"

    def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(input_size, hidden_size, **options)
        with torch.no_grad():
            self.bias.unflatten(0, (4, -1))[2] = 1.0  # what is remembered stays at first

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next ``(lags, c)``: ``(b, n_lags, hidden_size)``, newest first, and ``(b, hidden_size)``."""
        if state is not None and not (isinstance(state, (tuple, list)) and len(state) == 2):
            raise DataError(
                f"a state must be lags and c: state has {type(state).__name__}, expected a pair. Pass what the step "
                "before gave."
            )
        before, c = (None, None) if state is None else state
        x, lags = self.checked(x, before)
        c = self._state(c, (x.shape[0], self.hidden_size), "c")
        lags, after = self.step(x, lags, c)
        return lags, cast(Tensor, after)

    def newest(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """The last ``h``, ``(b, hidden_size)``."""
        return state[0][:, 0]
