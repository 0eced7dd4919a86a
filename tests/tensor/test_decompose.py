import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensortrain.cores.linalg as linalg
from tensortrain.errors import ConvergenceError, DTypeError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.tensor import (
    TensorTrain,
    TTMatrix,
    default_eps,
    max_ranks,
    randn,
    randn_matrix,
    tt_svd,
    unfolding_spectra,
)
from tensortrain.testing import is_left_orthogonal, rel_error

CORNERS = [
    (7,),
    (1,),
    (1, 1, 1),
    (5, 1),
    (1, 5),
    (1, 4, 1, 3, 1),
    (2,) * 8,
    (3, 40),
    (40, 3),
    (6, 5, 4, 3),
    (2, 30, 2),
]


def hilbert(d: int, n: int) -> torch.Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    grids = torch.meshgrid(*[i] * d, indexing="ij")
    return 1.0 / (sum(grids) - d + 1)


def awkward(kind: str, shape, generator, dtype=torch.float64) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    if kind == "noise":
        return noise
    if kind == "decaying":
        return noise.cumsum(0).cumsum(-1)
    if kind == "low rank":
        return randn(shape, 2, generator=generator, dtype=dtype).to_dense()
    if kind == "one entry":
        flat = torch.zeros(math.prod(shape), dtype=dtype)
        flat[len(flat) // 2] = 3.0
        return flat.reshape(shape)
    if kind == "flat spectrum":  # an orthogonal matrix at the middle unfolding
        rows = math.prod(shape[: max(1, len(shape) // 2)])
        columns = math.prod(shape) // rows
        q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=dtype)).Q
        return (q if rows >= columns else q.T).reshape(shape)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["noise", "decaying", "low rank", "one entry", "flat spectrum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128, torch.complex64])
def test_promise_is_kept_on_awkward_tensors(kind, dtype, generator):
    floor = 1e-5 if torch.finfo(dtype).eps > 1e-10 else 1e-13
    for shape in CORNERS:
        x = awkward(kind, shape, generator, dtype)
        for eps in (0.5, 0.1, 1e-3, floor):
            found = tt_svd(x, eps=eps)
            assert found.value.shape == shape
            assert found.value.dtype == dtype
            assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= eps


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple),
    eps=st.floats(1e-12, 0.9),
    decay=st.floats(0.0, 3.0),
    exponent=st.sampled_from([-700, -100, 0, 130, 700]),
    seed=st.integers(0, 10**6),
)
def test_promise_is_kept_on_random_shapes(shape, eps, decay, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for axis, n in enumerate(shape):
        weights = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
        x = x * weights.reshape([-1] + [1] * (len(shape) - 1 - axis))
    scale = 2.0**exponent  # exact, so that the test adds no rounding of its own
    found = tt_svd(x * scale, eps=eps)
    assert rel_error(found.value.to_dense() / scale, x) <= found.rel_error_bound <= eps


@pytest.mark.parametrize("d, n, expected", [
    (3, 20, (3, 6, 7, 9, 11)),
    (4, 12, (3, 5, 7, 9, 10)),
    (5, 8, (3, 5, 7, 8, 10)),
    (6, 6, (3, 5, 7, 8, 10)),
])  # fmt: skip
def test_hilbert_ranks(d, n, expected):
    x = hilbert(d, n)
    for eps, rank in zip((1e-2, 1e-4, 1e-6, 1e-8, 1e-10), expected, strict=True):
        found = tt_svd(x, eps=eps)
        assert max(found.value.ranks) == rank
        assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= eps


def test_ranks_on_grids():
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    a, b, c, e = torch.meshgrid(t, t, t, t, indexing="ij")
    assert tt_svd(torch.sin(a + b + c + e)).value.ranks == (1, 2, 2, 2, 1)
    assert tt_svd(a**2 + b**3 + c.exp() + e.cos()).value.ranks == (1, 2, 2, 2, 1)
    assert tt_svd(torch.exp(a + b - c + e)).value.ranks == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape, ranks", [((6, 7, 8, 5), (3, 5, 2)), ((2,) * 9, 3), ((30, 20, 30), (4, 9)), ((9,), 1)])
def test_exact_ranks_are_found(shape, ranks, dtype, generator):
    exact = randn(shape, ranks, generator=generator, dtype=dtype)
    found = tt_svd(exact.to_dense())
    assert found.value.ranks == exact.ranks
    assert rel_error(found.value.to_dense(), exact.to_dense()) <= 1e-13
    assert found.rel_error_bound <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_exact_ranks_are_found_in_low_precision(dtype, generator):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = randn((8, 9, 10), 3, generator=generator, dtype=wide).to_dense().to(dtype)
    found = tt_svd(exact)
    assert found.value.dtype == dtype
    assert found.value.ranks == (1, 3, 3, 1)
    assert rel_error(found.value.to_dense(), exact) <= found.rel_error_bound <= default_eps(dtype, 3)


def test_default_eps_scales_with_dtype():
    assert default_eps(torch.float64, 4) == default_eps(torch.complex128, 4) == 1e-12
    assert default_eps(torch.float32, 4) == pytest.approx(1.19e-6, rel=0.01)
    assert default_eps(torch.bfloat16, 4) == pytest.approx(0.078, rel=0.01)


def test_bound_is_sharp(generator):
    # The error of TT-SVD is the root-sum-square of its cuts, so the bound should sit on it.
    x = torch.randn(6, 6, 6, 6, generator=generator)
    found = tt_svd(x, eps=0.3)
    error = rel_error(found.value.to_dense(), x)
    assert 0.03 < error <= found.rel_error_bound <= error * (1 + 1e-10)
    assert math.hypot(*found.info.bond_errors) == pytest.approx(error, rel=1e-10)


def test_all_cores_but_the_last_are_left_orthogonal(generator):
    for dtype in (torch.float64, torch.complex128):
        train = tt_svd(torch.randn(4, 5, 6, 3, generator=generator, dtype=dtype), eps=0.2).value
        assert train.center == (3, 3)
        assert all(is_left_orthogonal(core) for core in train.cores[:-1])
        assert not is_left_orthogonal(train.cores[-1])


@pytest.mark.parametrize("ranks", [1, 3, (2, 7, 3), (1, 4, 2, 4, 1)])
def test_error_at_fixed_ranks_is_quasi_optimal(ranks, generator):
    x = torch.randn(5, 6, 6, 5, generator=generator).cumsum(1)
    found = tt_svd(x, max_rank=ranks)
    error = rel_error(found.value.to_dense(), x)
    spectra = unfolding_spectra(x)
    size = float(x.norm())
    # No train of these ranks can do better than the worst single unfolding cut.
    cuts = [float(s[r:].norm()) / size for s, r in zip(spectra, found.value.ranks[1:-1], strict=True)]
    assert max(cuts) <= error * (1 + 1e-12)
    assert error <= math.sqrt(3) * max(cuts)
    assert error <= found.rel_error_bound
    assert found.rel_error_bound > found.info.eps  # the cap overrides eps, and the bound admits it


def test_max_rank_is_clipped_to_the_modes(generator):
    x = torch.randn(3, 4, 5, generator=generator)
    assert tt_svd(x, max_rank=100).value.ranks == max_ranks(x.shape) == (1, 3, 5, 1)
    assert tt_svd(x, max_rank=(100, 2)).value.ranks == (1, 3, 2, 1)


@pytest.mark.parametrize("shape", CORNERS)
def test_zero_tensor_has_rank_one(shape):
    found = tt_svd(torch.zeros(shape))
    assert set(found.value.ranks) == {1}
    assert found.rel_error_bound == 0.0
    assert not found.value.to_dense().any()


def test_order_one_is_exact(generator):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(11, generator=generator, dtype=dtype)
        found = tt_svd(x)
        assert torch.equal(found.value.to_dense(), x)
        assert found.rel_error_bound == 0.0


@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e-150, 1e150, 1e300, 1.7e308])
def test_extreme_sizes(size, generator):
    x = torch.rand(4, 5, 6, generator=generator) * size
    found = tt_svd(x, eps=1e-2)
    dense = found.value.to_dense()
    assert torch.isfinite(dense).all()
    # denormal numbers hold few digits: their own rounding is not part of the promise
    slack = 1e-2 if size == 1e-320 else 0.0
    assert rel_error(dense / size, x / size) <= found.rel_error_bound + slack
    assert found.rel_error_bound <= 1e-2


