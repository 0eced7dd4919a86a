"""Walks of the kernels against the steps in Python, which are their readable twin."""

import math

import pytest
import torch

from tensortrain.cores import walks
from tensortrain.cores.algebra import add_cores, dot_parts, hadamard_cores
from tensortrain.cores.canonical import norm_parts, orthogonalize_cores, singular_values_at
from tensortrain.cores.dense import cores_of_dense
from tensortrain.cores.matrix import times_matrix_cores
from tensortrain.cores.rounding import round_cores
from tensortrain.cores.scaling import times_pow2
from tensortrain.system.native import library, python_only

built = pytest.mark.skipif(library() is None, reason="kernels are not built: tensortrain build-kernels")
pytestmark = built

CHAINS = [  # modes and inner ranks
    ((4,), ()),
    ((2, 3), (2,)),
    ((1, 6, 1, 2), (1, 1, 1)),
    ((3, 1, 5, 2, 4), (3, 3, 7, 4)),
    ((2, 2, 2, 2, 2, 2), (5, 9, 11, 6, 3)),  # ranks above what the modes allow
    ((40, 3, 30), (17, 21)),
]


def chain(modes, inner, generator, dtype=torch.float64, scale=1.0):
    ranks = (1, *inner, 1)
    shapes = zip(ranks, modes, ranks[1:], strict=False)
    return [scale * torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes]


def both(run):
    """The answers of the kernels and of Python."""
    found = run()
    with python_only():
        return found, run()


def dense(cores):
    out = torch.ones(1, 1, dtype=cores[0].dtype)
    for core in cores:
        out = (out @ core.flatten(1)).reshape(-1, core.shape[-1])
    return out.flatten()


def value(parts):
    return float(parts[0].double()) * 2.0 ** int(parts[1])


def far_apart(size, n=2, length=12):
    """Two terms: one grows to ``size**length`` in the middle and comes back, one stays at 1."""
    up, down = torch.diag(torch.tensor([size, 1.0])), torch.diag(torch.tensor([1 / size, 1.0]))
    middle = [up] * length + [down] * length
    cores = [core[:, None, :].repeat(1, n, 1) for core in middle]
    return [torch.ones(1, n, 2), *cores, torch.ones(2, n, 1)]


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("modes, inner", CHAINS)
def test_products_and_norms_agree(modes, inner, dtype, tol, generator):
    x, y = chain(modes, inner, generator, dtype), chain(modes, inner[::-1], generator, dtype)
    assert walks.dot_walk(x, y) is not None
    size = float(dense(x).double().norm() * dense(y).double().norm())
    found, twin = both(lambda: dot_parts(x, y))
    assert abs(value(found) - value(twin)) <= tol * size
    d = len(modes)
    for span in ((0, d - 1), (0, 0), (d - 1, d - 1)):
        found, twin = both(lambda span=span: norm_parts(x, span))
        assert value(found) == pytest.approx(value(twin), rel=tol)
        assert found[0].dtype == twin[0].dtype
        assert found[1].dtype == twin[1].dtype


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("modes, inner", CHAINS)
def test_canonical_forms_agree(modes, inner, dtype, tol, generator):
    x, d = chain(modes, inner, generator, dtype), len(modes)
    for k in range(d):
        (found, exponent), (twin, twins) = both(lambda k=k: orthogonalize_cores(x, (0, d - 1), k))
        assert [core.shape for core in found] == [core.shape for core in twin]
        assert 0.5 <= float(found[k].abs().max()) < 1
        a, b = times_pow2(dense(found), exponent), times_pow2(dense(twin), twins)
        assert float((a - b).norm()) <= tol * float(b.norm())
        again, _ = orthogonalize_cores(found, (k, k), 0)  # from a known form to another one
        for core in again[1:]:
            rows = core.flatten(1)
            assert float((rows @ rows.mT - torch.eye(len(rows), dtype=dtype)).norm()) <= 50 * tol
    for bond in range(1, d):
        (s, e), (t, f) = both(lambda bond=bond: singular_values_at(x, (0, d - 1), bond))
        assert float((times_pow2(s, e) - times_pow2(t, f)).norm()) <= tol * float(times_pow2(t, f).norm())


