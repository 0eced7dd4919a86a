"""Networks whose scores are multilinear in features of every position: recurrent, shallow and deep, as TT, CP and HT.

=========  ====================================================  ================
format     network                                               width
=========  ====================================================  ================
``"tt"``   recurrent, with a cell that is linear in its state    TT rank
``"cp"``   shallow: one hidden layer with product pooling        CP rank
``"ht"``   deep: a binary tree with product pooling of pairs     ranks of the tree
=========  ====================================================  ================

In place of the product may stand another operation that knows no order: ``max(x, y, 0)``, ``ln(e^x + e^y)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import data_halves
from tensortrain.errors import DataError, KindError, ShapeError
from tensortrain.models.base import TensorModel, held, label_scores, settle_
from tensortrain.models.checks import check_choice, checked_dtype, checked_inputs, checked_labels, checked_sizes
from tensortrain.models.supervised import Supervised
from tensortrain.networks import register
from tensortrain.system.history import History

__all__ = ["ScoreNetwork"]

_ROWS_AT_ONCE = 65_536  # sequences of a grid
_ROWS_TO_SETTLE = 128  # by which the scale of scores is set before a fit


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def _rectify(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y).clamp_min(0)


_PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {  # with the unit
    "multiply": (_multiply, 1.0),
    "rectify": (_rectify, 0.0),
    "softplus": (torch.logaddexp, -math.inf),
}


@register("score-network", needs_arguments=True)
class ScoreNetwork(TensorModel):
    r"""Scores :math:`\langle W_y, f(x_1) \circ .. \circ f(x_T) \rangle` with weights in TT, CP or HT form.

    Args:
        n_inputs: Positions T: patches of an image, steps of a sequence.
        input_size: Numbers at a position.
        n_classes: Scores.
        format: ``"tt"``, ``"cp"`` or ``"ht"``.
        rank: Width of the network.
        n_features: Numbers that the feature map makes of a position.
        product: ``"multiply"``, ``"rectify"`` (max(x, y, 0)) or ``"softplus"`` (ln(e^x + e^y)); for the last two
            every position has a matrix of its own before the product.
        label: Of ``"tt"``: the axis of classes is that of the last state, of the ``"middle"`` core, or there is a
            network for each class, ``"per-class"``.
        shared: Of ``"tt"``: all cores but the first and the last are one.
        feature_map: Module on the last axis, ``(.., input_size) -> (.., n_features)``; a linear map without bias by
            default.
        generator, device, dtype: Of the first parameters.

    Shapes: x ``(b, n_inputs, input_size)``, scores ``(b, n_classes)``.

    Source: Khrulkov, Novikov, Oseledets, ICLR 2018, arXiv:1711.00811; Khrulkov, Hrinchuk, Oseledets, ICLR 2019,
        arXiv:1901.10801 (other products); Cohen, Sharir, Shashua, COLT 2016 (HT).

    Example:
        >>> model = ScoreNetwork(16, 49, 10, format="tt", rank=8, n_features=16)
        >>> model(torch.rand(5, 16, 49)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        n_inputs: int,
        input_size: int,
        n_classes: int,
        *,
        format: Literal["tt", "cp", "ht"] | str = "tt",
        rank: int,
        n_features: int,
        product: Literal["multiply", "rectify", "softplus"] | str = "multiply",
        label: Literal["last", "middle", "per-class"] | str = "last",
        shared: bool = False,
        feature_map: nn.Module | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"n_inputs": n_inputs, "input_size": input_size, "n_classes": n_classes}
        self.n_inputs, self.input_size, self.n_classes = checked_sizes(**sizes)
        self.rank, self.n_features = checked_sizes(rank=rank, n_features=n_features)
        check_choice(format, tuple(_WIRINGS), "format")
        check_choice(product, tuple(_PRODUCTS), "product")
        check_choice(label, ("last", "middle", "per-class"), "label")
        if format != "tt" and (label != "last" or shared):
            raise KindError(
                f"labels elsewhere and shared cores belong to 'tt': format has {format!r} with label={label!r} and "
                f"shared={shared}, expected label='last' and shared=False. Leave them out."
            )
        self.format, self.product, self.label, self.shared = str(format), str(product), str(label), bool(shared)
        self.feature_map = feature_map
        draw = _Draws(generator, checked_dtype(dtype), device)
        if feature_map is None:
            width = 1 / math.sqrt(self.input_size)
            self.features = nn.Parameter(draw.uniform((self.n_features, self.input_size), width))
        if product != "multiply":
            each = [_plus_eye(self.n_features, self.n_features, draw) for _ in range(self.n_inputs)]
            self.maps = nn.ParameterList(each)
        self.cores = nn.ParameterList(_WIRINGS[self.format].cores(self, draw))

    @property
    def config(self) -> dict[str, Any]:
        if self.feature_map is not None:
            raise KindError(
                "a model that names itself needs the feature map of its own: feature_map is a module, expected None. "
                "Save it with tensortrain.save_pretrained and load it with model=."
            )
        names = ("n_inputs", "input_size", "n_classes", "format", "rank", "n_features", "product", "label", "shared")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        """Scores.

        Args:
            x: ``(b, n_inputs, input_size)``.

        Returns:
            Tensor: ``(b, n_classes)``.

        Raises:
            DataError: ``x`` has another shape, no floating numbers, or NaN.
        """
        features = self._features(self._checked(x))  # T b m
        return _WIRINGS[self.format].scores(self, features)

    def grid_tensor(self, templates: Tensor) -> Tensor:
        """Scores of all sequences that some templates make up.

        Args:
            templates: ``(M, input_size)``.

        Returns:
            Tensor: ``(n_classes, M, .., M)``, an axis for every position.

        Cost: ``M ** n_inputs`` sequences.
        """
        if templates.ndim != 2 or templates.shape[1] != self.input_size:
            raise DataError(
                f"templates must be inputs of one position: they have shape {tuple(templates.shape)}, expected "
                f"(M, {self.input_size}). Stack them along the first axis."
            )
        n_templates = templates.shape[0]
        index = torch.arange(n_templates**self.n_inputs, device=templates.device)
        powers = n_templates ** torch.arange(self.n_inputs - 1, -1, -1, device=templates.device)
        scores = []
        for rows in index.split(_ROWS_AT_ONCE):
            digits = rows[:, None] // powers % n_templates
            scores.append(self(templates[digits]))
        return torch.cat(scores).T.reshape(self.n_classes, *[n_templates] * self.n_inputs)

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        n_sweeps: int = 10,
        lr: float = 1e-3,
        batch_size: int = 128,
        validation: tuple[Tensor, Tensor] | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn from examples, in place, by cross entropy and Adam; arguments as for ``MPSClassifier.fit``.

        Scores that are far from 1 on the first examples are brought there before, by one factor for all cores.

        Returns:
            History: for every pass ``loss``, ``accuracy``, and those of ``validation``.
        """
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
        if self.product == "multiply":
            degree = {"tt": self.n_inputs, "cp": self.n_inputs + 1, "ht": 2 * self.n_inputs - 1}[self.format]
            settle_(list(self.cores), degree, lambda: self(job.x[:_ROWS_TO_SETTLE]))
        return job.by_steps(lr, batch_size)

    def _labelled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self._checked(x)
        return x, checked_labels(y, x.shape[0], self.n_classes)

    def _checked(self, x: object) -> Tensor:
        """In the model's dtype; a feature map of another one may convert by itself."""
        dtype = self.cores[0].dtype if self.feature_map is None else None
        way = "Reshape it: positions along axis 1, their numbers along axis 2"
        return checked_inputs(x, ("b", self.n_inputs, self.input_size), dtype, way)

    def _features(self, x: Tensor) -> Tensor:
        """``(T, b, m)``."""
        if self.feature_map is None:
            return (x @ self.features.T).transpose(0, 1).contiguous()
        found = self.feature_map(x)
        if found.shape != (*x.shape[:2], self.n_features):
            raise ShapeError(
                f"a feature map must make n_features numbers of a position: it gave {tuple(found.shape)} of "
                f"{tuple(x.shape)}, expected (.., {self.n_features}). Change n_features or the map."
            )
        return found.transpose(0, 1).contiguous()

    def _mapped(self, features: Tensor) -> Tensor:
        """Features as the product meets them."""
        return features if self.product == "multiply" else features @ torch.stack(list(self.maps)).mT

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return f"format={self.format!r}, n_inputs={self.n_inputs}, rank={self.rank}, product={self.product!r}"


