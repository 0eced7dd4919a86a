"""Every method of decomposition keeps the promise, on every kind of spectrum, and says what it did."""

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tensortrain.cores import (
    unfolding as sweeps,
)
from tensortrain.cores.ranks import count_params
from tensortrain.errors import KindError, NonFiniteError, RankError, ShapeError
from tensortrain.tensor import (
    TensorTrain,
    randn,
    round_tt,
    tt_svd,
)
from tensortrain.testing import is_left_orthogonal, rel_error

METHODS = ["auto", "svd", "qr", "gram", "randomized"]
DTYPES = [torch.float64, torch.complex128]


def spectrum(kind, generator, dtype=torch.float64):
    """Tensors large enough for a sketch: 12^5."""
    shape = (12,) * 5
    if kind == "low rank":
        return randn(shape, 5, generator=generator, dtype=dtype).to_dense()
    if kind == "noisy":
        x = randn(shape, 5, generator=generator, dtype=dtype).to_dense()
        return x + 1e-5 * torch.randn(shape, generator=generator, dtype=dtype)
    if kind == "flat":
        return torch.randn(shape, generator=generator, dtype=dtype)
    if kind == "clustered":
        parts = [w * randn(shape, 3, generator=generator, dtype=dtype).to_dense() for w in (1.0, 1e-4, 1e-9)]
        return parts[0] + parts[1] + parts[2]
    i = torch.arange(1.0, 13.0)
    total = sum(i.reshape([-1 if k == j else 1 for k in range(5)]) for j in range(5))
    return (1 / (total - 4)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["low rank", "noisy", "flat", "clustered", "hilbert"])