def test_float16_does_not_overflow(generator):
    x = (600 * torch.rand(40, 40, 40, generator=generator)).half()
    assert torch.linalg.vector_norm(x.double()) > 65504  # the norm does not fit, the entries do
    found = tt_svd(x, eps=0.6)
    assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= 0.6


def test_larger_sides_keep_the_promise(generator):
    x = torch.randn(150, 150, 20, generator=generator)
    for dtype in (torch.float64, torch.float32):
        found = tt_svd(x.to(dtype))
        assert rel_error(found.value.to_dense(), x.to(dtype)) <= found.rel_error_bound


def test_input_is_untouched_and_layout_free(generator):
    x = torch.randn(5, 6, 7, generator=generator)
    before = x.clone()
    permuted = x.permute(2, 0, 1)
    assert rel_error(tt_svd(permuted).value.to_dense(), permuted) <= 1e-13
    assert torch.equal(x, before)
    assert tt_svd(x.requires_grad_()).value.cores[0].requires_grad


# -- matrices -----------------------------------------------------------------------------------------


def test_matrix_modes_run_in_c_order():
    rows, columns = torch.arange(6.0), torch.arange(20.0)
    w = rows[:, None] * 100 + columns
    a = TTMatrix.from_dense(w, (2, 3), (4, 5))
    assert a.ranks == (1, 2, 1)
    # row 4 = (1, 1), column 7 = (1, 2) with the first mode slowest
    assert a.cores[0][0, 1, 1] @ a.cores[1][:, 1, 2, 0] == pytest.approx(407.0)
    assert rel_error(a.to_dense(), w) <= 1e-13


