"""scikit-learn's own checks of our estimators, and what its users do with them."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import tensortrain as tt
from tensortrain.errors import OptionalDependencyError


@parametrize_with_checks(
    [
        tt.sklearn.MPSClassifier(bond_dim=4, n_sweeps=1),
        tt.sklearn.ExponentialClassifier(rank=2, n_sweeps=15),
        tt.sklearn.ExponentialClassifier(rank=2, n_sweeps=10, method="gradient"),
        tt.sklearn.BornDensity(bond_dim=3, n_bins=3, n_sweeps=1),
    ]
)
def test_estimators_keep_the_rules(estimator, check) -> None:
    check(estimator)


def test_a_grid_search_in_a_pipeline() -> None:
    x, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(MinMaxScaler(), tt.sklearn.MPSClassifier(n_sweeps=2, random_state=0))
    found = GridSearchCV(pipeline, {"mpsclassifier__bond_dim": [2, 6]}, cv=3).fit(x, y)
    assert found.best_score_ >= 0.93


def test_interactions_and_names_as_labels() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    names = np.array(["malignant", "benign"])[y]
    model = tt.sklearn.ExponentialClassifier(rank=3, n_sweeps=30, random_state=0)
    assert cross_val_score(model, x, names, cv=3).mean() >= 0.93
    model.fit(x, names)
    shares = model.predict_proba(x)
    assert shares.shape == (569, 2)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert list(model.classes_[shares.argmax(1)]) == list(model.predict(x))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), shares)


def test_products_of_two_features_are_found_along_the_gradient() -> None:
    random = np.random.RandomState(0)
    x = random.normal(size=(900, 10))
    y = np.where(x[:, 7] * x[:, 1] + x[:, 4] * x[:, 2] + 0.3 * x[:, 9] > 0, "above", "below")
    found = {}
    for method in ("riemannian", "gradient"):
        model = tt.sklearn.ExponentialClassifier(method=method, n_sweeps=15, random_state=0).fit(x[:600], y[:600])
        found[method] = model.score(x[600:], y[600:])
    assert found["gradient"] >= max(0.92, found["riemannian"])
    with pytest.raises(ValueError, match="method"):
        tt.sklearn.ExponentialClassifier(method="magic").fit(x, y)


def test_features_of_any_size_are_scaled_and_bins_are_counted() -> None:
    x, y = load_wine(return_X_y=True)
    for size in (1e-200, 1e200):
        model = tt.sklearn.ExponentialClassifier(rank=2, n_sweeps=10, random_state=0)
        assert model.fit(x * size, y).score(x * size, y) > 0.9
    with pytest.raises(ValueError, match="n_bins"):
        tt.sklearn.BornDensity(n_bins=0).fit(x)


def test_a_density_of_two_clouds() -> None:
    random = np.random.RandomState(0)
    centers = random.choice([-2.0, 2.0], size=(2000, 1))
    x = centers * np.array([1.0, -1.0]) + random.normal(scale=0.3, size=(2000, 2))
    held, x = train_test_split(x, test_size=0.5, random_state=0)
    model = tt.sklearn.BornDensity(bond_dim=6, n_bins=8, random_state=0).fit(x)
    alone = tt.sklearn.BornDensity(bond_dim=1, n_bins=8, random_state=0).fit(x)
    inside = np.isfinite(model.score_samples(held))
    assert inside.mean() > 0.98
    gain = (model.score_samples(held[inside]) - alone.score_samples(held[inside])).mean()
    assert gain == pytest.approx(np.log(2), abs=0.15)  # which cloud one number is from says which the other is from
    drawn = model.sample(500)
    assert drawn.shape == (500, 2)
    assert (np.sign(drawn[:, 0]) == -np.sign(drawn[:, 1])).mean() > 0.8  # one bin of eight may span both clouds


def test_without_the_library_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "tensortrain.io.frameworks.sklearn")
    with pytest.raises(OptionalDependencyError, match=r"tensortrain\[sklearn\]"):
        _ = tt.sklearn
    monkeypatch.undo()
    assert tt.sklearn.MPSClassifier is not None
    with pytest.raises(AttributeError, match="no attribute 'skleran'"):
        _ = tt.skleran
