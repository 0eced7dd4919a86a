"""Trains inside torch's transforms: vmap, grad, compile."""

import pytest
import torch
from torch import nn

from tensortrain.tensor import TensorTrain, TTMatrix, dot, randn, randn_matrix
from tensortrain.testing import rel_error

ALGEBRA = {
    "dense": lambda x, y: (2 * x * y - y + 1).to_dense(),
    "dot": lambda x, y: dot(x, y),
    "norm": lambda x, y: x.norm(),
    "log_norm": lambda x, y: x.log_norm(),
    "sum": lambda x, y: x.sum(1).to_dense(),
    "index": lambda x, y: x[0, 1:].to_dense(),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_vmap(name, generator):
    batch = [
        TensorTrain([torch.randn(5, *c.shape, generator=generator) for c in randn((3, 4, 2), 2).cores]) for _ in "xy"
    ]

    def one(*cores):
        return ALGEBRA[name](TensorTrain(cores[:3]), TensorTrain(cores[3:]))

    found = torch.func.vmap(one)(*batch[0].cores, *batch[1].cores)
    assert rel_error(found, torch.stack([one(*(c[k] for x in batch for c in x.cores)) for k in range(5)])) <= 1e-13


def test_vmap_of_a_product(generator):
    a = randn_matrix((3, 2), (2, 4), 2, generator=generator)
    x = [torch.randn(5, *core.shape, generator=generator) for core in randn((2, 4), 3).cores]
    found = torch.func.vmap(lambda *cores: (a @ TensorTrain(cores)).to_dense())(*x)
    assert rel_error(found, (a @ TensorTrain(x)).to_dense()) <= 1e-14


def test_functional_gradients(generator):
    x, y = randn((3, 4), 2, generator=generator), randn((3, 4), 2, generator=generator)
    found = torch.func.grad(lambda *cores: dot(TensorTrain(cores), y), argnums=(0, 1))(*x.cores)
    assert rel_error(found[1][..., 0], x.cores[0][0].T @ y.to_dense()) <= 1e-13


class Machine(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.cores = nn.ParameterList(
            nn.Parameter(core) for core in randn_matrix((4, 3), (3, 4), 2, generator=generator).cores
        )
        self.other = nn.ParameterList(nn.Parameter(core) for core in randn((3, 4), 2, generator=generator).cores)

    def forward(self, x):
        matrix, train = TTMatrix(tuple(self.cores)), TensorTrain(tuple(self.other))
        image = matrix.matmul(train)
        return matrix.matmul(x), image.to_dense(), dot(train, 2 * train + train), image.sum()


def test_compile(generator):
    model = Machine(generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 5, generator=generator)
    for found, exact in zip(compiled(x), model(x), strict=True):
        assert rel_error(found, exact) <= 1e-13
    sum(out.sum() for out in compiled(x)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