class _Draws:
    """Random first parameters."""

    def __init__(self, generator: torch.Generator | None, dtype: torch.dtype, device: Any) -> None:
        self.generator, self.place = generator, {"dtype": dtype, "device": device}

    def uniform(self, shape: Sequence[int], most: float) -> Tensor:
        return (torch.rand(*shape, generator=self.generator, **self.place) * 2 - 1) * most

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator, **self.place) * std


def _plus_eye(n: int, m: int, draw: _Draws) -> Tensor:
    return torch.eye(n, m, **draw.place) + draw.normal((n, m), 0.05)


def _near_identity(r: int, m: int, s: int, draw: _Draws) -> Tensor:
    """Slices near the identity over m, so that a state keeps its size where features are near 1 in the mean."""
    eye = torch.eye(r, s, **draw.place) if min(r, s) > 1 else torch.full((r, s), 1 / max(r, s) ** 0.5, **draw.place)
    return eye[:, None] / m + draw.normal((r, m, s), 0.3 / m)


class _Recurrent:
    """``h_k[c] = sum_{a, i} G_k[a, i, c] xi(f(x_k)[i], h_{k-1}[a])``."""

    @staticmethod
    def cores(model: ScoreNetwork, draw: _Draws) -> list[nn.Parameter]:
        d, r, m = model.n_inputs, model.rank, model.n_features
        ranks = [1, *[r] * (d - 1), model.n_classes if model.label == "last" else 1]
        shapes = [(ranks[k], m, ranks[k + 1]) for k in range(d)]
        n_inner = max(d - 2, 0)
        kept = shapes if not model.shared else [shapes[0], *shapes[1 : 1 + min(n_inner, 1)], *shapes[max(d - 1, 1) :]]
        copies = model.n_classes if model.label == "per-class" else 1
        made = []
        for _ in range(copies):
            made += [_near_identity(*shape, draw) for shape in kept]
        if model.label == "middle":
            at = min(d // 2, len(made) - 1) if not model.shared else len(made)
            label = _near_identity(*shapes[d // 2], draw)[None] + draw.normal(
                (model.n_classes, *shapes[d // 2]), 0.3 / m
            )
            made[at:] = [label, *made[at + 1 :]] if not model.shared else [label]
        return [nn.Parameter(core) for core in made]

    @staticmethod
    def scores(model: ScoreNetwork, features: Tensor) -> Tensor:
        cores = list(model.cores)
        if model.label == "middle":
            return _Recurrent._around(model, cores, features)
        n = len(cores) // (model.n_classes if model.label == "per-class" else 1)
        parts = [_Recurrent._chain(model, cores[k : k + n]) for k in range(0, len(cores), n)]
        return torch.cat([_Recurrent._last_state(model, part, features) for part in parts], dim=1)

    @staticmethod
    def _chain(model: ScoreNetwork, cores: list[Tensor]) -> list[Tensor]:
        """The cores of all positions."""
        if not model.shared or model.n_inputs <= 2:
            return cores
        return [cores[0], *[cores[1]] * (model.n_inputs - 2), cores[-1]]

    @staticmethod
    def _last_state(model: ScoreNetwork, cores: list[Tensor], features: Tensor) -> Tensor:
        if model.product == "multiply":
            found = data_halves(cores, features)
            return held(found.left, found.exponent).to(cores[0].dtype)
        start = features.new_full((features.shape[1], 1), _PRODUCTS[model.product][1])
        return _Recurrent._past(model, start, cores, model._mapped(features))

    @staticmethod
    def _past(model: ScoreNetwork, state: Tensor, cores: Sequence[Tensor], mapped: Tensor) -> Tensor:
        """The state ``(b, r)`` behind some positions."""
        xi = _PRODUCTS[model.product][0]
        for row, core in zip(mapped, cores, strict=True):
            state = xi(state[:, :, None], row[:, None, :]).flatten(1) @ core.flatten(0, 1)
        return state

    @staticmethod
    def _around(model: ScoreNetwork, cores: list[Tensor], features: Tensor) -> Tensor:
        """Scores of a network whose middle core has an axis for the classes."""
        at = model.n_inputs // 2
        label = cores[-1] if model.shared else cores[at]
        others = cores[:-1] if model.shared else cores
        chain = _Recurrent._chain(model, others)
        before, after = chain[:at], chain[at + 1 :]
        if model.product == "multiply" and before:
            return label_scores(label, data_halves([*before, *after], features, at), features[at]).to(label.dtype)
        mapped = model._mapped(features)
        start = mapped.new_full((mapped.shape[1], 1), _PRODUCTS[model.product][1])
        state = _Recurrent._past(model, start, before, mapped[:at])
        wide = label.movedim(0, 2).flatten(2)  # r m (classes s)
        state = _Recurrent._past(model, state, [wide], mapped[at : at + 1]).unflatten(1, (model.n_classes, -1))
        rows = mapped[at + 1 :].repeat_interleave(model.n_classes, dim=1)
        return _Recurrent._past(model, state.flatten(0, 1), after, rows).unflatten(0, (-1, model.n_classes)).squeeze(-1)


class _Shallow:
    """``sum_a lam[y, a] xi(<f(x_1), v_1^a>, .., <f(x_T), v_T^a>)``."""

    @staticmethod
    def cores(model: ScoreNetwork, draw: _Draws) -> list[nn.Parameter]:
        m, r = model.n_features, model.rank
        made = [1 / m + draw.normal((m, r), 0.3 / m) for _ in range(model.n_inputs)]
        return [nn.Parameter(core) for core in (*made, draw.normal((r, model.n_classes), 1 / r))]

    @staticmethod
    def scores(model: ScoreNetwork, features: Tensor) -> Tensor:
        xi, _ = _PRODUCTS[model.product]
        units = torch.bmm(model._mapped(features), torch.stack(list(model.cores)[:-1]))  # T b r
        state = xi(units[0], units[0].new_full((), _PRODUCTS[model.product][1]))
        for unit in units[1:]:
            state = xi(state, unit)
        return state @ model.cores[-1]


class _Deep:
    """A binary tree in input order: leaves are linear, a node is bilinear in what its halves give."""

    @staticmethod
    def cores(model: ScoreNetwork, draw: _Draws) -> list[nn.Parameter]:
        m, r, d = model.n_features, model.rank, model.n_inputs
        leaves = [1 / m + draw.normal((m, r if d > 1 else model.n_classes), 0.5 / m) for _ in range(d)]
        nodes = [_near_identity(r, r, r, draw) for _ in range(max(d - 2, 0))]
        root = [_near_identity(r, r, model.n_classes, draw)] if d > 1 else []
        return [nn.Parameter(core) for core in (*leaves, *nodes, *root)]

    @staticmethod
    def scores(model: ScoreNetwork, features: Tensor) -> Tensor:
        mapped, cores = model._mapped(features), list(model.cores)
        level = [row @ core for row, core in zip(mapped, cores[: model.n_inputs], strict=True)]
        xi, unit = _PRODUCTS[model.product]
        if len(level) == 1:
            return xi(level[0], level[0].new_full((), unit))
        return _Deep._subtree(level, iter(cores[model.n_inputs :]), xi)

    @staticmethod
    def _subtree(level: list[Tensor], nodes: Any, xi: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if len(level) == 1:
            return level[0]
        half = (len(level) + 1) // 2
        left, right = (_Deep._subtree(part, nodes, xi) for part in (level[:half], level[half:]))
        pairs = xi(left[:, :, None], right[:, None, :])
        return pairs.flatten(1) @ next(nodes).flatten(0, 1)


_WIRINGS: dict[str, Any] = {"tt": _Recurrent, "cp": _Shallow, "ht": _Deep}
