"""Products rounded on the way agree with the product formed and rounded."""

import pytest
import torch

from tensortrain.errors import KindError, RankError, ShapeError
from tensortrain.tensor import eye, hadamard, matmul, randn, randn_matrix, round_sum
from tensortrain.testing import rel_error

METHODS = ["auto", "exact", "randomized", "zipup", "fit"]
DTYPES = [torch.float64, torch.complex128]


def smooth(shape, dtype, generator, decay=0.2):
    terms = [decay**k * randn(shape, 1, generator=generator, dtype=dtype) for k in range(5)]
    return sum(terms[1:], start=terms[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-10])
def test_products_reach_the_tolerance(method, eps, dtype, generator):
    shape = (4, 5, 3, 4)
    x, y = smooth(shape, dtype, generator), smooth(shape, dtype, generator)
    a = randn_matrix((3, 4, 4, 2), shape, 3, generator=generator, dtype=dtype)
    b = randn_matrix(shape, (2, 2, 2, 2), 2, generator=generator, dtype=dtype)
    for found, exact in (
        (hadamard(x, y, eps=eps, method=method), x.to_dense() * y.to_dense()),
        (matmul(a, x, eps=eps, method=method), a.to_dense() @ x.to_dense().flatten()),
        (matmul(a, b, eps=eps, method=method), a.to_dense() @ b.to_dense()),
        (round_sum([x, y, x], [1.0, -2.0, 0.5], eps=eps, method=method), 1.5 * x.to_dense() - 2 * y.to_dense()),
    ):
        error = rel_error(found.value.to_dense().reshape(exact.shape), exact)
        bound = found.rel_error_bound
        assert error <= (bound if bound is not None else 2 * eps)
        assert (bound is not None) == (found.info.method == "exact")


@pytest.mark.parametrize("method", METHODS)
def test_ranks_fall_to_what_is_needed(method, generator):
    x = randn((5,) * 8, 6, generator=generator)
    found = round_sum([x] * 9, eps=1e-6, method=method)
    assert found.value.ranks == x.ranks
    assert rel_error(found.value.to_dense(), 9 * x.to_dense()) <= 1e-6
    y = randn((5,) * 8, 3, generator=generator)
    assert hadamard(x, y, max_rank=7, method=method).value.ranks == (1, 5, *(7,) * 5, 5, 1)


def test_fit_is_no_worse_than_its_start_and_near_the_best(generator):
    x = smooth((6,) * 6, torch.float64, generator, decay=0.7)
    y = smooth((6,) * 6, torch.float64, generator, decay=0.7)
    exact = x.to_dense() * y.to_dense()
    errors = {m: rel_error(hadamard(x, y, max_rank=4, method=m).value.to_dense(), exact) for m in METHODS}
    assert errors["fit"] <= errors["randomized"] * (1 + 1e-9)
    assert errors["fit"] <= errors["exact"] * 1.0001  # the best at these ranks is at most that of TT-SVD
    assert errors["zipup"] <= 2 * errors["exact"]
    info = hadamard(x, y, max_rank=4, method="fit", eps=1e-3, max_sweeps=20).info
    assert info.converged
    assert 2 <= info.n_sweeps <= 20


def test_long_chains(generator):
    a = randn_matrix((2,) * 400, (2,) * 400, 2, generator=generator)
    x = randn((2,) * 400, 2, generator=generator)
    for method in ("randomized", "zipup", "exact", "fit"):
        found = matmul(a, x, eps=1e-6, method=method)
        assert torch.isfinite(found.value.log_norm())
        assert float(abs(found.value.log_norm() - (a @ x).log_norm())) <= 1e-5


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_dtypes(dtype, eps, generator):
    x = smooth((4, 5, 3, 4), torch.float64, generator).to(dtype)
    for method in METHODS:
        found = hadamard(x, x, eps=eps, method=method).value
        assert found.dtype == dtype
        assert rel_error(found.to(torch.float64).to_dense(), x.to(torch.float64).to_dense() ** 2) <= 2 * eps


def test_order_one_and_rank_one(generator):
    x, a = randn((4,), 1, generator=generator), randn_matrix((3,), (4,), 1, generator=generator)
    for method in METHODS:
        assert rel_error(matmul(a, x, method=method).value.to_dense(), a.to_dense() @ x.to_dense()) <= 1e-12
        assert rel_error(round_sum([x], method=method).value.to_dense(), x.to_dense()) <= 1e-12


def test_gradients_pass_through(generator):
    x = randn((3, 4, 3), 2, generator=generator)
    cores = [core.requires_grad_() for core in x.cores]
    a = randn_matrix((2, 2, 2), (3, 4, 3), 2, generator=generator)
    assert torch.autograd.gradcheck(lambda *c: matmul(a, type(x)(c), max_rank=2).value.to_dense(), cores)


def test_bad_operands_say_what_is_wrong(generator):
    x, a = randn((3, 4), 2, generator=generator), randn_matrix((2, 2), (3, 4), 2, generator=generator)
    for call, error, words in (
        (lambda: matmul(a, a), ShapeError, "must share modes"),
        (lambda: matmul(a, x.to_dense()), KindError, "Use @ for dense"),
        (lambda: matmul(a, x, method="svd"), KindError, "one of"),
        (lambda: hadamard(x, x[:, :2]), ShapeError, "must broadcast"),
        (lambda: hadamard(x, a), KindError, "of one kind"),
        (lambda: round_sum([]), ShapeError, "0 terms"),
        (lambda: round_sum([x], [1.0, 2.0]), ShapeError, "2 weights"),
        (lambda: round_sum([x, x[:2]]), ShapeError, "equal modes"),
        (lambda: matmul(a, x, eps=2.0), RankError, "eps has 2.0"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert matmul(eye((3, 4)), x).value.ranks == x.ranks
