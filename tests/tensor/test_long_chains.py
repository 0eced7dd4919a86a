"""Chains whose partial products leave the range of their dtype on the way to a value that fits it."""

import math

import pytest
import torch

from tensortrain.tensor import TensorTrain, TTMatrix, dot, ones, randn, round_tt
from tensortrain.testing import rel_error

BOTH_DEFAULTS = True
DTYPES = (torch.float64, torch.float32, torch.complex64, torch.bfloat16)
D = 80  # of factors of 2**16: partial products reach 2**640 and 2**-640


def hill(dtype=torch.float64, factor=2.0**16, modes=1, batch=()):
    """Constant entries 1, by cores that grow for half the way and shrink for the other."""
    up = torch.full((*batch, 1, modes, 1), factor, dtype=dtype)
    return TensorTrain([up] * (D // 2) + [up / factor**2] * (D // 2))


def valley(dtype=torch.float64, **options):
    return hill(dtype, factor=2.0**-16, **options)


NUMBERS = {
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "entry": lambda x: x[(0,) * D],
    "points": lambda x: x.points(torch.zeros(D, dtype=torch.long)),
    "dense": lambda x: x.to_dense().reshape(x.batch_shape),
    "norm": lambda x: x.norm(),
    "size of a center": lambda x: x.orthogonalize(D // 3).cores[D // 3].abs().sum((-3, -2, -1)),
    "singular value": lambda x: x.singular_values(D // 2)[..., 0],
    "partial sum": lambda x: x.sum(range(1, D - 1)).to_dense().reshape(x.batch_shape),
    "slices between indices": lambda x: x[(0,) * 30 + (slice(None),) * 2].to_dense().reshape(x.batch_shape),
    "lists beside slices": lambda x: x[([0],) * 30].sum(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_sizes_apart(name, dtype):
    # the terms of this sum go through 2**640, 2**-640 and 1, so that no common exponent holds them
    x = hill(dtype) + valley(dtype) + 1.0
    assert rel_error(NUMBERS[name](x), torch.tensor(3.0, dtype=torch.float64)) <= 1e-12 + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NUMBERS)
def test_members_of_a_batch(name):
    pairs = zip(hill(batch=(1,)).cores, (2 * valley(batch=(1,))).cores, strict=True)
    x = TensorTrain([torch.cat(pair) for pair in pairs])
    assert rel_error(NUMBERS[name](x), torch.tensor([1.0, 2.0], dtype=torch.float64)) <= 1e-12


def test_gradients():
    cores = [core.clone().requires_grad_() for core in hill(torch.float32).cores]
    x = TensorTrain(cores)
    for value, power in ((x.sum(), 1), (x.norm(), 1), (dot(x, x), 2), (x[(0,) * D], 1), (x.to_dense().sum(), 1)):
        for core, grad in zip(cores, torch.autograd.grad(value, cores), strict=True):
            assert rel_error(grad * core, torch.tensor(float(power))) <= 1e-5


def test_the_derivative_by_a_zero_is_no_zero():
    cores = [core.clone() for core in hill().cores]
    cores[7] = torch.zeros_like(cores[7])
    cores = [core.requires_grad_() for core in cores]
    x = TensorTrain(cores)
    for value in (x.sum(), x[(0,) * D], x.to_dense().sum()):
        grad = torch.autograd.grad(value, cores[7])[0]
        assert float(value) == 0.0
        assert float(grad) == pytest.approx(2.0**-16)
    assert float(dot(x, hill())) == 0.0


def test_an_index_at_which_all_is_zero_does_not_drown_the_others():
    x = hill(modes=2)
    cores = list(x.cores)
    cores[D // 2] = torch.zeros_like(cores[D // 2])
    y = TensorTrain(cores) + ones((2,) * D, dtype=torch.float64) / 4
    assert float(y[(1,) * D]) == 0.25
    assert float(y.mean()) == 0.25


def test_matrices():
    cores = [core[..., None, :] * torch.eye(2, dtype=core.dtype)[:, :, None] for core in hill().cores]
    a = TTMatrix(cores)  # the identity
    e = ones((2,) * D, dtype=torch.float64)
    unit = e * 2.0 ** (-D / 2)
    assert rel_error((a + a).bilinear(unit, unit), torch.tensor(2.0, dtype=torch.float64)) <= 1e-12
    assert rel_error(a.mean(), torch.tensor(2.0**-D, dtype=torch.float64)) <= 1e-12
    assert float(a.trace()) == 2.0**D
    assert float(a[7, 7]) == 1.0
    assert float(a[7, 8]) == 0.0
    assert float(a.sum(dim=1)[(0,) * D]) == 1.0
    assert rel_error((a @ unit).norm(), torch.tensor(1.0, dtype=torch.float64)) <= 1e-12
    narrow = TTMatrix([core[:, :1, :1] if k < D - 1 else core for k, core in enumerate(cores)])
    assert torch.equal(narrow.to_dense(), torch.eye(2, dtype=torch.float64))
    x = torch.tensor([[3.0, 3e-200, 4e200], [4.0, 5e-200, 7e200]], dtype=torch.float64)
    assert torch.equal(narrow @ x, x)
    assert torch.equal(narrow @ x[:, 0], x[:, 0])


def test_half_precision_sums_in_between():
    x = TensorTrain([torch.full((1, 300, 1), 300.0, dtype=torch.float16), torch.full((1, 1, 1), 1e-3).half()])
    assert float(x.sum()) == pytest.approx(90, rel=2e-3)


def test_log_norm_is_as_exact_as_its_dtype():
    for d in (3, 77, 400):
        x = ones((3,) * d, dtype=torch.float64)
        assert float(x.log_norm()) == pytest.approx(d / 2 * math.log(3), rel=1e-14)
        assert x.log_norm().dtype == torch.float64
        assert x.to(torch.float32).log_norm().dtype == torch.float32


@pytest.mark.parametrize("d", [80, 1100])
def test_variance_of_more_entries_than_a_float_can_count(d):
    one = ones((2,) * d, dtype=torch.float64)
    assert float((3 * one + 5).var()) == 0.0
    signs = TensorTrain([torch.tensor([1.0, -1.0], dtype=torch.float64)[None, :, None]] * d)
    assert float((signs + 7).var()) == pytest.approx(1.0, rel=1e-12)
    assert rel_error((signs + 7).var(range(1, d)).to_dense(), torch.ones(2, dtype=torch.float64)) <= 1e-10
    diagonal = TTMatrix([torch.diag_embed(core.mT).movedim(-3, -1) for core in signs.cores])
    assert float(diagonal.var()) == pytest.approx(2.0**-d, rel=1e-12)


def test_variance_where_little_is_left_of_the_count(generator):
    x = randn((3, 4), 2, dtype=torch.float64, generator=generator)
    dense = x.to_dense()
    for correction in (0, 1, 2.5, 11):
        assert rel_error(x.var(correction=correction), dense.var(correction=correction)) <= 1e-12
    assert math.isinf(float(x.var(correction=12)))
    assert math.isnan(float(x[:1, :1].var()))
    large = x + 1e9
    assert rel_error(large.var(), dense.var()) <= 1e-6  # the entries keep seven digits


def test_gradient_of_a_variance(generator):
    cores = [core.requires_grad_() for core in randn((3, 4), 2, dtype=torch.float64, generator=generator).cores]
    assert torch.autograd.gradcheck(lambda *cores: TensorTrain(cores).var(), cores)
    flat = [core.requires_grad_() for core in ones((2,) * 90, dtype=torch.float64).cores]
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(TensorTrain(flat).var(), flat))


def test_rounding_keeps_terms_of_sizes_apart():
    found = round_tt(hill() + valley() + 1.0)
    assert max(found.value.ranks) == 1
    assert float(found.value.sum()) == pytest.approx(3.0, rel=1e-12)