def test_matrix_promise(generator):
    w = torch.randn(24, 30, generator=generator).cumsum(0)
    for eps in (0.3, 1e-2, 1e-12):
        found = tt_svd(w, eps=eps, out_modes=(4, 3, 2), in_modes=(2, 3, 5))
        assert isinstance(found.value, TTMatrix)
        assert (found.value.out_modes, found.value.in_modes) == ((4, 3, 2), (2, 3, 5))
        assert rel_error(found.value.to_dense(), w) <= found.rel_error_bound <= eps
        assert all(is_left_orthogonal(core) for core in found.value.cores[:-1])


def test_matrix_exact_ranks(generator):
    exact = randn_matrix((4, 3, 2), (2, 3, 5), (4, 3), generator=generator)
    assert TTMatrix.from_dense(exact.to_dense(), (4, 3, 2), (2, 3, 5)).ranks == (1, 4, 3, 1)


# -- spectra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_spectra_are_those_of_the_unfoldings(dtype, generator):
    for shape in CORNERS:
        x = torch.randn(shape, generator=generator, dtype=dtype)
        spectra = unfolding_spectra(x)
        assert [len(s) for s in spectra] == list(max_ranks(shape)[1:-1])
        for k, s in enumerate(spectra):
            exact = torch.linalg.svdvals(x.reshape(math.prod(shape[: k + 1]), -1))
            assert s.dtype == torch.float64
            assert rel_error(s, exact) <= 4 * torch.finfo(dtype).eps
            assert (s.diff() <= 0).all()


# -- when a factorization fails -----------------------------------------------------------------------


