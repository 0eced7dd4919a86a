"""A batch of trains does what a loop over its members does."""

import pytest
import torch

from tensortrain.errors import ShapeError
from tensortrain.tensor import (
    TensorTrain,
    TTMatrix,
    cat,
    diag,
    dot,
    hadamard,
    kron,
    matmul,
    pad,
    round_sum,
    round_tt,
    stack,
    tt_svd,
)
from tensortrain.testing import is_left_orthogonal, rel_error

B = 3
DTYPES = [torch.float64, torch.complex128]


def batch(shape, ranks, generator, dtype=torch.float64, b=B):
    full = (1, *ranks, 1)
    return TensorTrain(
        [
            torch.randn(b, r, n, s, generator=generator, dtype=dtype)
            for r, n, s in zip(full[:-1], shape, full[1:], strict=True)
        ]
    )


def matrix_batch(out, into, ranks, generator, dtype=torch.float64, b=B):
    full = (1, *ranks, 1)
    return TTMatrix(
        [
            torch.randn(b, r, i, j, s, generator=generator, dtype=dtype)
            for r, i, j, s in zip(full[:-1], out, into, full[1:], strict=True)
        ]
    )


def members(x):
    return [type(x)(tuple(core[k] for core in x.cores)) for k in range(x.batch_shape[0])]


def dense(x):
    return x if isinstance(x, torch.Tensor) else x.to_dense()


OPERATIONS = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "neg": lambda x, y: -x / 3,
    "number": lambda x, y: 2 * x + 1.5,
    "conj": lambda x, y: x.conj(),
    "norm": lambda x, y: x.norm(),
    "log_norm": lambda x, y: x.log_norm(),
    "normalize": lambda x, y: x.normalize(),
    "dot": lambda x, y: dot(x, y),
    "sum": lambda x, y: x.sum(),
    "mean": lambda x, y: x.mean(),
}
TRAIN_OPERATIONS = {
    **OPERATIONS,
    "dot over modes": lambda x, y: dot(x, y, dims=(0, 2)),
    "dot against fewer modes": lambda x, y: dot(x, y.sum((1, 3)), dims=(0, 2)),
    "sum over modes": lambda x, y: x.sum((1, 2)),
    "var": lambda x, y: x.var(),
    "var over modes": lambda x, y: x.var((0, 3)),
    "orthogonalize": lambda x, y: x.orthogonalize(2),
    "entropy": lambda x, y: x.entropy(2),
    "singular values": lambda x, y: x.singular_values(1),
    "round": lambda x, y: x.round(max_rank=2),
    "int": lambda x, y: x[1, :, -1],
    "slice": lambda x, y: x[::-1, 1:, ..., None],
    "values": lambda x, y: x[[0, 1, 2], [1, 2, 3], 0, [4, 3, 2]],
    "lists": lambda x, y: x[:, [0, 2], [1, 1]],
    "lists apart": lambda x, y: x[:, [0, 2], :, [1, 3]],
    "set": lambda x, y: x.at[0, :, 1].set(2.0),
    "set points": lambda x, y: x.at[[0, 1], [1, 1], [0, 1], [2, 3]].set(torch.tensor([1.0, 2.0])),
    "cat": lambda x, y: cat((x, y), dim=1),
    "stack": lambda x, y: stack((x, y), dim=2),
    "pad": lambda x, y: pad(x, ((1, 0), (0, 0), (2, 1), (0, 1)), value=1.5),
    "kron": lambda x, y: kron(x, y),
    "diag": lambda x, y: diag(x),
    "merge": lambda x, y: x.reshape(12, 10),
    "split": lambda x, y: x.reshape(3, 2, 2, 10),
    "permute": lambda x, y: x.permute(2, 0, 3, 1),
    "mode product": lambda x, y: x.mode_product(torch.ones(6, 4, dtype=x.dtype), 1),
    "hadamard": lambda x, y: hadamard(x, y, method="zipup", eps=1e-8).value,
    "sum of many": lambda x, y: round_sum([x, y, x], method="randomized", eps=1e-6).value,
}
MATRIX_OPERATIONS = {
    **OPERATIONS,
    "T": lambda a, b: a.T,
    "H": lambda a, b: a.H,
    "rows": lambda a, b: a.sum(1),
    "row": lambda a, b: a[3],
    "column": lambda a, b: a[:, 2],
    "entry": lambda a, b: a[3, 2],
    "product": lambda a, b: a @ b.T,
    "vector": lambda a, b: a @ torch.ones(30, dtype=a.dtype),
    "vectors": lambda a, b: a @ torch.ones(30, 4, dtype=a.dtype),
    "fast product": lambda a, b: matmul(a, b.T, method="fit", eps=1e-8).value,
    "trace": lambda a, b: (a @ b.T).trace(),
    "reshape": lambda a, b: a.reshape((6, 2, 2), (5, 3, 2)),
}


