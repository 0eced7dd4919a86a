"""What every kind of train must hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from tensortrain.errors import DTypeError, KindError
from tensortrain.tensor import dot, round_tt
from tensortrain.tensor.base import CoreChain

from .compare import check_refused, is_left_orthogonal, rel_error

__all__ = ["ChainSuite"]


class ChainSuite(ABC):
    """Inherit as ``class TestMine(ChainSuite)`` and say how to make two of one shape.

    Example:
        >>> import tensortrain as tt
        >>> class TestTrain(ChainSuite):
        ...     def make(self, seed, dtype):
        ...         return tt.randn((3, 4), 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    """

    tol = 1e-13

    @abstractmethod
    def make(self, seed: int, dtype: torch.dtype) -> CoreChain:
        """A train of fixed modes and of rank 2 or more, different for every seed."""

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        return self.make(0, dtype), self.make(1, dtype)

    def test_algebra_agrees_with_dense(self) -> None:
        for dtype in (torch.float64, torch.complex128):
            x, y = self.pair(dtype)
            a, b = x.to_dense(), y.to_dense()
            assert tuple(a.shape) == x.shape
            for found, exact in (
                (x + y, a + b),
                (x - y, a - b),
                (x * y, a * b),
                (-x, -a),
                (x / 3, a / 3),
                (2 * x, 2 * a),
                (x * 2j, a * 2j),
                (x + 1.5, a + 1.5),
                (1.5 - x, 1.5 - a),
                (torch.tensor(2.0) * x, 2 * a),
                (x.conj(), a.conj()),
            ):
                assert type(found) is type(x)
                assert found.to_dense().dtype == exact.dtype
                assert rel_error(found.to_dense(), exact) <= self.tol

    def test_numbers_agree_with_dense(self) -> None:
        for dtype in (torch.float64, torch.complex128):
            x, y = self.pair(dtype)
            a, b = x.to_dense(), y.to_dense()
            assert rel_error(dot(x, y), torch.vdot(a.flatten(), b.flatten())) <= 10 * self.tol
            assert rel_error(x.norm(), a.norm()) <= self.tol
            assert rel_error(x.log_norm(), a.norm().log()) <= self.tol
            assert rel_error(x.sum(), a.sum()) <= 10 * self.tol
            assert rel_error(x.mean(), a.mean()) <= 10 * self.tol
            assert not x.norm().is_complex()
            assert x.numel == a.numel()

    def test_canonical_form_keeps_the_tensor(self) -> None:
        for dtype in (torch.float64, torch.complex128):
            x = self.make(0, dtype)
            for k in range(-x.order, x.order):
                y = x.orthogonalize(k)
                assert y.center == (k % x.order, k % x.order)
                assert rel_error(y.to_dense(), x.to_dense()) <= self.tol
                at = k % x.order
                assert all(is_left_orthogonal(core) for core in y.cores[:at])
                assert all(is_left_orthogonal(core.movedim(0, -1)) for core in y.cores[at + 1 :])
                assert rel_error(y.norm(), y.cores[k].norm()) <= self.tol

    def test_rounding_undoes_a_sum(self) -> None:
        x, _ = self.pair()
        found = round_tt(x + x - x / 2, eps=1e-10)
        assert found.value.ranks == x.ranks
        assert rel_error(found.value.to_dense(), 1.5 * x.to_dense()) <= found.rel_error_bound <= 1e-10  # type: ignore[operator]

    def test_gradients(self) -> None:
        x, y = self.pair()
        cores = [core.detach().requires_grad_() for core in x.cores]
        kind = type(x)

        def values(*cores: Tensor) -> tuple[Tensor, ...]:
            z = kind(cores)
            return (z * y + 2 * z - y).to_dense(), dot(z, y), z.norm(), z.log_norm(), z.sum()

        assert torch.autograd.gradcheck(values, cores)

    def test_operands_must_match(self) -> None:
        x, _ = self.pair()
        for wrong, error in ((x.to(torch.float32), DTypeError), (x.to_dense(), KindError), ("x", KindError)):
            for operation in (x.__add__, x.__sub__, x.__mul__):
                check_refused(error, operation, wrong)

    def test_repr_is_one_line(self) -> None:
        assert "\n" not in repr(self.make(0, torch.float64))
