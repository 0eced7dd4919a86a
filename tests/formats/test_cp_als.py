"""Alternating least squares for CP: the sweep written out is the one on the network, and its error is the true one."""

from __future__ import annotations

import itertools

import pytest
import torch

from tensortrain.contract import Network
from tensortrain.formats.als import alternate
from tensortrain.formats.cp import cp_factors
from tensortrain.formats.cp_als import alternate_cp
from tensortrain.testing import rel_error

SHAPES = [(4, 5), (3, 4, 5), (2, 6, 3, 4), (5, 1, 2, 3), (2, 3, 2, 3, 2)]


def dense_of(factors):
    letters = "abcdefg"[: len(factors)]
    return torch.einsum(",".join(f"{letter}z" for letter in letters) + "->" + letters, *factors)


def network_of(shape, rank):
    legs = tuple(f"n{k}" for k in range(len(shape)))
    sizes = (*zip(legs, shape, strict=True), ("a", rank))
    return Network(tuple((leg, "a") for leg in legs), legs[:1], legs[1:], sizes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_sweeps", [0, 1, 7])
def test_a_sweep_is_that_of_the_network(shape, n_sweeps):
    target, start = torch.randn(shape), [torch.randn(n, 2) for n in shape]
    found, error = alternate_cp(target, start, n_sweeps=n_sweeps, tol=0.0)
    expected, expected_error = alternate(network_of(shape, 2), target, start, n_sweeps=n_sweeps, tol=0.0)
    assert rel_error(dense_of(found), dense_of(expected)) <= 1e-7  # normal equations square the conditioning
    assert error == pytest.approx(expected_error, rel=1e-7)
    assert error == pytest.approx(rel_error(dense_of(found), target), rel=1e-12)


def test_the_error_never_rises():
    target = torch.randn(4, 5, 6)
    factors, errors = [torch.randn(n, 3) for n in target.shape], []
    for _ in range(20):
        factors, error = alternate_cp(target, factors, n_sweeps=1)
        errors.append(error)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))


def test_it_stops_where_it_is_good_enough():
    exact = [torch.randn(n, 2) for n in (5, 6, 7)]
    target, start = dense_of(exact), [torch.randn(n, 2) for n in (5, 6, 7)]
    errors = [alternate_cp(target, start, n_sweeps=500, tol=1e-12, enough=enough)[1] for enough in (0.3, 1e-3, 0.0)]
    assert 1e-3 < errors[0] <= 0.3
    assert errors[2] < errors[1] <= 1e-3


def test_a_zero_tensor_gets_zero_factors():
    found, error = alternate_cp(torch.zeros(3, 4, 5), [torch.randn(n, 2) for n in (3, 4, 5)])
    assert error == 0.0
    assert not any(factor.any() for factor in found)


@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 6, 6), (9, 2, 5, 4)])
def test_factors_found_early_are_as_good_as_asked(shape):
    target = torch.randn(shape)
    full = cp_factors(target, 4)[1]
    asked = 1.1 * full
    factors, error = cp_factors(target, 4, enough=asked)
    assert error <= asked
    assert error == pytest.approx(rel_error(dense_of(factors), target), rel=1e-9)
