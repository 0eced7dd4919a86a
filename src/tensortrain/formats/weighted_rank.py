"""The best approximation of a matrix by one of low rank, in the norm of the second moments of both its sides.

The error is ``||F^(1/2) (W - W') H^(1/2)||``. No root of a moment is needed: with ``F = C C^T`` the singular values of
``F^(1/2) W H^(1/2)`` are the roots of the eigenvalues of ``C^T (W H W^T) C``, and for the leading eigenvectors ``U``
the best matrix of their rank is ``C^-T U U^T C^T W``. Only products, one Cholesky factor and one eigenproblem of the
smaller side are left, in place of eigenproblems of both.

Source: Eckart and Young, Psychometrika 1(3), 1936; the norm as in SVD-LLM, ICLR 2025, arXiv:2403.07378.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import WeightShape
from .weighting import Weighting, times_moment
from .whitening import DAMPING, root_and_inverse

__all__ = ["WeightedMatrix"]

_CANCELLED = 1e-7  # of a square: less is not known from products in float32
_TINY = 1e-300
_LEAST = 1e-8  # of the mean square, so that a moment has a root
_AT_ONCE = 2**20  # numbers that are made doubles of


@dataclass(frozen=True)
class WeightedMatrix:
    """A weight as ``(outputs, inputs)`` with inputs in torch's order, and the moments of both sides.

    Attributes:
        matrix: ``(M, N)``, float64; of a large weight as it is.
        weighted: The matrix times the moment of the inputs, float64; None where a weight is so large that it is gone
            through in parts.
        inputs: ``(N, N)`` or ``(N,)``.
        outputs: ``(M, M)`` or ``(M,)``; None where all outputs count alike.
        basis, outside: Directions that the inputs lie in, see ``Weighting``; outside of them damping is that share.
        dtype: Of the weight.
        is_table: Whether torch's layout is ``(inputs, outputs)``.
        own: The matrix as it lies in the weight.
        weighting: What the moments are of; it keeps what is found.
    """

    matrix: Tensor
    weighted: Tensor | None
    inputs: Tensor
    outputs: Tensor | None
    dtype: torch.dtype
    is_table: bool
    own: Tensor
    weighting: Weighting
    basis: Tensor | None = None
    outside: float = 0.0

    @classmethod
    def of(cls, dense: Tensor, weight: WeightShape, weighting: Weighting) -> WeightedMatrix:
        """The matrix of one group's weight.

        Raises:
            ShapeError, NonFiniteError: As ``Weighting.checked``.
        """
        found = weighting.checked(weight)
        assert found.inputs is not None
        is_table = weight.kind == "embedding"
        matrix = dense.detach().T if is_table else dense.detach().flatten(1)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        basis = None if found.basis is None else found.basis.to(dense.device)
        more = dense.dtype, is_table, matrix, found, basis, found.outside
        one_side = found.inputs if _is_wide(matrix) else found.outputs
        if basis is None and found.goes_in_parts(matrix) and _counts_alone(one_side):
            return cls(matrix, None, found.inputs, found.outputs, *more)
        return cls(matrix.double(), found.times_inputs(matrix), found.inputs, found.outputs, *more)

    def singular_values(self) -> Tensor:
        """Of the matrix between the roots of its damped moments; float64, descending."""
        keeps = self.weighting.keeps_directions
        values = self._directions()[0] if keeps else torch.linalg.eigvalsh(self._gram()[0]).flip(0)
        values = values.clamp_min(0).sqrt()
        if self.basis is not None and not self.outside:
            values[len(self.basis) :] = 0.0  # no input has more directions
        return values

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors ``(M, r)`` and ``(r, N)`` of the best matrix of that rank."""
        _, vectors, factor = self._directions()
        return self._on(vectors[:, :rank].clone(), factor)  # what is kept must not be written to

    def at_errors(self, errors: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """The same of ranks whose predicted errors are about these, from one decomposition; none of full rank."""
        values, vectors, factor = self._directions()
        squares = values.clamp_min(0)
        tails = 1 - squares.cumsum(dim=0) / squares.sum().clamp_min(_TINY)
        ranks = sorted({1 + int((tails.clamp_min(0).sqrt() - error).abs().argmin()) for error in errors})
        ranks = [rank for rank in ranks if rank < len(values)]
        if not ranks:
            return []
        outputs, inputs = self._on(vectors[:, : ranks[-1]].clone(), factor)
        return [(outputs[:, :rank], inputs[:rank]) for rank in ranks]

    def _directions(self) -> tuple[Tensor, Tensor, _Factor]:
        """Eigenvalues of the smaller Gram matrix, descending, its eigenvectors, and the factor of that side."""

        def find() -> tuple[Tensor, Tensor, _Factor]:
            gram, factor = self._gram()
            values, vectors = torch.linalg.eigh(gram)
            return values.flip(0), vectors.flip(1), factor

        return self.weighting.found_of(self.own, "directions", find) if self.weighting.keeps_directions else find()

    def _on(self, leading: Tensor, factor: _Factor) -> tuple[Tensor, Tensor]:
        """The matrix projected on leading directions, as factors."""
        if self._is_wide:
            return factor.divide(leading), self._transposed_times(factor.multiply(leading)).T
        return self._transposed_times(factor.multiply(leading)), factor.divide(leading).T

    def rel_error(self, outputs: Tensor, inputs: Tensor) -> float:
        """Of the product of stored factors ``(M, r)`` and ``(r, N)``, in the moments as they are."""
        if self.weighted is None:
            return self._error_in_parts(outputs, inputs)
        outputs, inputs = outputs.double(), inputs.double()
        whole = max(self.weighting.energy_of_weight(self.own), _TINY)
        difference = self.matrix - outputs @ inputs
        lost = self._energy(difference, self.weighted - outputs @ self._times(inputs, self.inputs))
        if lost < _CANCELLED * whole:  # a difference of products that are nearly equal
            lost = self._energy(difference, self._times(difference, self.inputs))
        return math.sqrt(lost / whole)

    @property
    def _is_wide(self) -> bool:
        return _is_wide(self.matrix)

    @property
    def _long(self) -> Tensor:
        """The matrix with its longer side first."""
        return self.matrix.T if self._is_wide else self.matrix

    def _transposed_times(self, factor: Tensor) -> Tensor:
        """``W^T C`` of a wide matrix, ``W C`` of another; in parts, in the precision that it will be stored in."""
        if self.weighted is not None:
            return self._long @ factor
        found = factor.new_empty(len(self._long), factor.shape[1], dtype=self._long.dtype)
        for some, place in zip(_in_parts(self._long), _in_parts(found, like=self._long), strict=True):
            place.copy_(some.double() @ factor)
        return found

    def _inner_in_parts(self) -> Tensor:
        """``W H W^T`` of a wide matrix, ``W^T F W`` of another, with damped moments; the longer side counts alone."""
        moment = self.inputs if self._is_wide else self.outputs
        counts = None if moment is None else moment.clamp_min(0) + DAMPING * moment.mean()
        total = torch.zeros(())
        for some, weights in zip(_in_parts(self._long), _alike(counts, self._long), strict=True):
            rows = some.double()
            total = total + rows.T @ (rows if weights is None else weights[:, None] * rows)
        return total

    def _error_in_parts(self, outputs: Tensor, inputs: Tensor) -> float:
        lost = 0.0
        sides = (inputs.T, outputs) if self._is_wide else (outputs, inputs.T)
        short = sides[1].double()
        ends = _alike(self.inputs if self._is_wide else self.outputs, self._long)
        for some, long, counts in zip(_in_parts(self._long), _in_parts(sides[0], like=self._long), ends, strict=True):
            difference = (some.double() - long.double() @ short.T).to(some.dtype)
            if self._is_wide:
                lost += Weighting(counts, self.outputs).energy(difference.T)
            else:
                lost += Weighting(self.inputs, counts).energy(difference)
        return math.sqrt(lost / max(self.weighting.energy_of_weight(self.own), _TINY))

    def _gram(self) -> tuple[Tensor, _Factor]:
        """The smaller Gram matrix of the weighted matrix, and the factor of the moment on its side."""
        if self._is_wide:
            factor = _Factor.of(self.outputs)
        else:
            factor = _Factor.of(self._damped_inputs(), damping=0.0 if self.basis is not None else DAMPING)
        if self.weighted is None:
            inner = self._inner_in_parts()
        elif self._is_wide:
            inner = self._damped() @ self.matrix.T
        else:
            inner = self.matrix.T @ self._damped_outputs()
        gram = factor.transposed(factor.transposed(inner).T)
        return (gram + gram.T) / 2, factor

    def _damped(self) -> Tensor:
        """``W (H + damping mean(H) 1)``."""
        moment = self.inputs
        assert self.weighted is not None
        if moment.ndim == 1:
            return self.matrix * (moment.clamp_min(0) + DAMPING * moment.mean())
        mean = float(moment.diagonal().mean())
        if self.basis is None:
            return self.weighted + DAMPING * mean * self.matrix
        inside = (self.matrix @ self.basis.T) @ self.basis
        return self.weighted + mean * (DAMPING * inside + self.outside * (self.matrix - inside))

    def _damped_inputs(self) -> Tensor:
        """The moment of the inputs, damped where they lie in few directions; as it is where they do not."""
        moment = self.inputs.double()
        if self.basis is None:
            return moment
        outside = max(self.outside, _LEAST)
        damped = moment + (DAMPING - outside) * moment.diagonal().mean() * (self.basis.T @ self.basis)
        damped.diagonal().add_(outside * moment.diagonal().mean())
        return damped

    def _damped_outputs(self) -> Tensor:
        """``(F + damping mean(F) 1) W``; the matrix where there is no moment."""
        moment = self.outputs
        if moment is None:
            return self.matrix
        if moment.ndim == 1:
            return (moment.clamp_min(0) + DAMPING * moment.mean())[:, None] * self.matrix
        return self._times(self.matrix.T, moment).T + DAMPING * moment.diagonal().mean() * self.matrix

    def _times(self, matrix: Tensor, moment: Tensor | None) -> Tensor:
        """A matrix that is known to the precision of the weight, times a moment."""
        return times_moment(matrix if self.dtype == torch.float64 else matrix.float(), moment)

    def _energy(self, matrix: Tensor, weighted: Tensor) -> float:
        return max(0.0, float((weighted * self._times(matrix.T, self.outputs).T).sum()))


@dataclass(frozen=True)
class _Factor:
    """``C`` with ``C C^T`` the damped moment of one side: triangular, a diagonal, or None for the identity.

    Where the moment is indefinite by more than the damping, ``C`` is its symmetric root, and its inverse is known.
    """

    factor: Tensor | None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, moment: Tensor | None, *, damping: float = DAMPING) -> _Factor:
        if moment is None:
            return cls(None)
        mean = (moment if moment.ndim == 1 else moment.diagonal()).mean().clamp_min(torch.finfo(moment.dtype).tiny)
        if moment.ndim == 1:
            return cls((moment.clamp_min(0) + damping * mean).sqrt())
        damped = (moment + moment.T) / 2
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        return cls(factor) if not bool(failed) else cls(*root_and_inverse(moment, damping=max(damping, _LEAST)))

    def transposed(self, x: Tensor) -> Tensor:
        """``C^T x``."""
        if self.factor is None:
            return x
        return self.factor[:, None] * x if self.factor.ndim == 1 else self.factor.T @ x

    def multiply(self, x: Tensor) -> Tensor:
        """``C x``."""
        if self.factor is None:
            return x
        return self.factor[:, None] * x if self.factor.ndim == 1 else self.factor @ x

    def divide(self, x: Tensor) -> Tensor:
        """``C^-T x``."""
        if self.factor is None:
            return x
        if self.factor.ndim == 1:
            return x / self.factor[:, None]
        if self.inverse is not None:
            return self.inverse.T @ x
        return torch.linalg.solve_triangular(self.factor.T, x, upper=True)


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _counts_alone(moment: Tensor | None) -> bool:
    return moment is None or moment.ndim == 1


def _in_parts(long: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Some rows at a time, as many as another matrix is cut into."""
    return long.split(max(1, _AT_ONCE // (long if like is None else like).shape[1]))


def _alike(counts: Tensor | None, long: Tensor) -> Sequence[Tensor | None]:
    """The same parts of what belongs to the rows."""
    return [None] * len(_in_parts(long)) if counts is None else _in_parts(counts, like=long)