def failing(*args, **kwargs):
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("also_gesvd", [False, True])
def test_a_failing_svd_falls_back_and_keeps_the_promise(monkeypatch, generator, also_gesvd):
    monkeypatch.setattr(torch.linalg, "svd", failing)
    monkeypatch.setattr(torch.linalg, "svdvals", failing)
    if also_gesvd:
        monkeypatch.setattr(linalg, "_gesvd", failing)
    for dtype in (torch.float64, torch.complex128):
        x = randn((6, 7, 8), 3, generator=generator, dtype=dtype).to_dense()
        x = x + 1e-3 * torch.randn(x.shape, generator=generator, dtype=dtype)
        for eps in (1e-1, 1e-6, 1e-12):
            found = tt_svd(x, eps=eps)
            assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= eps
            assert all(is_left_orthogonal(core) for core in found.value.cores[:-1])
        assert tt_svd(x, eps=1e-1).value.ranks == (1, 3, 3, 1)
    values = unfolding_spectra(x)[0]
    monkeypatch.undo()
    assert rel_error(values, torch.linalg.svdvals(x.reshape(6, -1))) <= 1e-10


def test_a_silently_failing_svd_falls_back(monkeypatch, generator):
    x = torch.randn(5, 6, 7, generator=generator)
    real = torch.linalg.svd

    def nan_values(*args, **kwargs):
        u, s, vh = real(*args, **kwargs)
        return u, s * float("nan"), vh

    monkeypatch.setattr(torch.linalg, "svd", nan_values)
    found = tt_svd(x, eps=1e-10)
    assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= 1e-10


def test_when_everything_fails_there_is_one_clear_error(monkeypatch, generator):
    monkeypatch.setattr(linalg.torch.linalg, "svd", failing)
    monkeypatch.setattr(linalg, "_gesvd", failing)
    monkeypatch.setattr(linalg.torch.linalg, "eigh", failing)
    with pytest.raises(ConvergenceError, match="must converge: both the SVD and the eigenvalues"):
        tt_svd(torch.randn(3, 4, generator=generator))


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_non_finite_input_is_refused(bad, dtype):
    x = torch.ones(3, 4, dtype=dtype)
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match="1 NaN or Inf among 12 entries"):
        tt_svd(x)
    with pytest.raises(NonFiniteError):
        unfolding_spectra(x)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: tt_svd(x, eps=-1e-3), RankError, "eps has -0.001"),
        (lambda x: tt_svd(x, eps=1.0), RankError, "eps has 1.0"),
        (lambda x: tt_svd(x, eps=float("nan")), RankError, "eps has nan"),
        (lambda x: tt_svd(x, max_rank=0), RankError, "rank has 0"),
        (lambda x: tt_svd(x, max_rank=(2, 3)), RankError, "2 entries, expected 1 inner"),
        (lambda x: tt_svd(x, method="lu"), KindError, "method has 'lu', expected one of"),
        (lambda x: tt_svd(x.long()), DTypeError, "x has torch.int64"),
        (lambda x: tt_svd(x.tolist()), KindError, "x has list"),
        (lambda x: tt_svd(x[0, 0]), ShapeError, "x has shape"),
        (lambda x: tt_svd(x, out_modes=(2, 3)), ShapeError, "in_modes has None"),
        (lambda x: tt_svd(x, in_modes=(2, 3)), ShapeError, "out_modes has None"),
        (
            lambda x: tt_svd(x, out_modes=(2, 3), in_modes=(2, 5)),
            ShapeError,
            r"in_modes has \(2, 5\) with product 10",
        ),
        (lambda x: tt_svd(x, out_modes=(6,), in_modes=(2, 4)), ShapeError, "1 and 2 entries"),
        (lambda x: tt_svd(x[0], out_modes=(2, 3), in_modes=(2, 4)), ShapeError, r"x has shape \(8,\)"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(6, 8))


def test_from_dense_is_the_value(generator):
    x = torch.randn(4, 5, 6, generator=generator)
    assert TensorTrain.from_dense(x, max_rank=2).ranks == (1, 2, 2, 1)
    assert rel_error(TensorTrain.from_dense(x, eps=0.1, method="svd").to_dense(), x) <= 0.1
