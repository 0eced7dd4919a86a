"""Higher-order cells: polynomials by the dense tensor, maps recovered to the last digit, forecasts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models import Forecaster, HOTTLSTMCell, HOTTRNNCell
from tensortrain.testing import ModelSuite

H, L, P = 3, 2, 3


def dense_polynomial(cell: HOTTRNNCell | HOTTLSTMCell, lags: Tensor) -> Tensor:
    """The sum over all products of ``(1, lags)`` with the whole tensor of weights."""
    whole = cell.cores[0].detach()[0]
    for core in list(cell.cores)[1:]:
        whole = torch.tensordot(whole, core.detach(), dims=1)
    seen = torch.cat((torch.ones(len(lags), 1, dtype=lags.dtype), lags.flatten(1)), dim=1)
    return torch.einsum("ijkh,bi,bj,bk->bh", whole, seen, seen, seen)


def lags_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, L, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def inputs_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("activation", ["tanh", "relu", None])
def test_a_cell_is_its_polynomial(activation: str | None) -> None:
    cell = HOTTRNNCell(2, H, n_lags=L, degree=P, rank=4, activation=activation, dtype=torch.float64)
    x, lags = inputs_of(), lags_of()
    exact = dense_polynomial(cell, lags) + x @ cell.weight.detach().T + cell.bias.detach()
    exact = {"tanh": torch.tanh, "relu": torch.relu, None: lambda value: value}[activation](exact)
    found = cell(x, lags).detach()
    torch.testing.assert_close(found[:, 0], exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[:, 1], lags[:, 0])  # newest first
    assert cell.cores[0].shape == (1, 1 + L * H, 4)
    assert cell.cores[-1].shape == (4, 1 + L * H, H)


def test_gates_of_an_lstm_cell() -> None:
    cell = HOTTLSTMCell(2, H, n_lags=L, degree=P, rank=4, dtype=torch.float64)
    x, lags = inputs_of(), lags_of()
    c = lags[:, 1] / 2
    gates = dense_polynomial(cell, lags) + x @ cell.weight.detach().T + cell.bias.detach()
    i, g, f, o = gates.chunk(4, dim=1)
    after = c * f.sigmoid() + i.sigmoid() * g.tanh()
    found, state = cell(x, (lags, c))
    torch.testing.assert_close(state.detach(), after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.detach()[:, 0], o.sigmoid() * after.tanh(), rtol=1e-12, atol=1e-12)


class TestForecaster(ModelSuite):
    def make(self, dtype: torch.dtype) -> Forecaster:
        generator = torch.Generator().manual_seed(0)
        cell = HOTTLSTMCell(2, H, n_lags=L, degree=2, rank=2, dtype=dtype, generator=generator)
        model = Forecaster(cell, 2, generator=generator)
        with torch.no_grad():
            model.output.bias.fill_(0.3)
        return model

    def data(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def evaluate(self, model: Forecaster, data: Tensor) -> Tensor:
        return model(data, 3)

    def exact(self, model: Forecaster, data: Tensor) -> Tensor:
        state, said = None, []
        for step in data.double().unbind(1):
            state = model.cell(step, state)
        for _ in range(3):
            said.append(state[0][:, 0] @ model.output.weight.T + model.output.bias)
            state = model.cell(said[-1], state)
        return torch.stack(said, dim=1).detach()

    def learn(self, model: Forecaster, **options: object) -> object:
        x = self.data(torch.float64)
        generator = torch.Generator().manual_seed(2)
        return model.fit(x[:, :2], x[:, 2:], n_sweeps=3, batch_size=4, generator=generator, **options)

    def bad(self, model: Forecaster):
        x = self.data(torch.float32)
        yield DataError, model, (x[0], 3)
        yield DataError, model, (x[..., :1], 3)
        yield DataError, model, (x, 0)
        yield DataError, model.fit, (x, x[..., :1])
        yield DataError, model.fit, (x * torch.nan, x)
        yield KindError, model.fit, (x, x), {"method": "als"}
        yield KindError, model.fit, (x, x), {"method": "magic"}


def logistic(n: int, start: float = 0.37) -> Tensor:
    values = [start]
    for _ in range(n - 1):
        values.append(3.9 * values[-1] * (1 - values[-1]))
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def henon(n: int) -> Tensor:
    values = [(0.1, 0.3)]
    for _ in range(n - 1):
        x, y = values[-1]
        values.append((1 - 1.4 * x * x + y, 0.3 * x))
    return torch.tensor(values, dtype=torch.float64)[None]


@pytest.mark.parametrize(
    "name,series,lags",
    [("logistic", logistic(400), 1), ("henon", henon(400), 1), ("henon, its first number", henon(400)[..., :1], 2)],
)
def test_quadratic_maps_are_recovered(name: str, series: Tensor, lags: int) -> None:
    size = series.shape[2]
    errors = {}
    for degree in (1, 2):
        generator = torch.Generator().manual_seed(0)
        options = {"n_lags": lags, "rank": 3, "activation": None, "dtype": torch.float64, "generator": generator}
        model = Forecaster(HOTTRNNCell(size, size, degree=degree, **options), size)
        history = model.fit(series[:, :200], series[:, 200:300], method="als", n_sweeps=4)
        errors[degree] = history.loss[-1] ** 0.5
        found = model(series[:, 300:310], 8).detach()
        if degree == 2:
            torch.testing.assert_close(found, series[:, 310:318], rtol=0, atol=1e-5)  # errors double at every step
    assert errors[2] < 1e-8
    assert errors[1] > 0.05


def test_what_was_fitted_by_steps_is_saved(tmp_path) -> None:
    series = logistic(100)
    model = Forecaster(HOTTRNNCell(1, 1, n_lags=1, degree=2, rank=2, activation=None, dtype=torch.float64), 1)
    model.fit(series[:, :50], series[:, 50:], method="als", n_sweeps=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(Forecaster.from_pretrained(tmp_path)(series, 5), model(series, 5))


def test_true_steps_are_read_while_training() -> None:
    model = TestForecaster().make(torch.float64)
    x = TestForecaster().data(torch.float64)
    own = model(x[:, :2], 2)
    told = model(x[:, :2], 2, following=x[:, 2:], share=1.0)
    assert torch.equal(own[:, 0], told[:, 0])
    assert not torch.equal(own[:, 1], told[:, 1])


def test_a_sine_goes_on() -> None:
    t = torch.arange(60) * 0.3
    phases = torch.linspace(0, 6, 80)
    series = torch.sin(t + phases[:, None])[..., None]
    cell = HOTTLSTMCell(1, 8, n_lags=2, degree=2, rank=3, generator=torch.Generator().manual_seed(0))
    model = Forecaster(cell, 1, generator=torch.Generator().manual_seed(0))
    history = model.fit(
        series[::2, :20],
        series[::2, 20:30],
        n_sweeps=60,
        lr=0.01,
        batch_size=10,
        generator=torch.Generator().manual_seed(0),
    )
    found = model(series[1::2, :20], 10).detach()
    assert float((found - series[1::2, 20:30]).square().mean()) < 0.05  # of a mean square of one half
    assert history.loss[-1] < history.loss[0] / 5


def test_bad_cells_are_refused() -> None:
    with pytest.raises(RankError, match="degree"):
        HOTTRNNCell(1, 1, n_lags=1, degree=0, rank=1)
    with pytest.raises(KindError, match="activation"):
        HOTTRNNCell(1, 1, n_lags=1, degree=1, rank=1, activation="sine")
    cell = HOTTRNNCell(2, H, n_lags=L, degree=2, rank=2)
    with pytest.raises(DataError, match="newest first"):
        cell(torch.rand(5, 2), torch.rand(5, H))
    assert all(size == 1 for size in itertools.islice(cell.cores[0].shape, 1))


def test_whole_series_will_do() -> None:
    series = henon(200)
    model = Forecaster(HOTTRNNCell(2, 2, n_lags=1, degree=2, rank=3, activation=None, dtype=torch.float64), 2)
    assert model.fit(series, method="als", n_sweeps=4).loss[-1] ** 0.5 < 1e-8
    by_steps = TestForecaster().make(torch.float64).fit(TestForecaster().data(torch.float64), horizon=2, n_sweeps=2)
    assert len(by_steps) == 2
    with pytest.raises(DataError, match="more steps"):
        model.fit(series[:, :1])


class TestKnownAhead(ModelSuite):
    """A forecaster of one number that reads two more which are known ahead."""

    def make(self, dtype: torch.dtype) -> Forecaster:
        generator = torch.Generator().manual_seed(3)
        cell = HOTTRNNCell(3, H, n_lags=L, degree=2, rank=2, dtype=dtype, generator=generator)
        return Forecaster(cell, 1, generator=generator)

    def data(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def evaluate(self, model: Forecaster, data: Tensor) -> Tensor:
        return model(data[:, :4], 3, known=data[:, 4:, 1:])

    def exact(self, model: Forecaster, data: Tensor) -> Tensor:
        state, said = None, []
        for step in data[:, :4].double().unbind(1):
            state = model.cell(step, state)
        for k in range(3):
            said.append(state[:, 0] @ model.output.weight.T + model.output.bias)
            state = model.cell(torch.cat((said[-1], data[:, 4 + k, 1:].double()), dim=1), state)
        return torch.stack(said, dim=1).detach()

    def learn(self, model: Forecaster, **options: object) -> object:
        x = self.data(torch.float64)
        held = (x[:2, :4], x[:2, 4:, :1], x[:2, 4:, 1:])
        generator = torch.Generator().manual_seed(2)
        options = {"n_sweeps": 3, "batch_size": 4, "share": 0.5, "validation": held, "generator": generator} | options
        torch.manual_seed(4)  # decides which true steps are read
        return model.fit(x[:, :4], x[:, 4:, :1], known=x[:, 4:, 1:], **options)

    def bad(self, model: Forecaster):
        x = self.data(torch.float32)
        before, after, known = x[:, :4], x[:, 4:, :1], x[:, 4:, 1:]
        yield DataError, model, (before, 3), {"known": known[:, :2]}
        yield DataError, model, (before, 3), {"known": known[..., :1]}
        yield DataError, model.fit, (before, after), {"known": known * torch.inf}
        yield DataError, model.fit, (before, after), {"known": known, "validation": (before, after)}
        yield DataError, model.fit, (before, after), {"known": known, "validation": (before[:, :3], after, known)}


def test_what_is_known_ahead_decides() -> None:
    x = TestKnownAhead().data(torch.float64)
    model = TestKnownAhead().make(torch.float64)
    own, other = (model(x[:, :4], 3, known=flag * x[:, 4:, 1:]) for flag in (1, 2))
    assert torch.equal(own[:, 0], other[:, 0])  # it stands behind the step that it belongs to
    assert not torch.equal(own[:, 1], other[:, 1])


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_cells_start_as_linear_ones(degree: int) -> None:
    cell = HOTTLSTMCell(2, 8, n_lags=L, degree=degree, rank=3, generator=torch.Generator().manual_seed(0))
    lags = 0.3 * torch.randn(200, L, 8, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(200, 2)
    at_rest = cell.gates(nothing[:1], lags[:1] * 0)
    once, twice = ((cell.gates(nothing, k * lags) - at_rest).detach() for k in (1, 2))
    assert 0.1 < float(once.std()) < 0.6  # as that of a linear layer of usual variance
    assert float((twice - 2 * once).square().mean()) < 0.1 * float(twice.square().mean())


class TestLinearStart(TestKnownAhead):
    """The same with a linear map of the last steps beside the cell."""

    def make(self, dtype: torch.dtype) -> Forecaster:
        generator = torch.Generator().manual_seed(3)
        cell = HOTTRNNCell(3, H, n_lags=L, degree=2, rank=2, dtype=dtype, generator=generator)
        model = Forecaster(cell, 1, linear=(2, 3), generator=generator)
        with torch.no_grad():
            model.output.weight.copy_(torch.randn(1, H, generator=generator, dtype=torch.float64))
            model.linear.weight.copy_(torch.randn(3, 4, 1, generator=generator, dtype=torch.float64))
            model.linear.bias.fill_(0.2)
        return model

    def exact(self, model: Forecaster, data: Tensor) -> Tensor:
        x, known = data[:, :4].double(), data[:, 4:, 1:].double()
        state, said = None, []
        for step in x.unbind(1):
            state = model.cell(step, state)
        for k in range(3):
            seen = torch.cat((x[:, 2:, :1].flatten(1), known[:, k - 1] if k else x[:, -1, 1:]), dim=1)
            start = seen @ model.linear.weight[k].double() + model.linear.bias[k].double()
            said.append(state[:, 0] @ model.output.weight.T + model.output.bias + start)
            state = model.cell(torch.cat((said[-1], known[:, k]), dim=1), state)
        return torch.stack(said, dim=1).detach()

    def bad(self, model: Forecaster):
        x = self.data(torch.float32)
        before, after, known = x[:, :4], x[:, 4:, :1], x[:, 4:, 1:]
        yield DataError, model, (before[:, :1], 3), {"known": known}
        yield DataError, model, (before, 4), {"known": torch.cat((known, known[:, :1]), dim=1)}
        yield DataError, model.fit, (before, after[:, :2]), {"known": known[:, :2]}
        yield RankError, model.fit, (before, after), {"known": known, "ridge": -1.0}
        yield KindError, model.fit, (before, after), {"known": known, "method": "als"}


def autoregression(n: int) -> Tensor:
    """Series that a linear map says exactly, ten steps long: ``x_t = 1.2 x_{t-1} - 0.5 x_{t-2}``."""
    steps = list(torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for _ in range(8):
        steps.append(1.2 * steps[-1] - 0.5 * steps[-2])
    return torch.stack(steps, dim=1)[..., None]


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_a_linear_start_is_exact(ridge: float) -> None:
    series = autoregression(30)
    cell = HOTTLSTMCell(1, 4, n_lags=2, degree=2, rank=2, dtype=torch.float64)
    model = Forecaster(cell, 1, linear=(2, 4))
    model.fit(series[:20], horizon=4, n_sweeps=1, lr=1e-12, ridge=ridge)
    torch.testing.assert_close(model(series[20:, :6], 4), series[20:, 6:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [8, 60])  # fewer series than numbers that the maps see, and more
def test_a_linear_start_is_ridge_regression(n: int) -> None:
    x = torch.randn(n, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    cell = HOTTRNNCell(2, 4, n_lags=2, degree=2, rank=2, dtype=torch.float64)
    model = Forecaster(cell, 2, linear=(5, 3))
    model.fit(x, y, n_sweeps=1, lr=1e-12, ridge=0.7)
    seen = x[:, 1:].flatten(1)
    centred, left = seen - seen.mean(0), y[:, 1] - y[:, 1].mean(0)
    weight = torch.linalg.solve(centred.T @ centred + 0.7 * torch.eye(10, dtype=torch.float64), centred.T @ left)
    torch.testing.assert_close(model(x, 3)[:, 1].detach(), centred @ weight + y[:, 1].mean(0))


def test_a_linear_start_stays_where_it_is_asked_to(tmp_path) -> None:
    series = autoregression(20)
    model = Forecaster(HOTTLSTMCell(1, 4, n_lags=2, degree=2, rank=2, dtype=torch.float64), 1, linear=[2, 4])
    model.fit(series, horizon=4, n_sweeps=1)
    before = model.linear.weight.clone()
    model.fit(series * 2 + torch.rand(series.shape), horizon=4, n_sweeps=1, ridge=None)
    assert torch.equal(model.linear.weight, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(Forecaster.from_pretrained(tmp_path)(series, 4), model(series, 4))
