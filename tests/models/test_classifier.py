"""MPS classifiers: scores by the dense weight, labels that move, both ways of learning."""

from __future__ import annotations

import itertools
from typing import ClassVar

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


def test_missing_features_are_summed_out() -> None:
    model, x = classifier(feature_map="poly"), examples()
    missing = torch.zeros_like(x, dtype=torch.bool)
    missing[:, 2] = True
    grid = torch.linspace(0, 1, 501, dtype=torch.float64)
    every = x.repeat_interleave(501, 0)
    every[:, 2] = grid.repeat(len(x))
    mean = model(every).detach().unflatten(0, (len(x), 501)).mean(1)
    torch.testing.assert_close(model(x, missing=missing).detach(), mean, rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match="one by one"):
        model(x, missing=missing[0])


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
