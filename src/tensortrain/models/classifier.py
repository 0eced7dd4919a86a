"""Classifiers whose weight, one entry for every product of features, is a train."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import data_halves
from tensortrain.cores.split import split
from tensortrain.cores.sweep import Cuts
from tensortrain.cores.unfold import absorb_left, absorb_right
from tensortrain.errors import DataError, KindError, ModeIndexError
from tensortrain.models.base import TensorModel, held, label_scores
from tensortrain.models.born import BornMachine
from tensortrain.models.checks import (
    chain_ranks,
    check_between,
    check_cap,
    check_choice,
    checked_dtype,
    checked_labels,
    checked_sizes,
    lacking,
    whole,
)
from tensortrain.models.class_law import class_law, class_samples
from tensortrain.models.classifier_fit import ClassifierFit
from tensortrain.models.features import FeatureMap, constant_of
from tensortrain.models.supervised import Supervised
from tensortrain.networks import register
from tensortrain.system.history import History

__all__ = ["MPSClassifier"]

_NOISE = 0.02  # of first cores, beside slices that leave a state as it is


@register("mps-classifier", needs_arguments=True)
class MPSClassifier(TensorModel):
    r"""Scores :math:`f^l(x) = \langle W^l, \phi(x_1) \circ .. \circ \phi(x_n) \rangle` with a train ``W``.

    Every feature becomes a short vector, and their product, an entry for every combination, meets a weight of that
    size, which exists as cores alone.

    Args:
        n_features: Numbers that an example has, in [0, 1].
        n_classes: Classes, ``0 .. n_classes - 1``.
        bond_dim: Ranks between sites, one for all or ``n_features - 1`` of them.
        feature_map: ``"trig"``, ``"linear"`` (1 - x, x), ``"poly"`` (1, x), ``"fourier"``, ``"one-hot"`` (x is 0 or 1),
            or a module ``(b, n) -> (b, n, m)``.
        label: Site whose core has the axis of classes: its number, ``"middle"`` or ``"last"``; ``"per-class"``: a
            train for each class.
        generator, device, dtype: Of the first parameters.

    Shapes: ``cores`` are ``(r, m, s)``, the one of the label ``(n_classes, r, m, s)``; of ``"per-class"`` all are.

    Cost: O(b n_features m r^2) flops forward, twice that backward.

    Source: Stoudenmire and Schwab, NIPS 2016, arXiv:1605.05775; Efthymiou et al., arXiv:1906.06329 (all cores at once).

    Example:
        >>> model = MPSClassifier(64, 10, bond_dim=8)
        >>> model(torch.rand(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        *,
        bond_dim: int | Sequence[int] = 10,
        feature_map: str | nn.Module = "trig",
        label: int | str = "middle",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_features, self.n_classes = checked_sizes(n_features=n_features, n_classes=n_classes)
        self.features = FeatureMap(feature_map)
        self.label = self._site(label)
        dtype = checked_dtype(dtype)
        ranks = _ranks(bond_dim, self.n_features)
        constant = constant_of(self.features, dtype, device)
        made = []
        for k, (r, s) in enumerate(itertools.pairwise(ranks)):
            n_labels = self.n_classes if self.label is None or k == self.label else None
            made.append(_first_core(r, s, constant, n_labels, k == self.label, generator))
        self._take(made)

    @property
    def config(self) -> dict[str, Any]:
        if self.features.module is not None:
            raise KindError(
                "a model that names itself needs a named feature map: feature_map is a module, expected one of the "
                "names. Save it with tensortrain.save_pretrained and load it with model=."
            )
        return {
            "n_features": self.n_features,
            "n_classes": self.n_classes,
            "bond_dim": list(self.ranks),
            "feature_map": self.features.kind,
            "label": "per-class" if self.label is None else self.label,
        }

    @property
    def ranks(self) -> tuple[int, ...]:
        """With a 1 at both ends."""
        return (1, *(core.shape[-1] for core in self.cores))

    def forward(self, x: Tensor, *, missing: Tensor | Literal["nan"] | None = None) -> Tensor:
        """Scores, the bare values of the network.

        Args:
            x: ``(b, n_features)`` in [0, 1].
            missing: Features that an example lacks: ``(b, n_features)`` bool, or ``"nan"`` for those that are NaN. The
                mean of their vectors over [0, 1], of bits over 0 and 1, stands in for them, so that they are summed
                out: the scores are the means over all values that they may have. A module may have a method ``mean()
                -> (m,)`` where its features have another law.

        Returns:
            Tensor: ``(b, n_classes)``.

        Raises:
            DataError: ``x`` has another shape, NaN that is not said to be missing, or numbers outside [0, 1].
        """
        return self._scores(self._vectors(x, missing))

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        method: Literal["two-site", "adam"] | str = "two-site",
        max_bond: int | None = None,
        cutoff: float = 1e-4,
        n_sweeps: int = 3,
        n_steps: int = 3,
        ridge: float = 1e-6,
        whiten: bool = False,
        lr: float = 1e-3,
        batch_size: int = 128,
        validation: tuple[Tensor, Tensor] | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn from examples, in place.

        Args:
            x: ``(b, n_features)`` in [0, 1].
            y: ``(b,)`` int64.
            method: ``"two-site"``: sweeps there and back that fit the tensor of two sites to the labels by least
                squares, and choose the ranks by singular values; the label moves along, and stays at the first site.
                ``"adam"``: all cores at once, by cross entropy, at fixed ranks.
            max_bond: Cap on every rank; the present largest one by default.
            cutoff: Largest root-sum-square of the singular values that a split cuts, a share of the norm.
            n_sweeps: Sweeps, or passes over the data.
            n_steps: Steps of conjugate gradients at every pair of sites.
            ridge: Weight of the squared norm in the least squares, beside a mean over examples.
            whiten: Whether two-site sweeps go in a space where what the examples show is about even in all directions:
                steps reach further, a cut takes what changes scores least, and ``ridge`` is a share of what the present
                tensor gives for its norm. For thousands of examples of a hundred features and more of the maps "trig",
                "linear" and "poly", whose scores are else lost in rounding; few examples are memorized sooner.
            lr, batch_size: Of Adam.
            validation: Examples and labels to watch.
            checkpoint: File with which the same call on the same starting model goes on after a kill, to equal bits.
            observer: Called with the history after every sweep; what it raises passes through.
            generator: Decides the order of batches.

        Returns:
            History: for every sweep ``loss`` (cross entropy), ``accuracy``, ``ranks``, and those of ``validation``.

        Raises:
            DataError: There are no examples, or they do not fit.
            KindError: The method is not known, or not for this label.
            RankError: An option outside its range; steps of Adam at ranks above ``max_bond``.

        Cost: O(b n_features m^2 r^2 n_classes) flops for a two-site sweep, and memory for b n_features r numbers.
        """
        check_choice(method, ("two-site", "adam"), "method")
        cap, n_steps = checked_sizes(max_bond=max(self.ranks) if max_bond is None else max_bond, n_steps=n_steps)
        check_between(0.0, ridge=ridge)
        check_between(0.0, 1.0, cutoff=cutoff)
        job = Supervised.of(
            self,
            (x, y),
            self._labelled,
            n_sweeps=n_sweeps,
            validation=validation,
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        if method == "two-site" and self.label is None:
            raise KindError(
                "two-site sweeps need one train with a label: label is 'per-class', expected a site. Use method='adam'."
            )
        if method == "adam":
            check_cap(self.ranks, cap)
            return job.by_steps(lr, batch_size)
        return ClassifierFit(self, job).by_sweeps(Cuts(cutoff, cap), n_steps, ridge, whiten)

    @torch.no_grad()
    def move_label_(self, site: int) -> MPSClassifier:
        """Move the axis of classes to another core, in place; outputs stay the same.

        Args:
            site: Number of the core, from 0.

        Raises:
            ModeIndexError: There is no such core.
            KindError: Every class has a train of its own.
        """
        if self.label is None:
            raise KindError("a label that moves needs one train: label is 'per-class', expected a site. Build it anew.")
        target = self._site(site)
        assert target is not None
        cores = [core.detach() for core in self.cores]
        while self.label < target:
            found = split(cores[self.label], n_sites=1, n_labels=1)
            cores[self.label : self.label + 2] = found.left, absorb_left(found.right, cores[self.label + 1])
            self.label += 1
        while self.label > target:
            found = split(cores[self.label], n_sites=1, to_right=False, n_labels=1)
            cores[self.label - 1 : self.label + 1] = absorb_right(cores[self.label - 1], found.left), found.right
            self.label -= 1
        self._take(cores)
        return self

    def law(self, label: int, *, values: Sequence[float] | Tensor | None = None) -> BornMachine:
        """The scores of a class as amplitudes: a law on examples, with the square of the score as probability.

        Its sum, marginals, conditions and samples are exact. A fit by labels teaches what tells classes apart, not how
        their examples look: to learn the latter, fit a ``BornMachine`` to strings that have the label as a site.

        Args:
            label: The class.
            values: Numbers that a feature may have, ``(v,)``; 0 and 1 for ``"one-hot"``, for others to be given, such
                as ``torch.linspace(0, 1, 16)``. Value j of the law stands for the j-th of them.

        Returns:
            BornMachine: of ``n_features`` sites, with parameters of its own.

        Raises:
            KindError: The map takes any number, and ``values`` are not given.
            DataError: There is no such class, or the values are not for this map.

        Example:
            >>> model = MPSClassifier(6, 2, bond_dim=3, feature_map="one-hot")
            >>> law = model.law(1)
            >>> law.sample(4).shape, law.nll(law.sample(4)).shape
            (torch.Size([4, 6]), torch.Size([]))
        """
        return class_law(self, label, values)

    def sample(
        self,
        n: int,
        *,
        label: int | Tensor,
        values: Sequence[float] | Tensor | None = None,
        given: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw exact, independent examples of a class, by ``law``.

        Args:
            n: How many.
            label: The class, or ``(n,)`` int64.
            values: As for ``law``.
            given: ``(n_features,)`` or ``(n, n_features)``: a condition, with NaN where a feature is free.
            generator: Of the random numbers.

        Returns:
            Tensor: ``(n, n_features)``, numbers out of ``values``.

        Raises:
            KindError, DataError: As for ``law``; a condition has other values, or probability zero.
        """
        return class_samples(self, n, label, values, given, generator)

    def _scores(self, vectors: Tensor) -> Tensor:
        """Scores ``(b, n_classes)`` of vectors ``(n_features, b, m)``."""
        if self.label is None:
            return torch.stack(
                [_value([core[k] for core in self.cores], vectors) for k in range(self.n_classes)], dim=1
            )
        k, core = self.label, self.cores[self.label]
        others = [*list(self.cores)[:k], *list(self.cores)[k + 1 :]]
        if not others:
            return (vectors[0] @ core[:, 0, :, 0].T).to(core.dtype)
        return label_scores(core, data_halves(others, vectors, k), vectors[k]).to(core.dtype)

    def _vectors(self, x: Tensor, missing: Tensor | str | None = None) -> Tensor:
        """``(n_features, b, m)``."""
        lacks = lacking(x, missing)
        if lacks is not None:
            x = x.masked_fill(lacks, 0.0)  # any value in the range
        self._check(x)
        vectors = self.features(x.to(self.cores[0].dtype) if self.features.module is None else x)
        if lacks is None:
            return vectors
        mean = self.features.mean().to(vectors.device, vectors.dtype)
        return torch.where(lacks.T[..., None], mean, vectors)

    def _labelled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        return x, checked_labels(y, x.shape[0], self.n_classes)

    def _check(self, x: object) -> None:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.n_features:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"examples must have {self.n_features} features: x has {found}, expected (b, {self.n_features}). "
                "Flatten images with x.flatten(1)."
            )
        if x.is_complex() or (not x.is_floating_point() and self.features.kind != "one-hot"):
            raise DataError(f"features must be numbers with a fraction: x has {x.dtype}. Convert it with x.float().")
        self.features.check(x)

    def _site(self, label: int | str) -> int | None:
        if isinstance(label, str):
            check_choice(label, ("middle", "last", "per-class"), "label")
            return {"middle": self.n_features // 2, "last": self.n_features - 1}.get(label)
        site = whole(label)
        if site is None or not 0 <= site < self.n_features:
            raise ModeIndexError(
                f"a label must sit on a core: label has {label!r}, expected 0 to {self.n_features - 1}. Or 'middle'."
            )
        return site

    def _take(self, cores: Sequence[Tensor]) -> None:
        self.cores = nn.ParameterList([nn.Parameter(core) for core in cores])

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return (
            f"n_features={self.n_features}, n_classes={self.n_classes}, max_rank={max(self.ranks)}, label={self.label}"
        )


def _value(cores: Sequence[Tensor], vectors: Tensor) -> Tensor:
    found = data_halves(cores, vectors, len(cores) // 2)
    return held((found.left * found.right).sum(-1, keepdim=True), found.exponent)[:, 0].to(cores[0].dtype)


def _ranks(bond_dim: int | Sequence[int], order: int) -> tuple[int, ...]:
    """One number stays as it is at the ends too: cores of one shape."""
    number = whole(bond_dim)
    return chain_ranks(bond_dim if number is None else [number] * (order - 1), [1] * order)


def _first_core(
    r: int, s: int, constant: Tensor, n_labels: int | None, is_label: bool, generator: torch.Generator | None
) -> Tensor:
    """The identity in the direction of the constant, and noise."""
    shape = (() if n_labels is None else (n_labels,)) + (r, constant.shape[0], s)
    noise = torch.randn(shape, generator=generator, dtype=constant.dtype, device=constant.device)
    if is_label:
        return noise / max(r, s) / constant.shape[0] ** 0.5
    eye = torch.eye(r, s, dtype=constant.dtype, device=constant.device)
    if r == 1 or s == 1:
        eye = torch.ones_like(eye) / max(r, s) ** 0.5
    return eye[:, None] * constant[None, :, None] + _NOISE * noise
