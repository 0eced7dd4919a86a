"""Recurrent cells whose next state is a polynomial in several past ones, with weights in TT form; forecasts by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.cores.halves import outer
from tensortrain.errors import DataError, KindError
from tensortrain.models.base import TensorModel, check_choice, check_finite, check_sizes
from tensortrain.models.cell_fit import fitted_cores
from tensortrain.models.supervised import Supervised
from tensortrain.networks import build, register
from tensortrain.system.history import History

__all__ = ["Forecaster", "HOTTLSTMCell", "HOTTRNNCell"]

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    None: lambda x: x,
}


_PRODUCTS = 0.2  # of a linear layer's entries, in the factors of products at first


class _HigherOrderCell(TensorModel):
    """``TT(1, h_{t-1}, .., h_{t-L}) + W x_t + b``, of as many numbers as the cell has gates."""

    n_gates = 1

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
        check_sizes(hidden_size=hidden_size, n_lags=n_lags, degree=degree, rank=rank)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.n_lags, self.degree, self.rank = n_lags, degree, rank
        n_out, n_seen = self.n_gates * hidden_size, 1 + n_lags * hidden_size

        def draw(*shape: int, std: float) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, device=device, dtype=dtype or torch.get_default_dtype())
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
        first, *others = self.cores
        state = seen @ first[0]
        for core in others:
            if core.shape[1] > 2 * core.shape[2]:
                every = (seen @ core.movedim(1, 0).flatten(1)).unflatten(1, (core.shape[0], -1))  # b r s
                state = (state.unsqueeze(1) @ every).squeeze(1)
            else:  # with the core as it lies: (b, r m) times (r m, s)
                state = outer(state, seen) @ core.flatten(0, 1)
        return F.linear(x, self.weight, self.bias) + state

    def lags_of(self, x: Tensor, lags: Tensor | None) -> Tensor:
        """The lags given, or zeros.

        Raises:
            DataError: A shape that the cell does not take.
        """
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.input_size:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(f"an input must be a step: x has {found}, expected (b, {self.input_size}).")
        expected = (x.shape[0], self.n_lags, self.hidden_size)
        if lags is None:
            return self.bias.new_zeros(expected)
        if tuple(lags.shape) != expected:
            raise DataError(
                f"lags must be the last states, newest first: they have shape {tuple(lags.shape)}, expected {expected}."
            )
        return lags

    def extra_repr(self) -> str:
        """What a print of the cell shows."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


@register("hottrnn-cell", needs_arguments=True)
class HOTTRNNCell(_HigherOrderCell):
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
        if activation not in _ACTIVATIONS:
            raise KindError(f"an activation must be known: it is {activation!r}, expected one of {list(_ACTIVATIONS)}.")
        super().__init__(input_size, hidden_size, **options)
        self.activation = activation

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"activation": self.activation}

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """The next lags ``(b, n_lags, hidden_size)``, newest first, of an input ``(b, input_size)`` and the lags."""
        lags = self.lags_of(x, state)
        h = _ACTIVATIONS[self.activation](self.gates(x, lags))
        return torch.cat((h[:, None], lags[:, :-1]), dim=1)

    def newest(self, state: Tensor) -> Tensor:
        """The last ``h``, ``(b, hidden_size)``."""
        return state[:, 0]