@pytest.mark.parametrize("name", TRAIN_OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trains(name, dtype, generator):
    x, y = (batch((3, 4, 2, 5), (2, 3, 2), generator, dtype) for _ in range(2))
    found = dense(TRAIN_OPERATIONS[name](x, y))
    loop = torch.stack([dense(TRAIN_OPERATIONS[name](a, b)) for a, b in zip(members(x), members(y), strict=True)])
    assert found.shape == loop.shape
    assert rel_error(found, loop) <= 1e-7 if "sum of" in name else rel_error(found, loop) <= 1e-11


@pytest.mark.parametrize("name", MATRIX_OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices(name, dtype, generator):
    a, b = (matrix_batch((3, 4, 2), (2, 5, 3), (2, 3), generator, dtype) for _ in range(2))
    found = dense(MATRIX_OPERATIONS[name](a, b))
    loop = torch.stack([dense(MATRIX_OPERATIONS[name](u, v)) for u, v in zip(members(a), members(b), strict=True)])
    assert found.shape == loop.shape
    assert rel_error(found, loop) <= 1e-10


@pytest.mark.parametrize("method", ["svd", "gram", "randomized"])
def test_rounding_keeps_the_tolerance_of_every_member(method, generator):
    x = batch((4, 5, 4, 3), (2, 2, 2), generator)
    x = (x + 1e-3 * batch((4, 5, 4, 3), (3, 3, 3), generator)) * torch.tensor([1.0, 1e-6, 1e6], dtype=torch.float64)
    found = round_tt(x, eps=1e-2, method=method)
    assert found.value.ranks == (1, 2, 2, 2, 1)
    for k, bound in enumerate(found.info.rel_error_bounds.tolist()):
        error = rel_error(found.value.to_dense()[k], x.to_dense()[k])
        assert error <= bound <= found.rel_error_bound <= 1e-2
    assert all(is_left_orthogonal(core[k]) for core in found.value.cores[:-1] for k in range(B))


def test_ranks_are_the_largest_that_a_member_needs(generator):
    one, two = batch((4, 5, 6), (1, 1), generator, b=1), batch((4, 5, 6), (2, 3), generator, b=1)
    cores = []
    for a, b in zip(one.cores, two.cores, strict=True):
        padded = torch.zeros_like(b)
        padded[:, : a.shape[1], :, : a.shape[3]] = a
        cores.append(torch.cat((padded, b)))
    assert round_tt(TensorTrain(cores)).value.ranks == (1, 2, 3, 1)
    assert round_tt(TensorTrain([core[:1] for core in cores])).value.ranks == (1, 1, 1, 1)


@pytest.mark.parametrize("method", ["svd", "qr", "gram", "auto"])
def test_decomposition_of_a_batch(method, generator):
    x = batch((4, 5, 6), (2, 3), generator).to_dense()
    x = x + 1e-4 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    found = tt_svd(x, eps=1e-2, batch_dims=1, method=method)
    assert found.value.batch_shape == (B,)
    assert found.value.shape == (4, 5, 6)
    assert found.value.ranks == (1, 2, 3, 1)
    for k in range(B):
        assert rel_error(found.value.to_dense()[k], x[k]) <= float(found.info.rel_error_bounds[k]) <= 1e-2


def test_a_zero_member_is_no_trouble(generator):
    x = batch((4, 5, 6), (2, 3), generator)
    x = x * torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    for y in (x.round(eps=1e-8), tt_svd(x.to_dense(), batch_dims=1, eps=1e-8).value):
        assert not y.to_dense()[1].any()
        assert rel_error(y.to_dense(), x.to_dense()) <= 1e-8
    assert x.norm()[1] == 0
    assert not x.normalize().to_dense()[1].any()


def test_sizes_one_and_n_broadcast(generator):
    x, one = batch((3, 4), (2,), generator), batch((3, 4), (2,), generator, b=1)
    single = TensorTrain([core[0] for core in one.cores])
    for other in (one, single):
        assert (x + other).batch_shape == (B,)
        assert rel_error((x * other).to_dense(), x.to_dense() * single.to_dense()) <= 1e-14
        assert rel_error(dot(other, x), torch.stack([dot(single, m) for m in members(x)])) <= 1e-13
    mixed = TensorTrain([x.cores[0], one.cores[1]])
    assert mixed.batch_shape == (B,)
    a = matrix_batch((2, 3), (3, 4), (2,), generator)
    assert (a @ single).batch_shape == (B,)
    with pytest.raises(ShapeError, match="batches must broadcast"):
        x + batch((3, 4), (2,), generator, b=2)


def test_a_factor_for_each_member(generator):
    x = batch((3, 4), (2,), generator)
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert rel_error((x * c).to_dense(), x.to_dense() * c[:, None, None]) <= 1e-15
    assert rel_error((x / c + c).to_dense(), x.to_dense() / c[:, None, None] + c[:, None, None]) <= 1e-15


def test_attributes(generator):
    x = batch((3, 4), (2,), generator)
    assert (x.shape, tuple(x.batch_shape), x.n_params, x.numel) == ((3, 4), (B,), B * 14, 12)
    assert "batch_shape=(3,)" in repr(x)
    assert x.to_dense().shape == (B, 3, 4)


def test_gradients_of_a_batch(generator):
    x = batch((2, 3, 2), (2, 2), generator, b=2)
    cores = [core.requires_grad_() for core in x.cores]
    assert torch.autograd.gradcheck(
        lambda *c: (TensorTrain(c).norm(), TensorTrain(c).round(max_rank=1).to_dense()), cores
    )
