"""What every weight format must hold."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensortrain.errors import TTError
from tensortrain.formats import Factorization, FactorSpec, Format, WeightShape

from .compare import check_refused, rel_error

__all__ = ["FormatSuite"]


class FormatSuite(ABC):
    """Inherit as ``class TestMine(FormatSuite)`` and give a format with a weight that it can stand for.

    Attributes:
        tol: Largest error of an exact factorization in float64.
        recovers_ranks: Whether ``eps`` alone finds the ranks that a weight was made with.

    Example:
        >>> from tensortrain.formats import get_format
        >>> class TestLowRank(FormatSuite):
        ...     def make(self):
        ...         return get_format("low_rank"), WeightShape("linear", 24, 30)
    """

    tol = 1e-12
    recovers_ranks = True

    @abstractmethod
    def make(self) -> tuple[Format, WeightShape]:
        """The format, and the shape of a small weight."""

    def spec_of(self, rank: Any, one_group: bool = False) -> FactorSpec:
        format, weight = self.make()
        return format.spec(weight.one_group() if one_group else weight, rank=rank)

    def error_of(self, found: Factorization, dense: Tensor) -> float:
        """Measured in double precision; what was found must be laid out as its spec says."""
        assert tuple(tuple(core.shape) for core in found.cores) == found.spec.core_shapes
        for core in found.cores:
            assert core.dtype == dense.dtype
            assert core.is_contiguous()
            assert not core.requires_grad
        double = torch.complex128 if dense.is_complex() else torch.float64
        return rel_error(self.make()[0].to_dense([core.to(double) for core in found.cores], found.spec), dense)

    # -- specs -------------------------------------------------------------------------------------------

    def test_a_spec_is_plain_data_and_counts_its_cores(self) -> None:
        format, _ = self.make()
        spec = self.spec_of(rank=3)
        assert FactorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert hash(spec) == hash(FactorSpec.from_dict(spec.to_dict()))
        cores = _random_cores(spec)
        assert tuple(format.to_dense(cores, spec).shape) == spec.weight.dense_shape
        assert spec.n_params == spec.weight.groups * spec.one_group().n_params == sum(core.numel() for core in cores)
        caps = format.rank_caps(spec)
        assert len(caps) == len(spec.ranks)
        assert all(r <= cap for r, cap in zip(spec.ranks, caps, strict=True))

    def test_groups_are_separate_weights(self) -> None:
        format, weight = self.make()
        spec = self.spec_of(rank=2)
        cores = _random_cores(spec)
        if weight.groups > 1:
            groups = [[core[g] for core in cores] for g in range(weight.groups)]
            parts = [format.to_dense(group, spec.one_group()) for group in groups]
            assert torch.equal(format.to_dense(cores, spec), torch.cat(parts))

    def test_a_weight_is_the_sum_over_every_bond(self) -> None:
        format, _ = self.make()
        spec = self.spec_of(rank=3, one_group=True)
        cores = _random_cores(spec)
        dense = format.to_dense(cores, spec)
        for bond in format.bonds(spec):
            assert len(bond) >= 2
            (rank,) = {cores[k].shape[axis] for k, axis in bond}
            for k, axis in bond:
                parts = [[*cores[:k], _kept(cores[k], axis, index), *cores[k + 1 :]] for index in range(rank)]
                total = torch.stack([format.to_dense(part, spec) for part in parts]).sum(0)
                assert rel_error(total, dense) <= 1e-10

    def test_fans_multiply_to_what_an_output_sums_over(self) -> None:
        format, weight = self.make()
        spec = self.spec_of(rank=3, one_group=True)
        if weight.kind == "embedding":  # a lookup sums over nothing
            return
        fans = format.core_fans(spec)
        assert math.prod(f_in for f_in, _ in fans) == weight.fan_in * format.n_paths(spec)
        shapes = spec.core_shapes
        assert all(f_in * f_out <= math.prod(shape) for (f_in, f_out), shape in zip(fans, shapes, strict=True))

    def test_a_fresh_weight_has_the_spread_asked_for(self) -> None:
        format, weight = self.make()
        if weight.kind == "embedding":  # rows that pad the vocabulary have a part in it
            return
        for rank in (1, 3):
            spec = self.spec_of(rank)
            cores = _random_cores(spec)
            format.init_(cores, spec, 0.3, torch.Generator().manual_seed(1))
            assert abs(float(format.to_dense(cores, spec).square().mean().sqrt()) - 0.3) <= 1e-9, rank

    def test_gradients(self) -> None:
        format, _ = self.make()
        spec = self.spec_of(rank=2)
        cores = [core.requires_grad_() for core in _random_cores(spec)]
        upstream = torch.randn(spec.weight.dense_shape, dtype=torch.float64)

        def value(*cores: Tensor) -> Tensor:
            return (format.to_dense(list(cores), spec) * upstream).sum()

        assert torch.autograd.gradcheck(value, cores)

    # -- from a dense weight -----------------------------------------------------------------------------

    def test_exact_without_rank_and_eps(self) -> None:
        format, weight = self.make()
        for name, make in WEIGHTS.items():
            dense = make(weight.dense_shape)
            found = format.factorize(dense, weight)
            assert self.error_of(found.value, dense) <= _bound(found) <= self.tol, name
            assert self.error_of(found.value, dense) <= self.tol, name

    def test_the_tolerance_is_kept(self) -> None:
        format, weight = self.make()
        for name, make in WEIGHTS.items():
            for dtype in (torch.float32, torch.float64):
                dense = make(weight.dense_shape).to(dtype)
                for eps in (0.5, 0.1, 1e-2, 1e-4):
                    found = format.factorize(dense, weight, eps=eps)
                    assert self.error_of(found.value, dense) <= _bound(found) <= eps, (name, dtype)

    def test_the_bound_holds_under_caps(self) -> None:
        format, weight = self.make()
        dense = flat(weight.dense_shape)
        for rank in (1, 2, 5):
            found = format.factorize(dense, weight, rank=rank, eps=1e-3)
            assert max(format.inner_ranks(found.value.spec)) <= rank
            assert self.error_of(found.value, dense) <= _bound(found) * (1 + 1e-12), rank

    def test_the_bound_holds_in_lower_precision(self) -> None:
        format, weight = self.make()
        for dtype in (torch.float32, torch.bfloat16):
            for name, make in WEIGHTS.items():
                dense = make(weight.dense_shape).to(dtype)
                found = format.factorize(dense, weight)
                assert self.error_of(found.value, dense) <= _bound(found), (name, dtype)

    def test_zero_weight(self) -> None:
        format, weight = self.make()
        dense = torch.zeros(weight.dense_shape, dtype=torch.float64)
        options: tuple[dict[str, Any], ...] = ({}, {"rank": 2}, {"eps": 0.1})
        for each in options:
            found = format.factorize(dense, weight, **each)
            assert _bound(found) == 0
            assert found.value.to_dense().abs().max() == 0

    def test_ranks_recovered_from_an_exact_weight(self) -> None:
        if not self.recovers_ranks:
            return
        format, weight = self.make()
        spec = self.spec_of(rank=2)
        modes: dict[str, Any] = {"in_modes": spec.in_modes, "out_modes": spec.out_modes}
        n_ids = math.prod(spec.in_modes)
        if weight.kind == "embedding" and n_ids != weight.in_features:  # rows that pad a vocabulary cost rank
            weight = replace(weight, in_features=n_ids)
            spec = format.spec(weight, rank=2, **modes)
        dense = format.to_dense(_random_cores(spec), spec)
        found = format.factorize(dense, weight, eps=1e-6, **modes)
        assert found.value.spec.ranks == spec.ranks
        assert self.error_of(found.value, dense) <= 1e-6

    def test_cores_are_of_like_size(self) -> None:
        # Gradients of a core grow with the others: no core may hide the scale of the whole.
        format, weight = self.make()
        found = format.factorize(1e-4 * flat(weight.dense_shape), weight, rank=4)
        norms = torch.stack([core.norm() for core in found.value.cores])
        assert norms.max() / norms.min() < 30

    def test_what_is_refused(self) -> None:
        format, weight = self.make()
        dense = flat(weight.dense_shape)
        for eps in (-1.0, 1.0, math.nan):
            check_refused(TTError, format.factorize, dense, weight, eps=eps)
        check_refused(TTError, format.factorize, dense[1:], weight)


def flat(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def decaying(shape: tuple[int, ...]) -> Tensor:
    """Singular values from 1 down to 1e-6 in every matricization."""
    rest = math.prod(shape[1:])
    rows, columns = (torch.logspace(0, -3, n, dtype=torch.float64) for n in (shape[0], rest))
    return (rows[:, None] * flat((shape[0], rest)) * columns).reshape(shape)


def steps(shape: tuple[int, ...]) -> Tensor:
    """Groups of outputs on very different scales, so that groups of a convolution need different ranks."""
    scale = 10.0 ** -(torch.arange(shape[0]) // 3).double()
    return flat(shape) * scale.reshape(-1, *[1] * (len(shape) - 1))


def low(shape: tuple[int, ...]) -> Tensor:
    return (flat((shape[0], 2)) @ flat((2, math.prod(shape[1:])))).reshape(shape)


WEIGHTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "flat": flat,
    "decaying": decaying,
    "steps": steps,
    "low": low,
}


def _random_cores(spec: FactorSpec) -> list[Tensor]:
    return [flat(shape) for shape in spec.core_shapes]


def _bound(found: Any) -> float:
    return float(found.rel_error_bound)


def _kept(core: Tensor, axis: int, index: int) -> Tensor:
    """All but one index of an axis set to zero."""
    only = torch.zeros_like(core)
    only.movedim(axis, 0)[index] = core.movedim(axis, 0)[index]
    return only
