"""Rounding by Gram matrices alone, where the tolerance allows it: the promise and the gauge are those of triangles."""

import pytest
import torch

from tensortrain.cores import rounding, walks
from tensortrain.cores.algebra import add_cores, dot_parts
from tensortrain.cores.canonical import norm_parts, orthogonalize_cores
from tensortrain.cores.rounding import round_cores
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.sizes import root_sum
from tensortrain.system.native import library, python_only

pytestmark = pytest.mark.skipif(library() is None, reason="kernels are not built: tensortrain build-kernels")


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def unit_train(modes, rank, generator, size=1.0):
    """Orthonormal cores, of this norm together."""
    ranks = [1, *[rank] * (len(modes) - 1), 1]
    for k in range(1, len(modes)):
        ranks[k] = min(ranks[k], ranks[k - 1] * modes[k - 1])
    cores = []
    for k, n in enumerate(modes):
        drawn = torch.randn(ranks[k] * n, ranks[k + 1], generator=generator, dtype=torch.float64)
        cores.append(torch.linalg.qr(drawn).Q.reshape(ranks[k], n, ranks[k + 1]))
    cores[-1] = size * cores[-1]
    return cores


def norm(cores):
    return float(times_pow2(*norm_parts(cores, (0, len(cores) - 1))))


def distance(found, cores):
    """Relative, by triangles: exact to rounding where both nearly agree."""
    return norm(add_cores(list(found), [-cores[0], *cores[1:]])) / norm(cores)


def check(cores, eps, *, twin=True, **more):
    found = round_cores(cores, (0, len(cores) - 1), eps=eps, **more)
    assert distance(found.cores, cores) <= found.bound
    for core in found.cores[:-1]:
        left = core.flatten(0, 1)
        assert float((left.mT @ left - torch.eye(left.shape[1], dtype=left.dtype)).norm()) <= 1e-13
    if twin:
        # A hundredth of the tolerance is left to what squares cannot show.
        with python_only():
            most, least = (round_cores(cores, (0, len(cores) - 1), eps=f * eps, **more).ranks for f in (0.985, 1.0))
        assert all(a <= b <= c for a, b, c in zip(least, found.ranks, most, strict=True))
    return found


