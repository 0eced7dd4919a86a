"""Reshape, permute and mode products agree with torch on the dense tensor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.errors import ModeIndexError, ShapeError
from tensortrain.tensor import TensorTrain, eye, randn, randn_matrix, tt_svd
from tensortrain.testing import rel_error


@st.composite
def factorized(draw):
    """Two shapes of one product."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=6))

    def grouped():
        order = draw(st.permutations(primes))
        cuts = draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
        shape = [order[0]]
        for n, new in zip(order[1:], cuts, strict=True):
            shape = [*shape, n] if new else [*shape[:-1], shape[-1] * n]
        return tuple(shape)

    return grouped(), grouped()


@settings(max_examples=150, deadline=None)
@given(shapes=factorized(), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float64, torch.complex128]))
def test_reshape(shapes, seed, dtype):
    old, new = shapes
    x = randn(old, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    exact = x.to_dense().reshape(new)
    for found in (x.reshape(new), x.reshape(*new, eps=0)):
        assert found.shape == new
        assert rel_error(found.to_dense(), exact) <= 1e-12
    assert x.reshape(new).reshape(old).ranks == x.round().ranks


def test_reshape_infers_and_refuses(generator):
    x = randn((4, 6), 2, generator=generator)
    assert x.reshape(-1, 3).shape == (8, 3)
    assert x.reshape(-1).order == 1
    for bad in ((5, 5), (24, 0), (-1, -1), (-1, 5), ()):
        with pytest.raises(ShapeError, match="keep the number of entries"):
            x.reshape(bad)


@pytest.mark.parametrize(
    "function, rank",
    [
        (lambda t: torch.exp(-3 * t), 1),
        (lambda t: torch.sin(40 * t + 1), 2),
        (lambda t: t**3 - t + 2, 4),
        (lambda t: (t > 0.3).double(), 2),
    ],
)
def test_quantized_trains_have_the_known_ranks(function, rank):
    points = torch.arange(2.0**12) / 2**12
    flat = tt_svd(function(points)).value
    quantized = flat.reshape((2,) * 12)
    assert max(quantized.ranks) == rank
    assert rel_error(quantized.to_dense().flatten(), function(points)) <= 1e-11
    assert rel_error(quantized.reshape(-1).to_dense(), function(points)) <= 1e-11


def test_matrices_are_quantized_too(generator):
    a = randn_matrix((6, 4), (4, 9), 2, generator=generator)
    found = a.reshape((2, 3, 2, 2), (2, 2, 3, 3))
    assert (found.out_modes, found.in_modes) == ((2, 3, 2, 2), (2, 2, 3, 3))
    assert rel_error(found.to_dense(), a.to_dense()) <= 1e-12
    assert eye((8, 8)).reshape((2,) * 6, (2,) * 6).ranks == (1,) * 7
    laplacian = 2 * torch.eye(64) - torch.diag(torch.ones(63), 1) - torch.diag(torch.ones(63), -1)
    quantized = tt_svd(laplacian, out_modes=(64,), in_modes=(64,)).value.reshape((2,) * 6, (2,) * 6)
    assert max(quantized.ranks) == 3
    with pytest.raises(ShapeError, match="keep rows and columns"):
        a.reshape((6, 4), (6, 7))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple),
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.complex128]),
)
def test_permute(shape, data, dtype):
    dims = data.draw(st.permutations(range(len(shape))))
    x = randn(shape, 2, dtype=dtype)
    found = x.permute(*dims)
    assert found.dtype == dtype
    tol = 1e-11 if dtype != torch.float32 else 3e-6
    assert rel_error(found.to_dense(), x.to_dense().permute(dims)) <= tol
    lo, hi = found.center
    assert rel_error(found.orthogonalize(0).to_dense(), found.to_dense()) <= tol
    assert 0 <= lo <= hi < found.order


def test_permute_keeps_its_tolerance_and_refuses(generator):
    i = torch.arange(6.0)
    x = tt_svd(1 / (1 + i[:4, None, None, None] + i[:5, None, None] ** 2 + i[:, None] + i[:3])).value
    found = x.permute((3, 0, 2, 1), eps=0.1)
    assert max(found.ranks) < max(x.permute(3, 0, 2, 1).ranks)
    assert rel_error(found.to_dense(), x.to_dense().permute(3, 0, 2, 1)) <= 0.1
    assert x.permute(0, 1, 2, -1) is x
    for bad in ((0, 1, 2), (0, 1, 2, 2), (0, 1, 2, 4)):
        with pytest.raises(ModeIndexError, match="every mode once"):
            x.permute(bad)


