import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.errors import KindError, NonFiniteError, RankError
from tensortrain.system.native import library
from tensortrain.tensor import (
    TensorTrain,
    default_eps,
    ones,
    randn,
    randn_matrix,
    round_tt,
    tt_svd,
    unfolding_spectra,
    zeros,
)
from tensortrain.testing import is_left_orthogonal, rel_error


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple),
    rank=st.integers(1, 9),
    eps=st.floats(1e-11, 0.9),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_promise_is_kept_on_random_trains(shape, rank, eps, seed, dtype):
    x = randn(shape, (rank,) * (len(shape) - 1), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    found = round_tt(x, eps=eps)
    assert found.value.shape == shape
    assert rel_error(found.value.to_dense(), x.to_dense()) <= found.rel_error_bound <= eps
    assert all(is_left_orthogonal(core) for core in found.value.cores[:-1])


def decaying(dtype, generator):
    shape = (6, 7, 8, 5)
    terms = [0.3**k * randn(shape, 1, generator=generator, dtype=dtype) for k in range(7)]
    return sum(terms[1:], start=terms[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64, torch.bfloat16])
def test_promise_is_kept_in_every_dtype(dtype, generator):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = decaying(dtype, generator)
    exact = x.to(wide).to_dense()
    for eps in (0.5, 0.2, default_eps(dtype, 4)):
        found = round_tt(x, eps=eps)
        assert found.value.dtype == dtype
        assert rel_error(found.value.to_dense(), exact) <= found.rel_error_bound <= eps


def test_error_at_fixed_ranks_is_quasi_optimal(generator):
    x = decaying(torch.float64, generator)
    dense = x.to_dense()
    for rank in (1, 2, (3, 2, 1), (1, 2, 5, 2, 1)):
        found = round_tt(x, max_rank=rank)
        error = rel_error(found.value.to_dense(), dense)
        ranks = found.value.ranks[1:-1]
        cuts = [float(s[r:].norm()) / float(dense.norm()) for s, r in zip(unfolding_spectra(dense), ranks, strict=True)]
        assert max(cuts) * (1 - 1e-12) <= error <= math.sqrt(3) * max(cuts)
        assert error <= found.rel_error_bound


def test_matrices_round_too(generator):
    a = randn_matrix((3, 4, 2), (2, 3, 4), 3, generator=generator)
    found = round_tt(a + a, eps=1e-10)
    assert found.value.ranks == a.ranks
    assert (found.value.out_modes, found.value.in_modes) == (a.out_modes, a.in_modes)
    assert rel_error(found.value.to_dense(), 2 * a.to_dense()) <= found.rel_error_bound


def test_idempotent(generator):
    once = round_tt(decaying(torch.float64, generator), eps=1e-2).value
    twice = round_tt(once, eps=1e-10)
    assert twice.value.ranks == once.ranks
    assert rel_error(twice.value.to_dense(), once.to_dense()) <= 1e-13


def test_canonical_input_gives_the_same(generator):
    x = decaying(torch.float64, generator)
    plain = round_tt(x, eps=1e-2)
    for k in range(4):
        found = round_tt(x.orthogonalize(k), eps=1e-2)
        assert found.value.ranks == plain.value.ranks
        assert rel_error(found.value.to_dense(), plain.value.to_dense()) <= 1e-13


def test_zero_and_cancelled_trains(generator):
    found = round_tt(zeros((3, 4, 5)) + zeros((3, 4, 5)))
    assert found.value.ranks == (1, 1, 1, 1)
    assert found.rel_error_bound == 0.0
    x = randn((3, 4, 5), 2, generator=generator)
    assert float((x - x).round().norm()) <= 1e-14 * float(x.norm())


def test_bound_stays_honest_where_a_sum_cancels(generator):
    x, y = (randn((5, 6, 7), 3, generator=generator) for _ in range(2))
    almost = (x + 1e-8 * y).round(eps=1e-14)
    difference = almost - x  # what is left is 1e-8 of what went in
    found = round_tt(difference, eps=1e-3)
    exact = almost.to_dense() - x.to_dense()
    error = rel_error(found.value.to_dense(), difference.to_dense())
    assert error <= found.rel_error_bound <= 1e-3
    assert found.value.ranks == (1, 3, 3, 1)
    assert rel_error(found.value.to_dense(), exact) <= 1e-6
    # eps below what the cores can tell is answered by a bound above it
    assert 1e-13 < round_tt(difference, eps=1e-13).rel_error_bound < 1e-5


def test_long_chains_neither_overflow_nor_vanish(generator):
    length = 2000 if library() is not None else 600  # core by core Python takes its time
    for size in (4.0, 0.25):
        x = ones((2,) * length)
        x = TensorTrain([core * size for core in x.cores])
        found = round_tt(x + x, eps=1e-8)
        assert set(found.value.ranks) == {1}
        expected = length * math.log(size) + length / 2 * math.log(2) + math.log(2)
        assert float(found.value.log_norm()) == pytest.approx(expected, rel=1e-12)
        assert float((x + x).log_norm()) == pytest.approx(expected, rel=1e-12)


def test_round_method_gives_the_value(generator):
    x = decaying(torch.float64, generator)
    assert x.round(max_rank=2).ranks == (1, 2, 2, 2, 1)
    assert x.round(eps=1e-2).ranks == round_tt(x, eps=1e-2).value.ranks


def test_bad_input(generator):
    x = randn((3, 4, 5), 2, generator=generator)
    bad = TensorTrain([x.cores[0], x.cores[1] * float("nan"), x.cores[2]])
    with pytest.raises(NonFiniteError, match=r"cores\[1\] has NaN or Inf"):
        round_tt(bad)
    with pytest.raises(KindError, match="x has Tensor"):
        round_tt(x.to_dense())
    with pytest.raises(KindError, match="method has 'als'"):
        round_tt(x, method="als")
    with pytest.raises(RankError, match="rank has 0"):
        round_tt(x, max_rank=0)
    with pytest.raises(RankError, match="eps has 2"):
        round_tt(x, eps=2.0)


@pytest.mark.parametrize("method", ["gram", "randomized", "svd"])
@pytest.mark.parametrize("poor", ["zero", "rank one"])
def test_members_of_a_batch_may_be_poor(method, poor, generator):
    x = torch.randn(2, 8, 8, 8, generator=generator, dtype=torch.float64)
    if poor == "zero":
        x[1] = 0.0
    else:
        x[1] = torch.ones(8, 8, 8)
    found = tt_svd(x, eps=1e-12, batch_dims=1).value
    doubled = found + found
    rounded = round_tt(doubled, eps=1e-6, method=method)
    error = (rounded.value.to_dense() - 2 * x).flatten(1).norm(dim=1)
    assert bool((error <= 1e-6 * (2 * x).flatten(1).norm(dim=1) + 1e-300).all())


def test_a_zero_member_keeps_a_basis(generator):
    x = torch.zeros(2, 64, 3, 3, dtype=torch.float64)
    x[0] = torch.randn(64, 3, 3, generator=generator, dtype=torch.float64)
    right = torch.eye(9, dtype=torch.float64).reshape(1, 9, 9, 1).expand(2, 9, 9, 1).contiguous()
    train = TensorTrain([x.reshape(2, 1, 64, 9), right])
    rounded = round_tt(train, method="gram", eps=1e-6).value
    assert all(bool(torch.isfinite(core).all()) for core in rounded.cores)
    torch.testing.assert_close(rounded.to_dense(), train.to_dense(), rtol=1e-6, atol=1e-6)
