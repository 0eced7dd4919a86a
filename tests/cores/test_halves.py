"""Data that go through a chain from both ends: dense sums, both ways of computing, derivatives, long chains."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tensortrain.cores.algebra import dot_parts
from tensortrain.cores.halves import data_halves, log_abs, log_square_norm, values_of_data
from tensortrain.system.native import python_only

ORDER, MODE, RANK = 5, 3, 4


def chain(dtype: torch.dtype, order: int = ORDER, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, *[RANK] * (order - 1), 1]
    draws = [torch.randn(r, MODE, s, generator=generator, dtype=torch.float64) for r, s in itertools.pairwise(sizes)]
    return [draw.to(dtype).requires_grad_() for draw in draws]


def data(kind: str, n_samples: int, dtype: torch.dtype, order: int = ORDER) -> Tensor | list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "values":
        return torch.randint(-1, MODE, (n_samples, order), generator=generator)
    vectors = torch.randn(order, n_samples, MODE, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "stacked":
        return vectors.requires_grad_()
    return [vector.clone().requires_grad_() for vector in vectors]


def dense_values(cores: list[Tensor], rows: Tensor | list[Tensor]) -> Tensor:
    whole = cores[0][0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, dims=1)
    whole = whole[..., 0]
    if isinstance(rows, Tensor) and not rows.is_floating_point():
        every = torch.eye(MODE, dtype=whole.dtype)
        rows = [
            torch.where(rows[:, k, None] < 0, torch.ones_like(every[0]), every[rows[:, k].clamp_min(0)])
            for k in range(ORDER)
        ]
    return torch.einsum("abcde,za,zb,zc,zd,ze->z", whole, *rows)


def inputs(cores: list[Tensor], rows: Tensor | list[Tensor]) -> list[Tensor]:
    vectors = [rows] if isinstance(rows, Tensor) else rows
    return [*cores, *(vector for vector in vectors if vector.requires_grad)]


@pytest.mark.parametrize("n_samples", [1, 7, 150])
@pytest.mark.parametrize("n_left", [0, 2, ORDER])
@pytest.mark.parametrize("kind", ["values", "stacked", "apart"])
def test_values_and_gradients_agree_with_the_dense_sum(kind: str, n_left: int, n_samples: int) -> None:
    cores, rows = chain(torch.float64), data(kind, n_samples, torch.float64)
    weights = torch.linspace(0.5, 1.5, n_samples, dtype=torch.float64)

    def found() -> tuple[Tensor, tuple[Tensor, ...]]:
        halves = data_halves(cores, rows, n_left)
        value = (halves.left * halves.right).sum(-1) * torch.exp2(halves.exponent)
        return value, torch.autograd.grad((value * weights).sum(), inputs(cores, rows))

    exact = dense_values(cores, rows)
    exact_grads = torch.autograd.grad((exact * weights).sum(), inputs(cores, rows))
    value, grads = found()
    with python_only():
        twin, twin_grads = found()
    for one, other in (
        (value, exact),
        (twin, exact),
        *zip(grads, exact_grads, strict=True),
        *zip(twin_grads, exact_grads, strict=True),
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["values", "stacked"])
def test_derivatives_of_derivatives(kind: str) -> None:
    cores, rows = chain(torch.float64), data(kind, 3, torch.float64)

    def value(*tensors: Tensor) -> Tensor:
        given = tensors[ORDER] if len(tensors) > ORDER else rows
        mantissa, exponent = values_of_data(tensors[:ORDER], given)
        return mantissa * torch.exp2(exponent)

    assert torch.autograd.gradcheck(value, inputs(cores, rows))
    assert torch.autograd.gradgradcheck(value, inputs(cores, rows))


def test_a_core_may_be_missing_between_the_walks() -> None:
    cores, rows = chain(torch.float64), data("stacked", 6, torch.float64)
    found = data_halves([*cores[:2], *cores[3:]], rows, 2)
    middle = torch.einsum("za,anb,zn,zb->z", found.left, cores[2], rows[2], found.right) * torch.exp2(found.exponent)
    torch.testing.assert_close(middle, dense_values(cores, rows))


def test_norm_and_its_gradient() -> None:
    cores = chain(torch.float64)
    mantissa, exponent = dot_parts(cores, cores)
    exact = torch.autograd.grad(log_abs(mantissa, exponent), cores)
    for one, other in zip(torch.autograd.grad(log_square_norm(cores), cores), exact, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda *given: log_square_norm(given), cores)
    assert torch.autograd.gradgradcheck(lambda *given: log_square_norm(given), cores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_two_thousand_sites_stay_finite(scale: float, dtype: torch.dtype) -> None:
    cores = [(core.detach() * scale).to(dtype).requires_grad_() for core in chain(torch.float64, order=2000)]
    rows = data("values", 3, dtype, order=2000)
    found = log_abs(*values_of_data(cores, rows))
    exact = log_abs(*values_of_data([core.detach().double() for core in cores], rows))
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-4, atol=0)
    for core, grad in zip(cores, torch.autograd.grad(found.sum() + log_square_norm(cores), cores), strict=True):
        assert bool(torch.isfinite(grad).all())
        parts = grad.double() * core.detach().double()  # they sum up to 3 + 2: the values are homogeneous in a core
        rounding = torch.finfo(dtype).eps * float(parts.abs().sum())
        assert float(parts.sum()) == pytest.approx(5, abs=0.05 + rounding)


def test_zeros_have_the_logarithm_minus_infinity() -> None:
    cores = [torch.eye(2)[None], torch.eye(2)[..., None]]
    assert log_abs(*values_of_data(cores, torch.tensor([[0, 1], [1, 1]]))).tolist() == [-math.inf, 0]


def test_transforms_and_half_precision_take_the_steps() -> None:
    cores = [core.detach().requires_grad_() for core in chain(torch.float64)]
    rows = data("values", 5, torch.float64)

    def value(cores: list[Tensor]) -> Tensor:
        mantissa, exponent = values_of_data(cores, rows)
        return (mantissa * torch.exp2(exponent)).sum()

    grads = torch.func.grad(value)(cores)
    for one, other in zip(grads, torch.autograd.grad(value(cores), cores), strict=True):
        torch.testing.assert_close(one, other)


def test_no_samples() -> None:
    cores = chain(torch.float64)
    for kind in ("values", "stacked"):
        found, exponent = values_of_data(cores, data(kind, 0, torch.float64))
        assert found.shape == exponent.shape == (0,)
        assert all(not grad.any() for grad in torch.autograd.grad(found.sum(), cores))
