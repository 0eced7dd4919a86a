"""Exponential machines: every interaction by the dense weight, linear models, learning on the manifold."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models import ExponentialMachine
from tensortrain.models.unfolded_gradient import UnfoldedGradient
from tensortrain.testing import ModelSuite


def machine(dtype: torch.dtype = torch.float64, **options: object) -> ExponentialMachine:
    generator = torch.Generator().manual_seed(0)
    model = ExponentialMachine(4, **{"rank": 3, **options}, dtype=dtype)
    with torch.no_grad():
        for core in model.cores:
            core.copy_(torch.randn(core.shape, generator=generator, dtype=torch.float64))
    return model


def examples(dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(15, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 2] = torch.arange(15) % 3
    return x.to(dtype)


def by_subsets(model: ExponentialMachine, x: Tensor) -> Tensor:
    """The sum over all interactions, one by one."""
    weights = model.tensor.to_dense()
    total = torch.zeros(len(x), *weights.shape[4:], dtype=weights.dtype)
    for index in itertools.product(*map(range, weights.shape[:4])):
        factor = torch.ones(len(x), dtype=weights.dtype)
        for k, i in enumerate(index):
            if model.n_values[k]:
                factor = factor * (1.0 if i == 0 else (x[:, k] == i - 1).to(weights.dtype))
            elif i:
                factor = factor * x[:, k].to(weights.dtype)
        total += weights[index] * (factor[:, None] if total.ndim == 2 else factor)
    return total


class ExponentialSuite(ModelSuite):
    outputs = 1
    values: tuple[int, ...] | None = None
    method = "riemannian"
    batch: int | None = None

    def make(self, dtype: torch.dtype) -> ExponentialMachine:
        return machine(dtype, n_outputs=self.outputs, n_values=self.values, rank=2)

    def data(self, dtype: torch.dtype) -> Tensor:
        return examples(dtype)

    def exact(self, model: ExponentialMachine, data: Tensor) -> Tensor:
        return by_subsets(model, data)

    def learn(self, model: ExponentialMachine, **options: object) -> object:
        x = examples()
        y = x[:, :2] * 0.3 if self.outputs == 2 else x[:, 0] * x[:, 1]
        generator = torch.Generator().manual_seed(2)
        return model.fit(x, y, n_sweeps=3, method=self.method, batch_size=self.batch, generator=generator, **options)

    def bad(self, model: ExponentialMachine):
        x = examples(torch.float32)
        yield DataError, model, (x[:, :3],)
        yield DataError, model, (x * torch.nan,)
        yield DataError, model.fit, (x[:0], x[:0, 0])
        yield DataError, model.fit, (x, x)
        yield KindError, model.fit, (x, x[:, 0]), {"method": "magic"}
        yield KindError, model.fit, (x, x[:, 0]), {"loss": "absolute"}
        good = x[:, :2] if self.outputs == 2 else x[:, 0]
        yield DataError, model.fit, (x, good), {"validation": (x[:, :3], good)}


class TestNumbers(ExponentialSuite):
    batch = 5


class TestAllAtOnce(ExponentialSuite):
    pass


class TestAllCategories(ExponentialSuite):
    values = (3, 2, 3, 4)
    method = "adam"

    def data(self, dtype: torch.dtype) -> Tensor:
        every = torch.cartesian_prod(*map(torch.arange, (3, 2, 3, 4)))
        return every[:: 5 if dtype == torch.float64 else 7].to(dtype)

    def learn(self, model: ExponentialMachine, **options: object) -> object:
        x, generator = self.data(torch.float64), torch.Generator().manual_seed(2)
        return model.fit(x, x[:, 0] * x[:, 3], n_sweeps=3, method="adam", batch_size=4, generator=generator, **options)

    def bad(self, model: ExponentialMachine):
        x = self.data(torch.float32)
        yield DataError, model, (x + 1,)
        yield DataError, model, (x - 0.5,)
        yield DataError, model, (x * torch.nan,)


class TestWholeGradient(ExponentialSuite):
    values = (0, 0, 3, 0)
    order: int | None = 3

    def learn(self, model: ExponentialMachine, **options: object) -> object:
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x[:, 2] = torch.arange(300) % 3
        y = x[:, 0] * x[:, 1] * (x[:, 2] == 1) + x[:, 3]
        return model.fit(x, y, n_sweeps=3, method="gradient", order=self.order, max_rank=4, **options)

    def bad(self, model: ExponentialMachine):
        x = examples(torch.float32)
        y, gradient = x[:, 0], {"method": "gradient"}
        yield DataError, model.fit, (x[:0], y[:0]), gradient
        yield RankError, model.fit, (x, y), gradient | {"order": 0}
        yield RankError, model.fit, (x, y), gradient | {"max_rank": 0}
        yield KindError, model.fit, (x, y), gradient | {"penalty": 1.0}
        yield RankError, ExponentialMachine(1, rank=1).fit, (x[:, :1], y), gradient
        yield RankError, ExponentialMachine(60, rank=2).fit, (torch.randn(5, 60), y[:5]), gradient
        yield KindError, machine(n_outputs=2).fit, (x.double(), x[:, :2].double()), gradient


class TestDirections(TestWholeGradient):
    order = None


class TestCategories(ExponentialSuite):
    values = (0, 0, 3, 0)
    method = "adam"


class TestOutputs(ExponentialSuite):
    outputs = 2
    method = "adam"


def test_categories_outside_their_feature_are_refused() -> None:
    model = machine(n_values=(0, 0, 2, 0))
    with pytest.raises(DataError, match="column 2"):
        model(examples())


def test_a_linear_model_is_exact_at_rank_two() -> None:
    x = examples()
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    model = ExponentialMachine.from_linear(weight, 0.25, rank=2)
    torch.testing.assert_close(model(x).detach(), x @ weight + 0.25, rtol=1e-13, atol=1e-13)
    wider = ExponentialMachine.from_linear(weight, 0.25, rank=4, generator=torch.Generator().manual_seed(0))
    assert max(wider.ranks) == 4
    assert 0 < float((wider(x) - model(x)).detach().abs().max()) < 0.1
    single = ExponentialMachine.from_linear(weight[:1], 0.25, rank=2)
    torch.testing.assert_close(single(x[:, :1]).detach(), x[:, 0] + 0.25)
    with pytest.raises(RankError, match="rank 2"):
        ExponentialMachine.from_linear(weight, 0.25, rank=1)


def test_a_teacher_is_found_to_the_last_digit() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3000, 8, generator=generator, dtype=torch.float64).sign()
    weight = torch.randn(8, generator=generator, dtype=torch.float64)
    more = tt.randn((2,) * 8, 2, generator=generator, dtype=torch.float64)
    linear = ExponentialMachine.from_linear(weight, 0.1, rank=2).tensor
    teacher = ExponentialMachine(8, rank=4, dtype=torch.float64)
    teacher._take(list((linear + more * (0.5 * linear.norm() / more.norm())).cores))
    y = teacher(x).detach()
    start = torch.linalg.lstsq(torch.cat((x, torch.ones(3000, 1, dtype=torch.float64)), 1), y).solution
    model = ExponentialMachine.from_linear(start[:8], start[8], rank=4, generator=generator)
    history = model.fit(x, y, n_sweeps=400)
    assert history.loss[-1] ** 0.5 < 1e-8
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(history.loss[:50]))


def test_an_interaction_that_linear_models_miss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator).sign()
    y = (x[:, 0] * x[:, 2] * x[:, 5] > 0).float()
    model = ExponentialMachine(6, rank=4, generator=torch.Generator().manual_seed(1))
    history = model.fit(
        x[:2000], y[:2000], loss="logistic", n_sweeps=100, validation=(x[2000:], y[2000:]), penalty=1e-4
    )
    assert history.validation_accuracy[-1] >= 0.99


@pytest.mark.parametrize("order", [None, 3])
def test_the_whole_gradient_is_that_of_the_dense_weights(order: int | None) -> None:
    generator, modes = torch.Generator().manual_seed(0), (2, 3, 2, 2, 3)
    vectors = [torch.randn(40, n, generator=generator, dtype=torch.float64) for n in modes]
    for vector in vectors:
        vector[:, 0] = 1.0
    numbers = torch.randn(40, generator=generator, dtype=torch.float64)
    gradient = UnfoldedGradient(modes, order, lambda: vectors)
    found = torch.zeros(modes, dtype=torch.float64)
    for block, (rows, n) in zip(gradient.blocks(numbers), gradient.counts, strict=True):
        for i, word in enumerate(gradient.halves[0].words[rows]):
            for j in range(n):
                found[(*word, *gradient.halves[1].words[j])] = block[i, j]
    normal = [
        torch.cat((v[:, :1], (v[:, 1:] - v[:, 1:].mean(0)) / v[:, 1:].std(0, correction=0)), dim=1) for v in vectors
    ]
    exact = torch.einsum("z,za,zb,zc,zd,ze->abcde", numbers, *normal) / 40
    degree = torch.tensor([sum(i > 0 for i in index) for index in itertools.product(*map(range, modes))])
    exact = torch.where(degree.view(modes) <= (order or 5), exact, 0.0)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)
    # Its cores stand for the same function of the features as they are.
    cores = gradient._sum_of_products(gradient_words(modes), exact.flatten()[: 2 * 3 * 2 * 2 * 3])
    weights = tt.TensorTrain(tuple(cores)).to_dense()
    values = torch.einsum("abcde,za,zb,zc,zd,ze->z", weights, *vectors)
    torch.testing.assert_close(values, torch.einsum("abcde,za,zb,zc,zd,ze->z", exact, *normal), rtol=1e-9, atol=1e-11)


def gradient_words(modes: tuple[int, ...]) -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, modes))


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_products_of_few_features_among_many_are_found(low: float) -> None:
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (6000, 14), generator=generator) * 2.0 - 1
    y = (signs[:, [0, 4, 9, 12]].prod(1) + 0.6 * signs[:, [2, 3, 7, 13]].prod(1) > 0).float()
    x = signs if low == -1 else (signs + 1) / 2
    model = ExponentialMachine(14, rank=4, generator=generator)
    assert model.fit(x[:5000], y[:5000], loss="logistic", method="gradient", order=3).stop == "noise"
    assert max(model.ranks) == 4  # and is as it was
    history = model.fit(
        x[:5000], y[:5000], loss="logistic", method="gradient", order=4, n_sweeps=2, validation=(x[5000:], y[5000:])
    )
    assert history.validation_accuracy[-1] == 1.0


@pytest.mark.parametrize("order", [None, 2])
def test_the_whole_gradient_of_a_model_in_half_precision(order: int | None) -> None:
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)).sign()
    model = ExponentialMachine(6, rank=2, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    history = model.fit(x, x[:, 1] * x[:, 4], method="gradient", order=order, n_sweeps=1)
    assert history.loss[-1] < 0.3
    assert model.cores[0].dtype == torch.bfloat16


def test_a_teacher_far_from_linear_is_found_from_the_whole_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    true = tt.randn((2,) * 12, 3, generator=generator, dtype=torch.float64)
    teacher = ExponentialMachine(12, rank=3, dtype=torch.float64)
    teacher._put(true)
    x = torch.randint(0, 2, (3000, 12), generator=generator).double() * 2 - 1
    y = teacher(x).detach()
    y = y / y.abs().median()
    model = ExponentialMachine(12, rank=3, generator=generator, dtype=torch.float64)
    model.fit(x, y, loss="huber", method="gradient", n_sweeps=1)
    model.fit(x, y, loss="huber", n_sweeps=150, tol=1e-6)
    model.fit(x, y, n_sweeps=30)
    assert float((model(x) - y).detach().square().mean().sqrt()) < 1e-8


def test_a_start_that_is_perfect_has_a_history_all_the_same() -> None:
    model = machine()
    x = examples()
    history = model.fit(x, model(x).detach(), n_sweeps=5)
    assert history.stop in ("gradient", "stagnated", "max_steps")
    assert history.loss[-1] < 1e-20


def test_a_gradient_of_too_many_weights_is_refused_before_anything_is_made() -> None:
    with pytest.raises(RankError, match="smaller order"):
        UnfoldedGradient((2,) * 100, 6, pytest.fail)
    with pytest.raises(RankError, match="smaller order"):
        UnfoldedGradient((4000,) * 4, 2, pytest.fail)


def test_noise_is_not_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 10, generator=generator)
    y = torch.randint(0, 2, (3000,), generator=generator).float()
    model = ExponentialMachine(10, rank=2, generator=generator)
    assert model.fit(x, y, loss="logistic", method="gradient", order=2).stop == "noise"
    found = model(x).detach()  # the share of ones is known now, and nothing else
    assert abs(float(found.mean())) < 0.14  # 3.8 spreads of a mean of 3,000
    assert float(found.std()) < 0.02


def test_a_penalty_keeps_the_weights_small() -> None:
    x, y = examples(), examples()[:, 0]
    free, held = (machine().fit(x, y, n_sweeps=30, penalty=penalty) for penalty in (0.0, 1.0))
    assert free.loss[-1] < held.loss[-1]


def test_many_features_stay_finite() -> None:
    model = ExponentialMachine(2000, rank=3, dtype=torch.float32)
    found = model(torch.randn(4, 2000))
    assert bool(torch.isfinite(found).all())
    found.sum().backward()
    assert all(bool(torch.isfinite(core.grad).all()) for core in model.cores)


@pytest.mark.parametrize("values", [None, (0, 0, 3, 0), (2, 3, 2, 4)])
@pytest.mark.parametrize("outputs", [1, 3])
def test_missing_features_are_summed_out(values: tuple[int, ...] | None, outputs: int) -> None:
    model = machine(n_values=values, n_outputs=outputs)
    sizes = values or (0, 0, 0, 0)
    columns = [torch.arange(15) % n if n else torch.linspace(-1, 1, 15) for n in sizes]
    x = torch.stack([column.double() for column in columns], dim=1)
    lacks = torch.zeros(15, 4, dtype=torch.bool)
    lacks[3:9, 0] = lacks[5:, 2] = True
    grids = [range(n) if n else (-0.7, 0.7) for n in (sizes[0], sizes[2])]  # of mean 0
    found = []
    for first, third in itertools.product(*grids):
        filled = x.clone()
        filled[lacks[:, 0], 0], filled[lacks[:, 2], 2] = float(first), float(third)
        found.append(model(filled))
    mean = torch.stack(found).mean(0)
    torch.testing.assert_close(model(x, missing=lacks), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x.masked_fill(lacks, torch.nan), missing="nan"), mean, rtol=1e-12, atol=1e-12)
    assert model(x[:0], missing="nan").shape[0] == 0
    with pytest.raises(DataError, match="missing='nan'"):
        model(x * torch.nan)
    with pytest.raises(DataError, match="one by one"):
        model(x, missing=lacks[:3])
    with pytest.raises(KindError, match="missing"):
        model(x, missing="mean")