def test_mode_product(generator):
    x = randn((3, 4, 5), 2, generator=generator).orthogonalize(1)
    m, v = torch.randn(6, 4, generator=generator), torch.randn(5, generator=generator)
    found = x.mode_product(m, 1)
    assert rel_error(found.to_dense(), torch.einsum("mn,anb->amb", m, x.to_dense())) <= 1e-14
    assert found.center == (1, 1)
    assert rel_error(x.mode_product(v, -1).to_dense(), x.to_dense() @ v) <= 1e-14
    assert (
        rel_error(
            x.mode_product(v, 2).mode_product(m[0], 1).mode_product(torch.ones(3), 0),
            torch.einsum("abc,b,c->", x.to_dense(), m[0], v),
        )
        <= 1e-13
    )
    with pytest.raises(ShapeError, match=r"expected \(m, 3\) or \(3,\)"):
        x.mode_product(m, 0)


def test_they_are_differentiable(generator):
    x = randn((2, 6, 2), 2, generator=generator)
    cores = [core.detach().requires_grad_() for core in x.cores]
    assert torch.autograd.gradcheck(lambda *c: TensorTrain(c).reshape(4, 3, 2).to_dense(), cores)
    assert torch.autograd.gradcheck(lambda *c: TensorTrain(c).permute(2, 0, 1).to_dense(), cores)


def test_variance(generator):
    x = randn((3, 4, 5), 2, generator=generator, dtype=torch.complex128)
    dense = x.to_dense()
    assert rel_error(x.var(), dense.var()) <= 1e-13
    assert rel_error(x.var(correction=0), dense.var(correction=0)) <= 1e-13
    for dims in (0, (0, 2), (-1, 1)):
        assert rel_error(x.var(dims).to_dense().real, dense.var(dims)) <= 1e-12
    assert math.isnan(float(x[:1, :1, :1].var()))
    a = randn_matrix((2, 3), (4, 5), 2, generator=generator)
    assert rel_error(a.var(), a.to_dense().var()) <= 1e-13
    assert rel_error(a.var(0).reshape(-1).to_dense(), a.to_dense().var(0)) <= 1e-12


def test_matrix_functions(generator):
    a = randn_matrix((3, 2), (3, 2), 2, generator=generator)
    assert rel_error(a.trace(), a.to_dense().trace()) <= 1e-13
    k = randn_matrix((3, 2, 4), (3, 2, 4), 1, generator=generator)
    assert rel_error(k.det(), torch.linalg.det(k.to_dense())) <= 1e-10
    assert rel_error(k.inv().to_dense(), torch.linalg.inv(k.to_dense())) <= 1e-9
    assert float((1e3 * eye((10,) * 6)).slogdet()[1]) == pytest.approx(1e6 * math.log(1e3))
    x, y = (randn((3, 2), 2, generator=generator, dtype=torch.complex128) for _ in range(2))
    c = randn_matrix((3, 2), (3, 2), 2, generator=generator, dtype=torch.complex128)
    exact = x.to_dense().flatten().conj() @ c.to_dense() @ y.to_dense().flatten()
    assert rel_error(c.bilinear(x, y), exact) <= 1e-13
    with pytest.raises(ShapeError, match="square modes"):
        randn_matrix((3, 2), (2, 3), 1).trace()
    with pytest.raises(ValueError, match="Kronecker products"):
        a.det()


def test_spectrum_and_entropy(generator):
    x = randn((3, 4, 5), 3, generator=generator)
    for bond in (1, 2):
        exact = torch.linalg.svdvals(x.to_dense().reshape(math.prod(x.shape[:bond]), -1))
        found = x.singular_values(bond)
        assert rel_error(found, exact[: len(found)]) <= 1e-13
        p = exact[: len(found)].square() / exact.square().sum()
        assert rel_error(x.entropy(bond), -(p * p.log()).sum()) <= 1e-12
        assert rel_error((1e-200 * x).entropy(bond), x.entropy(bond)) <= 1e-12
    assert float((0.0 * x).entropy(1)) == 0.0
    ghz = TensorTrain([torch.eye(2)[None], torch.eye(2)[..., None]])
    assert float(ghz.entropy(1)) == pytest.approx(math.log(2))
    for bad in (0, 3):
        with pytest.raises(ModeIndexError, match="between two cores"):
            x.entropy(bad)


def test_diagrams():
    assert randn((4, 5, 6), 3).diagram() == "●─3─●─3─●\n│   │   │\n4   5   6"
    assert randn_matrix((2, 30), (4, 5), 3).diagram() == "2   30\n│   │\n●─3─●\n│   │\n4   5"
    wide = randn((1000, 2), 2).diagram().splitlines()
    assert wide[1].index("│", 1) == wide[0].index("●", 1)
    assert wide[2].split() == ["1000", "2"]
    long = randn((2,) * 300, 2).diagram()
    assert max(map(len, long.splitlines())) < 120
    assert "··" in long


def test_zero_times_a_train_has_rank_one(generator):
    x = randn((3, 4, 5), 3, generator=generator)
    assert (0 * x).ranks == (1, 1, 1, 1)
    assert (x * 0.0).round(eps=1e-3).ranks == (1, 1, 1, 1)
    assert (0j * x).dtype == torch.complex128