@pytest.mark.parametrize("method", METHODS)
def test_promise_is_kept(method, kind, dtype, generator):
    if kind == "flat" and (method == "svd" or dtype.is_complex):
        pytest.skip("nothing but slow")
    x = spectrum(kind, generator, dtype)
    for eps in (1e-1, 1e-3, 1e-6, 1e-8, 1e-11):
        found = tt_svd(x, eps=eps, method=method)
        assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= eps
        if kind == "flat":
            break
        assert all(is_left_orthogonal(core) for core in found.value.cores[:-1])
        best = tt_svd(x, eps=eps, method="svd").value
        # the tolerance is shared out a little differently by a sketch: a rank more, here and there
        assert sum(found.value.ranks) <= sum(best.ranks) + 2 * (method != "svd")


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-5), (torch.complex64, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("method", METHODS)
def test_promise_is_kept_in_lower_dtypes(method, dtype, eps, generator):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = spectrum("low rank", generator, wide).to(dtype)
    found = tt_svd(x, eps=eps, method=method)
    assert found.value.dtype == dtype
    assert found.value.ranks == (1, 5, 5, 5, 5, 1)
    assert rel_error(found.value.to(wide).to_dense(), x.to(wide)) <= found.rel_error_bound <= eps


def test_auto_sketches_where_ranks_are_small_and_not_where_they_are_not(generator):
    low, flat = spectrum("low rank", generator), spectrum("flat", generator)
    assert tt_svd(low, eps=1e-12).info.method == "randomized"
    assert tt_svd(low, eps=1e-2).info.method == "randomized"
    assert tt_svd(flat, eps=1e-2).info.method == "gram"
    assert tt_svd(flat, eps=1e-8).info.method == "qr"
    assert tt_svd(low[:2, :2, :2], eps=1e-2).info.method == "svd"
    assert tt_svd(low, eps=1e-10, method="gram").info.method == "qr"


def test_full_rank_is_found_without_an_svd(generator, monkeypatch):
    def refuse(*_):
        raise AssertionError("an SVD was taken")

    monkeypatch.setattr(sweeps, "cut_basis", refuse)
    x = torch.randn((72, 72, 80), generator=generator)
    cut = sweeps._cut_full_rank_first(refuse)
    basis, _, tail = cut(x.reshape(72, -1), 1e-8 * x.norm(), 72)
    assert basis is None
    assert tail == 0
    basis, _, _ = cut(x.reshape(-1, 80), 1e-8 * x.norm(), 80)
    assert is_left_orthogonal(basis[None])
    monkeypatch.undo()
    found = tt_svd(x, eps=1e-8, method="qr")
    assert found.value.ranks == (1, 72, 80, 1)
    assert torch.equal(found.value.cores[0][0], torch.eye(72))
    assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= 1e-8


def test_sketches_are_near_the_best_at_fixed_ranks(generator):
    x = spectrum("hilbert", generator)
    for rank in (2, 3, 5):
        best = tt_svd(x, max_rank=rank, method="svd")
        error = rel_error(best.value.to_dense(), x)
        for method in METHODS:
            found = tt_svd(x, max_rank=rank, method=method)
            assert found.value.ranks == best.value.ranks
            assert rel_error(found.value.to_dense(), x) <= 1.01 * error
            assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_bad_input(method, generator):
    x = spectrum("low rank", generator)
    for size in (1e-300, 1e300):
        found = tt_svd(x * size, eps=1e-8, method=method)
        assert found.value.ranks == (1, 5, 5, 5, 5, 1)
        assert rel_error((found.value / size).to_dense(), x) <= 1e-8
    x[3, 1, 4, 1, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="1 NaN or Inf"):
        tt_svd(x, method=method)
    assert tt_svd(torch.zeros(12, 12, 12, 12, 12), method=method).value.ranks == (1,) * 6


# -- gradients ----------------------------------------------------------------------------------------


def test_decomposition_is_differentiable(generator):
    x = torch.randn(3, 4, 5, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tt_svd(x).value.to_dense(), x)
    assert torch.autograd.gradcheck(lambda x: tt_svd(x, max_rank=2).value.to_dense(), x)
    z = torch.randn(3, 4, 2, generator=generator, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: tt_svd(z, max_rank=(2, 1)).value.to_dense(), z)


def test_rounding_is_differentiable(generator):
    for dtype in DTYPES:
        x = randn((3, 2, 3, 2), (3, 3, 2), generator=generator, dtype=dtype)
        cores = [core.requires_grad_() for core in x.cores]
        assert torch.autograd.gradcheck(lambda *c: TensorTrain(c).round(max_rank=2).to_dense(), cores)
        assert torch.autograd.gradcheck(lambda *c: TensorTrain(c).round(max_rank=2).norm(), cores)


def test_gradients_are_finite_at_repeated_singular_values():
    x = torch.eye(4).reshape(4, 2, 2).requires_grad_()
    tt_svd(x).value.to_dense().square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert rel_error(x.grad, 2 * x.detach()) <= 1e-12  # nothing is cut: the gradient of the square
    for rank in (1, 2, 3):  # a cut between equal values
        y = torch.eye(4).reshape(4, 2, 2).requires_grad_()
        tt_svd(y, max_rank=rank).value.to_dense().sum().backward()
        assert torch.isfinite(y.grad).all()


def test_gradient_through_a_sum_that_rounds_back(generator):
    x = randn((3, 4, 3), 2, generator=generator)
    cores = [core.requires_grad_() for core in x.cores]
    train = type(x)(cores)
    weights = torch.randn(3, 4, 3, generator=generator)
    ((train + train).round(eps=1e-10).to_dense() * weights).sum().backward()
    found = [core.grad.clone() for core in cores]
    for core in cores:
        core.grad = None
    (2 * train.to_dense() * weights).sum().backward()
    # at the ranks of x only changes along them count, and changes of the cores are such
    for a, core in zip(found, cores, strict=True):
        assert rel_error(a, core.grad) <= 1e-9


# -- budgets ------------------------------------------------------------------------------------------


def test_a_budget_of_parameters(generator):
    terms = [0.3**k * randn((6, 7, 8, 5), 1, generator=generator) for k in range(8)]
    x = sum(terms[1:], start=terms[0])
    errors = []
    for limit in (26, 60, 120, 200, 10**6):
        found = round_tt(x, max_params=limit)
        assert found.value.n_params <= limit
        error = rel_error(found.value.to_dense(), x.to_dense())
        assert error <= found.rel_error_bound
        errors.append(error)
        # no uniform rank within the budget does better
        for rank in range(1, 9):
            uniform = round_tt(x, max_rank=rank).value
            if count_params(uniform.shape, uniform.ranks) <= limit:
                assert error <= 1.05 * rel_error(uniform.to_dense(), x.to_dense()) + 1e-12
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-11
    with pytest.raises(RankError, match="at least 26"):
        round_tt(x, max_params=25)


# -- streams ------------------------------------------------------------------------------------------


def test_streams_equal_the_whole(tmp_path, generator):
    x = spectrum("noisy", generator)
    exact = tt_svd(x, eps=1e-3).value.ranks
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"x": x}, tmp_path / "x.safetensors")
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for eps in (1e-3, 1e-9):
            for found in (
                tt_svd(mapped, eps=eps, slab_bytes=1 << 17),
                tt_svd(file.get_slice("x"), eps=eps, slab_bytes=1 << 17),
                tt_svd(iter(x.split(5)), shape=x.shape, eps=eps),
                tt_svd(iter(x), shape=x.shape, eps=eps),
                tt_svd(x.split(1), shape=x.shape, eps=eps),
            ):
                assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= eps
                assert eps < 1e-3 or found.value.ranks == exact
        assert tt_svd(mapped, max_rank=3, slab_bytes=1 << 17).value.ranks == (1, 3, 3, 3, 3, 1)
    whole = tt_svd(x.numpy(), eps=1e-3)
    assert whole.value.ranks == exact


