"""Forecast a season and what is left of it, beside the best forecast that there is.

The series is a season of twelve steps, whose phase is known ahead as a calendar is, and noise that remembers its last
two steps: ``u_t = 1.2 u_{t-1} - 0.5 u_{t-2} + e_t``. So the least error of a forecast k steps ahead is known. A cell
whose gates are products of its last two states learns to go on from 24 steps:

    python examples/forecast_series.py --figure forecast.png
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import tensortrain as tt

PERIOD, N_IN, HORIZON = 12, 24, 12
FIRST, SECOND, NOISE = 1.2, -0.5, 0.2


def series(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Series ``(n, 36, 1)``, and the sine and cosine ``(n, 36, 2)`` of the phase of every next step."""
    generator = torch.Generator().manual_seed(seed)
    n_steps = N_IN + HORIZON
    kicks = NOISE * torch.randn(n, 100 + n_steps, generator=generator)
    left = [torch.zeros(n), torch.zeros(n)]
    for kick in kicks.unbind(1):
        left.append(FIRST * left[-1] + SECOND * left[-2] + kick)
    phase = 2 * math.pi * (torch.randint(0, PERIOD, (n, 1), generator=generator) + torch.arange(n_steps + 1)) / PERIOD
    season = torch.sin(phase) + 0.5 * torch.sin(2 * phase)
    after = phase[:, 1:]
    return (season[:, :-1] + torch.stack(left[-n_steps:], dim=1))[..., None], torch.stack((after.sin(), after.cos()), 2)


def least_errors() -> Tensor:
    """Root mean squares of the best forecasts, 1 to 12 steps ahead."""
    weights = [1.0, FIRST]
    while len(weights) < HORIZON:
        weights.append(FIRST * weights[-1] + SECOND * weights[-2])
    return NOISE * torch.tensor(weights).square().cumsum(0).sqrt()


def learnt(n_sweeps: int, seed: int) -> tt.models.Forecaster:
    generator = torch.Generator().manual_seed(seed)
    x, calendar = series(600, seed)
    cell = tt.models.HOTTLSTMCell(3, 8, n_lags=2, degree=2, rank=2, generator=generator)
    model = tt.models.Forecaster(cell, 1, generator=generator)
    steps = torch.cat((x, calendar), dim=2)
    model.fit(
        steps[:, :N_IN],
        x[:, N_IN:],
        known=calendar[:, N_IN:],
        n_sweeps=n_sweeps,
        lr=0.01,
        generator=generator,
    )
    return model


def draw(path: str, true: Tensor, said: Tensor, errors: Tensor, least: Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(-N_IN, HORIZON), true, color="black", linewidth=1, label="series")
    left.plot(range(HORIZON), said, linewidth=2, label="forecast")
    left.set(xlabel="steps")
    left.legend()
    ahead = range(1, HORIZON + 1)
    right.plot(ahead, errors, "o-", label="forecast")
    right.plot(ahead, least, "--", color="black", label="best possible")
    right.set(xlabel="steps ahead", ylabel="root mean square error", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-sweeps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file to draw to")
    options = parser.parse_args()

    model = learnt(options.n_sweeps, options.seed)
    x, calendar = series(500, options.seed + 1)
    steps = torch.cat((x, calendar), dim=2)
    with torch.no_grad():
        said = model(steps[:, :N_IN], HORIZON, known=calendar[:, N_IN:])
    errors = (said - x[:, N_IN:]).square().mean((0, 2)).sqrt()
    for ahead in (1, 3, 6, 12):
        print(f"{ahead:2} steps ahead: {errors[ahead - 1]:.3f}, best possible {least_errors()[ahead - 1]:.3f}")
    if options.figure:
        draw(options.figure, x[0, :, 0], said[0, :, 0], errors, least_errors())


if __name__ == "__main__":
    main()
