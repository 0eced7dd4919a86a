import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.errors import DTypeError, KindError, ModeIndexError, ShapeError
from tensortrain.system.native import library
from tensortrain.tensor import (
    TensorTrain,
    TTMatrix,
    cat,
    diag,
    dot,
    eye,
    kron,
    ones,
    pad,
    randn,
    randn_matrix,
    stack,
    zeros,
)
from tensortrain.testing import rel_error


@pytest.fixture
def x(generator):
    return randn((3, 4, 2, 5), (2, 3, 4), generator=generator)


# -- the type -----------------------------------------------------------------------------------------


def test_attributes(x):
    assert (x.shape, x.ranks, x.order, x.numel) == ((3, 4, 2, 5), (1, 2, 3, 4, 1), 4, 120)
    assert x.n_params == 6 + 24 + 24 + 20 == sum(core.numel() for core in x.cores)
    assert (x.dtype, x.device.type, x.center) == (torch.float64, "cpu", (0, 3))
    assert (
        repr(x)
        == "TensorTrain(shape=(3, 4, 2, 5), ranks=(1, 2, 3, 4, 1), n_params=74, compression=1.62x, dtype=torch.float64)"
    )
    assert len(repr(ones((2,) * 2000))) < 200
    assert ones((2,) * 2000).numel == 2**2000


def test_frozen(x):
    with pytest.raises(AttributeError):
        x.cores = ()
    with pytest.raises(TypeError):
        x.cores[0] = x.cores[1]


def test_to(x):
    low = x.to(torch.float32)
    assert low.dtype == torch.float32
    assert rel_error(low.to_dense(), x.to_dense()) < 1e-6
    assert x.to("meta").device.type == "meta"
    assert rel_error(pickle.loads(pickle.dumps(x)).to_dense(), x.to_dense()) == 0.0


def test_entries_are_products_of_core_slices(x):
    a, b, c, e = 2, 1, 0, 3
    product = x.cores[0][:, a] @ x.cores[1][:, b] @ x.cores[2][:, c] @ x.cores[3][:, e]
    assert float(x.to_dense()[a, b, c, e]) == pytest.approx(float(product), rel=1e-14)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ([], "cores has length 0"),
        ([(1, 3)], r"cores\[0\] has shape \(1, 3\), expected 3 or 4 axes"),
        ([(1, 1, 3, 4, 1)], r"3 axes \(rank, mode, rank\)"),
        ([(2, 1, 3, 1), (3, 1, 3, 1)], "share a batch axis"),
        ([(2, 1, 3, 1), (1, 3, 1)], "share a batch axis"),
        ([(2, 3, 1)], r"boundary ranks must be 1: cores\[0\] has 2 at the start"),
        ([(1, 3, 2), (2, 3, 2)], r"cores\[1\] has 2 at the end"),
        ([(1, 3, 2), (3, 3, 1)], r"cores\[0\] has last size 2 but cores\[1\] starts with 3"),
        ([(1, 3, 0), (0, 3, 1)], "ranks must be at least 1"),
    ],
)
def test_bad_shapes_say_what_is_wrong(shapes, words):
    with pytest.raises(ShapeError, match=words):
        TensorTrain([torch.ones(shape) for shape in shapes])


def test_bad_cores_say_what_is_wrong():
    one = torch.ones(1, 2, 1)
    with pytest.raises(KindError, match="cores has Tensor"):
        TensorTrain(one)
    with pytest.raises(KindError, match=r"cores\[1\] has ndarray"):
        TensorTrain([one, one.numpy()])
    with pytest.raises(DTypeError, match=r"torch\.float32, expected torch\.float64"):
        TensorTrain([one, one.float()])
    with pytest.raises(DTypeError, match=r"torch\.int64"):
        TensorTrain([one.long()])
    with pytest.raises(ShapeError, match="center has"):
        TensorTrain([one, one], (1, 0))
    with pytest.raises(ShapeError, match=r"4 axes \(rank, out mode, in mode, rank\)"):
        TTMatrix([one])


