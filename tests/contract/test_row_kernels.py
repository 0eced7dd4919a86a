"""Rows by the kernels are those of the dense table, and so are their gradients."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tensortrain.contract import ChainShape, CostModel, chain_lookup, chain_to_dense, kernels, row_kernels
from tensortrain.errors import ModeIndexError

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")
MODEL = CostModel.reference("cpu")


def random_chain(seed: int) -> ChainShape:
    draw = random.Random(seed)
    order = draw.randint(2, 5)
    outs, ins = (tuple(draw.randint(1, 9) for _ in range(order)) for _ in range(2))
    ranks = (1, *(draw.randint(1, 20) for _ in range(order - 1)), 1)
    return ChainShape(outs, ins, ranks)


def cores_of(chain: ChainShape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in chain.core_shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_rows_and_gradients_are_those_of_the_table(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    chain = random_chain(seed)
    cores = cores_of(chain, dtype)
    table = chain_to_dense([core.double() for core in cores]).T
    for n, max_bytes in ((1, 2**26), (300, 2**12), (700, 2**26)):
        ids = torch.randint(chain.in_features, (n,))
        rows = chain_lookup(ids, cores, chain.in_modes, max_bytes=max_bytes)
        expected, grad = table[ids], torch.randn(n, chain.out_features, dtype=dtype)
        found = torch.autograd.grad(rows, cores, grad)
        wanted = torch.autograd.grad(expected, cores, grad.double(), retain_graph=True)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4  # 2.4e-5 seen, five cores and 700 ids
        for a, b in ((rows, expected), *zip(found, wanted, strict=True)):
            assert float((a - b).detach().norm()) <= tolerance * float(b.detach().norm()) + 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_tables_that_are_kept_give_the_same_rows(seed: int) -> None:
    torch.manual_seed(seed)
    chain = random_chain(100 + seed)
    cores, ids = [core.detach() for core in cores_of(chain)], torch.randint(chain.in_features, (400,))
    groups = row_kernels.kept_groups(chain, torch.float64, 2**20, MODEL)
    assert len(groups) >= 2
    rows = row_kernels.rows_of_packed(ids, row_kernels.packed_tables(cores, groups), chain, groups)
    torch.testing.assert_close(rows, chain_to_dense(cores).T[ids], rtol=1e-12, atol=1e-11)


def test_kept_tables_stay_below_their_bound() -> None:
    chain = ChainShape((4, 4, 4), (89, 106, 106), (1, 16, 16, 1))
    for most in (2**14, 2**20, 2**24):
        for start, stop in row_kernels.kept_groups(chain, torch.float32, most, MODEL):
            shape = chain.ranks[start], chain.ranks[stop]
            numel = shape[0] * shape[1] * 4 ** (stop - start) * torch.tensor(chain.in_modes[start:stop]).prod().item()
            assert stop - start == 1 or 4 * numel <= most


def test_second_derivatives() -> None:
    chain = ChainShape((2, 3), (2, 3), (1, 2, 1))
    ids = torch.tensor([0, 5, 5, 2])
    assert torch.autograd.gradgradcheck(lambda *cores: chain_lookup(ids, cores, (2, 3)), cores_of(chain))


def test_many_gradients_at_once() -> None:
    chain = ChainShape((2, 3, 2), (4, 3, 5), (1, 2, 3, 1))
    cores, ids = cores_of(chain), torch.randint(60, (20,))
    rows, grads = chain_lookup(ids, cores, chain.in_modes), torch.randn(3, 20, 12, dtype=torch.float64)
    found = torch.autograd.grad(rows, cores, grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        for many, one in zip(found, torch.autograd.grad(rows, cores, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(many[k], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [-1, 60])
def test_ids_outside_the_table_are_refused(bad: int) -> None:
    chain = ChainShape((2, 3, 2), (4, 3, 5), (1, 2, 3, 1))
    with pytest.raises(ModeIndexError):
        chain_lookup(torch.tensor([3, bad]), cores_of(chain), chain.in_modes)


def test_without_kernels_the_rows_are_the_same() -> None:
    chain = ChainShape((2, 3, 2), (14, 13, 15), (1, 4, 3, 1))
    cores, ids = cores_of(chain), torch.randint(chain.in_features, (500,))
    rows = chain_lookup(ids, cores, chain.in_modes)
    with kernels.python_only():
        torch.testing.assert_close(chain_lookup(ids, cores, chain.in_modes), rows, rtol=1e-12, atol=1e-12)
