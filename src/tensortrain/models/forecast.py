"""Forecasts of series by recurrent cells that read on what they said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.errors import DataError, KindError
from tensortrain.models.base import TensorModel
from tensortrain.models.cell_fit import fitted_cores
from tensortrain.models.cell_steps import Course, serves, taken
from tensortrain.models.cells import HOTTLSTMCell, HOTTRNNCell
from tensortrain.models.checks import check_between, check_choice, checked_inputs, checked_sizes, whole
from tensortrain.models.linear_forecast import LinearForecast
from tensortrain.models.supervised import Supervised
from tensortrain.networks import build, register
from tensortrain.nn.composite import is_plain, is_watched
from tensortrain.nn.cores import list_cores
from tensortrain.system.history import History

__all__ = ["Forecaster"]

_OF_A_CELL = ("input_size", "hidden_size", "newest")
_CELLS: dict[str, type[nn.Module]] = {"hottrnn-cell": HOTTRNNCell, "hottlstm-cell": HOTTLSTMCell}


@register("forecaster", needs_arguments=True)
class Forecaster(TensorModel):
    """Reads the beginning of a series and goes on by itself: what it says is what it reads next.

    Args:
        cell: A ``HOTTRNNCell`` or ``HOTTLSTMCell``, or another with ``forward(x, state)`` and ``newest(state)``; or the
            ``config`` of one with its ``name``.
        output_size: Numbers of a step that are forecast. Where they are as many as the cell reads, they are read next;
            else the cell reads zeros.
        linear: ``(lags, horizon)``: a linear map of the last so many steps, one for each step ahead and of what is
            known of it, is added to what the cell says, which then starts from zero: an exact linear start. ``fit``
            sets the maps by least squares in closed form.
        generator: Of the first parameters of the map from state to output; a cell that is linear in its output and as
            large as it needs no such map, and starts with the identity.

    Attributes:
        holds_data: The states of the cell are the steps themselves, as after alternating least squares: it starts from
            the last ones that it reads.

    Example:
        >>> model = Forecaster(HOTTLSTMCell(2, 8, n_lags=2, degree=2, rank=3), 2)
        >>> model(torch.rand(5, 12, 2), horizon=7).shape
        torch.Size([5, 7, 2])

        A forecast that is a linear map of the last four steps, and of what a cell adds to it:

        >>> model = Forecaster(HOTTLSTMCell(2, 8, n_lags=2, degree=2, rank=3), 2, linear=(4, 7))
        >>> len(model.fit(torch.rand(20, 19, 2), horizon=7, n_sweeps=1, ridge=0.1))
        1
    """

    def __init__(
        self,
        cell: Any,
        output_size: int,
        *,
        linear: Sequence[int] | None = None,
        holds_data: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(cell, Mapping):
            cell = build(**cell)
        _check_cell(cell)
        (output_size,) = checked_sizes(output_size=output_size)
        self.cell, self.output_size, self.holds_data = cell, output_size, bool(holds_data)
        like = next(cell.parameters())
        self.output = nn.Linear(cell.hidden_size, output_size, device=like.device, dtype=like.dtype)
        self.linear: LinearForecast | None = None
        if linear is not None:
            self.linear = LinearForecast(output_size, cell.input_size - output_size, linear, like)
        with torch.no_grad():
            if self.linear is not None:
                self.output.weight.zero_()
                self.output.bias.zero_()
            elif getattr(cell, "activation", "tanh") is None and cell.hidden_size == output_size:
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
            "linear": None if self.linear is None else [self.linear.n_lags, self.linear.horizon],
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
            DataError: ``x`` has another shape, no floating numbers, or NaN; the horizon is below 1.
        """
        shape = ("b", "N_in", self.cell.input_size)
        x = checked_inputs(x, shape, self.output.weight.dtype, "Put the steps, one or more, along axis 1")
        n_steps = whole(horizon)
        if n_steps is None or n_steps < 1:
            raise DataError(f"a forecast must have steps: horizon has {horizon!r}, expected 1 or more. Pass a number.")
        horizon = n_steps
        self._check_known(known, x.shape[0], horizon)
        start = None if self.linear is None else self.linear(x, horizon, known)
        if self._goes_in_one(x):
            return self._said_in_one(x, horizon, start, known, following, share)
        state = self._read_beginning(x)
        said: list[Tensor] = []
        for k in range(horizon):
            if k > 0:
                ahead = None if known is None else known[:, k - 1]
                state = self.cell(self._read(said[-1], ahead, following, k - 1, share), state)
            one = self.output(self.cell.newest(state))
            said.append(one if start is None else one + start[:, k])
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
        ridge: float | None = 1.0,
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
            ridge: Of a ``linear`` start: its maps are fitted first, on the same series, with so much times the squares
                of their weights; None leaves them as they are. The steps then train the cell on what is left.
            validation: ``(x, y)`` that is held back, or ``(x, y, known)``.
            checkpoint, observer, generator: As for ``MPSClassifier.fit``.

        Returns:
            History: ``loss``, the mean square of the forecast, and that of ``validation``.

        Raises:
            DataError: The data do not fit.
            KindError: The method is not known, or not for this cell.
            RankError: An option outside its range.
        """
        check_choice(method, ("adam", "als"), "method")
        check_between(0.0, 1.0, share=share)
        if ridge is not None:
            check_between(0.0, ridge=ridge)
        if y is None:
            x, y = self._parted(x, horizon)
        if method == "als":
            self._check_steps(known)
        n_in = x.shape[1] if isinstance(x, Tensor) and x.ndim == 3 else 0
        job = Supervised.of(
            _Whole(self, n_in, known is not None, share),
            (x, y) if known is None else (x, y, known),
            partial(self._joined, n_in=n_in),
            "squared",
            n_sweeps=n_sweeps,
            validation=validation,
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        if method == "als":
            return self._fit_steps(job)
        if self.linear is not None and ridge is not None:
            self.linear.fit(job.x[:, :n_in, : self.cell.input_size], job.y, known, ridge)
        return job.by_steps(lr, batch_size, grad_clip=grad_clip)

    def _joined(self, x: Tensor, y: Tensor, known: Tensor | None = None, *, n_in: int) -> tuple[Tensor, Tensor]:
        """Beginnings and what follows as one series, and the latter; it may have fewer numbers a step, or more."""
        x = checked_inputs(x, ("b", n_in or "N_in", "n"), None, "Give all beginnings as many steps, one or more")
        way = "Pass what follows each of the beginnings"
        y = checked_inputs(y, (x.shape[0], "Horizon", self.output_size), None, way, name="y")
        self._check_known(known, *y.shape[:2])
        after = y if known is None else torch.cat((y, known.to(y.dtype)), dim=2)
        width = max(x.shape[2], after.shape[2])
        return torch.cat([F.pad(part, (0, width - part.shape[2])) for part in (x, after)], dim=1), y

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

    def _check_steps(self, known: Tensor | None) -> None:
        cell, size = self.cell, self.output_size
        if (
            known is not None
            or getattr(cell, "activation", "tanh") is not None
            or self.linear is not None
            or not cell.hidden_size == size == cell.input_size
        ):
            raise KindError(
                "alternating least squares needs a cell that says what it holds: expected a HOTTRNNCell with "
                f"activation=None and input_size = hidden_size = output_size = {size}, nothing known ahead and no "
                "linear start. Use method='adam'."
            )

    @torch.no_grad()
    def _fit_steps(self, job: Supervised) -> History:
        """The cell's polynomial by least squares on all true steps."""
        cell, size = self.cell, self.output_size
        series = [job.x] if job.validation is None else [job.x, job.validation[0]]
        steps = [self._steps(one) for one in series]
        made, history = fitted_cores([core.detach() for core in cell.cores], steps, job)
        cell.cores = nn.ParameterList([nn.Parameter(core.to(cell.bias.dtype)) for core in made])
        cell.weight.zero_()
        cell.bias.zero_()
        self.output.weight.copy_(torch.eye(size))
        self.output.bias.zero_()
        self.holds_data = True
        return history

    def _goes_in_one(self, x: Tensor) -> bool:
        """Whether one call of the kernels takes all steps as the modules would, and nobody waits for these."""
        cell = self.cell
        if (
            type(cell) not in _CELLS.values()
            or is_watched(cell)
            or is_watched(self.output)
            or not is_plain(self.output)
        ):
            return False
        return serves(x, (cell.weight, cell.bias, *list_cores(cell.cores), self.output.weight, self.output.bias))

    def _said_in_one(
        self,
        x: Tensor,
        horizon: int,
        start: Tensor | None,
        known: Tensor | None,
        following: Tensor | None,
        share: float,
    ) -> Tensor:
        """All steps at once: what the inputs give is known ahead, and what is said is linear in the state before."""
        cell, size = self.cell, self.output_size
        lags = x.new_zeros(x.shape[0], cell.n_lags, cell.hidden_size)
        if self.holds_data:
            x, lags = self._data_held(x)
        c = torch.zeros_like(lags[:, 0]) if cell.kind == "lstm" else None
        after, own = self._read_ahead(x, horizon - 1, start, known, following, share)
        gates = F.linear(torch.cat((x, after), dim=1), cell.weight, cell.bias)
        feed = None
        if horizon > 1 and self._reads_itself(known):
            feed = self.output.weight.T @ cell.weight[:, :size].T
        course = Course(cell.kind, x.shape[1])
        states = taken(course, gates, lags, c, list_cores(cell.cores), feed, own).states
        said: Tensor = self.output(states[-horizon:].transpose(0, 1))
        return said if start is None else said + start

    def _read_ahead(
        self,
        x: Tensor,
        n_steps: int,
        start: Tensor | None,
        known: Tensor | None,
        following: Tensor | None,
        share: float,
    ) -> tuple[Tensor, Tensor | None]:
        """What is read after ``x``, what the states say left out; and, ``(n_steps, b)``, where it is not left out."""
        if not self._reads_itself(known) or n_steps == 0:
            return x.new_zeros(x.shape[0], n_steps, x.shape[2]), None
        said, own = self.output.bias.expand(x.shape[0], n_steps, -1), None
        if start is not None:
            said = said + start[:, :n_steps]
        if following is not None and share > 0:
            is_true = torch.stack([self._is_true(x, share) for _ in range(n_steps)], dim=1)
            said = torch.where(is_true, following[:, :n_steps].to(x.dtype), said)
            own = (~is_true).to(x.dtype).squeeze(2).T
        return said if known is None else torch.cat((said, known[:, :n_steps].to(x.dtype)), dim=2), own

    def _reads_itself(self, known: Tensor | None) -> bool:
        return self.cell.input_size == self.output_size or known is not None

    def _is_true(self, like: Tensor, share: float) -> Tensor:
        """Which series read the true step, ``(b, 1)``, by chance."""
        return torch.rand(like.shape[0], 1, device=like.device) < share

    def _data_held(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last step, and the steps that a cell which says what it holds should have said."""
        if x.shape[1] < self.cell.n_lags:
            raise DataError(f"a beginning must have the lags of the cell: x has {x.shape[1]} steps.")
        return x[:, -1:], x[:, -self.cell.n_lags :].flip(1)

    def _steps(self, series: Tensor) -> tuple[Tensor, Tensor]:
        """What the cell sees before every step, ``(steps, 1 + n_lags size)``, and that step."""
        n_lags = self.cell.n_lags
        if series.shape[1] <= n_lags:
            raise DataError(
                f"a series must be longer than the lags: it has {series.shape[1]} steps, expected {n_lags + 1} or "
                "more. Pass longer ones, or a cell with fewer lags."
            )
        windows = series.unfold(1, n_lags + 1, 1).movedim(-1, 2)  # b t lags+1 size, oldest first
        lags, following = windows[:, :, :-1].flip(2).flatten(0, 1).flatten(1), windows[:, :, -1].flatten(0, 1)
        return torch.cat((torch.ones_like(lags[:, :1]), lags), dim=1), following

    def _read_beginning(self, x: Tensor) -> Any:
        """The state behind some true steps; a cell that says what it holds is given what it should have said."""
        if self.holds_data:
            last, lags = self._data_held(x)
            return self.cell(last[:, 0], lags)
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state

    def _read(self, said: Tensor, ahead: Tensor | None, following: Tensor | None, k: int, share: float) -> Tensor:
        if not self._reads_itself(ahead):
            return said.new_zeros(said.shape[0], self.cell.input_size)
        if following is not None and share > 0:
            said = torch.where(self._is_true(said, share), following[:, k].to(said.dtype), said)
        return said if ahead is None else torch.cat((said, ahead.to(said.dtype)), dim=1)

    def _check_known(self, known: Tensor | None, n_series: int, horizon: int) -> None:
        if known is None:
            return
        n_known = self.cell.input_size - self.output_size
        way = "Give the cell an input_size of all numbers of a step: those that are forecast, and those known ahead"
        checked_inputs(known, (n_series, horizon, max(n_known, 1)), None, way, name="known")


def _check_cell(cell: object) -> None:
    if not isinstance(cell, nn.Module) or not all(hasattr(cell, name) for name in _OF_A_CELL):
        raise KindError(
            f"a forecaster needs a cell: cell is a {type(cell).__name__}, expected a module with "
            f"{', '.join(_OF_A_CELL)}. Pass a HOTTRNNCell or HOTTLSTMCell."
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