# -- algebra ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    full=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ones_left=st.lists(st.booleans(), min_size=4, max_size=4),
    ones_right=st.lists(st.booleans(), min_size=4, max_size=4),
    drop=st.integers(0, 3),
)
def test_broadcasting_is_that_of_numpy(full, ones_left, ones_right, drop):
    generator = torch.Generator().manual_seed(1)
    left = [1 if one else n for n, one in zip(full, ones_left, strict=False)]
    right = [1 if one else n for n, one in zip(full, ones_right, strict=False)][min(drop, len(full) - 1) :]
    x, y = randn(left, 2, generator=generator), randn(right, 2, generator=generator)
    for found, exact in ((x + y, x.to_dense() + y.to_dense()), (y * x, y.to_dense() * x.to_dense())):
        assert found.shape == tuple(exact.shape)
        assert rel_error(found.to_dense(), exact) <= 1e-13


def test_ranks_of_results(x):
    assert (x + x).ranks == (1, 4, 6, 8, 1)
    assert (x * x).ranks == (1, 4, 9, 16, 1)
    assert (x + 1).ranks == (1, 3, 4, 5, 1)
    assert (3 * x).ranks == x.ranks


def test_scalars_of_every_kind(x):
    dense = x.to_dense()
    for scalar in (2, 2.0, True, np.float64(2), np.float32(2), torch.tensor(2.0), torch.tensor(2)):
        assert (x * scalar).dtype == (scalar * x).dtype == torch.float64
        assert rel_error((x * scalar).to_dense(), dense * float(scalar)) <= 1e-15
        assert rel_error((scalar * x).to_dense(), dense * float(scalar)) <= 1e-15
        assert rel_error((scalar + x).to_dense(), dense + float(scalar)) <= 1e-14
    assert (x.to(torch.float32) * 2j).dtype == torch.complex64
    assert (x.to(torch.float32) * torch.tensor(2.0)).dtype == torch.float32


def test_scaling_keeps_the_canonical_form(x):
    y = 3 * x.orthogonalize(2)
    assert y.center == (2, 2)
    assert float(y.norm()) == pytest.approx(3 * float(x.to_dense().norm()), rel=1e-13)


def test_mismatches_say_what_is_wrong(x):
    with pytest.raises(ShapeError, match=r"the right operand has \(3, 4, 2, 6\)"):
        x + ones((3, 4, 2, 6))
    with pytest.raises(KindError, match="has TTMatrix, expected TensorTrain or a number"):
        x + eye((3, 4, 2, 5))
    with pytest.raises(KindError, match="divides by a number only"):
        x / x
    with pytest.raises(DTypeError, match=r"torch\.float32, expected torch\.float64"):
        dot(x, x.to(torch.float32))
    with pytest.raises(ShapeError, match="dot must have equal modes"):
        dot(x, ones((3, 4, 2, 1)))


def test_norm_of_a_difference_is_exact(x):
    # The root of an inner product would stop near 1e-8.
    y = x + 1e-12 * ones(x.shape)
    assert float((y - x).norm()) == pytest.approx(1e-12 * 120**0.5, rel=1e-2)
    assert float((x - x).norm()) <= 1e-14 * float(x.norm())


def test_norm_is_differentiable_where_ranks_are_deficient(x):
    cores = [core.clone().requires_grad_() for core in x.cores]
    z = TensorTrain(cores)
    (z + z).norm().backward()
    again = [core.clone().requires_grad_() for core in x.cores]
    (2 * TensorTrain(again)).to_dense().norm().backward()
    for core, other in zip(cores, again, strict=True):
        assert rel_error(core.grad, other.grad) <= 1e-12


def test_norm_has_second_derivatives():
    x = randn((3, 2), 2, generator=torch.Generator().manual_seed(3))
    cores = [core.requires_grad_() for core in x.cores]
    assert torch.autograd.gradgradcheck(lambda *cores: TensorTrain(cores).norm(), cores)


