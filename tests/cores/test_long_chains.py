"""Hundreds of cores neither overflow nor vanish in any environment."""

from itertools import pairwise

import pytest
import torch

from tensortrain.cores.canonical import orthogonalize_cores
from tensortrain.cores.environments import Data, Environments, Overlap, Sandwich, SquaredData
from tensortrain.cores.sketch import Plain


def chain(n, d, rank, dtype, generator):
    ranks = [1, *[rank] * (d - 1), 1]
    return [torch.randn(r, n, s, dtype=dtype, generator=generator) for r, s in pairwise(ranks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_six_hundred_cores_stay_in_range(dtype, size, generator):
    d, n = 600, 2
    x, _ = orthogonalize_cores(chain(n, d, 3, dtype, generator), (0, d - 1), 0)
    target = [size * core for core in x]
    a = [size * torch.eye(n, dtype=dtype).reshape(1, n, n, 1)] * d
    values = torch.randint(-1, n, (4, d), generator=generator)
    middle = d // 2
    norm = x[0].abs().square().sum()  # the others are orthonormal
    exact = d * torch.log2(torch.tensor(size, dtype=torch.float64)) + torch.log2(norm.double())
    for rows in (Overlap(Plain(target)), Sandwich(a)):
        env = Environments(rows, x)
        m, e = env.at(middle).parts(x[middle])
        m = (x[middle].conj() * m).sum() if rows.makes_tensors else m
        assert abs(float(m.abs().double().log2() + e - exact)) < 0.05  # of numbers with some 6,000 bits
    for rows in (Data, SquaredData):
        env = Environments(rows.of_values(values, [n] * d, dtype), x)
        m, e = env.at(middle).parts(x[middle])
        assert torch.isfinite(torch.view_as_real(m) if m.is_complex() else m).all()
        assert bool((m != 0).flatten(1).any(1).all()) if m.ndim > 1 else bool((m != 0).all())
        back, top = env.at(middle).adjoint_parts(m, -e)  # as a gradient of logarithms asks for it
        assert torch.isfinite(back.abs()).all()
        assert float(back.abs().max()) > 0
        assert int(top) == 0
