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


# Few ids, and ranks that fill no whole vectors: cores are read, and gradients written, where they lie.
FEW = ChainShape((3, 4, 2), (9, 11, 8), (1, 37, 29, 1))


def assert_gradients_as_of_the_table(ids: Tensor, cores: list[Tensor], chain: ChainShape, *, times: int = 1) -> None:
    table = chain_to_dense(cores).T
    rows, grad = chain_lookup(ids, cores, chain.in_modes), torch.randn(len(ids), chain.out_features, dtype=table.dtype)
    torch.testing.assert_close(rows, table[ids], rtol=1e-12, atol=1e-11)
    trained = [core for core in cores if core.requires_grad]
    wanted = torch.autograd.grad(table[ids], trained, grad)
    for _ in range(times):
        found = torch.autograd.grad(rows, trained, grad, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("n", [1, 7, 200])
@pytest.mark.parametrize(
    "chain",
    [FEW, ChainShape((16, 9), (21, 30), (1, 33, 1)), ChainShape((2, 3, 2, 3), (5, 6, 7, 4), (1, 5, 18, 6, 1))],
    ids=["order 3", "order 2", "order 4"],
)
def test_a_kept_graph_gives_the_same_gradients_again(chain: ChainShape, n: int) -> None:
    torch.manual_seed(n)
    assert_gradients_as_of_the_table(torch.randint(chain.in_features, (n,)), cores_of(chain), chain, times=2)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_cores_get_no_gradient(trained: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cores = [core.requires_grad_(k in trained) for k, core in enumerate(cores_of(FEW))]
    assert_gradients_as_of_the_table(torch.randint(FEW.in_features, (12,)), cores, FEW)
    rows = chain_lookup(torch.randint(FEW.in_features, (12,)), cores, FEW.in_modes)
    rows.sum().backward()
    assert [core.grad is not None for core in cores] == [k in trained for k in range(3)]


def test_cores_that_lie_in_another_order() -> None:
    torch.manual_seed(0)
    cores = [core.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for core in cores_of(FEW)]
    leaves = [core.requires_grad_() for core in cores]
    assert not leaves[1].is_contiguous()
    assert_gradients_as_of_the_table(torch.randint(FEW.in_features, (20,)), leaves, FEW)


def test_threads_share_the_work_of_few_ids() -> None:
    chain = ChainShape((4, 4, 3), (8, 15, 8), (1, 60, 54, 1))
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_gradients_as_of_the_table(torch.randint(chain.in_features, (40,)), cores_of(chain), chain)
    finally:
        torch.set_num_threads(before)


def test_chains_are_turned_where_their_last_ranks_are_small() -> None:
    chain = ChainShape((30, 30, 2), (4, 5, 40), (1, 2, 24, 1))
    torch.manual_seed(0)
    for n in (3, 500):
        assert_gradients_as_of_the_table(torch.randint(chain.in_features, (n,)), cores_of(chain), chain)


def test_a_core_that_changed_before_the_way_back_is_refused() -> None:
    cores = cores_of(FEW)
    rows = chain_lookup(torch.tensor([3, 5]), cores, FEW.in_modes)
    with torch.no_grad():
        cores[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


def test_chains_begin_at_either_end() -> None:
    wide_first = ChainShape((40, 3, 2), (4, 5, 6), (1, 9, 7, 1))  # rows come out of the last product either way
    wide_last = ChainShape((2, 3, 40), (4, 5, 6), (1, 9, 7, 1))
    thin = ChainShape((5, 1, 3), (6, 1, 7), (1, 4, 3, 1))  # a core that no digit chooses from
    torch.manual_seed(0)
    for chain in (wide_first, wide_last, thin, ChainShape((5, 1, 1), (3, 1, 1), (1, 1, 4, 1))):
        for n in (1, 3, 400):
            assert_gradients_as_of_the_table(torch.randint(chain.in_features, (n,)), cores_of(chain), chain)


@pytest.mark.parametrize("ranks", [(1, 70, 33, 1), (1, 33, 70, 1), (1, 2, 65, 1), (1, 1, 3, 1)])
def test_widths_between_those_of_vectors(ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for outs in ((5, 7, 3), (2, 3, 1), (9, 1, 11)):
        chain = ChainShape(outs, (5, 4, 6), ranks)
        for n in (4, 300):
            assert_gradients_as_of_the_table(torch.randint(chain.in_features, (n,)), cores_of(chain), chain)


# -- bags ---------------------------------------------------------------------------------------------

BAG_IDS, ENDS = torch.tensor([0, 7, 7, 3, 119, 7, 3, 5, 119]), torch.tensor([0, 3, 3, 4, 9])
BAG_CHAIN = ChainShape((2, 3, 4), (4, 5, 6), (1, 3, 5, 1))


def bags(cores: list[Tensor], weights: Tensor | None = None, *, is_mean: bool = False) -> Tensor:
    options = {"has_end": True, "is_mean": is_mean, "padding_idx": 3, "max_bytes": 2**26}
    found = row_kernels.bags_of_cores(BAG_IDS, ENDS, weights, cores, **options)
    assert found is not None
    return found


def dense_bags(cores: list[Tensor], weights: Tensor | None = None, *, is_mean: bool = False) -> Tensor:
    return torch.nn.functional.embedding_bag(
        BAG_IDS,
        chain_to_dense(cores).T,
        ENDS,
        mode="mean" if is_mean else "sum",
        per_sample_weights=weights,
        include_last_offset=True,
        padding_idx=3,
    )


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("is_mean", [False, True])
def test_bags_are_those_of_the_table(is_mean: bool, with_weights: bool) -> None:
    torch.manual_seed(0)
    cores = cores_of(BAG_CHAIN)
    weights = torch.randn(9, dtype=torch.float64, requires_grad=True) if with_weights and not is_mean else None
    found, wanted = (of(cores, weights, is_mean=is_mean) for of in (bags, dense_bags))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[[1, 2]], torch.zeros(2, 24, dtype=torch.float64))  # without ids, and of padding alone
    inputs, grad = [*cores, *([] if weights is None else [weights])], torch.randn(4, 24, dtype=torch.float64)
    for _ in range(2):
        ours = torch.autograd.grad(found, inputs, grad, retain_graph=True)
        for one, other in zip(ours, torch.autograd.grad(wanted, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bags_have_second_derivatives() -> None:
    torch.manual_seed(0)
    cores, weights = cores_of(BAG_CHAIN), torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda given, *cores: bags(list(cores), given), (weights, *cores))
    sums, grads = bags(cores, weights), torch.randn(3, 4, 24, dtype=torch.float64)
    found = torch.autograd.grad(sums, (weights, *cores), grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        for many, one in zip(found, torch.autograd.grad(sums, (weights, *cores), grad, retain_graph=True), strict=True):
            torch.testing.assert_close(many[k], one)


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_frozen_parts_of_bags_get_no_gradient(trained: int) -> None:
    cores, weights = cores_of(BAG_CHAIN), torch.randn(9, dtype=torch.float64)
    leaves = [core.requires_grad_(k == trained) for k, core in enumerate((*cores, weights))]
    bags(cores, weights).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [k == trained for k in range(4)]


def test_bags_of_padding_alone_are_left_to_torch() -> None:
    options = {"has_end": False, "is_mean": False, "padding_idx": 3, "max_bytes": 2**26}
    found = row_kernels.bags_of_cores(torch.tensor([3]), torch.tensor([0]), None, cores_of(BAG_CHAIN), **options)
    assert found is None


# -- tables of low rank -------------------------------------------------------------------------------


def low_rank_rows(ids: Tensor, *cores: Tensor, max_bytes: int = 2**26) -> Tensor:
    rows = kernels.library().look_up_cores(ids, list(cores), max_bytes)  # type: ignore[union-attr]
    assert isinstance(rows, Tensor)
    return rows


def low_rank_cores(n: int, dim: int, rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(size, rank, dtype=dtype, requires_grad=True) for size in (n, dim)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (17, 5), (64, 16), (300, 33)])
def test_rows_of_low_rank_and_their_gradients(dim: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cores = low_rank_cores(90, dim, rank, dtype)
    for sizes, max_bytes in (((1,), 2**26), ((3, 40), 2**26), ((700,), 2**12)):
        ids, grad = torch.randint(90, sizes), torch.randn(*sizes, dim, dtype=dtype)
        rows, table = low_rank_rows(ids, *cores, max_bytes=max_bytes), cores[0] @ cores[1].T
        torch.testing.assert_close(rows, table[ids])
        found = torch.autograd.grad(rows, cores, grad)
        for one, other in zip(found, torch.autograd.grad(table[ids], cores, grad), strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # 1.6e-6 seen
            assert float((one - other).norm()) <= tolerance * float(other.norm())


def test_rows_of_low_rank_have_second_derivatives() -> None:
    ids, cores = torch.tensor([[0, 5], [5, 2]]), low_rank_cores(6, 4, 3)
    assert torch.autograd.gradgradcheck(lambda *given: low_rank_rows(ids, *given), cores)
    rows, grads = low_rank_rows(ids, *cores), torch.randn(3, 2, 2, 4, dtype=torch.float64)
    found = torch.autograd.grad(rows, cores, grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        for many, one in zip(found, torch.autograd.grad(rows, cores, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(many[k], one)


@pytest.mark.parametrize("trained", [0, 1])
def test_frozen_matrices_of_low_rank_get_no_gradient(trained: int) -> None:
    cores = [core.requires_grad_(k == trained) for k, core in enumerate(low_rank_cores(6, 4, 3))]
    low_rank_rows(torch.tensor([1, 1, 4]), *cores).sum().backward()
    assert [core.grad is not None for core in cores] == [k == trained for k in range(2)]


# -- predicted times ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "n_ids"), [(200, 50), (5000, 4096), (10**6, 16), (10**6, 4096)])
def test_expected_distinct_ids_are_those_of_a_text(n_rows: int, n_ids: int) -> None:
    law = 1 / torch.arange(1, n_rows + 1, dtype=torch.float64)
    expected = float((1 - (1 - law / law.sum()) ** n_ids).sum())
    assert 0.8 * expected < row_kernels.distinct_ids(n_ids, n_rows) < 1.25 * expected