def test_half_precision(x):
    low = x.to(torch.bfloat16)
    wide = low.to(torch.float64)
    assert low.norm().dtype == torch.bfloat16
    assert float(low.norm()) == pytest.approx(float(wide.norm()), rel=0.01)
    assert float(dot(low, low)) == pytest.approx(float(wide.norm()) ** 2, rel=0.01)
    assert rel_error(low.orthogonalize(1).to_dense(), wide.to_dense()) <= 0.03


def test_long_chains(generator):
    length = 2000 if library() is not None else 800  # core by core Python takes its time
    x = randn((3,) * length, 4, generator=generator)
    expected = float(x.log_norm())
    assert abs(expected - length / 2 * np.log(3)) < 300  # mean square 1, heavy tails
    y = x.orthogonalize(length // 2)
    assert float(y.log_norm()) == pytest.approx(expected, rel=1e-10)
    assert all(torch.isfinite(core).all() for core in y.cores)
    assert float(x.normalize().norm()) == pytest.approx(1.0, rel=1e-10)
    assert float(dot(x.normalize(), x.normalize())) == pytest.approx(1.0, rel=1e-10)
    assert torch.isinf(TensorTrain([2 * core for core in x.cores]).norm())


def test_log_norm_is_differentiable_on_long_chains():
    cores = [core.requires_grad_() for core in randn((3,) * 500, 2, generator=torch.Generator().manual_seed(0)).cores]
    (4 * TensorTrain(cores)).log_norm().backward()
    # log ||x|| has degree one in the logarithm of each core
    for core in cores:
        assert float((core.grad * core.detach()).sum()) == pytest.approx(1.0, rel=1e-9)


def test_zero_train():
    z = zeros((3, 4, 5))
    assert float(z.norm()) == 0.0
    assert float(z.log_norm()) == -float("inf")
    assert float(dot(z, z)) == 0.0
    assert not z.orthogonalize(1).to_dense().any()
    assert not z.normalize().to_dense().any()


def test_orthogonalize_rejects_a_missing_core(x):
    with pytest.raises(ModeIndexError, match="k has 4, expected -4 to 3"):
        x.orthogonalize(4)


# -- reductions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 0, 1, 3, -1, (0, 1), (0, 3), (1, -2), (0, 1, 2, 3), ()])
def test_sum_and_mean_over_modes(x, dim):
    dense = x.to_dense()
    axes = tuple(range(4)) if dim is None else dim
    exact_sum, exact_mean = (dense, dense) if axes == () else (dense.sum(axes), dense.mean(axes))
    for found, exact in ((x.sum(dim), exact_sum), (x.mean(dim), exact_mean)):
        found = found.to_dense() if isinstance(found, TensorTrain) else found
        assert found.shape == exact.shape
        assert rel_error(found, exact) <= 1e-12


def test_sum_rejects_bad_modes(x):
    with pytest.raises(ModeIndexError, match="dim has 4"):
        x.sum(4)
    with pytest.raises(ModeIndexError, match="no repeats"):
        x.sum((1, -3))


# -- indexing -----------------------------------------------------------------------------------------


KEYS = [
    0,
    -1,
    slice(1, 3),
    (1, 2),
    (1, 2, 0, 4),
    (slice(None), 2),
    (..., 2),
    (1, ..., slice(None, None, 2)),
    (slice(None, None, -1), slice(3, 0, -2)),
    (..., slice(-1, None)),
    (slice(2, 2),),
    None,
    (None, 1, None, slice(None), None),
    (1, 2, 0, 4, None),
    (..., None),
    ([0, 2],),
    ([2, 0, -1], [1, 1, 3]),
    (slice(None), [1, 3, 0], [0, 1, 1]),
    (slice(1, 3), ..., [4, 4, 0, -2]),
    (0, [1, 2]),
    ([1, 2], 3),
    ([True, False, True],),
    ([0, 1, 2], [3, 2, 1], [0, 0, 1], [4, 3, 2]),
    (1, [3, 2, 1], 1, [4, 3, 2]),
    (None, [0, 1], [0, 1], None),
    (np.array([0, 1]), np.int64(2)),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_is_that_of_numpy(x, key):
    exact = torch.from_numpy(np.array(x.to_dense().numpy()[key]))
    found = x[key]
    found = found.to_dense() if isinstance(found, TensorTrain) else found
    assert found.shape == exact.shape
    assert rel_error(found, exact) <= 1e-13


def test_lists_in_every_mode_give_values(x):
    points = torch.tensor([[0, 1, 1, 4], [2, 3, 0, 0]])
    found = x[tuple(points.T)]
    assert isinstance(found, torch.Tensor)
    assert rel_error(found, x.to_dense()[tuple(points.T)]) <= 1e-14


@pytest.mark.parametrize(
    "key, error, words",
    [
        (3, ModeIndexError, "mode 0 has index 3, expected -3 to 2"),
        ((0, 0, -3), ModeIndexError, "mode 2 has index -3"),
        ((0, 0, 0, 0, 0), ModeIndexError, "5 entries"),
        ((..., ...), ModeIndexError, "2 ellipses"),
        ((slice(None), [0, 4]), ModeIndexError, "mode 1 has indices from 0 to 4"),
        (([True, False], 0), ModeIndexError, "the mask has 2, expected 3"),
        (([0, 1], [0, 1, 2]), ShapeError, r"the lists have shapes \[\(2,\), \(3,\)\]"),
        (1.5, KindError, "has float"),
        (True, KindError, "mode 0 has True"),
        ("a", KindError, "has str"),
        ([[True, False], [True, True]], KindError, "a mask of one axis"),
        ([0.5], KindError, "must be of integers"),
        (slice(None, None, 0), KindError, "step other than 0"),
    ],
)
def test_bad_indices_say_what_is_wrong(x, key, error, words):
    with pytest.raises(error, match=words):
        x[key]


def test_indexing_is_differentiable(x):
    cores = [core.detach().requires_grad_() for core in x.cores]
    assert torch.autograd.gradcheck(lambda *cores: TensorTrain(cores)[1:, 2, [0, 1]].to_dense(), cores)


# -- joining ------------------------------------------------------------------------------------------


def test_kron(x, generator):
    y = randn((2, 3), 2, generator=generator)
    assert kron(x, y).shape == (3, 4, 2, 5, 2, 3)
    assert (
        rel_error(kron(x, y).to_dense().flatten(), torch.kron(x.to_dense().flatten(), y.to_dense().flatten())) <= 1e-14
    )
    a, b = (randn_matrix((2, 3), (3, 2), 2, generator=generator) for _ in range(2))
    assert rel_error(kron(a, b).to_dense(), torch.kron(a.to_dense(), b.to_dense())) <= 1e-14


@pytest.mark.parametrize("dim", [0, 1, 3, -1])
def test_cat(x, generator, dim):
    shape = list(x.shape)
    shape[dim] = 2
    y = randn(shape, 2, generator=generator)
    found = cat((x, y, x), dim=dim)
    exact = torch.cat((x.to_dense(), y.to_dense(), x.to_dense()), dim=dim)
    assert found.shape == tuple(exact.shape)
    assert rel_error(found.to_dense(), exact) <= 1e-14


@pytest.mark.parametrize("dim", [0, 2, 4, -1])
def test_stack(x, generator, dim):
    y = randn(x.shape, 2, generator=generator)
    exact = torch.stack((x.to_dense(), y.to_dense()), dim=dim)
    found = stack((x, y), dim=dim)
    assert found.shape == tuple(exact.shape)
    assert rel_error(found.to_dense(), exact) <= 1e-14


@pytest.mark.parametrize("value", [0, 1.5])
def test_pad(x, value):
    widths = ((1, 0), (0, 0), (2, 3), (0, 1))
    exact = np.pad(x.to_dense().numpy(), widths, constant_values=value)
    found = pad(x, widths, value=value)
    assert found.shape == exact.shape
    assert rel_error(found.to_dense(), torch.from_numpy(exact)) <= 1e-14


def test_joining_rejects_what_does_not_fit(x):
    with pytest.raises(ShapeError, match="length 0"):
        cat(())
    with pytest.raises(ShapeError, match=r"trains\[1\] has shape \(3, 4, 2, 6\)"):
        cat((x, ones((3, 4, 2, 6))), dim=0)
    with pytest.raises(ShapeError, match="of one order"):
        stack((x, ones((3, 4))))
    with pytest.raises(KindError, match="holds Tensor"):
        cat((x, x.to_dense()))
    with pytest.raises(ShapeError, match="expected 4 pairs"):
        pad(x, ((1, 1),))


# -- matrices -----------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float64, torch.complex128])
def a(generator, request):
    return randn_matrix((3, 2, 4), (2, 5, 3), 3, generator=generator, dtype=request.param)


def test_matrix_attributes(generator):
    a = randn_matrix((3, 2, 4), (2, 5, 3), 3, generator=generator)
    assert (a.shape, a.out_modes, a.in_modes, a.ranks) == ((24, 30), (3, 2, 4), (2, 5, 3), (1, 3, 3, 1))
    assert a.numel == 720
    assert repr(a) == (
        "TTMatrix(out_modes=(3, 2, 4), in_modes=(2, 5, 3), ranks=(1, 3, 3, 1), n_params=144, compression=5x, "
        "dtype=torch.float64)"
    )


def test_transposes(a):
    assert rel_error(a.T.to_dense(), a.to_dense().T) <= 1e-15
    assert rel_error(a.H.to_dense(), a.to_dense().mH) <= 1e-15


def test_products(a, generator):
    dense = a.to_dense()
    b = randn_matrix((2, 5, 3), (2, 2, 1), 2, generator=generator, dtype=a.dtype)
    x = randn((2, 5, 3), 2, generator=generator, dtype=a.dtype)
    v = torch.randn(30, 7, generator=generator, dtype=a.dtype)
    assert (a @ b).ranks == (1, 6, 6, 1)
    assert rel_error((a @ b).to_dense(), dense @ b.to_dense()) <= 1e-13
    assert (a @ x).shape == (3, 2, 4)
    assert rel_error((a @ x).to_dense().flatten(), dense @ x.to_dense().flatten()) <= 1e-13
    assert rel_error(a @ v, dense @ v) <= 1e-13
    assert rel_error(a @ v[:, 0], dense @ v[:, 0]) <= 1e-13
    assert (a @ v[:, :0]).shape == (24, 0)
    assert rel_error(v.T @ a.T, v.T @ dense.T) <= 1e-13
    assert rel_error(v[:, 0] @ a.T, v[:, 0] @ dense.T) <= 1e-13
    assert rel_error((x @ a.T).to_dense().flatten(), x.to_dense().flatten() @ dense.T) <= 1e-13


def test_products_are_differentiable(generator):
    a = randn_matrix((2, 2), (3, 2), 2, generator=generator)
    cores = [core.requires_grad_() for core in a.cores]
    v = torch.randn(6, 2, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *cores: TTMatrix(cores) @ v, (v, *cores))


def test_rows_columns_entries_and_sums(a):
    dense = a.to_dense()
    for found, exact in (
        (a[5, 7], dense[5, 7]),
        (a[-1, -2], dense[-1, -2]),
        (a[3].to_dense().flatten(), dense[3]),
        (a[3, :].to_dense().flatten(), dense[3]),
        (a[:, 11].to_dense().flatten(), dense[:, 11]),
        (a[:, :].to_dense(), dense),
        (a.sum(), dense.sum()),
        (a.sum(0).to_dense().flatten(), dense.sum(0)),
        (a.mean(-1).to_dense().flatten(), dense.mean(1)),
    ):
        assert found.shape == exact.shape
        assert rel_error(found, exact) <= 1e-12


def test_diagonals(generator):
    x = randn((3, 2, 4), 2, generator=generator)
    assert rel_error(diag(x).to_dense(), torch.diag(x.to_dense().flatten())) <= 1e-15
    assert rel_error(diag(diag(x)).to_dense(), x.to_dense()) == 0.0
    a = randn_matrix((3, 2), (3, 2), 3, generator=generator)
    assert rel_error(diag(a).to_dense().flatten(), a.to_dense().diagonal()) <= 1e-15


def test_identity(a):
    assert rel_error((eye(a.out_modes, dtype=a.dtype) @ a).to_dense(), a.to_dense()) <= 1e-15
    assert torch.equal(eye((2, 3)).to_dense(), torch.eye(6))


def test_matrix_mismatches_say_what_is_wrong(generator):
    a = randn_matrix((3, 2), (2, 5), 2, generator=generator)
    with pytest.raises(ShapeError, match=r"right one has \(3, 2\), expected \(2, 5\)"):
        a @ a
    with pytest.raises(ShapeError, match=r"right one has \(10,\)"):
        a @ ones((10,))
    with pytest.raises(ShapeError, match=r"x has shape \(6,\), expected \(10,\) or \(10, b\)"):
        a @ torch.ones(6)
    with pytest.raises(DTypeError, match=r"torch\.float32"):
        a @ torch.ones(10, dtype=torch.float32)
    with pytest.raises(KindError, match="has list"):
        a @ [1.0] * 10
    with pytest.raises(ShapeError, match="in_modes"):
        a + randn_matrix((3, 2), (5, 2), 2)
    with pytest.raises(ShapeError, match="square modes"):
        diag(a)
    with pytest.raises(ModeIndexError, match="has 6, expected -6 to 5"):
        a[6]
    with pytest.raises(KindError, match="int or ':'"):
        a[1:3]
    with pytest.raises(ModeIndexError, match="3 entries"):
        a[1, 2, 3]


# -- creation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_random_entries_have_variance_one(dtype):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([randn((6, 5, 4), (4, 3), generator=generator, dtype=dtype).to_dense() for _ in range(2000)])
    # 2,000 draws of 120 entries that share cores; kurtosis 3 (1 + 2/4)(1 + 2/3): measured 0.993 and 1.000
    assert float(draws.abs().square().mean()) == pytest.approx(1.0, abs=0.04)
    assert float(draws.mean().abs()) < 0.02


def test_creation_arguments():
    assert randn((4, 5, 6), 100).ranks == (1, 4, 6, 1)
    assert randn((4, 5, 6), (100, 2)).ranks == (1, 100, 2, 1)
    assert randn((4, 5, 6), 0.5).n_params <= 60
    assert randn_matrix((4, 4), (4, 4), "full").ranks == (1, 16, 1)
    for make in (
        lambda **k: randn((3, 2), 2, **k),
        lambda **k: ones((3, 2), **k),
        lambda **k: eye((3, 2), **k),
    ):
        assert make().dtype == torch.get_default_dtype()
        assert make(dtype=torch.float32).dtype == torch.float32
        assert make(device="meta").device.type == "meta"
    first, second = (randn((3, 2), 2, generator=torch.Generator().manual_seed(7)).to_dense() for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(ones((3, 2)).to_dense(), torch.ones(3, 2))
    assert torch.equal(zeros((3, 2)).to_dense(), torch.zeros(3, 2))


def test_creation_rejects_bad_modes():
    with pytest.raises(ShapeError, match=r"shape has \(3, 0\)"):
        ones((3, 0))
    with pytest.raises(ShapeError, match=r"shape has \(\)"):
        randn((), 2)
    with pytest.raises(ShapeError, match="2 and 1 entries"):
        randn_matrix((3, 2), (4,), 2)
