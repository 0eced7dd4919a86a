"""Score networks: their scores by dense sums, the three formats, what is said of their widths."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import torch
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn

from tensortrain.errors import DataError, KindError, RankError, ShapeError
from tensortrain.models import ScoreNetwork, separation_rank
from tensortrain.testing import ModelSuite

T, SIZE, CLASSES, RANK, M = 4, 3, 2, 3, 2
FORMATS = ["tt", "cp", "ht"]
PRODUCTS = ["multiply", "rectify", "softplus"]


def network(dtype: torch.dtype = torch.float64, **options: object) -> ScoreNetwork:
    generator = torch.Generator().manual_seed(0)
    options = {"rank": RANK, "n_features": M} | options
    model = ScoreNetwork(T, SIZE, CLASSES, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def long_way(model: ScoreNetwork, x: Tensor) -> Tensor:
    """Scores by the formulas, one sample and one index at a time."""
    xi = {
        "multiply": lambda a, b: a * b,
        "rectify": lambda a, b: max(a, b, 0.0),
        "softplus": lambda a, b: float(
            torch.logaddexp(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        ),
    }[model.product]
    unit = {"multiply": 1.0, "rectify": 0.0, "softplus": -torch.inf}[model.product]
    cores = [core.detach().double() for core in model.cores]
    scores = torch.zeros(len(x), CLASSES, dtype=torch.float64)
    for b, sample in enumerate(x.double()):
        f = [model.features.detach().double() @ step for step in sample]
        if model.product != "multiply":
            f = [matrix.detach().double() @ row for matrix, row in zip(model.maps, f, strict=True)]
        if model.format == "tt":
            n = len(cores) // CLASSES if model.label == "per-class" else len(cores)
            for y in range(CLASSES):
                chain = cores[y * n : (y + 1) * n] if model.label == "per-class" else list(cores)
                label = None
                if model.label == "middle":
                    label = chain.pop() if model.shared else chain[T // 2]
                if model.shared:
                    chain = [chain[0], *[chain[1]] * (T - 2), chain[-1]]
                if label is not None:
                    chain[T // 2] = label[y]
                state = [unit]
                for row, core in zip(f, chain, strict=True):
                    state = [
                        sum(
                            float(core[a, i, c]) * xi(float(row[i]), state[a])
                            for a in range(core.shape[0])
                            for i in range(core.shape[1])
                        )
                        for c in range(core.shape[2])
                    ]
                scores[b, y] = state[y] if model.label == "last" else state[0]
        elif model.format == "cp":
            for a in range(RANK):
                value = unit
                for row, core in zip(f, cores, strict=False):
                    value = xi(value, float(row @ core[:, a]))
                scores[b] += cores[-1][a] * value
        else:
            leaves = [(row @ core).tolist() for row, core in zip(f, cores, strict=False)]

            def node(left: list[float], right: list[float], core: Tensor) -> list[float]:
                pairs = [[xi(p, q) for q in right] for p in left]
                return [
                    float((torch.tensor(pairs, dtype=torch.float64) * core[:, :, c]).sum())
                    for c in range(core.shape[2])
                ]

            left, right = node(leaves[0], leaves[1], cores[T]), node(leaves[2], leaves[3], cores[T + 1])
            scores[b] = torch.tensor(node(left, right, cores[T + 2]), dtype=torch.float64)
    return scores


class ScoreSuite(ModelSuite):
    options: ClassVar[dict[str, object]] = {}

    def make(self, dtype: torch.dtype) -> ScoreNetwork:
        return network(dtype, **self.options)

    def data(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(9, T, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def exact(self, model: ScoreNetwork, data: Tensor) -> Tensor:
        return long_way(model, data)

    def learn(self, model: ScoreNetwork, **options: object) -> object:
        y = torch.arange(9) % CLASSES
        generator = torch.Generator().manual_seed(2)
        return model.fit(self.data(torch.float64), y, n_sweeps=3, batch_size=4, generator=generator, **options)

    def bad(self, model: ScoreNetwork):
        x = self.data(torch.float32)
        yield DataError, model, (x[:, 1:],)
        yield DataError, model, (x[0],)
        yield DataError, model.fit, (x, torch.full((9,), CLASSES))
        yield DataError, model.fit, (x[:0], torch.zeros(0, dtype=torch.int64))
        yield DataError, model.grid_tensor, (x,)
        yield DataError, model.fit, (x, torch.zeros(9).long()), {"validation": (x, torch.full((9,), CLASSES))}


class TestTT(ScoreSuite):
    pass


class TestSharedMiddle(ScoreSuite):
    options: ClassVar[dict[str, object]] = {"label": "middle", "shared": True}


class TestPerClass(ScoreSuite):
    options: ClassVar[dict[str, object]] = {"label": "per-class", "shared": True}


class TestRectifierMiddle(ScoreSuite):
    options: ClassVar[dict[str, object]] = {"label": "middle", "product": "rectify"}


class TestSoftplus(ScoreSuite):
    options: ClassVar[dict[str, object]] = {"product": "softplus"}


class TestCP(ScoreSuite):
    options: ClassVar[dict[str, object]] = {"format": "cp"}


class TestDeepSoftplus(ScoreSuite):
    options: ClassVar[dict[str, object]] = {"format": "ht", "product": "softplus"}


@pytest.mark.parametrize("n_inputs", range(1, 6))
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("format", FORMATS)
def test_ones_everywhere_give_the_bare_operation(format: str, product: str, n_inputs: int) -> None:
    labels = (
        [("last", False), ("middle", False), ("middle", True), ("per-class", True)]
        if format == "tt"
        else [("last", False)]
    )
    x = torch.randn(6, n_inputs, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n_inputs))
    bare = {"multiply": x.prod(1), "rectify": x.amax(1).clamp_min(0), "softplus": x.logsumexp(1)}[product]
    for label, shared in labels:
        model = ScoreNetwork(
            n_inputs,
            1,
            2,
            format=format,
            rank=1,
            n_features=1,
            product=product,
            label=label,
            shared=shared,
            dtype=torch.float64,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1)
        torch.testing.assert_close(model(x).detach(), bare.expand(-1, 2))


@pytest.mark.parametrize("format", FORMATS)
def test_a_grid_holds_all_sequences(format: str) -> None:
    model, templates = network(format=format), torch.randn(3, SIZE, dtype=torch.float64)
    grid = model.grid_tensor(templates)
    assert grid.shape == (CLASSES, 3, 3, 3, 3)
    for index in itertools.islice(itertools.product(range(3), repeat=T), 0, None, 7):
        torch.testing.assert_close(grid[(slice(None), *index)], model(templates[list(index)][None])[0])


@pytest.mark.parametrize("d,n,r,expected", [(4, 2, 2, 4), (6, 2, 2, 8), (6, 3, 2, 18), (6, 3, 3, 27), (8, 2, 2, 16)])
def test_a_train_of_generic_cores_needs_a_wide_shallow_network(d: int, n: int, r: int, expected: int) -> None:
    """The rank of odd against even positions is a lower bound of the CP rank (Khrulkov et al. 2018, theorem 1)."""
    p = 2**31 - 1
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ranks = [1, *[r] * (d - 1), 1]
        cores = [torch.randint(p, (ranks[k], n, ranks[k + 1]), generator=generator) for k in range(d)]
        whole = cores[0][0]
        for core in cores[1:]:
            products = whole[..., :, None, None] * core % p
            whole = torch.zeros_like(products[..., 0, :, :])
            for a in range(core.shape[0]):
                whole = (whole + products[..., a, :, :]) % p
        assert separation_rank(whole[..., 0], tuple(range(0, d, 2)), modulus=p) == expected
        assert expected >= min(n, r) ** (d // 2)


@pytest.mark.parametrize("format", FORMATS)
def test_moons_and_circles(format: str) -> None:
    if format == "ht":
        pytest.skip("two positions make a tree of one node, which is what tt shows")
    for make, options in ((make_moons, {"noise": 0.1}), (make_circles, {"noise": 0.05, "factor": 0.5})):
        x, y = make(1500, random_state=0, **options)
        x, y = torch.tensor(x, dtype=torch.float32)[..., None], torch.tensor(y)
        torch.manual_seed(0)
        lift = nn.Sequential(nn.Linear(1, 8), nn.Tanh())
        model = ScoreNetwork(2, 1, 2, format=format, rank=6, n_features=8, feature_map=lift)
        history = model.fit(x[:1000], y[:1000], n_sweeps=60, lr=0.02, batch_size=100, validation=(x[1000:], y[1000:]))
        assert history.validation_accuracy[-1] >= 0.98


def test_long_sequences_stay_finite() -> None:
    model = ScoreNetwork(2000, 2, 3, rank=4, n_features=3, dtype=torch.float32)
    scores = model(torch.randn(3, 2000, 2))
    assert bool(torch.isfinite(scores).all())


def test_bad_options_are_refused() -> None:
    with pytest.raises(RankError, match="rank"):
        ScoreNetwork(4, 2, 2, rank=0, n_features=2)
    with pytest.raises(KindError, match="'tt'"):
        ScoreNetwork(4, 2, 2, rank=2, n_features=2, format="cp", shared=True)
    with pytest.raises(KindError, match="product"):
        ScoreNetwork(4, 2, 2, rank=2, n_features=2, product="add")
    with pytest.raises(ShapeError, match="n_features"):
        ScoreNetwork(4, 2, 2, rank=2, n_features=5, feature_map=nn.Linear(2, 3))(torch.rand(1, 4, 2))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0.02, 50.0])
def test_scores_of_no_use_are_settled_before_a_fit(format: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 30, 2, generator=generator) * size
    y = (x[:, 7, 0] > size / 2).long()
    model = ScoreNetwork(30, 2, 2, format=format, rank=3, n_features=3, generator=generator)
    model.fit(x, y, n_sweeps=1, lr=1e-6, generator=generator)
    assert 1e-4 < float(model(x).detach().abs().median()) < 1e4


@pytest.mark.parametrize("format", ["tt", "cp", "ht"])
def test_a_fit_starts_at_scores_that_are_numbers_at_any_length(format: str) -> None:
    """A product of a thousand numbers below 1 is zero in single precision, and jumps beyond the range at twice each."""
    generator = torch.Generator().manual_seed(0)
    model = ScoreNetwork(1000, 3, 2, format=format, rank=3, n_features=4, generator=generator)
    x = torch.rand(8, 1000, 3, generator=generator)
    history = model.fit(x, torch.arange(8) % 2, n_sweeps=1, lr=0.0)
    assert math.isfinite(history.loss[0])
    assert 0.1 <= float(model(x).detach().abs().median()) <= 10