@pytest.mark.parametrize(
    "modes, rank",
    [((7, 9, 8, 11, 6, 9), 19), ((3,) * 30, 5), ((23, 31, 29), 37), ((40, 41, 43), 33), ((2,) * 11, 30)],
    ids=str,
)
def test_sums_with_levels_are_cut_where_triangles_cut_them(modes, rank, generator):
    cores = unit_train(modes, rank, generator)
    for size in (1e-3, 1e-5, 5e-8):
        cores = add_cores(cores, unit_train(modes, max(1, rank // 2), generator, size))
    for eps in (1e-6, 3e-5, 2e-3):
        found = check(cores, eps)
        assert found.bound <= eps
        assert float(found.sweep.unseen) > 0  # triangles see all


def test_terms_that_depend_on_each_other_leave_one(generator):
    cores = unit_train((9, 8, 30, 9), 21, generator)
    found = check(add_cores(cores, add_cores(cores, cores)), 1e-6)
    assert found.ranks == (1, 9, 21, 9, 1)
    assert found.bound <= 1e-6


@pytest.mark.parametrize("hi", [0, 2, 4])
def test_cores_known_to_be_orthonormal_are_not_squared(hi, generator):
    cores = add_cores(unit_train((6, 5, 8, 7, 6), 17, generator), unit_train((6, 5, 8, 7, 6), 9, generator, 1e-7))
    placed, exponent = orthogonalize_cores(cores, (0, 4), hi)
    placed[hi] = times_pow2(placed[hi], exponent)
    found = round_cores(placed, (hi, hi), eps=1e-6)
    assert found.ranks == check(cores, 1e-6).ranks
    assert distance(found.cores, cores) <= found.bound <= 1e-6


def test_caps_go_before_the_tolerance(generator):
    cores = add_cores(unit_train((8, 9, 7, 8), 20, generator), unit_train((8, 9, 7, 8), 20, generator, 0.1))
    found = check(cores, 1e-6, max_rank=11)
    assert max(found.ranks) == 11
    assert found.bound == pytest.approx(distance(found.cores, cores), rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_is_cut_of_what_is_full(dtype, generator):
    cores = [core.to(dtype) for core in unit_train((12, 14, 13, 12), 29, generator)]
    found = round_cores(cores, (0, 3), eps=1e-5)
    assert found.ranks == (1, 12, 29, 12, 1)
    assert distance([core.double() for core in found.cores], [core.double() for core in cores]) <= found.bound <= 1e-5


def test_tight_tolerances_are_kept_by_triangles(generator):
    cores = add_cores(unit_train((5,) * 9, 6, generator), unit_train((5,) * 9, 6, generator, 1e-9))
    assert float(check(cores, 1e-8).sweep.unseen) == 0
    long = unit_train((2,) * 400, 3, generator)  # a bond more, a little more unseen
    assert float(check(add_cores(long, long), 1e-6, twin=False).sweep.unseen) == 0


def test_squares_beyond_the_range_are_left_to_triangles(generator):
    cores = unit_train((4, 5, 4), 4, generator)
    scale = 2.0 ** torch.tensor([0.0, 200.0, -80.0, 60.0], dtype=torch.float64)
    far = [cores[0] * scale, cores[1] / scale[:, None, None], cores[2]]
    found = round_cores(add_cores(far, far), (0, 2), eps=1e-5)
    assert found.ranks == (1, 4, 4, 1)
    assert distance(found.cores, add_cores(cores, cores)) <= 1e-5


def test_what_nearly_cancels_is_not_taken_for_zero(generator):
    x, y = unit_train((4, 6, 5, 4), 5, generator), unit_train((4, 6, 5, 4), 3, generator, 1e-9)
    cores = add_cores(add_cores(x, y), [-x[0], *x[1:]])
    found = round_cores(cores, (0, 3), eps=1e-3)
    assert distance(found.cores, y) <= found.bound + 1e-6
    assert distance(found.cores, y) <= 1e-3


def test_what_squares_leave_unseen_is_less_than_promised(generator):
    for modes in ((3,) * 40, (8, 9, 10), (20, 20)):
        cores = unit_train(modes, 6, generator)
        for size in (1e-5, 1e-6, 3e-7, 1e-7):
            cores = add_cores(cores, unit_train(modes, 4, generator, size))
        found = check(cores, 2e-6, twin=False)
        shown = float(root_sum(found.sweep.tails))
        unseen = max(0.0, distance(found.cores, cores) ** 2 - shown**2) ** 0.5
        assert unseen <= float(found.sweep.unseen)
    assert rounding._WALK_UNIT < rounding.SQUARED_UNIT


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("modes, rank", [((300, 70, 90), 83), ((5, 130, 7), 3), ((40, 600, 3), 11), ((9, 9, 9), 128)])
def test_narrow_products_agree(modes, rank, dtype, tol, generator):
    def drawn():
        shapes = zip((1, rank, rank), modes, (rank, rank, 1), strict=True)
        return [torch.randn(shape, generator=generator, dtype=dtype) / rank**0.5 for shape in shapes]

    x, y = drawn(), drawn()
    found = walks.dot_walk(x, y)
    with python_only():
        expected = dot_parts([core.double() for core in x], [core.double() for core in y])
    size = norm([core.double() for core in x]) * norm([core.double() for core in y])
    difference = float(times_pow2(found[0].double(), found[1])) - float(times_pow2(*expected))
    assert abs(difference) <= tol * size


def between(cores, spread, generator):
    """The same train with a matrix and its inverse, of singular values so far apart, at every bond."""
    cores = list(cores)
    for k in range(len(cores) - 1):
        r = cores[k].shape[-1]
        turn = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        sizes = spread ** -torch.linspace(0, 1, r, dtype=torch.float64)
        cores[k] = cores[k] @ (turn * sizes) @ turn.mT
        cores[k + 1] = torch.einsum("ab,bns->ans", (turn / sizes) @ turn.mT, cores[k + 1])
    return cores


@pytest.mark.parametrize("spread", [1e5, 1e7, 1e9, 1e11])
def test_norms_that_are_nothing_but_rounding_are_found_out(spread, generator):
    for modes in ((6,) * 7, (9, 7, 8), (4,) * 12):
        for _ in range(10):
            cores = between(unit_train(modes, 4, generator), spread, generator)
            found = round_cores(cores, (0, len(cores) - 1), eps=1e-5)
            assert distance(found.cores, cores) <= found.bound