@register("hottlstm-cell", needs_arguments=True)
class HOTTLSTMCell(_HigherOrderCell):
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

    def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(input_size, hidden_size, **options)
        with torch.no_grad():
            self.bias.unflatten(0, (4, -1))[2] = 1.0  # what is remembered stays at first

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next ``(lags, c)``: ``(b, n_lags, hidden_size)``, newest first, and ``(b, hidden_size)``."""
        lags = self.lags_of(x, None if state is None else state[0])
        c = torch.zeros_like(lags[:, 0]) if state is None else state[1]
        i, g, f, o = self.gates(x, lags).chunk(4, dim=1)
        c = c * torch.sigmoid(f) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return torch.cat((h[:, None], lags[:, :-1]), dim=1), c

    def newest(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """The last ``h``, ``(b, hidden_size)``."""
        return state[0][:, 0]


_CELLS: dict[str, type[nn.Module]] = {"hottrnn-cell": HOTTRNNCell, "hottlstm-cell": HOTTLSTMCell}


@register("forecaster", needs_arguments=True)
class Forecaster(TensorModel):
    """Reads the beginning of a series and goes on by itself: what it says is what it reads next.

    Args:
        cell: A ``HOTTRNNCell`` or ``HOTTLSTMCell``, or another with ``forward(x, state)`` and ``newest(state)``; or the
            ``config`` of one with its ``name``.
        output_size: Numbers of a step that are forecast. Where they are as many as the cell reads, they are read next;
            else the cell reads zeros.
        generator: Of the first parameters of the map from state to output; a cell that is linear in its output and as
            large as it needs no such map, and starts with the identity.

    Attributes:
        holds_data: The states of the cell are the steps themselves, as after alternating least squares: it starts from
            the last ones that it reads.

    Example:
        >>> model = Forecaster(HOTTLSTMCell(2, 8, n_lags=2, degree=2, rank=3), 2)
        >>> model(torch.rand(5, 12, 2), horizon=7).shape
        torch.Size([5, 7, 2])
    """

    def __init__(
        self, cell: Any, output_size: int, *, holds_data: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if isinstance(cell, Mapping):
            cell = build(**cell)
        self.cell, self.output_size, self.holds_data = cell, output_size, holds_data
        like = next(cell.parameters())
        self.output = nn.Linear(cell.hidden_size, output_size, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            if getattr(cell, "activation", "tanh") is None and cell.hidden_size == output_size:
                self.output.weight.copy_(torch.eye(output_size))
                self.output.bias.zero_()
            else:
                drawn = torch.randn(self.output.weight.shape, generator=generator, device=like.device, dtype=like.dtype)
                self.output.weight.copy_(drawn / math.sqrt(cell.hidden_size))
                self.output.bias.zero_()

    @property
    def config(self) -> dict[str, Any]:
        name = next((name for name, kind in _CELLS.items() if type(self.cell) is kind), None)
        if name is None:
            raise KindError(
                f"a model that names itself needs a cell of this package: cell is a {type(self.cell).__name__}. Save "
                "it with tensortrain.save_pretrained and load it with model=."
            )
        return {
            "cell": {"name": name, **self.cell.config},
            "output_size": self.output_size,
            "holds_data": self.holds_data,
        }

    def forward(
        self,
        x: Tensor,
        horizon: int,
        *,
        known: Tensor | None = None,
        following: Tensor | None = None,
        share: float = 0.0,
    ) -> Tensor:
        """Forecasts.

        Args:
            x: ``(b, n_in, input_size)``: the beginnings.
            horizon: Steps to forecast.
            known: ``(b, horizon, input_size - output_size)``: what is known ahead of the steps to come, such as the
                calendar. In ``x`` these are the last numbers of a step.
            following: ``(b, horizon, output_size)``: the true steps, of which a ``share`` is read in place of what was
                said, at random (scheduled sampling while training).

        Returns:
            Tensor: ``(b, horizon, output_size)``.

        Raises:
            DataError: ``x`` has another shape, or the horizon is below 1.
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.cell.input_size or x.shape[1] == 0:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"a series must be (b, n_in, {self.cell.input_size}) with a step or more: x has {found}. Put the steps "
                "along axis 1."
            )
        if horizon < 1:
            raise DataError(f"a forecast must have steps: horizon has {horizon}, expected 1 or more.")
        self._check_known(known, x.shape[0], horizon)
        state = self._read_beginning(x)
        said = [self.output(self.cell.newest(state))]
        for k in range(1, horizon):
            ahead = None if known is None else known[:, k - 1]
            state = self.cell(self._read(said[-1], ahead, following, k - 1, share), state)
            said.append(self.output(self.cell.newest(state)))
        return torch.stack(said, dim=1)

    def fit(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        horizon: int | None = None,
        known: Tensor | None = None,
        method: Literal["adam", "als"] | str = "adam",
        n_sweeps: int = 20,
        lr: float = 3e-3,
        batch_size: int = 64,
        share: float = 0.0,
        grad_clip: float | None = 1.0,
        validation: tuple[Tensor, ...] | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn to go on, in place, by least squares.

        Args:
            x: ``(b, n_in, input_size)``; without ``y`` whole series.
            y: ``(b, horizon, output_size)``: what follows.
            horizon: Without ``y``: how many of the last steps of ``x`` are forecast; a quarter by default.
            known: What is known ahead of the steps of ``y``, as ``forward`` takes it; with ``"adam"``.
            method: ``"adam"``: through the whole forecast. ``"als"``: for cells that are linear in their output, as
                large as the output (``activation=None``): the weights by alternating least squares on true steps,
                exactly; the series alone decides, x and y together.
            n_sweeps: Passes over the data, or sweeps.
            lr, batch_size: Of Adam.
            share: Of true steps that are read while training; 0: always what was said.
            grad_clip: Largest norm of a gradient: through many steps some are huge.
            validation: ``(x, y)`` that is held back, or ``(x, y, known)``.
            checkpoint, observer, generator: As for ``MPSClassifier.fit``.

        Returns:
            History: ``loss``, the mean square of the forecast, and that of ``validation``.

        Raises:
            DataError: The data do not fit.
            KindError: The method is not known, or not for this cell.
        """
        check_choice(method, ("adam", "als"), "method")
        if y is None:
            x, y = self._parted(x, horizon)
        self._check_following(x, y, known)
        if method == "als":
            return self._fit_steps(x, y, n_sweeps)
        job = Supervised(
            _Whole(self, x.shape[1], known is not None, share),
            self._joined(x, y, known),
            y,
            "squared",
            n_sweeps,
            self._held_back(x.shape[1], known is not None, validation),
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        return job.by_steps(lr, batch_size, grad_clip=grad_clip)

    def _check_following(self, x: Tensor, y: Tensor, known: Tensor | None) -> None:
        """Refuse series and what follows them where they do not fit."""
        if not isinstance(y, Tensor) or y.ndim != 3 or y.shape[0] != x.shape[0] or y.shape[2] != self.output_size:
            found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise DataError(
                f"what follows must be (b, horizon, {self.output_size}): y has {found}, x {tuple(x.shape)}."
            )
        if x.shape[0] == 0:
            raise DataError("a fit must have data: x has no series, expected one or more.")
        self._check_known(known, *y.shape[:2])
        check_finite(x)
        check_finite(y, "y")
        if known is not None:
            check_finite(known, "known")

    def _held_back(
        self, n_in: int, has_known: bool, validation: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor] | None:
        if validation is None:
            return None
        if len(validation) != 2 + has_known or validation[0].shape[1] != n_in:
            raise DataError(
                f"what is held back must be as what is learnt: validation has {len(validation)} tensors and beginnings "
                f"of {validation[0].shape[1]} steps, expected {2 + has_known} and {n_in}. Pass (x, y), and known third."
            )
        x, y = validation[:2]
        known = validation[2] if has_known else None
        self._check_following(x, y, known)
        return self._joined(x, y, known), y

    def _joined(self, x: Tensor, y: Tensor, known: Tensor | None = None) -> Tensor:
        """Beginnings and what follows as one series; what follows may have fewer numbers a step, or more."""
        after = y if known is None else torch.cat((y, known.to(y.dtype)), dim=2)
        width = max(x.shape[2], after.shape[2])
        return torch.cat([F.pad(part, (0, width - part.shape[2])) for part in (x, after)], dim=1)

    def _parted(self, series: Tensor, horizon: int | None) -> tuple[Tensor, Tensor]:
        """Beginnings and what follows."""
        n_steps = series.shape[1] if isinstance(series, Tensor) and series.ndim == 3 else 0
        horizon = max(1, n_steps // 4) if horizon is None else horizon
        if not 1 <= horizon < n_steps or self.output_size > series.shape[2]:
            found = f"shape {tuple(series.shape)}" if isinstance(series, Tensor) else type(series).__name__
            raise DataError(
                f"whole series must be (b, steps, numbers) with more steps than are forecast: x has {found}, and "
                f"horizon is {horizon}, output_size {self.output_size}. Or pass what follows as y."
            )
        return series[:, :-horizon], series[:, -horizon:, : self.output_size]

    @torch.no_grad()
    def _fit_steps(self, x: Tensor, y: Tensor, n_sweeps: int) -> History:
        """The cell's polynomial by least squares on all true steps."""
        cell, size = self.cell, self.output_size
        if getattr(cell, "activation", "tanh") is not None or not cell.hidden_size == size == cell.input_size:
            raise KindError(
                "alternating least squares needs a cell that says what it holds: expected a HOTTRNNCell with "
                f"activation=None and input_size = hidden_size = output_size = {size}. Use method='adam'."
            )
        windows = torch.cat((x, y), dim=1).unfold(1, cell.n_lags + 1, 1).movedim(-1, 2)  # b t lags+1 size, oldest first
        if windows.shape[1] == 0:
            raise DataError(f"a series must be longer than the lags: it has {x.shape[1] + y.shape[1]} steps.")
        lags, following = windows[:, :, :-1].flip(2).flatten(0, 1).flatten(1), windows[:, :, -1].flatten(0, 1)
        seen = torch.cat((torch.ones_like(lags[:, :1]), lags), dim=1)
        made, history = fitted_cores([core.detach() for core in cell.cores], seen, following, n_sweeps)
        cell.cores = nn.ParameterList([nn.Parameter(core.to(cell.bias.dtype)) for core in made])
        cell.weight.zero_()
        cell.bias.zero_()
        self.output.weight.copy_(torch.eye(size))
        self.output.bias.zero_()
        self.holds_data = True
        return history

    def _read_beginning(self, x: Tensor) -> Any:
        """The state behind some true steps; a cell that says what it holds is given what it should have said."""
        if self.holds_data:
            if x.shape[1] < self.cell.n_lags:
                raise DataError(f"a beginning must have the lags of the cell: x has {x.shape[1]} steps.")
            return self.cell(x[:, -1], x[:, -self.cell.n_lags :].flip(1))
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state

    def _read(self, said: Tensor, ahead: Tensor | None, following: Tensor | None, k: int, share: float) -> Tensor:
        if self.cell.input_size != self.output_size and ahead is None:
            return said.new_zeros(said.shape[0], self.cell.input_size)
        if following is not None and share > 0:
            is_true = torch.rand(said.shape[0], 1, device=said.device) < share
            said = torch.where(is_true, following[:, k], said)
        return said if ahead is None else torch.cat((said, ahead.to(said.dtype)), dim=1)

    def _check_known(self, known: Tensor | None, n_series: int, horizon: int) -> None:
        if known is None:
            return
        expected = (n_series, horizon, self.cell.input_size - self.output_size)
        if not isinstance(known, Tensor) or tuple(known.shape) != expected or expected[2] < 1:
            found = f"shape {tuple(known.shape)}" if isinstance(known, Tensor) else type(known).__name__
            raise DataError(
                f"what is known ahead must be (b, horizon, input_size - output_size): known has {found}, expected "
                f"{expected}. Give the cell an input_size of all numbers of a step."
            )


class _Whole(nn.Module):
    """A forecaster as it is trained: it gets whole series, and says what comes after their beginnings."""

    def __init__(self, model: Forecaster, n_in: int, has_known: bool, share: float) -> None:
        super().__init__()
        self.model, self.n_in, self.has_known, self.share = model, n_in, has_known, share

    def forward(self, series: Tensor) -> Tensor:
        size, n_read = self.model.output_size, self.model.cell.input_size
        beginning, after = series[:, : self.n_in, :n_read], series[:, self.n_in :]
        return self.model(
            beginning,
            after.shape[1],
            known=after[..., size:n_read] if self.has_known else None,
            following=after[..., :size],
            share=self.share if self.training else 0.0,
        )
