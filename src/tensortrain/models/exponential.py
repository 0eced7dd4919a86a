"""Exponential machines: a weight for every subset of features, in TT form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import data_halves, log_square_norm
from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models.base import (
    TensorModel,
    chain_ranks,
    check_choice,
    check_finite,
    check_sizes,
    checked_labels,
    held,
)
from tensortrain.models.supervised import LOSSES, Supervised
from tensortrain.networks import register
from tensortrain.numerics.manifold import RiemannianSGD, TangentVector, descend, project
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
        check_sizes(n_features=n_features, n_outputs=n_outputs)
        self.n_features, self.n_outputs = n_features, n_outputs
        self.n_values = [int(n or 0) for n in (n_values if n_values is not None else [0] * n_features)]
        if len(self.n_values) != n_features or min(self.n_values) < 0:
            raise RankError(
                f"n_values must say of each feature how many values it has: it has {n_values}, expected {n_features} "
                "numbers, 0 or None for features that are numbers."
            )
        modes = [n + 1 if n else 2 for n in self.n_values] + ([n_outputs] if n_outputs > 1 else [])
        ranks = chain_ranks(rank, modes, "rank")
        place: dict[str, Any] = {"dtype": dtype or torch.get_default_dtype(), "device": device}
        cores = [
            torch.randn(r, n, s, generator=generator, **place) * (_NOISE / max(r, s) ** 0.5)
            for r, n, s in zip(ranks, modes, ranks[1:], strict=False)
        ]
        for core in cores[:n_features]:
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
        """
        if rank < 2 or weight.ndim != 1:
            raise RankError(
                f"a linear model is a train of rank 2: rank has {rank} and weight {weight.ndim} axes, expected 2 or "
                "more and one axis. Pass a larger rank."
            )
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        linear = TensorTrain(_linear_cores(weight.detach(), torch.as_tensor(bias, **place)))
        if rank > 2 and len(weight) > 1:
            more = randn(linear.shape, chain_ranks(rank - 2, linear.shape, "rank"), generator=generator, **place)
            linear = round_tt(linear + more * (_NOISE * linear.norm() / more.norm()), eps=0.0, max_rank=rank).value
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

    def forward(self, x: Tensor) -> Tensor:
        """Values of examples.

        Args:
            x: ``(b, n_features)``.

        Returns:
            Tensor: ``(b,)``, or ``(b, n_outputs)``.

        Raises:
            DataError: ``x`` has another shape, NaN, or a category that is not there.
        """
        return self._values(list(self.cores), self._vectors(x))

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        loss: Literal["squared", "logistic", "cross-entropy"] | str = "squared",
        method: Literal["riemannian", "adam"] | str = "riemannian",
        n_sweeps: int = 100,
        lr: float | None = None,
        batch_size: int | None = None,
        penalty: float = 0.0,
        tol: float = 0.0,
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
            loss: A mean over examples.
            method: ``"riemannian"``: on the manifold of the ranks, by conjugate gradients with a line search on all of
                ``x``, or with ``batch_size`` by steps of length ``lr``. ``"adam"``: steps of the cores.
            n_sweeps: Steps over all of ``x``, or passes in batches.
            lr: Of steps in batches: 0.05 on the manifold and 1e-3 for Adam by default.
            batch_size: Of steps in batches.
            penalty: Weight of half the squared norm of all weights.
            tol: Of the line search: end where the gradient is this share of the first one.
            validation: Examples and labels to watch.
            checkpoint: File with which the same call on the same starting model goes on after a kill; of steps in
                batches and of Adam.
            observer: Called with the history after every sweep.
            generator: Decides the order of batches.

        Returns:
            History: for every sweep ``loss``, and those of ``validation``.

        Raises:
            DataError: Examples or labels do not fit.
            KindError: An option of no known name.
        """
        check_choice(method, ("riemannian", "adam"), "method")
        check_choice(loss, tuple(LOSSES), "loss")
        if checkpoint is not None and method == "riemannian" and batch_size is None:
            raise KindError(
                "a line search over all examples keeps no file: checkpoint is given, expected none. Leave it out, or "
                "pass batch_size."
            )
        vectors = self._vectors(x)
        labels = self._labels(y, x.shape[0], loss)
        if x.shape[0] == 0:
            raise DataError("a fit must have data: x has no examples, expected one or more. Pass (b, n_features).")
        if validation is not None:
            self._vectors(validation[0])
            validation = (validation[0], self._labels(validation[1], validation[0].shape[0], loss))
        job = Supervised(
            self,
            x,
            labels,
            loss,
            n_sweeps,
            validation,
            penalty=(lambda: self._penalty(list(self.cores), penalty)) if penalty else None,
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        if method == "adam":
            return job.by_steps(1e-3 if lr is None else lr, batch_size or 256)
        if batch_size is not None:
            return job.by_steps(
                0.05 if lr is None else lr, batch_size, lambda parameters, lr: RiemannianSGD(self, lr=lr)
            )
        return _Descent(self, job, vectors, labels, penalty).run(tol)

    def _values(self, cores: Sequence[Tensor], vectors: Any) -> Tensor:
        n = self.n_features
        found = data_halves(cores[:n], vectors, n if self.n_outputs > 1 else n // 2)
        if self.n_outputs > 1:
            wide = found.left @ cores[-1][:, :, 0].to(found.left.dtype)
            return held(wide, found.exponent).to(cores[0].dtype)
        value = (found.left * found.right).sum(-1, keepdim=True)
        return held(value, found.exponent)[:, 0].to(cores[0].dtype)

    def _penalty(self, cores: Sequence[Tensor], weight: float) -> Tensor:
        return 0.5 * weight * log_square_norm(cores).exp()

    def _vectors(self, x: object) -> Tensor | list[Tensor]:
        """For each feature ``(b, m)``."""
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.n_features:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"examples must have {self.n_features} features: x has {found}, expected (b, {self.n_features})."
            )
        dtype = self.cores[0].dtype
        if can_look(x):
            check_finite(x)
        columns = x.to(dtype).T
        if not any(self.n_values):
            return torch.stack((torch.ones_like(columns), columns), dim=-1)
        return [self._vector(k, x[:, k], dtype) for k in range(self.n_features)]

    def _vector(self, k: int, column: Tensor, dtype: torch.dtype) -> Tensor:
        n = self.n_values[k]
        if not n:
            numbers = column.to(dtype)
            return torch.stack((torch.ones_like(numbers), numbers), dim=-1)
        values = column.long()
        if can_look(column) and column.numel():
            low, high = (int(v) for v in torch.aminmax(values))
            if low < 0 or high >= n or not bool((values == column).all()):
                raise DataError(
                    f"a category must be one of the {n} of its feature: column {k} has numbers from {low} to {high}, "
                    f"expected whole ones from 0 to {n - 1}. Number the categories from 0."
                )
        one_hot = nn.functional.one_hot(values, n).to(dtype)
        return torch.cat((torch.ones_like(one_hot[:, :1]), one_hot), dim=1)

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

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return f"n_features={self.n_features}, n_outputs={self.n_outputs}, max_rank={max(self.ranks)}"


class _Descent:
    """Conjugate gradients on the manifold, over all examples at once."""

    def __init__(
        self, model: ExponentialMachine, job: Supervised, vectors: Any, labels: Tensor, penalty: float
    ) -> None:
        self.model, self.job, self.penalty = model, job, penalty
        wide = torch.float64 if model.cores[0].dtype != torch.float64 else model.cores[0].dtype
        self.vectors = vectors.to(wide) if isinstance(vectors, Tensor) else [vector.to(wide) for vector in vectors]
        self.labels = labels.to(wide) if labels.is_floating_point() else labels
        self.dtype = wide

    def run(self, tol: float) -> History:
        start = TensorTrain(tuple(core.detach().to(self.dtype) for core in self.model.cores))
        history = History()
        _, done = descend(
            self._loss,
            round_tt(start, eps=0.0).value,
            n_steps=self.job.n_sweeps,
            tol=tol,
            length=self._length if self.job.loss == "squared" else None,
            observer=lambda x, _: self._note(x, history),
        )
        history.stop = done.stop
        return history

    def _loss(self, x: TensorTrain) -> Tensor:
        found = LOSSES[self.job.loss](self.model._values(x.cores, self.vectors), self.labels)
        return found + 0.5 * self.penalty * x.norm() ** 2 if self.penalty else found

    def _length(self, x: TensorTrain, direction: TangentVector) -> float:
        """Where least squares are least on the line, in the tangent space."""
        with torch.no_grad():
            residual = self.labels - self.model._values(x.cores, self.vectors)
            along = self.model._values(direction.value.cores, self.vectors)
            top = float((residual * along).mean()) - 0.5 * self.penalty * float(
                direction.inner(_as_tangent(x, direction))
            )
            bottom = float(along.square().mean()) + 0.5 * self.penalty * float(direction.inner(direction))
        return top / bottom if bottom > 0 and top > 0 else 1.0

    def _note(self, x: TensorTrain, history: History) -> None:
        self.model._take([core.to(self.model.cores[0].dtype).clone() for core in x.cores])
        history.append(**self.job.figures(), ranks=self.model.ranks)
        if self.job.observer is not None:
            self.job.observer(history)


def _as_tangent(x: TensorTrain, direction: TangentVector) -> TangentVector:
    return project(x, at=direction.point)


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