def test_a_stored_tensor_is_read_in_small_pieces(generator):
    x = spectrum("low rank", generator).numpy()
    seen = []

    class Stored:
        def get_shape(self):
            return list(x.shape)

        def __getitem__(self, key):
            part = x[key]
            seen.append(part.nbytes)
            return torch.from_numpy(part.copy())

    found = tt_svd(Stored(), eps=1e-6, slab_bytes=50_000)
    assert max(seen) <= 50_000
    assert found.info.n_pieces == len(seen) - 1  # one more to learn the dtype
    assert rel_error(found.value.to_dense(), torch.from_numpy(x)) <= found.rel_error_bound <= 1e-6


def test_bad_streams_say_what_is_wrong(generator):
    x = torch.randn(4, 5, 6, generator=generator)
    for call, error, words in (
        (lambda: tt_svd(iter(x)), ShapeError, "needs the shape"),
        (lambda: tt_svd(iter(x[:3]), shape=(4, 5, 6)), ShapeError, "came to 3 of 4"),
        (lambda: tt_svd(iter(x), shape=(3, 5, 6)), ShapeError, "must fill the first mode"),
        (lambda: tt_svd(iter(x), shape=(4, 6, 5)), ShapeError, "must fill the first mode"),
        (lambda: tt_svd(x.numpy(), shape=(4, 5, 7)), ShapeError, "has its own shape"),
        (lambda: tt_svd(np.arange(6)), KindError, "floating or complex"),
        (lambda: tt_svd(iter(x), shape=x.shape, batch_dims=1), KindError, "plain tensor"),
        (lambda: tt_svd(3.0), KindError, "only a tensor"),
        (lambda: tt_svd([1.0, 2.0]), KindError, "only a tensor"),
        (lambda: tt_svd(x, batch_dims=3), ShapeError, "batch has one axis"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_a_nan_in_a_slab_is_found(generator):
    x = torch.randn(4, 5, 6, generator=generator)
    x[2, 1, 1] = math.inf
    with pytest.raises(NonFiniteError):
        tt_svd(iter(x), shape=x.shape)
