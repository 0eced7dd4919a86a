"""Forecasts by linear maps of the last steps, one for each step ahead: least squares in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tensortrain.errors import DataError
from tensortrain.models.checks import checked_sizes

__all__ = ["LinearForecast"]


class LinearForecast(nn.Module):
    """``(b, horizon, output_size)`` of the last steps and, for each step ahead, of what is known of it.

    Args:
        output_size: Numbers of a step that are forecast, the first ones of a step that is read.
        n_known: Further numbers of a step: what is known ahead of the step after it.
        shape: ``(lags, horizon)``: steps that the maps see, and steps ahead that have a map.
        like: Gives dtype and device.

    Attributes:
        weight: ``(horizon, n_lags output_size + n_known, output_size)``; zero until it is fitted, and not trained by
            steps.
        bias: ``(horizon, output_size)``.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, output_size: int, n_known: int, shape: Sequence[int], like: Tensor) -> None:
        super().__init__()
        if len(shape) != 2 or n_known < 0:
            raise DataError(
                f"a linear start must have lags and a horizon, for a cell that reads what is forecast: linear is "
                f"{shape} and a step has {output_size + n_known} numbers, expected two sizes and {output_size} numbers "
                "or more. Pass linear=(lags, horizon)."
            )
        self.output_size, self.n_known = output_size, n_known
        self.n_lags, self.horizon = checked_sizes(lags=shape[0], horizon=shape[1])
        n_seen = self.n_lags * output_size + n_known
        self.register_buffer("weight", like.detach().new_zeros(self.horizon, n_seen, output_size))
        self.register_buffer("bias", like.detach().new_zeros(self.horizon, output_size))

    def forward(self, x: Tensor, horizon: int, known: Tensor | None = None) -> Tensor:
        """Arguments as of ``Forecaster.forward``."""
        self.check(x, horizon)
        rows = [self._row(x, known, k) for k in range(horizon)]
        return torch.stack([row @ self.weight[k] + self.bias[k] for k, row in enumerate(rows)], dim=1)

    def check(self, x: Tensor, horizon: int) -> None:
        """Refuse beginnings that are too short, and forecasts that are too long.

        Raises:
            DataError: They are.
        """
        if x.shape[1] < self.n_lags or horizon > self.horizon:
            raise DataError(
                f"a linear start must see its lags and have a map for every step: x has {x.shape[1]} steps and the "
                f"horizon is {horizon}, expected at least {self.n_lags} and at most {self.horizon}. Build the "
                "forecaster with linear=(lags, horizon) as they are needed."
            )

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, known: Tensor | None, penalty: float) -> None:
        """Least squares of what follows, with ``penalty`` times the squares of the weights; solved in float64.

        Cost: O(horizon (b m^2 + m^3)) flops for the m numbers that a map sees.
        """
        self.check(x, y.shape[1])
        if y.shape[1] != self.horizon:
            raise DataError(
                f"a linear start must be fitted for all of its steps: y has {y.shape[1]} steps, expected "
                f"{self.horizon}. Pass what follows as far as it goes."
            )
        for k in range(y.shape[1]):
            row, target = self._row(x, known, k).double(), y[:, k].double()
            centre, mean = row.mean(0), target.mean(0)
            row, target = row - centre, target - mean
            weight = _ridge(row, target, penalty)
            self.weight[k], self.bias[k] = weight, mean - centre @ weight

    def _row(self, x: Tensor, known: Tensor | None, k: int) -> Tensor:
        """What the map of step k sees: ``(b, n_lags output_size + n_known)``."""
        lags = x[:, -self.n_lags :, : self.output_size].flatten(1)
        if not self.n_known:
            return lags
        ahead = x.new_zeros(x.shape[0], self.n_known)
        if known is not None:
            ahead = x[:, -1, self.output_size :] if k == 0 else known[:, k - 1].to(x.dtype)
        return torch.cat((lags, ahead), dim=1)


def _ridge(row: Tensor, target: Tensor, penalty: float) -> Tensor:
    """The weights ``(m, n)`` that are best for rows ``(b, m)``, through the smaller of the two Gram matrices."""
    if len(row) < row.shape[1] and penalty > 0:
        gram = row @ row.T
        return row.T @ torch.linalg.solve(gram + penalty * torch.eye(len(row)).to(gram), target)
    if penalty == 0:
        return torch.linalg.pinv(row) @ target  # the smallest of them
    gram = row.T @ row
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), row.T @ target)