@pytest.mark.parametrize("dtype, top", [(torch.float64, 40), (torch.float32, 4)], ids=str)
@pytest.mark.parametrize("exponent", [-1.0, 1.0])
def test_terms_of_sizes_far_apart_keep_their_own(dtype, top, exponent):
    torch.set_default_dtype(dtype)
    x = far_apart(2.0 ** (exponent * top))
    entries = 2.0 ** len(x)
    for found in both(lambda: dot_parts(x, x)):
        assert value(found) == pytest.approx(4.0 * entries, rel=1e-6)  # every entry is 1 + 1
    for found in both(lambda: norm_parts(x, (0, len(x) - 1))):
        assert value(found) == pytest.approx(2.0 * math.sqrt(entries), rel=1e-6)
    for k in (0, len(x) // 2, len(x) - 1):
        for found, power in both(lambda k=k: orthogonalize_cores(x, (0, len(x) - 1), k)):
            assert float(torch.linalg.vector_norm(found[k])) * 2.0 ** int(power) == pytest.approx(
                2.0 * math.sqrt(entries), rel=1e-5
            )
    for found in both(lambda: round_cores(x, (0, len(x) - 1), eps=1e-3)):
        assert set(found.ranks) == {1}
        assert value(norm_parts(found.cores, (0, len(x) - 1))) == pytest.approx(2.0 * math.sqrt(entries), rel=2e-3)


def test_balanced_chains_agree():
    x = far_apart(2.0**60)
    (found, power), with_twin = both(lambda: walks.balanced_walk(x))
    assert with_twin is None  # Python's way is another function
    parts = dot_parts(found, found)
    assert value((parts[0], parts[1] + 2 * power)) == pytest.approx(4.0 * 2.0 ** len(x), rel=1e-12)
    for core in found[1:]:
        largest = core.abs().amax((-2, -1))
        assert bool((largest < 1.0 + 1e-12).all())


@pytest.mark.parametrize("modes, inner", CHAINS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 0.1, 0.6])
@pytest.mark.parametrize("cap", [None, 2])
def test_roundings_agree(modes, inner, eps, cap, generator):
    x, y = chain(modes, inner, generator), chain(modes, inner[::-1], generator)
    d = len(modes)
    near = [core.clone() for core in y]
    near[0] = 1e-4 * near[0]
    for cores, span in (
        (add_cores(x, x), (0, d - 1)),
        (add_cores(x, near), (0, d - 1)),
        (orthogonalize_cores(add_cores(x, y), (0, d - 1), d - 1)[0], (d - 1, d - 1)),
        (orthogonalize_cores(add_cores(x, y), (0, d - 1), 0)[0], (0, 0)),
        (orthogonalize_cores(add_cores(x, y), (0, d - 1), d // 2)[0], (d // 2, d // 2)),
    ):
        found, twin = both(lambda c=cores, s=span: round_cores(c, s, eps=eps, max_rank=cap))
        assert found.ranks == twin.ranks
        assert found.bound <= twin.bound * 1.02 + 0.05 * eps + 1e-13  # what was dropped before an SVD counts whole
        exact = dense(cores)
        assert float((dense(found.cores) - dense(twin.cores)).norm()) <= (1e-2 * eps + 1e-13) * float(exact.norm())
        error = float((dense(found.cores) - exact).norm() / exact.norm())
        assert error <= found.bound
        assert cap is not None or found.bound <= max(eps, 1e-13)
        for core in found.cores[:-1]:
            left = core.flatten(0, 1)
            assert float((left.mT @ left - torch.eye(left.shape[1])).norm()) <= 1e-13


def test_sums_that_nearly_cancel_keep_their_promise(generator):
    x, y = (chain((3, 4, 2, 5), (3, 6, 4), generator) for _ in range(2))
    for size in (1e-3, 1e-7, 1e-11, 1e-14):
        small = [size * y[0], *y[1:]]
        cores = add_cores(add_cores(x, small), [-x[0], *x[1:]])
        for found in both(lambda c=cores: round_cores(c, (0, 3), eps=1e-2)):
            error = float((dense(found.cores) - dense(small)).norm() / dense(small).norm())
            assert error <= found.bound * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_dtypes_keep_their_promise(dtype, generator):
    x = [core.to(dtype) for core in chain((4, 3, 5, 2), (3, 5, 2), generator)]
    cores = add_cores(x, x)
    for found in both(lambda: round_cores(cores, (0, 3))):
        exact = dense([core.double() for core in cores])
        error = float((dense([core.double() for core in found.cores]) - exact).norm() / exact.norm())
        assert error <= found.bound
        assert found.ranks == (1, 3, 5, 2, 1)


def test_zero_and_tiny_chains(generator):
    zero = [torch.zeros(1, 3, 2), torch.zeros(2, 4, 1)]
    for found in both(lambda: round_cores(zero, (0, 1), eps=1e-6)):
        assert found.ranks == (1, 1, 1)
        assert found.bound == 0.0
    for found in both(lambda: dot_parts(zero, zero)):
        assert float(found[0]) == 0.0
    for scale in (1e-160, 1e-300):
        tiny = chain((3, 4, 3), (2, 2), generator, scale=scale)
        for found in both(lambda c=tiny: round_cores(add_cores(c, c), (0, 2), eps=1e-8)):
            assert found.ranks == (1, 2, 2, 1)
        (m, e), (n, f) = both(lambda c=tiny: norm_parts(c, (0, 2)))
        assert float(m) * 2.0 ** int(e - f) == pytest.approx(float(n), rel=1e-12)


def test_what_walks_leave_to_python(generator):
    x = chain((3, 4, 2), (2, 3), generator)
    learned = [core.clone().requires_grad_() for core in x]
    batch = [core.expand(2, *core.shape) for core in x]
    bad = [x[0], x[1] * float("nan"), x[2]]
    empty = [x[0][:, :0], *x[1:]]
    for cores in (learned, batch, bad, empty, [core.to(torch.complex128) for core in x], [core.half() for core in x]):
        assert walks.norm_walk(cores) is None
        assert walks.dot_walk(cores, cores) is None
        assert walks.rounding_walk(cores, 2) is None
    with torch.no_grad():
        assert walks.norm_walk(learned) is not None
    with python_only():
        assert walks.norm_walk(x) is None
    assert math.isnan(float(dot_parts(bad, bad)[0]))
    views = [core.transpose(-3, -1).contiguous().transpose(-3, -1) for core in x]  # not contiguous
    assert value(norm_parts(views, (0, 2))) == pytest.approx(value(norm_parts(x, (0, 2))), rel=1e-14)
    assert torch.func.vmap(lambda c: dot_parts([c, *x[1:]], x)[0] * 2.0)(x[0][None]).shape == (1,)


def test_derivatives_pass_by_the_walks(generator):
    x = [core.requires_grad_() for core in chain((3, 2, 3), (2, 2), generator)]
    for run in (
        lambda *c: times_pow2(*dot_parts(c, c)),
        lambda *c: times_pow2(*norm_parts(c, (0, 2))),
        lambda *c: dense(round_cores(add_cores(c, c), (0, 2), eps=1e-6).cores),
    ):
        assert torch.autograd.gradcheck(run, x)


def test_a_flat_spectrum_keeps_every_rank(generator):
    noise = torch.randn(4, 4, 4, 4, generator=generator)
    full = cores_of_dense(noise, eps=0.0)
    for found in both(lambda: round_cores(add_cores(full.cores, full.cores), (0, 3), eps=1e-9)):
        assert found.ranks == (1, 4, 16, 4, 1)
        assert float((dense(found.cores) - 2 * noise.flatten()).norm()) <= 1e-12 * float(noise.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_of_chains_agree(dtype, generator):
    x, y = chain((3, 4, 2, 5), (3, 6, 4), generator, dtype), chain((3, 4, 2, 5), (2, 1, 7), generator, dtype)
    for found in zip(*both(lambda: hadamard_cores(x, y)), strict=True):
        assert torch.equal(*found)
    a = [core.unflatten(1, (core.shape[1], 1)).expand(-1, -1, 3, -1) * torch.rand(3, 1, dtype=dtype) for core in x]
    b = [core.unflatten(1, (1, core.shape[1])).repeat(1, 3, 1, 1) * torch.rand(3, 1, 1, dtype=dtype) for core in y]
    for found, twin in zip(*both(lambda: times_matrix_cores(a, b)), strict=True):
        assert found.shape == twin.shape
        torch.testing.assert_close(found, twin)


def test_products_with_derivatives_are_left_to_python(generator):
    x = [core.requires_grad_() for core in chain((3, 4), (2,), generator)]
    assert walks.product_walk(x, x) is None
    assert all(core.requires_grad for core in hadamard_cores(x, x))


@pytest.mark.parametrize("ranks", [(20, 20), (24, 17, 30)])
@pytest.mark.parametrize("eps", [1e-6, 1e-10])
def test_sums_of_several_terms_are_rounded_by_their_blocks(ranks, eps, generator):
    inner = (16, 20, 16) if len(ranks) == 3 else (20, 20, 20)
    terms = [chain((6, 5, 7, 6), inner, generator) for _ in ranks]
    for cores in (
        add_cores(terms[0], terms[1]),
        add_cores(add_cores(terms[0], terms[0]), terms[1]),
        add_cores(terms[0], [1e-4 * terms[1][0], *terms[1][1:]]),
    ):
        found, twin = both(lambda c=cores: round_cores(c, (0, 3), eps=eps))
        assert found.ranks == twin.ranks
        exact = dense(cores)
        error = float((dense(found.cores) - exact).norm() / exact.norm())
        assert error <= found.bound <= eps


def test_inner_products_of_large_cores_agree(generator):
    modes, inner = (9, 11, 8, 10), (9, 64, 10)
    x, y = chain(modes, inner, generator), chain(modes, inner, generator)
    wide = [chain((3, 60, 50), (90, 70), generator) for _ in range(2)]
    long = [chain((60, 12, 12, 60), (60, 70, 60), generator) for _ in range(2)]
    for bra, ket in ((x, y), tuple(wide), tuple(long), (long[0], long[0])):
        found, twin = both(lambda b=bra, k=ket: dot_parts(b, k))
        assert value(found) == pytest.approx(value(twin), rel=1e-10)
    far = [long[0][0], 2.0**300 * long[0][1], 2.0**-400 * long[0][2], long[0][3]]
    found, twin = both(lambda: dot_parts(far, far))
    assert float(found[0] / twin[0]) * 2.0 ** int(found[1] - twin[1]) == pytest.approx(1.0, rel=1e-10)


def column_by_column(core):
    """The same numbers as QR leaves them: the last axis apart from the others."""
    return core.movedim(-1, 0).contiguous().movedim(0, -1)


def every_second(core):
    return torch.stack([core, core], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize(
    "modes, inner", [*CHAINS, ((30, 70, 40), (90, 80)), ((5, 4, 6), (150, 170)), ((4,) * 9, (24,) * 8)]
)
def test_cores_may_lie_column_by_column(modes, inner, dtype, tol, generator):
    x, y = chain(modes, inner, generator, dtype), chain(modes, inner[::-1], generator, dtype)
    with python_only():
        expected = value(dot_parts(x, y))
    size = float(dense(x).double().norm() * dense(y).double().norm())
    for left in (list, column_by_column, every_second):
        for right in (list, column_by_column, every_second):
            a = x if left is list else [left(core) for core in x]
            b = y if right is list else [right(core) for core in y]
            assert abs(float(walks.inner_walk(tuple(a), tuple(b), 3)) - expected) <= tol * size
            assert abs(value(walks.dot_walk(a, b)) - expected) <= tol * size


def test_far_apart_numbers_that_lie_column_by_column(generator):
    x = [core.double() for core in far_apart(2.0**60)]
    found, twin = both(lambda: dot_parts([column_by_column(core) for core in x], x))
    assert float(found[0] / twin[0]) * 2.0 ** int(found[1] - twin[1]) == pytest.approx(1.0, rel=1e-12)
    lying = [column_by_column(core) for core in chain((7, 8, 9), (12, 11), generator)]
    a, b = both(lambda: round_cores(lying, (0, 2), eps=1e-6))
    assert a.ranks == b.ranks
    assert float((dense(a.cores) - dense(lying)).norm() / dense(lying).norm()) <= a.bound


def test_inner_products_look_at_modes_and_axes_themselves(generator):
    x = chain((3, 5, 4), (4, 6), generator)
    matrix = [core.unflatten(1, (1, core.shape[1])) for core in x]
    found = walks.inner_walk(matrix, [core.unflatten(1, (1, core.shape[1])) for core in x], 4)
    assert float(found) == pytest.approx(float(dense(x).square().sum()), rel=1e-12)
    assert walks.inner_walk(matrix, [core.unflatten(1, (core.shape[1], 1)) for core in x], 4) is None
    assert walks.inner_walk(x, chain((3, 4, 4), (4, 6), generator), 3) is None
    assert walks.inner_walk(x, x[:2], 3) is None
    assert walks.inner_walk(x, [core.float() for core in x], 3) is None
    assert walks.inner_walk([core[None] for core in x], [core[None] for core in x], 3) is None  # a batch
    large = [2.0**500 * core for core in x]
    assert math.isinf(float(walks.inner_walk(large, large, 3)))  # as the number itself


def test_sound_cores_are_known_in_one_look(generator):
    x = chain((3, 5, 4), (4, 6), generator)
    assert walks.are_sound(x, 3)
    assert walks.are_sound([column_by_column(core) for core in x], 3)
    unsound = [
        (x[:2], 3),  # ends in rank 6
        ([x[0], x[2]], 3),  # ranks do not meet
        ([x[0], x[1].float(), x[2]], 3),
        ([core.to(torch.complex128) for core in x], 3),
        ([core[None] for core in x], 3),
        ([], 3),
        ([1.0], 3),
        ([x[0], x[1], x[2].numpy()], 3),
        ([x[0], torch.view_as_complex(torch.stack([x[1], x[1]], -1)).conj().imag, x[2]], 3),  # lazily negative
        ([torch.zeros(1, 3, 0).double(), torch.zeros(0, 4, 1).double()], 3),
    ]
    for cores, n_axes in unsound:
        assert not walks.are_sound(cores, n_axes)


def test_cores_whose_numbers_lie_far_apart_are_not_squared_away(generator):
    """A bond scaled by 1e12 one way and back again changes no bound and no rank."""
    x = chain((5, 6, 5, 4), (4, 6, 3), generator)
    scale = torch.logspace(0, 12, 6, dtype=torch.float64)
    y = [x[0], x[1] * scale, x[2] / scale[:, None, None], x[3]]
    found, twin = both(lambda: round_cores(add_cores(y, y), (0, 3), eps=1e-5))
    assert found.ranks == twin.ranks
    error = float((dense(found.cores) - 2 * dense(x)).norm() / dense(x).norm() / 2)
    assert error <= found.bound <= 1e-5


def test_squares_give_way_where_a_matrix_and_its_inverse_meet(generator):
    x = chain((5, 6, 5), (5, 5), generator)
    q = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    s = torch.logspace(0, -9, 5, dtype=torch.float64)
    y = [x[0] @ (q * s) @ q.mT, ((q / s) @ q.mT @ x[1].flatten(1)).unflatten(1, x[1].shape[1:]), x[2]]
    for found in both(lambda: round_cores(y, (0, 2), eps=1e-4)):
        error = float((dense(found.cores) - dense(y)).norm() / dense(y).norm())
        assert error <= found.bound
