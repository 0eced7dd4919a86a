"""A local tensor in two pieces: what is kept, what is orthonormal, and the one rule of truncation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensortrain.cores.linalg import choose_rank
from tensortrain.cores.split import split
from tensortrain.cores.unfold import absorb_left, absorb_right, as_left, as_right

BOTH_DEFAULTS = True
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
WAYS = pytest.mark.parametrize("to_right", [True, False], ids=["right", "left"])


def joined(found, n_sites, to_right):
    """What the two pieces come to, without labels."""
    if n_sites == 1:
        return absorb_right(found.left, found.right) if to_right else absorb_left(found.left, found.right)
    out = as_left(found.left) @ as_right(found.right)
    return out.reshape(*out.shape[:-2], *found.left.shape[-3:-1], *found.right.shape[-2:])


def is_orthonormal(found, to_right, tol=1e-13):
    rows = as_left(found.left).mH if to_right else as_right(found.right)
    eye = torch.eye(rows.shape[-2], dtype=rows.dtype)
    assert float((rows @ rows.mH - eye).abs().max()) < tol


@DTYPES
@WAYS
@pytest.mark.parametrize("shape", [(3, 2, 2, 4), (1, 2, 3, 1), (5, 3, 4, 2, 2), (4, 2, 3), (2, 5, 1)], ids=str)
def test_nothing_is_lost_without_a_tolerance(dtype, to_right, shape, generator):
    n_sites = 1 if len(shape) == 3 else 2
    local = torch.randn(shape, dtype=dtype, generator=generator)
    found = split(local, n_sites=n_sites, to_right=to_right)
    is_orthonormal(found, to_right)
    assert float((joined(found, n_sites, to_right) - local).abs().max()) < 1e-13
    assert bool((found.tail == 0).all())
    assert found.left.is_contiguous()
    assert found.right.is_contiguous()


@WAYS
@given(
    seed=st.integers(0, 10_000),
    digits=st.floats(0.5, 12),
    tol=st.sampled_from([0.0, 1e-10, 1e-6, 1e-2, 0.3]),
    cap=st.sampled_from([None, 1, 3, 100]),
    is_complex=st.booleans(),
)
def test_the_rank_is_that_of_the_one_rule(to_right, seed, digits, tol, cap, is_complex):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if is_complex else torch.float64
    decay = torch.logspace(0, -digits, 6, dtype=torch.float64)
    a, b = (torch.randn(6, 6, dtype=dtype, generator=generator) for _ in range(2))
    matrix = torch.linalg.qr(a).Q * decay @ torch.linalg.qr(b).Q
    found = split(matrix.reshape(2, 3, 2, 3), to_right=to_right, tol=tol, max_rank=cap)
    s = torch.linalg.svdvals(matrix)
    # a tail at the tolerance itself is decided by rounding
    allowed = {choose_rank(s, tol * t * s.norm(), cap or 6)[0] for t in (1 - 1e-9, 1 + 1e-9)}
    assert found.rank in allowed
    lost = (joined(found, 2, to_right).reshape(6, 6) - matrix).norm() / matrix.norm()
    assert abs(float(lost - found.tail)) < 1e-13
    assert cap is not None or float(found.tail) <= tol * (1 + 1e-9)


@DTYPES
@WAYS
@pytest.mark.parametrize("n_labels", [1, 2])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_labels_go_with_the_rest(dtype, to_right, n_labels, batch, generator):
    labels = (3, 2)[:n_labels]
    local = torch.randn(*labels, *batch, 2, 3, 2, 2, dtype=dtype, generator=generator)
    found = split(local, to_right=to_right, n_labels=n_labels)
    is_orthonormal(found, to_right)
    going = found.right if to_right else found.left
    assert going.shape[: n_labels + len(batch)] == (*labels, *batch)
    assert found.left.ndim - found.right.ndim == (-n_labels if to_right else n_labels)
    assert float((joined(found, 2, to_right).reshape(local.shape) - local).abs().max()) < 1e-13


@DTYPES
@WAYS
def test_labels_of_one_site_go_with_the_matrix(dtype, to_right, generator):
    local = torch.randn(3, 4, 2, 5, dtype=dtype, generator=generator)
    found = split(local, n_sites=1, to_right=to_right, n_labels=1)
    assert (found.right if to_right else found.left).shape[0] == 3
    back = absorb_right(found.left, found.right) if to_right else absorb_left(found.left, found.right)
    assert float((back - local).abs().max()) < 1e-13


@DTYPES
@WAYS
@pytest.mark.parametrize("columns", ["random", "zero", "inside"])
def test_enrichment_widens_the_basis_and_changes_nothing(dtype, to_right, columns, generator):
    shape = (2, 3, 1) if to_right else (1, 3, 2)
    local = torch.randn(shape, dtype=dtype, generator=generator).expand(2, 3, 2)  # of rank 1 to that side
    plain = split(local, n_sites=1, to_right=to_right, tol=1e-12)
    core = plain.left if to_right else plain.right
    bond = -1 if to_right else -3
    shape = [2 if axis == core.ndim + bond else n for axis, n in enumerate(core.shape)]
    more = torch.zeros(shape, dtype=dtype)
    if columns == "random":
        more = torch.randn(shape, dtype=dtype, generator=generator)
    if columns == "inside":
        more = more + core
    found = split(local, n_sites=1, to_right=to_right, tol=1e-12, enrich=more)
    wide = found.left if to_right else found.right
    assert wide.shape[bond] == 3
    is_orthonormal(found, to_right)
    assert torch.equal(wide.narrow(bond, 0, 1), core)
    assert float((joined(found, 1, to_right) - local).abs().max()) < 1e-13
    if columns == "random":  # the new directions lie in the basis
        basis = as_left(wide) if to_right else as_right(wide).mT
        new = (as_left(more) if to_right else as_right(more).mT).clone()
        assert float((new - basis @ (basis.mH @ new)).abs().max()) < 1e-13
    capped = split(local, n_sites=1, to_right=to_right, tol=1e-12, enrich=more, max_rank=2)
    assert capped.rank == 2


@WAYS
def test_a_batch_keeps_its_tolerance_for_each_member(to_right, generator):
    local = torch.randn(3, 2, 3, 3, 2, dtype=torch.float64, generator=generator)
    sizes = torch.tensor([1e-200, 1.0, 1e200], dtype=torch.float64)[:, None, None, None, None]
    found = split(local * sizes, to_right=to_right, tol=0.3)
    lost = (joined(found, 2, to_right) / sizes - local).flatten(1).norm(dim=1) / local.flatten(1).norm(dim=1)
    assert float((lost - found.tail).abs().max()) < 1e-13
    assert float(found.tail.max()) <= 0.3


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_lower_precision_is_orthonormal_to_its_own_rounding(to_right, dtype, generator):
    local = torch.randn(8, 2, 2, 8, dtype=dtype, generator=generator)
    found = split(local, to_right=to_right, tol=1e-3, max_rank=12)
    assert found.left.dtype == found.right.dtype == dtype
    is_orthonormal(found, to_right, 1e-6)


@WAYS
def test_zero_has_rank_one(to_right):
    found = split(torch.zeros(2, 3, 3, 2), to_right=to_right, tol=1e-6)
    assert found.left.shape == (2, 3, 1)
    assert found.right.shape == (1, 3, 2)
    assert float(found.tail) == 0.0


@DTYPES
@WAYS
@pytest.mark.parametrize("rank", [None, 3])
def test_gradients_are_those_of_the_best_approximation(dtype, to_right, rank, generator):
    local = torch.randn(2, 2, 3, 2, dtype=dtype, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: joined(split(x, to_right=to_right, max_rank=rank), 2, to_right), (local,))


@DTYPES
@WAYS
def test_gradients_pass_a_basis_of_all_directions_whatever_the_rank(dtype, to_right, generator):
    parts = (torch.randn(shape, dtype=dtype, generator=generator) for shape in ((2, 2, 1), (1, 2, 2)))
    local = torch.tensordot(*parts, dims=1).requires_grad_()  # of rank one
    weights = torch.randn(local.shape, dtype=dtype, generator=generator)
    found = split(local, to_right=to_right)
    product = torch.tensordot(found.left, found.right, dims=1)
    (gradient,) = torch.autograd.grad((weights.conj() * product).real.sum(), local)
    torch.testing.assert_close(gradient, weights)


def positive(n, generator):
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)


@WAYS
@pytest.mark.parametrize("rank", [1, 2, 4, None])
def test_a_cut_in_a_metric_is_the_best_one_there(to_right, rank, generator):
    local = torch.randn(3, 4, 2, 3, 5, dtype=torch.float64, generator=generator)  # labels r n n s
    metric = positive(8, generator), positive(15, generator)
    found = split(local, to_right=to_right, max_rank=rank, n_labels=1, metric=metric)
    is_orthonormal(found, to_right)
    left = found.left if to_right else found.left.movedim(0, -2)
    kept = torch.einsum("ant,ltms->lanms" if to_right else "anlt,tms->lanms", left, found.right)
    roots = [torch.linalg.cholesky(part) for part in metric]

    def seen(x):
        x = roots[0].mT @ x.reshape(3, 8, 15) @ roots[1]  # of the same norm as with any other root
        return x.movedim(0, 1).flatten(1) if to_right else x.flatten(0, 1)

    values = torch.linalg.svdvals(seen(local))
    least = values[len(values) if rank is None else rank :].square().sum().sqrt() / values.square().sum().sqrt()
    assert float((seen(kept - local)).norm() / seen(local).norm()) == pytest.approx(float(least), abs=1e-10)
    assert float(found.tail) == pytest.approx(float(least), abs=1e-10)
