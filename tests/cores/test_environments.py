"""Environments against dense contractions: every kind of row, at every site, real and complex."""

import pytest
import torch

from tensortrain.cores.algebra import contract
from tensortrain.cores.environments import Data, Environments, Overlap, Sandwich, SquaredData, Together, value_parts
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.sketch import Hadamard, Plain, Sum
from tensortrain.cores.unfold import absorb_right

BOTH_DEFAULTS = True
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
SITES = pytest.mark.parametrize("n_sites", [0, 1, 2, 3])
MODES = (2, 3, 2, 4)


def chain(modes, rank, dtype, generator, batch=()):
    ranks = [1, *[rank] * (len(modes) - 1), 1]
    shapes = [(*batch, r, n, s) for r, n, s in zip(ranks, modes, ranks[1:], strict=False)]
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def matrix_chain(modes, rank, dtype, generator, batch=()):
    merged = chain([n * n for n in modes], rank, dtype, generator, batch)
    return [core.unflatten(-2, (n, n)) for core, n in zip(merged, modes, strict=True)]


def dense(cores):
    return contract(cores)


def dense_matrix(cores):
    d = len(cores)
    n_batch = cores[0].ndim - 4
    full = contract([core.flatten(-3, -2) for core in cores])
    sizes = [n for core in cores for n in core.shape[-3:-1]]
    full = full.reshape(*full.shape[:n_batch], *sizes)
    order = [*range(n_batch), *range(n_batch, n_batch + 2 * d, 2), *range(n_batch + 1, n_batch + 2 * d, 2)]
    n = int(torch.tensor([core.shape[-2] for core in cores]).prod())
    return full.permute(order).reshape(*full.shape[:n_batch], n, n)


def local_of(cores, k, n_sites):
    """The tensor of some sites, and the cores in which it stands between."""
    batch = cores[0].shape[:-3]
    if n_sites == 0:
        return torch.eye(cores[k].shape[-3], dtype=cores[0].dtype).expand(*batch, -1, -1).contiguous()
    local = cores[k]
    for core in cores[k + 1 : k + n_sites]:
        product = local.flatten(len(batch), -2) @ core.flatten(-2)
        local = product.reshape(*local.shape[:-1], *core.shape[-2:])
    return local


def with_local(cores, k, n_sites, local):
    """The dense tensor with another local one; its axes in front come first."""
    n_local = n_sites + 2
    if n_sites == 0:
        return dense([*cores[: k - 1], absorb_right(cores[k - 1], local), *cores[k:]])
    merged = local.flatten(-n_local + 1, -2)
    modes = [core.shape[-2] for core in cores]
    out = dense([*cores[:k], merged, *cores[k + n_sites :]])
    return out.reshape(*out.shape[: cores[0].ndim - 3], *modes)


def at_every_place(n_sites):
    return range(1 if n_sites == 0 else 0, len(MODES) + 1 - max(1, n_sites))


def other_local(local, generator):
    return torch.randn(local.shape, dtype=local.dtype, generator=generator)


