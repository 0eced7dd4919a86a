import pytest
import torch

import tensortrain as tt


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _default_dtype(default_dtype):
    torch.set_default_dtype(default_dtype)  # the fixture of all tests puts it back


@pytest.fixture(params=[torch.float64, torch.complex128], ids=["real", "complex"])
def dtype(request):
    return request.param


POINTS = {
    "train": ((3, 4, 5, 3), (2, 4, 3)),
    "bits": ((2,) * 8, 4),
    "modes of one": ((1, 3, 1, 4, 2), 2),
    "rank one": ((3, 4, 5), 1),
    "order two": ((4, 5), 3),
    "order one": ((6,), 1),
    "matrix": (((3, 1, 2), (2, 4, 3)), 2),
    "matrix of order one": (((3,), (4,)), 1),
}


@pytest.fixture(params=POINTS)
def make(request, dtype, generator):
    """Makes trains of one shape: ``make()`` of the ranks of the case, ``make(rank)`` of others."""
    shape, ranks = POINTS[request.param]

    def made(rank=ranks):
        if isinstance(shape[0], tuple):
            return tt.randn_matrix(*shape, rank, generator=generator, dtype=dtype)
        return tt.randn(shape, rank, generator=generator, dtype=dtype)

    return made


@pytest.fixture
def regauge(generator):
    """The same tensor held by other cores: a random, ill-conditioned factor of the identity at each bond."""

    def regauged(x):
        cores = x._merged()
        for k in range(len(cores) - 1):
            r = cores[k].shape[2]
            change = torch.randn(r, r, generator=generator, dtype=x.dtype) * 3.0 ** torch.arange(r)
            cores[k] = cores[k] @ change
            cores[k + 1] = torch.tensordot(torch.linalg.inv(change), cores[k + 1], dims=1)
        return x._like(cores)

    return regauged
