"""Exponential machines: a weight for every subset of features, in TT form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import data_halves, log_square_norm
from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models.base import TensorModel, held
from tensortrain.models.checks import (
    chain_ranks,
    check_between,
    check_choice,
    check_finite,
    checked_dtype,
    checked_labels,
    checked_sizes,
    lacking,
    whole,
)
from tensortrain.models.exponential_fit import Descent, WholeGradient
from tensortrain.models.supervised import LOSSES, Supervised
from tensortrain.networks import register
from tensortrain.numerics.manifold import RiemannianSGD
from tensortrain.system.history import History
from tensortrain.system.tracing import can_look
from tensortrain.tensor import TensorTrain, randn, round_tt

__all__ = ["ExponentialMachine"]

_NOISE = 1e-3  # of first interactions


@register("exponential-machine", needs_arguments=True)
class ExponentialMachine(TensorModel):
    r"""``y(x) = sum over i in {0, 1}^d of W[i_1 .. i_d] prod_k x_k^{i_k}``: every interaction of every order.

    Args:
        n_features: d.
        rank: TT ranks of ``W``, one for all or ``d - 1`` of them (``d`` with several outputs).
        n_outputs: 1 gives ``(b,)``; more, ``(b, n_outputs)``: then the train has a last mode for them.
        n_values: For each feature the number of its values where it is categorical, and None or 0 where it is a
            number; None for numbers alone. A categorical core has ``n_values + 1`` slices, of which the first is
            always on: there are no interactions of two values of one feature.
        generator, device, dtype: Of the first parameters: the constant 0 and small interactions.

    Shapes: x ``(b, n_features)``, categories as whole numbers from 0 in it; ``cores`` ``(r, 2 or n_values + 1, s)``.

    Cost: O(b d r^2) flops.

    Source: Novikov, Trofimov, Oseledets, arXiv:1605.03795.

    Example:
        >>> model = ExponentialMachine.from_linear(torch.tensor([1.0, -2.0, 3.0]), 0.5, rank=2)
        >>> model(torch.tensor([[1.0, 1.0, 1.0]])).tolist()
        [2.5]
    """

    def __init__(
        self,
        n_features: int,
        *,
        rank: int | Sequence[int],
        n_outputs: int = 1,
        n_values: Sequence[int | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_features, self.n_outputs = checked_sizes(n_features=n_features, n_outputs=n_outputs)
        self.n_values = self._numbers_of_values(n_values)
        modes = [n + 1 if n else 2 for n in self.n_values] + ([self.n_outputs] if self.n_outputs > 1 else [])
        ranks = chain_ranks(rank, modes, "rank")
        place: dict[str, Any] = {"dtype": checked_dtype(dtype), "device": device}
        cores = [
            torch.randn(r, n, s, generator=generator, **place) * (_NOISE / max(r, s) ** 0.5)
            for r, n, s in zip(ranks, modes, ranks[1:], strict=False)
        ]
        for core in cores[: self.n_features]:
            core[:, 0] += torch.eye(core.shape[0], core.shape[2], **place)
        self._take(cores)

    @classmethod
    def from_linear(
        cls, weight: Tensor, bias: float | Tensor, *, rank: int, generator: torch.Generator | None = None
    ) -> ExponentialMachine:
        """The machine that is a linear model: exactly at rank 2, with small further interactions at higher ranks.

        Args:
            weight: ``(n_features,)``.
            bias: A number.
            rank: 2 or more.

        Raises:
            RankError: A rank of 1 has no room for a sum.
            DataError: Weights that are no finite floating numbers.
        """
        if (whole(rank) or 0) < 2:
            raise RankError(
                f"a linear model is a train of rank 2: rank has {rank!r}, expected 2 or more. Pass a larger rank."
            )
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 1 or len(weight) == 0:
            found = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight)
            raise DataError(
                f"a linear model has a weight for each feature: weight has {found}, expected floating numbers "
                "(n_features,). Pass torch.as_tensor(model.coef_[0]) of scikit-learn's, for instance."
            )
        check_finite(weight, "weight")
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        linear = TensorTrain(_linear_cores(weight.detach(), torch.as_tensor(bias, **place).detach().reshape(())))
        if rank > 2 and len(weight) > 1:
            more = randn(linear.shape, chain_ranks(rank - 2, linear.shape, "rank"), generator=generator, **place)
            size = linear.norm()
            share = _NOISE * size.where(size > 0, 1.0) / more.norm()
            linear = round_tt(linear + more * share, eps=0.0, max_rank=rank).value
        model = cls(len(weight), rank=list(linear.ranks), **place)
        model._take([core.clone() for core in linear.cores])
        return model

    @property
    def config(self) -> dict[str, Any]:
        return {
            "n_features": self.n_features,
            "rank": list(self.ranks),
            "n_outputs": self.n_outputs,
            "n_values": self.n_values,
        }

    @property
    def ranks(self) -> tuple[int, ...]:
        """With a 1 at both ends."""
        return (1, *(core.shape[-1] for core in self.cores))

    @property
    def tensor(self) -> TensorTrain:
        """The weights: entry ``[i_1, .., i_d]`` multiplies ``prod x_k^{i_k}``."""
        return TensorTrain(tuple(core.detach() for core in self.cores))

    def forward(self, x: Tensor, *, missing: Tensor | Literal["nan"] | None = None) -> Tensor:
        """Values of examples.

        Args:
            x: ``(b, n_features)``.
            missing: Features that an example lacks: ``(b, n_features)`` bool, or ``"nan"`` for those that are NaN.
                Their mean stands in for them, so that they are summed out: 0 for a number, the mean of features
                that were standardized, and an even share of every value for a category.

        Returns:
            Tensor: ``(b,)``, or ``(b, n_outputs)``.

        Raises:
            DataError: ``x`` has another shape, NaN that is not said to be missing, or a category that is not there.
        """
        return self._values(list(self.cores), self._data(x, missing))

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        loss: Literal["squared", "huber", "logistic", "cross-entropy"] | str = "squared",
        method: Literal["riemannian", "adam", "gradient"] | str = "riemannian",
        n_sweeps: int = 100,
        lr: float | None = None,
        batch_size: int | None = None,
        penalty: float = 0.0,
        tol: float = 0.0,
        order: int | None = None,
        max_rank: int | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn from examples, in place.

        Args:
            x: ``(b, n_features)``.
            y: ``(b,)``: numbers, or 0 and 1 for ``"logistic"``; ``(b, n_outputs)`` numbers, or class numbers for
                ``"cross-entropy"``.
            loss: A mean over examples. ``"huber"`` is half the square below 1 and grows straight beyond: values that
                spread over decades, as products of many features do, then do not hide the others.
            method: ``"riemannian"``: on the manifold of the ranks, by conjugate gradients with a line search on all of
                ``x``, or with ``batch_size`` by steps of length ``lr``. ``"adam"``: steps of the cores. ``"gradient"``:
                along the gradient by the whole tensor of weights, which finds interactions that the other two do not
                see; a start for them. One or a few steps; it ends by itself where only noise is left.
            n_sweeps: Steps over all of ``x``, or passes in batches.
            lr: Of steps in batches: 0.05 on the manifold and 1e-3 for Adam by default.
            batch_size: Of steps in batches.
            penalty: Weight of half the squared norm of all weights.
            tol: Of the line search: end where the gradient is this share of the first one.
            order: Of ``"gradient"``: features of an interaction at most; those that stand above the noise of sampling
                are added, O(b c) flops for c interactions. None: all ``2^d`` of them are added, as far as the singular
                values of their middle unfolding stand above the noise; for weights of low rank that are not sparse,
                and up to about 24 features.
            max_rank: Of ``"gradient"``: cap on the ranks; the largest that there is when left out.
            validation: Examples and labels to watch.
            checkpoint: File with which the same call on the same starting model goes on after a kill.
            observer: Called with the history after every sweep.
            generator: Decides the order of batches.

        Returns:
            History: for every sweep ``loss``, and those of ``validation``.

        Raises:
            DataError: Examples or labels do not fit.
            KindError: An option of no known name, or that the method does not have.
            RankError: Too many interactions for ``"gradient"``.
        """
        check_choice(method, ("riemannian", "adam", "gradient"), "method")
        check_choice(loss, tuple(LOSSES), "loss")
        check_between(0.0, penalty=penalty, tol=tol)
        job = Supervised.of(
            self,
            (x, y),
            partial(self._labelled, loss=loss),
            loss,
            n_sweeps=n_sweeps,
            validation=validation,
            penalty=(lambda: self._penalty(list(self.cores), penalty)) if penalty else None,
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        if method == "gradient":
            return self._along_gradient(job, order, max_rank)
        if method == "adam":
            return job.by_steps(1e-3 if lr is None else lr, 256 if batch_size is None else batch_size)
        if batch_size is not None:
            return job.by_steps(
                0.05 if lr is None else lr, batch_size, lambda parameters, lr: RiemannianSGD(self, lr=lr)
            )
        return Descent(self, job, self._data(job.x), penalty).run(tol)

    def _along_gradient(self, job: Supervised, order: int | None, max_rank: int | None) -> History:
        if self.n_outputs > 1 or job.penalty is not None:
            raise KindError(
                "steps along the whole gradient are for one output, without a penalty: this model has "
                f"{self.n_outputs} outputs. Fit one machine for each, and let another method keep the weights small."
            )
        cap, most = checked_sizes(
            max_rank=max(self.ranks) if max_rank is None else max_rank,
            order=self.n_features if order is None else order,
        )
        return WholeGradient(self, job, None if order is None else most, cap).run()

    def _values(self, cores: Sequence[Tensor], data: Any) -> Tensor:
        n = self.n_features
        here = cores[:n]
        if isinstance(data, Tensor) and data.ndim == 2:  # categories: one slice is always on, and one of the others
            here = [core[:, :1] + core[:, 1:] for core in here]
        found = data_halves(here, data, n if self.n_outputs > 1 else n // 2)
        if self.n_outputs > 1:
            wide = found.left @ cores[-1][:, :, 0].to(found.left.dtype)
            return held(wide, found.exponent).to(cores[0].dtype)
        value = (found.left * found.right).sum(-1, keepdim=True)
        return held(value, found.exponent)[:, 0].to(cores[0].dtype)

    def _penalty(self, cores: Sequence[Tensor], weight: float) -> Tensor:
        return 0.5 * weight * log_square_norm(cores).exp()

    def _data(self, x: object, missing: Tensor | str | None = None) -> Tensor | list[Tensor]:
        """What a walk over the chain takes: values where all are categories, or vectors ``(b, m)``."""
        lacks = lacking(x, missing) if isinstance(x, Tensor) else None
        if lacks is not None:
            x = x.masked_fill(lacks, 0)  # type: ignore[attr-defined]  # a category that there is
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.n_features:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"examples must have {self.n_features} features: x has {found}, expected (b, {self.n_features})."
            )
        if x.is_complex():
            raise DataError(f"features must be real: x has {x.dtype}. Pass their real and imaginary parts, or moduli.")
        if can_look(x):
            check_finite(x, way="Fill, or say that these features are missing with missing='nan'")
        if lacks is not None:
            return [
                torch.where(here[:, None], _mean_vector(n, found), found)
                for here, n, found in zip(lacks.T, self.n_values, self._vectors_of(x), strict=True)
            ]
        if all(self.n_values):
            return torch.stack([self._category(k, x[:, k]) for k in range(self.n_features)], dim=1)
        if any(self.n_values):
            return self._vectors_of(x)
        columns = x.to(self.cores[0].dtype).T
        return torch.stack((torch.ones_like(columns), columns), dim=-1)

    def _vectors_of(self, x: Tensor) -> list[Tensor]:
        """For each feature ``(b, m)``: 1, and the number or what category it is."""
        dtype = self.cores[0].dtype
        found = []
        for k, n in enumerate(self.n_values):
            if n:
                rest = nn.functional.one_hot(self._category(k, x[:, k]), n).to(dtype)
            else:
                rest = x[:, k : k + 1].to(dtype)
            found.append(torch.cat((torch.ones_like(rest[:, :1]), rest), dim=1))
        return found

    def _category(self, k: int, column: Tensor) -> Tensor:
        n, values = self.n_values[k], column.long()
        if can_look(column) and column.numel():
            low, high = (int(v) for v in torch.aminmax(values))
            if low < 0 or high >= n or not bool((values == column).all()):
                raise DataError(
                    f"a category must be one of the {n} of its feature: column {k} has numbers from {low} to {high}, "
                    f"expected whole ones from 0 to {n - 1}. Number the categories from 0."
                )
        return values

    def _numbers_of_values(self, n_values: Sequence[int | None] | None) -> list[int]:
        given = [0] * self.n_features if n_values is None else [whole(n or 0) for n in n_values]
        found = [n for n in given if n is not None and n >= 0]
        if len(found) != len(given) or len(found) != self.n_features:
            raise RankError(
                f"n_values must say of each feature how many values it has: it has {n_values}, expected "
                f"{self.n_features} numbers, 0 or None for features that are numbers."
            )
        return found

    def _labelled(self, x: Tensor, y: Tensor, loss: str) -> tuple[Tensor, Tensor]:
        self._data(x)
        return x, self._labels(y, x.shape[0], loss)

    def _labels(self, y: object, n_samples: int, loss: str) -> Tensor:
        wide = self.n_outputs > 1 and loss != "cross-entropy"
        shape = (n_samples, self.n_outputs) if wide else (n_samples,)
        if loss == "cross-entropy" and self.n_outputs == 1:
            raise KindError("cross entropy needs an output for each class: n_outputs is 1. Use loss='logistic'.")
        if not isinstance(y, Tensor) or tuple(y.shape) != shape:
            found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise DataError(f"labels must be as many as there are outputs: y has {found}, expected {shape}.")
        if loss == "cross-entropy":
            return checked_labels(y, n_samples, self.n_outputs)
        if loss == "logistic" and not bool(((y == 0) | (y == 1)).all()):
            raise DataError("labels of a logistic loss must be 0 and 1: y has others. Pass (y > 0).float().")
        check_finite(y, "y")
        return y.to(self.cores[0].dtype)

    def _take(self, cores: Sequence[Tensor]) -> None:
        self.cores = nn.ParameterList([nn.Parameter(core) for core in cores])

    def _put(self, x: TensorTrain) -> None:
        """The model takes weights over, in its own dtype."""
        self._take([core.detach().to(self.cores[0].dtype).clone() for core in x.cores])

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return f"n_features={self.n_features}, n_outputs={self.n_outputs}, max_rank={max(self.ranks)}"


def _mean_vector(n_values: int, like: Tensor) -> Tensor:
    """What stands for a feature that is missing, ``(m,)``: 1, and the mean of what follows it."""
    mean = like.new_full((like.shape[1],), 1 / n_values if n_values else 0.0)
    mean[0] = 1.0
    return mean


def _linear_cores(weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Cores of ``bias + sum_k w_k x_k``: the state is (1, the sum so far) read from the left."""
    d = len(weight)
    zero, one = torch.zeros_like(bias), torch.ones_like(bias)
    if d == 1:
        return (torch.stack((bias, weight[0])).reshape(1, 2, 1),)
    first = torch.stack((torch.stack((one, zero)), torch.stack((zero, weight[0]))))[None]
    middle = [
        torch.stack(
            (
                torch.stack((torch.stack((one, zero)), torch.stack((zero, w)))),
                torch.stack((torch.stack((zero, one)), torch.stack((zero, zero)))),
            )
        )
        for w in weight[1:-1]
    ]
    last = torch.stack((torch.stack((bias, weight[-1])), torch.stack((one, zero))))[..., None]
    return (first, *middle, last)
