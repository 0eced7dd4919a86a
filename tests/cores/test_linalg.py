"""Factorizations of tall and of semidefinite matrices."""

import pytest
import torch

from tensortrain.cores.linalg import gram_root, orthonormal, reorthonormalized, triangle

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


def with_spectrum(s, p, dtype, generator):
    u = torch.linalg.qr(torch.randn(p, len(s), dtype=dtype, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(len(s), len(s), dtype=dtype, generator=generator)).Q
    return u * s @ v


def deviation(q):
    return float((q.mH @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


@DTYPES
@pytest.mark.parametrize("digits", [0, 8, 14])
@pytest.mark.parametrize("scale", [1.0, 1e60, 1e-60])
def test_blocks_of_rows_have_the_triangle_of_the_whole(dtype, digits, scale, generator):
    s = torch.logspace(0, -digits, 6)
    a = with_spectrum(s, 40_000, dtype, generator) * scale
    r = triangle(a)
    assert r.shape == (6, 6)
    assert float(r.tril(-1).abs().max()) == 0.0
    assert float((torch.linalg.svdvals(r) / scale - s).abs().max()) < 1e-13
    assert float((r.mH @ r / scale**2 - a.mH @ a / scale**2).norm()) < 1e-13


@DTYPES
@pytest.mark.parametrize("rank", [0, 1, 10])
def test_dependent_columns_get_a_full_basis_all_the_same(dtype, rank, generator):
    a = with_spectrum(torch.tensor([1.0] * rank + [0.0] * (20 - rank)), 100, dtype, generator)
    q = orthonormal(a)
    assert q.shape == (100, 20)
    assert deviation(q) < 1e-14
    assert float((a - q @ (q.mH @ a)).norm()) <= 1e-14 * float(a.norm())
    r = triangle(a)
    assert float((r.mH @ r - a.mH @ a).norm()) <= 1e-14 * max(1.0, rank)


@DTYPES
def test_reorthonormalizing_does_not_turn_the_vectors(dtype, generator):
    u = torch.linalg.qr(torch.randn(100, 20, dtype=dtype, generator=generator)).Q
    bent = u + 1e-4 * torch.randn(100, 20, dtype=dtype, generator=generator)
    straight = reorthonormalized(bent)
    assert deviation(straight) < 1e-14
    assert float((straight - bent).abs().max()) < 2e-3


@DTYPES
def test_a_batch_is_reorthonormalized_without_turning_it(dtype, generator):
    u = torch.linalg.qr(torch.randn(3, 100, 20, dtype=dtype, generator=generator)).Q
    straight = reorthonormalized(u + 1e-4 * torch.randn(3, 100, 20, dtype=dtype, generator=generator))
    assert max(deviation(one) for one in straight) < 1e-14
    assert float((straight - u).abs().max()) < 2e-3


@DTYPES
@pytest.mark.parametrize("rank", [0, 1, 7, 30])
def test_a_root_has_as_many_columns_as_the_gram_matrix_has_rank(dtype, rank, generator):
    b = torch.randn(30, rank, dtype=dtype, generator=generator)
    gram = b @ b.mH
    root = gram_root(gram)
    assert root.shape[0] == 30
    assert max(1, rank) <= root.shape[1] <= min(30, rank + 2)
    assert float((root @ root.mH - gram).norm()) <= 1e-14 * float(gram.norm())


def test_roots_of_a_batch(generator):
    b = torch.randn(3, 6, 4, generator=generator)
    root = gram_root(b @ b.mH)
    assert float((root @ root.mH - b @ b.mH).abs().max()) < 1e-13
