"""The promised error holds whatever the train: against sums in 80 bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.tensor import TensorTrain, TTMatrix, default_eps, ones, randn, randn_matrix, round_tt, tt_svd, zeros
from tensortrain.testing import rel_error

DTYPES = [torch.float64, torch.complex128, torch.float32, torch.complex64, torch.bfloat16, torch.float16]
LOWER = [torch.float32, torch.complex64, torch.bfloat16, torch.float16]
ROUNDINGS = ["svd", "gram", "randomized"]
METHODS = ["auto", "svd", "qr", "gram", "randomized"]


def wide(dtype):
    return torch.complex128 if dtype.is_complex else torch.float64


def long(x):
    x = x.detach().resolve_conj()
    x = x.to(wide(x.dtype)).numpy()
    return x.astype(np.clongdouble if np.iscomplexobj(x) else np.longdouble)


def exact(x):
    """All entries ``(b, N)`` of a train as it is stored."""
    cores = [long(core if x.batch_shape else core[None]) for core in x.cores]
    out = cores[0][:, 0]
    for core in cores[1:]:
        out = np.einsum("bar,brns->bans", out, core).reshape(len(out), -1, core.shape[-1])
    return out[..., 0]


def errors(found, entries):
    """Relative errors of the members."""
    size = np.sqrt((np.abs(entries) ** 2).sum(1))
    error = np.sqrt((np.abs(exact(found) - entries) ** 2).sum(1))
    return (error / np.where(size > 0, size, 1)).astype(float)


def keeps_promise(found, entries):
    bounds = np.asarray(found.info.get("rel_error_bounds", [found.rel_error_bound]))
    assert all(bool(torch.isfinite(core).all()) for core in found.value.cores)
    assert (errors(found.value, entries) <= bounds * (1 + 1e-10)).all()
    assert found.rel_error_bound >= bounds.max()


def turned(core, following, cond, generator):
    """The same product with a matrix of such condition behind the first core, and its inverse before the second."""
    r = core.shape[-1]
    q = torch.linalg.qr(torch.randn(r, r, dtype=core.dtype, generator=generator))[0]
    p = torch.linalg.qr(torch.randn(r, r, dtype=core.dtype, generator=generator))[0]
    s = (cond ** -torch.linspace(0, 1, r)).to(core.dtype)
    after = ((p / s) @ q.mH @ following.flatten(-2)).unflatten(-1, following.shape[-2:])
    return core @ (q * s) @ p.mH, after


def unbalanced(shape, rank, cond, generator, dtype=torch.float64, batch=()):
    ranks = [1, *[rank] * (len(shape) - 1), 1]
    cores = [
        torch.randn(*batch, ranks[k], n, ranks[k + 1], dtype=wide(dtype), generator=generator)
        for k, n in enumerate(shape)
    ]
    for k in range(len(shape) - 1):
        cores[k], cores[k + 1] = turned(cores[k], cores[k + 1], cond, generator)
    return TensorTrain([core.to(dtype) for core in cores])


# -- trains -------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple),
    rank=st.integers(1, 6),
    log_cond=st.floats(0, 12),
    log_size=st.integers(-280, 280),
    eps=st.sampled_from([None, 0.0, 0.3, 1e-3, 1e-6, 1e-10]),
    cap=st.sampled_from([None, None, 2]),
    method=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([(), (), (2,)]),
    seed=st.integers(0, 10**6),
)
def test_unbalanced_trains(shape, rank, log_cond, log_size, eps, cap, method, dtype, batch, seed):
    half = dtype in (torch.bfloat16, torch.float16)
    generator = torch.Generator().manual_seed(seed)
    x = unbalanced(shape, rank, 10 ** (log_cond / 4 if half else log_cond), generator, dtype, batch)
    if dtype in (torch.float64, torch.complex128):
        first = x.cores[0].clone()
        first.reshape(-1, *first.shape[-3:])[0] *= 10.0**log_size  # one member alone
        x = TensorTrain([first, *x.cores[1:]])
    keeps_promise(round_tt(x, eps=eps, max_rank=cap, method=method), exact(x))


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("cond", [1.0, 10.0, 60.0])
def test_ordinary_trains_stay_within_the_default_tolerance(method, cond, generator):
    for shape in ((6, 7, 8), (3,) * 6, (2,) * 10):
        x = unbalanced(shape, 4, cond if len(shape) < 4 else math.sqrt(cond), generator)
        found = round_tt(x, method=method)
        assert errors(found.value, exact(x)) <= found.rel_error_bound <= 1e-12


@pytest.mark.parametrize("method", ROUNDINGS)
def test_what_cannot_be_kept_is_not_promised(method, generator):
    x = unbalanced((6, 6, 6, 6), 4, 1e11, generator)
    assert round_tt(x, eps=1e-4, method=method).rel_error_bound > 1e-4
    y = randn((4, 5, 6), 3, generator=generator)
    assert round_tt(y - y, eps=1e-4, method=method).rel_error_bound > 1e-4


@pytest.mark.parametrize("cond", [1e6, 1e10])
def test_small_directions_survive_gram_matrices(cond, generator):
    for x in (
        unbalanced((20, 23), 5, cond, generator),
        tt_svd(torch.diag(cond ** -torch.linspace(0, 1, 16)).reshape(4, 4, 4, 4)).value,
        unbalanced((5, 6, 7), 4, cond**0.5, generator).orthogonalize(2),
    ):
        keeps_promise(round_tt(x, eps=1e-4, method="gram"), exact(x))
        assert round_tt(x, eps=1e-4, method="gram").rel_error_bound <= 1e-4


def test_what_a_sketch_lost_adds_to_the_cuts(generator):
    decay = 1e6 ** -torch.linspace(0, 1, 30)
    for seed in range(6):
        x = randn((4,) * 5, (30,) * 4, generator=torch.Generator().manual_seed(seed))
        x = TensorTrain([core * decay if core.shape[-1] > 1 else core for core in x.cores])
        for rank in (2, 3, 5):
            keeps_promise(round_tt(x, max_rank=rank, method="randomized"), exact(x))


def test_paths_at_both_ends_of_the_range(generator):
    x = randn((3, 4, 5, 2), 2, generator=generator)
    spread = TensorTrain([core * 1e70 for core in x.cores])
    alone = TensorTrain([*x.cores[:-1], x.cores[-1] * 1e280])
    for train in (spread + alone, TensorTrain([core.flip(-1) for core in spread.cores[:-1]] + [spread.cores[-1]])):
        for method in ROUNDINGS:
            found = round_tt(train, eps=1e-6, method=method)
            keeps_promise(found, exact(train))
            assert found.rel_error_bound <= 1e-6


@pytest.mark.parametrize("dtype, order", [(torch.bfloat16, 70), (torch.bfloat16, 500), (torch.float16, 520)])
def test_long_chains_in_low_precision(dtype, order, generator):
    assert default_eps(dtype, order) < 1
    x = randn((2,) * order, 2, generator=generator).normalize().to(dtype)
    found = round_tt(x)
    exactly = x.to(torch.float64)
    error = float((found.value.to(torch.float64) - exactly).norm() / exactly.norm())
    assert error <= found.rel_error_bound <= found.info.eps


# -- arrays -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple),
    eps=st.sampled_from([None, 0.3, 1e-2]),
    end=st.sampled_from(["smallest", "small", "largest"]),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_arrays_at_the_ends_of_the_range(shape, eps, end, method, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    size = {"smallest": 300 * info.tiny * info.eps, "small": 30 * info.tiny, "largest": info.max}[end]
    x = torch.randn(shape, dtype=wide(dtype), generator=generator)
    x = (x / x.abs().amax() * (0.99 * size)).to(dtype)
    found = tt_svd(x, eps=eps, method=method)
    keeps_promise(found, long(x).reshape(1, -1))
    # below the default a half precision may have no room for more cores
    assert found.rel_error_bound <= max(found.info.eps, default_eps(dtype, len(shape)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(1e250, 1e-250, 1.0), (1e-310, 1e5, 1e305), (0.0, 1.0, 1e-290)])
def test_members_of_very_different_sizes(method, sizes, generator):
    x = torch.randn(3, 4, 3, 5, generator=generator)
    x = x * torch.tensor(sizes).reshape(3, 1, 1, 1)
    found = tt_svd(x, eps=1e-4, batch_dims=1, method=method)
    keeps_promise(found, long(x).reshape(3, -1))
    assert found.rel_error_bound <= 1e-4
    for again in ROUNDINGS:
        rounded = round_tt(found.value + found.value, eps=1e-4, method=again)
        keeps_promise(rounded, exact(found.value + found.value))
        assert rounded.rel_error_bound <= 1e-4


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (4, 2, 7), (3, 9, 2, 2), (1, 4, 4)])
def test_batches_of_full_rank_by_gram_matrices(shape, generator):
    x = torch.randn(shape, generator=generator)
    found = tt_svd(x, eps=1e-3, batch_dims=1, method="gram")
    keeps_promise(found, long(x).reshape(shape[0], -1))
    assert found.rel_error_bound <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, step", [((9, 5, 7), 1), ((30, 4, 4, 3), 4), ((17, 6), 3)])
def test_streams_keep_the_default_tolerance(dtype, shape, step, generator):
    x = randn(shape, 2, generator=generator, dtype=wide(dtype)).to_dense().to(dtype)
    found = tt_svd(iter(x.split(step)), shape=shape)
    assert found.value.dtype == dtype
    assert found.value.ranks == tt_svd(x).value.ranks
    keeps_promise(found, long(x).reshape(1, -1))
    assert found.rel_error_bound <= found.info.eps == default_eps(dtype, len(shape))


# -- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("shape, rank", [((3, 3, 3, 3), 2), ((4, 2, 4, 2), 3), ((2,) * 8, (2, 3, 3, 3, 2, 2, 2))])
def test_values_with_derivatives_are_those_without(shape, rank, dtype, generator):
    side = math.isqrt(math.prod(shape))
    x = torch.linalg.qr(torch.randn(side, side, dtype=dtype, generator=generator))[0].reshape(shape)  # equal values
    plain, tracked = tt_svd(x, max_rank=rank), tt_svd(x.requires_grad_(), max_rank=rank)
    assert plain.rel_error_bound == tracked.rel_error_bound
    assert all(torch.equal(a, b) for a, b in zip(plain.value.cores, tracked.value.cores, strict=True))
    keeps_promise(tracked, long(x).reshape(1, -1))
    cores = [core.detach().requires_grad_() for core in tt_svd(x).value.cores]
    for method in ROUNDINGS:
        rounded = round_tt(TensorTrain(cores), max_rank=rank, method=method)
        keeps_promise(rounded, exact(TensorTrain(cores)))
        rounded.value.to_dense().abs().square().sum().backward()
        assert all(bool(torch.isfinite(core.grad).all()) for core in cores)


def test_derivatives_of_known_bases_are_right(generator):
    x = torch.randn(3, 2, 3, generator=generator, requires_grad=True)
    for method in ("qr", "gram"):
        assert torch.autograd.gradcheck(
            lambda x, method=method: tt_svd(x, max_rank=2, method=method).value.to_dense(), x, atol=1e-4
        )
    batch = torch.randn(2, 3, 3, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tt_svd(x, max_rank=2, batch_dims=1).value.to_dense(), batch)


# -- ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, rank", [((5, 6, 7), 1), ((4, 7, 3, 5), 3), ((3,) * 6, 2)])
def test_nothing_to_cut_keeps_no_rounding(shape, rank, dtype, generator):
    train = randn(shape, rank, generator=generator, dtype=wide(dtype))
    x = train.to_dense().to(dtype)
    for method in METHODS:
        assert tt_svd(x, eps=0.0, method=method).value.ranks == train.ranks
    assert tt_svd(iter(x.split(1)), shape=shape, eps=0.0).value.ranks == train.ranks
    stored = tt_svd(x).value
    for method in ROUNDINGS:
        assert round_tt(stored + stored, eps=0.0, method=method).value.ranks == train.ranks


def test_constants_and_grids_have_exact_ranks(generator):
    i = torch.arange(1.0, 8.0)
    assert tt_svd(torch.full((3, 5, 7, 2), 0.1), eps=0.0).value.ranks == (1, 1, 1, 1, 1)
    assert tt_svd(torch.full((6, 7, 2), 3j, dtype=torch.complex128), eps=0.0).value.ranks == (1, 1, 1, 1)
    assert tt_svd(i[:, None, None] + i[:, None] * 2 + i, eps=0.0).value.ranks == (1, 2, 2, 1)
    assert tt_svd(torch.eye(24), eps=0.0, out_modes=(2, 3, 4), in_modes=(2, 3, 4)).value.ranks == (1, 1, 1, 1)
    a = randn_matrix((2, 3, 4), (3, 2, 2), 2, generator=generator)
    again = tt_svd(a.to_dense(), eps=0.0, out_modes=a.out_modes, in_modes=a.in_modes).value
    assert isinstance(again, TTMatrix)
    assert again.ranks == (again + again).round(eps=0.0).ranks == a.ranks
    x = randn((4, 5, 6), 2, generator=generator)
    assert (x + ones((4, 5, 6)) - x).round(eps=0.0).ranks == (1, 1, 1, 1)
    assert (x + x).permute((2, 0, 1), eps=0.0).ranks == (1, 2, 4, 1)


@pytest.mark.parametrize("dtype", LOWER)
def test_a_large_norm_fits_small_numbers(dtype, generator):
    top = torch.finfo(dtype).max
    x = (torch.rand(60, 50, 4, generator=generator, dtype=wide(dtype)).real * 0.2 + 0.7) * top
    found = tt_svd(x.to(dtype), eps=0.3)
    assert found.value.ranks == (1, 1, 1, 1)
    keeps_promise(found, long(x.to(dtype)).reshape(1, -1))
    assert rel_error(found.value.to(wide(dtype)).to_dense() / top, x / top) <= found.rel_error_bound <= 0.3


@pytest.mark.parametrize("method", ["svd", "gram", "randomized"])
@pytest.mark.parametrize("seed", [2, 89])
def test_a_train_that_cancels_is_zero_or_nothing_is_promised(method: str, seed: int) -> None:
    torch.manual_seed(seed)
    shapes = [(1, 3, 3), (3, 1, 1), (1, 2, 1), (1, 2, 8), (8, 1, 1)]
    x = TensorTrain(tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    zero = TensorTrain(tuple(core.clone().requires_grad_() for core in (x - x).cores))
    for train in (x - x, zero):
        found = round_tt(train, method=method, eps=1e-2)
        assert float(found.value.norm()) == 0 or found.rel_error_bound == math.inf


def test_a_batch_of_none() -> None:
    assert tt_svd(torch.zeros(0, 3, 4), batch_dims=1).value.batch_shape == (0,)


@pytest.mark.parametrize("operation", [lambda x: x.permute(2, 0, 1), lambda x: x.orthogonalize(1)])
def test_derivatives_at_the_zero_train_are_finite(operation) -> None:
    cores = [core.requires_grad_() for core in zeros((3, 2, 2), dtype=torch.float64).cores]
    found = torch.autograd.grad(operation(TensorTrain(tuple(cores))).to_dense().sum(), cores)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)


def test_singular_values_have_derivatives() -> None:
    x = randn((3, 4, 5), 2, dtype=torch.float64)
    cores = [core.clone().requires_grad_() for core in x.cores]
    TensorTrain(tuple(cores)).singular_values(1).sum().backward()
    assert all(bool(torch.isfinite(core.grad).all()) for core in cores)


@pytest.mark.parametrize("power", [-200, 200])
def test_casting_weighs_alike_whatever_the_norm(power, generator):
    """The norm of a float32 train may lie far outside of the range of its dtype."""
    plain = TensorTrain(
        [torch.randn(1 if k == 0 else 3, 4, 1 if k == 9 else 3, generator=generator) for k in range(10)]
    )
    scaled = TensorTrain([core * 2.0 ** (power // 10) for core in plain.cores])
    expected, found = (round_tt(x + x, eps=1e-3) for x in (plain, scaled))
    assert found.value.ranks == expected.value.ranks
    assert found.rel_error_bound >= 0.99 * expected.rel_error_bound
    keeps_promise(expected, exact(plain + plain))