def close(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


def is_adjoint(local_map, x, generator):
    """<y, L x> = <L* y, x>."""
    out = local_map(x)
    y = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    left, right = (y.conj() * out).sum(), (local_map.adjoint(y).conj() * x).sum()
    close(left, right, 1e-11)


@DTYPES
@SITES
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_overlap_is_the_inner_product_at_every_site(dtype, n_sites, batch, generator):
    a, x = (chain(MODES, rank, dtype, generator, batch) for rank in (3, 2))
    env = Environments(Overlap(Plain(a)), x)
    for k in at_every_place(n_sites):
        local = other_local(local_of(x, k, n_sites), generator)
        expected = (dense(a).conj() * with_local(x, k, n_sites, local)).flatten(len(batch)).sum(-1)
        close(env.apply(k, local, n_sites), expected)
        if not batch:
            is_adjoint(env.at(k, n_sites), local, generator)


@DTYPES
@SITES
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_sandwich_is_the_bilinear_form_at_every_site(dtype, n_sites, batch, generator):
    x, bra = (chain(MODES, rank, dtype, generator, batch) for rank in (2, 3))
    a = matrix_chain(MODES, 2, dtype, generator, batch)
    env = Environments(Sandwich(a), x, bra=bra)
    full = dense_matrix(a)
    for k in at_every_place(n_sites):
        local = other_local(local_of(x, k, n_sites), generator)
        theirs = other_local(local_of(bra, k, n_sites), generator)
        product = (full @ with_local(x, k, n_sites, local).flatten(len(batch))[..., None])[..., 0]
        expected = (with_local(bra, k, n_sites, theirs).flatten(len(batch)).conj() * product).sum(-1)
        found = (theirs.conj() * env.apply(k, local, n_sites)).flatten(len(batch)).sum(-1)
        close(found, expected)
        is_adjoint(env.at(k, n_sites), local, generator)


@DTYPES
@SITES
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_data_gives_the_value_of_every_sample(dtype, n_sites, batch, generator):
    x = chain(MODES, 2, dtype, generator, batch)
    vectors = [torch.randn(5, n, dtype=dtype, generator=generator) for n in MODES]
    env = Environments(Data(vectors), x)
    letters = "ijkl"
    for k in at_every_place(n_sites):
        local = other_local(local_of(x, k, n_sites), generator)
        equation = f"...{letters},{','.join('z' + letter for letter in letters)}->...z"
        close(env.apply(k, local, n_sites), torch.einsum(equation, with_local(x, k, n_sites, local), *vectors))
        is_adjoint(env.at(k, n_sites), local, generator)


@DTYPES
@SITES
def test_minus_one_sums_a_site_out(dtype, n_sites, generator):
    x = chain(MODES, 2, dtype, generator)
    values = torch.stack([torch.randint(-1, n, (7,), generator=generator) for n in MODES], dim=1)
    values[0] = -1
    for k in at_every_place(n_sites):
        local = other_local(local_of(x, k, n_sites), generator)
        full = with_local(x, k, n_sites, local)
        for rows, entries in ((Data, full), (SquaredData, full.abs().square())):
            env = Environments(rows.of_values(values, MODES, dtype), x)
            picked = [entries[tuple(slice(None) if v < 0 else int(v) for v in row)].sum() for row in values]
            found = env.apply(k, local, n_sites)
            if rows is SquaredData:
                found = (local.conj() * found).flatten(1).sum(-1).real
                is_adjoint(env.at(k, n_sites), local, generator)
            close(found, torch.stack(picked))


@DTYPES
def test_axes_in_front_are_labels(dtype, generator):
    x, target = chain(MODES, 2, dtype, generator), chain(MODES, 3, dtype, generator)
    a = matrix_chain(MODES, 2, dtype, generator)
    values = torch.zeros(4, len(MODES), dtype=torch.int64)
    kinds = [Overlap(Plain(target)), Sandwich(a), Data.of_values(values, MODES, dtype)]
    for rows in (*kinds, SquaredData.of_values(values, MODES, dtype)):
        here = Environments(rows, x).at(1, 2)
        local = torch.randn(6, 2, 3, 2, 2, dtype=dtype, generator=generator)
        both = here(local)
        close(both, torch.stack([here(one) for one in local]))
        y = torch.randn(both.shape, dtype=dtype, generator=generator)
        close(here.adjoint(y), torch.stack([here.adjoint(one) for one in y]))


@DTYPES
def test_targets_of_a_batch_share_one_basis(dtype, generator):
    x, targets = chain(MODES, 2, dtype, generator), chain(MODES, 3, dtype, generator, (4,))
    env = Environments(Overlap(Plain(targets)), x)
    seen = env.at(1, 2).adjoint()
    for k in range(4):
        one = Environments(Overlap(Plain([core[k] for core in targets])), x)
        close(seen[k], one.at(1, 2).adjoint())


@DTYPES
def test_what_a_chain_is_made_of_does_not_matter(dtype, generator):
    x, a, b = (chain(MODES, 2, dtype, generator) for _ in range(3))
    product = Environments(Overlap(Hadamard(a, b)), x).at(1, 2).adjoint()
    formed = dense(a) * dense(b)
    expected = torch.einsum("ijkl,iA,DlE->AjkD", formed, x[0][0].conj(), x[3].conj())
    close(product, expected)
    total = Environments(Overlap(Sum([Plain(a), Plain(b)])), x).at(1, 2).adjoint()
    parts = [Environments(Overlap(Plain(part)), x).at(1, 2).adjoint() for part in (a, b)]
    close(total, parts[0] + parts[1])


@DTYPES
def test_a_core_that_changes_makes_stale_what_holds_it_and_nothing_else(dtype, generator):
    x, target = chain(MODES, 2, dtype, generator), chain(MODES, 2, dtype, generator)
    a = matrix_chain(MODES, 2, dtype, generator)
    both = Together(Environments(Overlap(Plain(target)), x), Environments(Sandwich(a), x))
    cores = list(x)
    for k in (0, 1, 2, 3, 2, 1, 0, 2):
        cores[k] = torch.randn(cores[k].shape, dtype=dtype, generator=generator)
        both.advance(k, cores[k])
        fresh = Environments(Overlap(Plain(target)), cores), Environments(Sandwich(a), cores)
        for at in range(3):
            local = torch.randn(2 if at else 1, MODES[at], MODES[at + 1], 2 if at < 2 else 1, dtype=dtype)
            for mine, theirs in zip(both.at(at, 2), fresh, strict=True):
                assert torch.equal(mine(local), theirs.at(at, 2)(local))


@DTYPES
def test_a_bra_of_its_own_moves_along(dtype, generator):
    x, bra = chain(MODES, 2, dtype, generator), chain(MODES, 3, dtype, generator)
    a = matrix_chain(MODES, 2, dtype, generator)
    env = Environments(Sandwich(a), x, bra=bra)
    env.at(0)
    x[0], bra[0] = 2 * x[0], 3 * bra[0]
    env.advance(0, x[0], bra[0])
    assert torch.equal(env.apply(1, x[1]), Environments(Sandwich(a), x, bra=bra).apply(1, x[1]))


@DTYPES
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_value_of_a_whole_network(dtype, batch, generator):
    x, y = (chain(MODES, rank, dtype, generator, batch) for rank in (2, 3))
    a = matrix_chain(MODES, 2, dtype, generator, batch)
    flat = [dense(cores).flatten(len(batch)) for cores in (x, y)]
    close(times_pow2(*value_parts([x, y])), (flat[0].conj() * flat[1]).sum(-1))
    product = (dense_matrix(a) @ flat[1][..., None])[..., 0]
    close(times_pow2(*value_parts([x, a, y])), (flat[0].conj() * product).sum(-1))


@DTYPES
def test_gradients_flow_through_environments(dtype, generator):
    x = [core.requires_grad_() for core in chain(MODES, 2, dtype, generator)]
    target = [core.requires_grad_() for core in chain(MODES, 2, dtype, generator)]
    values = torch.tensor([[0, 1, 1, 3], [-1, 2, 0, -1]])

    def f(*cores):
        state, other = cores[:4], cores[4:]
        a = Environments(Overlap(Plain(other)), state).apply(1, state[1])
        b = Environments(Data.of_values(values, MODES, dtype), state).apply(2, state[2])
        c = Environments(SquaredData.of_values(values, MODES, dtype), state).apply(0, state[0])
        total = [part.abs().square().sum() for part in (a, b, c)]
        return sum(total)

    assert torch.autograd.gradcheck(f, (*x, *target))


@DTYPES
@pytest.mark.parametrize("n_samples", [0, 1, 7, 600])
def test_labels_go_through_in_one_product(dtype, n_samples, generator):
    state = chain(MODES, 3, dtype, generator)
    vectors = [torch.randn(n_samples, n, dtype=dtype, generator=generator) for n in MODES]
    at = Environments(Data(vectors), state).at(1, 2)
    local = torch.randn(2, 5, 3, 3, 2, 3, dtype=dtype, generator=generator)
    one_by_one = torch.stack([torch.stack([at(one) for one in row]) for row in local])
    torch.testing.assert_close(at(local), one_by_one)
    y = torch.randn(2, 5, n_samples, dtype=dtype, generator=generator)
    torch.testing.assert_close(at.adjoint(y), torch.stack([torch.stack([at.adjoint(one) for one in row]) for row in y]))


@DTYPES
def test_moments_of_what_samples_show(dtype, generator):
    state = chain(MODES, 3, dtype, generator)
    vectors = [torch.randn(300, n, dtype=dtype, generator=generator) for n in MODES]
    at = Environments(Data(vectors), state).at(1, 2)
    before = torch.einsum("br,bn->brn", at.left, vectors[1]).flatten(1)
    after = torch.einsum("bn,bs->bns", vectors[2], at.right).flatten(1)
    left, right = at.grams()
    torch.testing.assert_close(left, before.mH @ before)
    torch.testing.assert_close(right, after.mH @ after)
