"""Tensor-network models as scikit-learn's estimators, as ``tensortrain.sklearn`` (extra ``sklearn``).

Thin wrappers: features are scaled inside, labels may be anything, parameters are stored as they are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tensortrain.errors import DataError, OptionalDependencyError
from tensortrain.models import BornMachine
from tensortrain.models import ExponentialMachine as _ExponentialMachine
from tensortrain.models import MPSClassifier as _MPSClassifier
from tensortrain.models.checks import check_choice, checked_sizes

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise OptionalDependencyError(
        "tensortrain.sklearn needs scikit-learn 1.6 or later, which is not installed. Run pip install "
        "'tensortrain[sklearn]'."
    ) from error

__all__ = ["BornDensity", "ExponentialClassifier", "MPSClassifier"]

_SHARPNESS = np.logspace(-1, 2, 61)  # factors of scores that are tried for probabilities


class _Classifier(ClassifierMixin, BaseEstimator):
    """Labels in, scaled features, probabilities out; a subclass makes and fits the model."""

    def fit(self, X: Any, y: Any) -> Any:  # scikit-learn's name
        """Learn from examples ``(n_samples, n_features)`` and labels ``(n_samples,)``."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(
                f"a classifier needs two classes or more: y has one class, {self.classes_[0]!r}. Add examples of "
                "others."
            )
        self._learn_scale(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        labels = torch.from_numpy(codes.astype(np.int64))
        self.model_ = self._fitted(self._scaled(X), labels, generator)
        self.sharpness_ = 1.0
        self.sharpness_ = _best_sharpness(self._scores(self._scaled(X)), codes)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(n_samples, n_classes)``."""
        scores = self.decision_scores(X) * self.sharpness_  # which is there once the call has looked
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest labels ``(n_samples,)``."""
        best = self.decision_scores(X).argmax(axis=1)
        return self.classes_[best]

    def decision_scores(self, X: Any) -> np.ndarray:
        """The model's scores ``(n_samples, n_classes)``."""
        check_is_fitted(self)
        return self._scores(self._scaled(validate_data(self, X, dtype=np.float64, reset=False)))

    def _scores(self, x: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            found = torch.cat([self.model_(rows) for rows in x.split(4096)])
        return found.double().numpy()

    def _learn_scale(self, X: np.ndarray) -> None:
        raise NotImplementedError

    def _scaled(self, X: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def _fitted(self, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.nn.Module:
        raise NotImplementedError


class MPSClassifier(_Classifier):
    """A matrix product state as a classifier, by two-site sweeps: see ``tensortrain.models.MPSClassifier``.

    Features are brought into [0, 1] by their range in the training data; what lies outside later is cut.

    Parameters:
        bond_dim: Cap on the ranks.
        feature_map: ``"trig"``, ``"linear"``, ``"poly"`` or ``"fourier"``.
        n_sweeps: Sweeps there and back.
        ridge: Weight of the squared norm in the least squares.
        random_state: Of the first parameters.

    Example:
        >>> from sklearn.datasets import load_wine
        >>> from tensortrain.io.frameworks.sklearn import MPSClassifier
        >>> X, y = load_wine(return_X_y=True)
        >>> bool(MPSClassifier(bond_dim=6, random_state=0).fit(X, y).score(X, y) > 0.95)
        True
    """

    def __init__(
        self,
        bond_dim: int = 8,
        *,
        feature_map: str = "trig",
        n_sweeps: int = 3,
        ridge: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.bond_dim, self.feature_map, self.n_sweeps = bond_dim, feature_map, n_sweeps
        self.ridge, self.random_state = ridge, random_state

    def _learn_scale(self, X: np.ndarray) -> None:
        self.low_ = X.min(axis=0)
        span = X.max(axis=0) - self.low_
        self.span_ = np.where(span > 0, span, 1.0)

    def _scaled(self, X: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.clip((X - self.low_) / self.span_, 0.0, 1.0))

    def _fitted(self, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.nn.Module:
        model = _MPSClassifier(
            x.shape[1],
            len(self.classes_),
            bond_dim=min(4, *checked_sizes(bond_dim=self.bond_dim)),
            feature_map=self.feature_map,
            generator=generator,
            dtype=torch.float64,
        )
        model.fit(x, labels, max_bond=self.bond_dim, n_sweeps=self.n_sweeps, ridge=self.ridge)
        return model


class ExponentialClassifier(_Classifier):
    """All interactions of all features, with weights in TT form: see ``tensortrain.models.ExponentialMachine``.

    Features are brought to mean 0 and spread 1 by the training data.

    Parameters:
        rank: TT ranks of the weights.
        n_sweeps: Steps over all examples.
        penalty: Weight of half the squared norm of all weights; not with ``"gradient"``.
        method: ``"riemannian"``: on the manifold of the ranks. ``"gradient"``: along the gradient by all weights of up
            to ``order`` features, less what may be noise, with a machine for each class: for labels that a few products
            of features decide, which it finds sooner and without fitting the rest; where all features count a little,
            the other is better.
        order: Features in an interaction at most, with ``"gradient"``.
        random_state: Of the first parameters.
    """

    def __init__(
        self,
        rank: int = 4,
        *,
        n_sweeps: int = 40,
        penalty: float = 1e-3,
        method: str = "riemannian",
        order: int = 2,
        random_state: Any = None,
    ) -> None:
        self.rank, self.n_sweeps, self.penalty = rank, n_sweeps, penalty
        self.method, self.order, self.random_state = method, order, random_state

    def _learn_scale(self, X: np.ndarray) -> None:
        # Squares of features far from 1 leave the range.
        peak = np.abs(X).max(axis=0)
        peak = np.where(peak > 0, peak, 1.0)
        self.mean_ = (X / peak).mean(axis=0) * peak
        spread = (X / peak).std(axis=0) * peak
        self.spread_ = np.where(spread > 0, spread, 1.0)

    def _scaled(self, X: np.ndarray) -> torch.Tensor:
        # Products of many large numbers have no bound: far-off examples are drawn in.
        return torch.from_numpy(np.clip((X - self.mean_) / self.spread_, -4.0, 4.0))

    def _fitted(self, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.nn.Module:
        check_choice(self.method, ("riemannian", "gradient"), "method")
        if self.method == "gradient" and x.shape[1] > 1:
            return self._one_for_each(x, labels, generator)
        model = _ExponentialMachine(
            x.shape[1], rank=self.rank, n_outputs=len(self.classes_), generator=generator, dtype=torch.float64
        )
        model.fit(x, labels, loss="cross-entropy", n_sweeps=self.n_sweeps, penalty=self.penalty)
        return model

    def _one_for_each(self, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> _OneForEach:
        """A machine for each class but, of two, the first."""
        machines = []
        for label in range(len(self.classes_))[0 if len(self.classes_) > 2 else 1 :]:
            machine = _ExponentialMachine(x.shape[1], rank=self.rank, generator=generator, dtype=torch.float64)
            is_label = (labels == label).double()
            machine.fit(x, is_label, loss="logistic", method="gradient", order=self.order, n_sweeps=self.n_sweeps)
            machines.append(machine)
        return _OneForEach(machines)


class _OneForEach(torch.nn.Module):
    """Scores of machines with one output, side by side; one machine alone tells two classes apart."""

    def __init__(self, machines: list[_ExponentialMachine]) -> None:
        super().__init__()
        self.machines = torch.nn.ModuleList(machines)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.stack([machine(x) for machine in self.machines], dim=1)
        return scores if scores.shape[1] > 1 else torch.cat((-scores / 2, scores / 2), dim=1)


class BornDensity(DensityMixin, BaseEstimator):
    """A density by a Born machine on bins of the features: see ``tensortrain.models.BornMachine``.

    Every feature is cut at its quantiles; within a bin the density is even, and outside of all bins there is none but
    what the first and last bin reach beyond the data.

    Parameters:
        bond_dim: Cap on the ranks.
        n_bins: Bins of a feature.
        n_sweeps: Two-site sweeps.
        random_state: Of the first parameters, and of ``sample``.
    """

    def __init__(self, bond_dim: int = 8, *, n_bins: int = 8, n_sweeps: int = 6, random_state: Any = None) -> None:
        self.bond_dim, self.n_bins, self.n_sweeps, self.random_state = bond_dim, n_bins, n_sweeps, random_state

    def fit(self, X: Any, y: Any = None) -> Any:
        """Learn from examples ``(n_samples, n_features)``."""
        X = validate_data(self, X, dtype=np.float64)
        (n_bins,) = checked_sizes(n_bins=self.n_bins)
        self.edges_ = [_edges_of(column, n_bins) for column in X.T]
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        n_values = max(len(edges) - 1 for edges in self.edges_)
        model = BornMachine(
            X.shape[1], max(n_values, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        model.fit(self._bins(X), max_bond=self.bond_dim, n_sweeps=self.n_sweeps)
        self.model_ = model
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Logarithms of the density ``(n_samples,)``, in nats; minus infinity outside of all bins."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        bins = self._bins(X)
        with torch.no_grad():
            log = self.model_.log_prob(bins).double().numpy()
        for k, edges in enumerate(self.edges_):
            log = log - np.log(np.diff(edges))[bins[:, k].numpy()]
            log = np.where((X[:, k] < edges[0]) | (X[:, k] > edges[-1]), -np.inf, log)
        return log

    def score(self, X: Any, y: Any = None) -> float:
        """The mean logarithm of the density."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> np.ndarray:
        """Draw ``(n_samples, n_features)``."""
        check_is_fitted(self)
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        bins = self.model_.sample(n_samples, generator=generator).numpy()
        columns = []
        for k, edges in enumerate(self.edges_):
            here = np.minimum(bins[:, k], len(edges) - 2)
            columns.append(edges[here] + random.uniform(size=n_samples) * np.diff(edges)[here])
        return np.stack(columns, axis=1)

    def _bins(self, X: np.ndarray) -> torch.Tensor:
        """Numbers of the bins ``(n_samples, n_features)``; what lies outside counts to the nearest one."""
        found = [
            np.clip(np.searchsorted(edges, column, side="right") - 1, 0, len(edges) - 2)
            for edges, column in zip(self.edges_, X.T, strict=True)
        ]
        return torch.from_numpy(np.stack(found, axis=1).astype(np.int64))


def _edges_of(column: np.ndarray, n_bins: int) -> np.ndarray:
    """Quantiles, each once; a constant gets a bin of width 1 around it."""
    edges = np.unique(np.quantile(column, np.linspace(0, 1, n_bins + 1)))
    return edges if len(edges) > 1 else np.array([edges[0] - 0.5, edges[0] + 0.5])


def _best_sharpness(scores: np.ndarray, codes: np.ndarray) -> float:
    """The factor of scores whose softmax says the labels best; least squares leave that open."""

    def loss(factor: float) -> float:
        scaled = factor * scores
        top = scaled.max(axis=1, keepdims=True)
        logs = scaled - top - np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))
        return float(-logs[np.arange(len(codes)), codes].mean())

    return float(min(_SHARPNESS, key=loss))
