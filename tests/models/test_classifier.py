"""MPS classifiers: scores by the dense weight, labels that move, both ways of learning."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tensortrain.errors import DataError, KindError, ModeIndexError, RankError
from tensortrain.models import MPSClassifier
from tensortrain.models.features import FEATURE_MAPS
from tensortrain.testing import ModelSuite

N, CLASSES = 5, 3


def classifier(dtype: torch.dtype = torch.float64, **options: object) -> MPSClassifier:
    generator = torch.Generator().manual_seed(0)
    model = MPSClassifier(N, CLASSES, **{"bond_dim": 3, **options}, dtype=dtype)
    with torch.no_grad():
        for parameter in model.cores:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def examples(dtype: torch.dtype = torch.float64, n: int = 12) -> Tensor:
    return torch.rand(n, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def labels(n: int = 12) -> Tensor:
    return torch.randint(0, CLASSES, (n,), generator=torch.Generator().manual_seed(2))


def dense_scores(model: MPSClassifier, x: Tensor) -> Tensor:
    vectors = [model.features(x)[k] for k in range(N)]
    scores = []
    for label in range(CLASSES):
        whole = None
        for k, core in enumerate(model.cores):
            core = core.detach()
            core = core[label] if core.ndim == 4 else core
            whole = core[0] if whole is None else torch.tensordot(whole, core, dims=1)
            assert k < N
        assert whole is not None
        scores.append(torch.einsum("abcde,za,zb,zc,zd,ze->z", whole[..., 0], *vectors))
    return torch.stack(scores, dim=1)


class ClassifierSuite(ModelSuite):
    options: ClassVar[dict[str, object]] = {}
    method = "two-site"

    def make(self, dtype: torch.dtype) -> MPSClassifier:
        return classifier(dtype, **self.options)

    def data(self, dtype: torch.dtype) -> Tensor:
        return examples(dtype)

    def exact(self, model: MPSClassifier, data: Tensor) -> Tensor:
        return dense_scores(model, data.to(model.cores[0].dtype))

    def learn(self, model: MPSClassifier, **options: object) -> object:
        generator = torch.Generator().manual_seed(5)
        return model.fit(
            examples(), labels(), n_sweeps=3, method=self.method, batch_size=5, generator=generator, **options
        )

    def bad(self, model: MPSClassifier):
        x = examples(torch.float32)
        yield DataError, model, (x * 300,)
        yield DataError, model, (x.log(),)
        yield DataError, model, (x * torch.nan,)
        yield DataError, model, (x[:, 1:],)
        yield DataError, model, (x[0],)
        yield DataError, model.fit, (x, labels() + 1)
        yield DataError, model.fit, (x, labels()[1:])
        yield DataError, model.fit, (x, labels().double())
        yield DataError, model.fit, (x[:0], labels()[:0])
        yield KindError, model.fit, (x, labels()), {"method": "magic"}


class TestMiddle(ClassifierSuite):
    pass


class TestFirst(ClassifierSuite):
    options: ClassVar[dict[str, object]] = {"label": 0, "feature_map": "poly"}


class TestLast(ClassifierSuite):
    options: ClassVar[dict[str, object]] = {"label": "last", "feature_map": "fourier"}
    method = "adam"


class TestPerClass(ClassifierSuite):
    options: ClassVar[dict[str, object]] = {"label": "per-class", "feature_map": "linear"}
    method = "adam"


def test_a_label_moves_and_nothing_changes() -> None:
    model, x = classifier(), examples()
    before = model(x).detach()
    for site in (4, 0, 2, 3):
        assert model.move_label_(site) is model
        assert model.label == site
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-10, atol=1e-10)
    with pytest.raises(ModeIndexError, match="0 to 4"):
        model.move_label_(5)
    with pytest.raises(KindError, match="per-class"):
        classifier(label="per-class").move_label_(0)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps(name: str) -> None:
    model = classifier(feature_map=name)
    x = examples().round() if name == "one-hot" else examples()
    torch.testing.assert_close(model(x).detach(), dense_scores(model, x))
    if name == "one-hot":
        assert torch.equal(model.features(torch.tensor([[0.0, 1.0]]))[:, 0], torch.eye(2))
        with pytest.raises(DataError, match="0 or 1"):
            model(examples())


class Powers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((torch.ones_like(x), self.scale * x, x**2), dim=-1)


def test_a_feature_map_of_ones_own_learns_too() -> None:
    model = classifier(feature_map=Powers())
    assert model.cores[0].shape == (1, 3, 3)
    x = examples() * 5 - 2  # its own range
    torch.testing.assert_close(model(x).detach(), dense_scores(model, x))
    model(x).sum().backward()
    assert model.features.module.scale.grad != 0
    with pytest.raises(KindError, match="named feature map"):
        model.save_pretrained("nowhere")


class Waves(nn.Module):
    """Orthonormal on [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((torch.ones_like(x), 2**0.5 * (torch.pi * x).cos(), 2**0.5 * (2 * torch.pi * x).cos()), -1)


@pytest.mark.parametrize("name", [*FEATURE_MAPS, Powers(), Waves()], ids=str)
def test_missing_features_are_summed_out(name: str | nn.Module) -> None:
    model, x = classifier(feature_map=name), examples()
    x = x.round() if name == "one-hot" else x
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    nodes = torch.tensor([0.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    if name != "one-hot":
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(10))
        nodes, weights = (nodes + 1) / 2, weights / 2
    for row, lacks in zip(x, missing, strict=True):
        sites = torch.nonzero(lacks)[:, 0].tolist()
        every = row.expand(len(nodes) ** len(sites), N).clone()
        share = torch.ones(len(every), dtype=torch.float64)
        for which, site in enumerate(sites):
            digit = torch.arange(len(every)) // len(nodes) ** which % len(nodes)
            every[:, site], share = nodes[digit], share * weights[digit]
        mean = (model(every).detach() * share[:, None]).sum(0)
        torch.testing.assert_close(model(row[None], missing=lacks[None]).detach()[0], mean, rtol=1e-9, atol=1e-9)


def test_nan_is_missing_where_it_is_said_to_be() -> None:
    model, x = classifier(), examples()
    missing = x < 0.3
    holed = x.masked_fill(missing, torch.nan)
    assert torch.equal(model(holed, missing="nan"), model(x, missing=missing))
    assert torch.equal(model(x, missing="nan"), model(x))
    with pytest.raises(DataError, match="NaN"):
        model(holed)
    with pytest.raises(DataError, match="one by one"):
        model(x, missing=missing[0])
    with pytest.raises(KindError, match="missing"):
        model(x, missing="none")


def test_a_feature_map_may_have_a_mean_of_its_own() -> None:
    features = Powers()
    features.mean = lambda: torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64)
    model, x = classifier(feature_map=features), examples()
    vectors = model.features(x)
    vectors[2] = features.mean()
    missing = torch.zeros_like(x, dtype=torch.bool)
    missing[:, 2] = True
    torch.testing.assert_close(model(x, missing=missing), model._scores(vectors))


# -- laws of classes -----------------------------------------------------------------------------------


def examples_of(values: Tensor) -> Tensor:
    return torch.cartesian_prod(*[values] * N)


LAWS = [
    ("one-hot", None, "middle"),
    ("one-hot", None, "per-class"),
    ("trig", torch.linspace(0, 1, 3), 0),
    ("poly", torch.tensor([0.2, 0.9]), "last"),
    (Waves(), torch.tensor([0.1, 0.5, 0.8]), "middle"),
]


@pytest.mark.parametrize(("feature_map", "values", "label"), LAWS, ids=str)
def test_the_law_of_a_class_is_its_squared_scores(
    feature_map: str | nn.Module, values: Tensor | None, label: int | str
) -> None:
    model = classifier(feature_map=feature_map, label=label)
    grid = (torch.tensor([0.0, 1.0]) if values is None else values).double()
    x = examples_of(grid)
    numbers = torch.cartesian_prod(*[torch.arange(len(grid))] * N)
    square = model(x).detach().square()
    for k in range(CLASSES):
        law = model.law(k, values=values)
        torch.testing.assert_close(law.log_prob(numbers).exp().detach(), square[:, k] / square[:, k].sum())


def test_samples_of_a_class_have_its_law() -> None:
    model, n = classifier(feature_map="one-hot"), 9000
    x, labels = examples_of(torch.tensor([0.0, 1.0], dtype=torch.float64)), torch.arange(n) % CLASSES
    given = torch.tensor([torch.nan, 1.0, torch.nan, torch.nan, 0.0], dtype=torch.float64)
    for condition in (None, given, given.expand(n, N)):
        square = model(x).detach().square()
        if condition is not None:
            square = square * ((x[:, 1] == 1) & (x[:, 4] == 0))[:, None]
        drawn = model.sample(n, label=labels, given=condition, generator=torch.Generator().manual_seed(0))
        assert drawn.dtype == torch.float64
        for k in range(CLASSES):
            law = square[:, k] / square[:, k].sum()
            counts = (drawn[labels == k][:, None] == x).all(-1).double().mean(0)
            assert bool(((counts - law).abs() <= 4.5 * (law * (1 - law) * CLASSES / n).sqrt() + 1e-12).all())
    grid = torch.tensor([0.25, 0.75], dtype=torch.float64)
    few = classifier(feature_map="fourier").sample(50, label=1, values=grid, generator=torch.Generator().manual_seed(0))
    assert set(few.unique().tolist()) == {0.25, 0.75}


def test_a_class_of_a_long_chain_is_sampled() -> None:
    model = MPSClassifier(600, 3, bond_dim=4, feature_map="one-hot", generator=torch.Generator().manual_seed(0))
    drawn = model.sample(5, label=2, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 600)
    assert bool(torch.isfinite(model.law(2).log_prob(drawn.long())).all())


def test_laws_that_there_are_not_are_refused() -> None:
    model, bits = classifier(), classifier(feature_map="one-hot")
    nothing = torch.full((N,), torch.nan)
    for error, match, call in (
        (KindError, "values=", lambda: model.law(0)),
        (KindError, "values=", lambda: model.sample(2, label=0)),
        (DataError, "labels", lambda: bits.law(CLASSES)),
        (DataError, "labels", lambda: bits.sample(2, label=torch.tensor([0, 1, 2]))),
        (DataError, "0 or 1", lambda: bits.law(0, values=[0.0, 0.5])),
        (DataError, "different", lambda: model.law(0, values=[0.5, 0.5])),
        (DataError, r"\[0, 1\]", lambda: model.law(0, values=[0.5, 2.0])),
        (DataError, "others", lambda: bits.sample(2, label=0, given=nothing.masked_fill(torch.arange(N) == 1, 0.5))),
        (DataError, "NaN", lambda: bits.sample(2, label=0, given=nothing[1:])),
        (DataError, "NaN", lambda: bits.sample(2, label=0, given=torch.full((N,), -1))),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("n", [784, 2000])
@pytest.mark.parametrize("name", ["trig", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_chains_stay_finite(dtype: torch.dtype, name: str, n: int) -> None:
    model = MPSClassifier(n, 3, bond_dim=4, feature_map=name, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = torch.stack((torch.rand(n), torch.zeros(n), torch.ones(n), torch.full((n,), 0.5))).to(dtype)
    scores = model(x)
    assert scores.dtype == dtype
    assert bool(torch.isfinite(scores).all())
    nn.functional.cross_entropy(scores.float(), torch.tensor([0, 1, 2, 0])).backward()
    assert all(bool(torch.isfinite(core.grad).all()) for core in model.cores)


def test_least_squares_never_get_worse_without_cuts() -> None:
    losses = []
    model, x, y = classifier(), examples(n=40), labels(40)
    target = nn.functional.one_hot(y, CLASSES).double()

    def look(history: object) -> None:
        losses.append(float((model(x).detach() - target).square().mean()))

    model.fit(x, y, n_sweeps=6, max_bond=50, cutoff=0.0, observer=look)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))


def test_digits_two_site() -> None:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    model = MPSClassifier(64, 10, bond_dim=5, generator=torch.Generator().manual_seed(0))
    history = model.fit(x[:1437], y[:1437], max_bond=20, n_sweeps=2, validation=(x[1437:], y[1437:]))
    assert history.validation_accuracy[-1] >= 0.97
    assert model.label == 0
    assert max(model.ranks) <= 20
    right = (model(x[1437:]).argmax(1) == y[1437:]).float().mean()
    assert float(right) == pytest.approx(history.validation_accuracy[-1])


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(RankError, match="n_classes"):
        MPSClassifier(4, 0)
    with pytest.raises(RankError, match="bond_dim"):
        MPSClassifier(4, 2, bond_dim=[2, 2])
    with pytest.raises(ModeIndexError, match="0 to 3"):
        MPSClassifier(4, 2, label=4)
    with pytest.raises(KindError, match="feature_map"):
        MPSClassifier(4, 2, feature_map="sine")


@pytest.mark.parametrize("name", ["trig", "linear", "poly"])
def test_whitened_sweeps_learn_from_hundreds_of_features(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 150, generator=generator) ** 4, torch.arange(60) % 3
    x[torch.arange(60), 50 * y] = 0.9
    x[torch.arange(60), 50 * ((y + 1) % 3)] = 0.1
    model = MPSClassifier(150, 3, bond_dim=2, feature_map=name, generator=generator)
    history = model.fit(x, y, max_bond=5, n_sweeps=1, whiten=True)
    assert history.accuracy[-1] >= 0.9
    assert history.accuracy[-1] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


def test_whitened_sweeps_never_get_worse_without_cuts() -> None:
    losses = []
    model, x, y = classifier(), examples(n=40), labels(40)
    target = nn.functional.one_hot(y, CLASSES).double()

    def look(history: object) -> None:
        losses.append(float((model(x).detach() - target).square().mean()))

    model.fit(x, y, n_sweeps=4, max_bond=50, cutoff=0.0, ridge=0.0, whiten=True, observer=look)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))
