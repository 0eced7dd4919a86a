"""Mutual information by counting, and orders of sites beside brute force."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor

import tensortrain as tt
from tensortrain.errors import DataError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.numerics.ordering import exact, information, order
from tensortrain.testing.compare import check_refused

METHODS = ("fiedler", "greedy", "swap", "exact")


def cost(likeness: Tensor, order: tuple[int, ...]) -> float:
    return sum(float(likeness[a, b]) * abs(i - j) for (i, a), (j, b) in itertools.combinations(enumerate(order), 2))


def is_line(order: tuple[int, ...], names: list[int]) -> bool:
    found = [names[k] for k in order]
    return found in (list(range(len(names))), list(reversed(range(len(names)))))


def markov_samples(seed: int, d: int = 16, n: int = 5000, correlation: float = 0.8) -> tuple[Tensor, list[int]]:
    """Bits of a chain, and which place of the chain each column has."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.rand(n, d, generator=generator) < (1 - correlation) / 2
    turns[:, 0] = torch.rand(n, generator=generator) < 0.5
    names = torch.randperm(d, generator=generator)
    return (turns.long().cumsum(1) % 2)[:, names], names.tolist()


def pairs_of_equal_bits() -> tt.TensorTrain:
    x = torch.zeros((2,) * 10, dtype=torch.float64)
    for half in itertools.product((0, 1), repeat=5):
        x[half + half] = 1
    return tt.TensorTrain.from_dense(x)


def reduced_density(x: Tensor, sites: tuple[int, ...]) -> Tensor:
    rest = [k for k in range(x.ndim) if k not in sites]
    matrix = x.permute(*sites, *rest).reshape(math.prod(x.shape[k] for k in sites), -1)
    return matrix @ matrix.mH / torch.linalg.vector_norm(x) ** 2


def entropy(density: Tensor) -> float:
    return float(torch.special.entr(torch.linalg.eigvalsh(density).clamp_min(0)).sum())


def random_tree(seed: int, d: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    likeness = torch.zeros(d, d, dtype=torch.float64)
    for child in range(1, d):
        parent = int(torch.randint(0, child, (), generator=generator))
        likeness[child, parent] = likeness[parent, child] = torch.rand((), generator=generator) + 0.1
    return likeness


def test_integers_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (200, 5), generator=generator)
    x[:, 3] = (x[:, 0] + x[:, 1]) * 10 - 7  # any integers will do
    found = tt.mutual_information(x)
    assert found.dtype == torch.float64
    for i, j in itertools.product(range(5), repeat=2):  # the diagonal is the entropy
        assert float(found[i, j]) == pytest.approx(mutual_info_score(x[:, i], x[:, j]), abs=1e-12)
    torch.testing.assert_close(tt.mutual_information(x.repeat(100, 1)), found)  # more rows than are counted at once


def test_floats_are_taken_for_gaussian() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat((x, x[:, :1] * 1e200, torch.full((300, 1), 3.0)), dim=1)  # far from 1; constant
    x[:, 1] += x[:, 0]
    found = tt.mutual_information(x)
    rho = torch.from_numpy(np.corrcoef(x[:, :4].numpy().T))
    for i, j in itertools.permutations(range(4), 2):
        assert float(found[i, j]) == pytest.approx(float(-torch.log(1 - rho[i, j] ** 2) / 2), abs=1e-12)
    assert 15 < found[0, 4] < 20  # a copy: finite all the same
    assert (found.diagonal() == 0).all()
    assert (found[5] == 0).all()
    torch.testing.assert_close(tt.mutual_information(x[:, :4].float()), found[:4, :4], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.complex64])
def test_trains_by_reduced_densities(dtype: torch.dtype) -> None:
    x = tt.randn((2, 3, 1, 2, 3), 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    dense, tol = x.to_dense(), 1e-10 if dtype != torch.complex64 else 1e-4
    found = tt.mutual_information(x)
    own = [entropy(reduced_density(dense, (k,))) for k in range(5)]
    for i, j in itertools.combinations(range(5), 2):
        expected = own[i] + own[j] - entropy(reduced_density(dense, (i, j)))
        assert float(found[i, j]) == float(found[j, i]) == pytest.approx(expected, abs=tol)
        assert float(found[i, i]) == pytest.approx(own[i], abs=tol)
    far = 1e150 * x.to(torch.complex128) if dtype == torch.complex128 else x / 3
    torch.testing.assert_close(tt.mutual_information(far), found, rtol=0, atol=tol)
    assert (tt.mutual_information(tt.zeros((2, 2, 2))) == 0).all()


@pytest.mark.parametrize(("method", "least"), [("fiedler", 19), ("greedy", 15), ("swap", 19)])
def test_a_shuffled_chain_is_found_again(method: str, least: int) -> None:
    found = [is_line(tt.order_sites(x, method=method), names) for x, names in map(markov_samples, range(20))]
    assert sum(found) >= least


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_of_floats_is_found_again(method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(4000, 9, generator=generator)
    for k in range(1, 9):
        steps[:, k] = 0.8 * steps[:, k - 1] + 0.6 * steps[:, k]
    names = torch.randperm(9, generator=generator)
    x = steps[:, names]
    found = tt.order_sites(x, method=method)
    assert is_line(found, names.tolist())
    assert found == tt.order_sites(tt.mutual_information(x), method=method)
    assert all(isinstance(site, int) for site in found)
    assert found[0] < found[-1]


@pytest.mark.parametrize("method", METHODS)
def test_paired_deltas_come_to_rank_two(method: str) -> None:
    x = pairs_of_equal_bits()
    assert max(x.ranks) == 32
    found = tt.order_sites(x, method=method)
    assert sorted(found) == list(range(10))
    assert max(x.permute(found).ranks) == 2


def test_swaps_find_pairs_that_are_nested() -> None:
    nested = pairs_of_equal_bits().permute(0, 1, 2, 3, 4, 9, 8, 7, 6, 5)
    assert max(nested.permute(tt.order_sites(nested, method="swap")).ranks) == 2


@pytest.mark.parametrize("seed", range(4))
def test_exact_is_the_best_of_all_orders(seed: int) -> None:
    likeness = random_tree(seed)
    if seed == 3:
        likeness = torch.rand(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        likeness = likeness + likeness.T
    best = min(cost(likeness, order) for order in itertools.permutations(range(7)) if order[0] < order[-1])
    assert cost(likeness, tt.order_sites(likeness, method="exact")) == pytest.approx(best, rel=1e-12)
    assert cost(likeness, tt.order_sites(likeness, method="swap")) <= 1.1 * best


def test_the_best_order_by_ranks_of_sets() -> None:
    """The table of any cost of sets will do: here logarithms of the ranks of a tensor."""
    generator = torch.Generator().manual_seed(2)
    planted = tt.randn((2,) * 7, 2, generator=generator, dtype=torch.float64)
    names = torch.randperm(7, generator=generator).tolist()
    x = planted.to_dense().permute(names)

    def log_rank(sites: list[int]) -> float:
        rest = [k for k in range(7) if k not in sites]
        matrix = x.permute(*sites, *rest).reshape(2 ** len(sites), -1)
        return math.log(int(torch.linalg.matrix_rank(matrix)))

    table = torch.tensor([log_rank([k for k in range(7) if number >> k & 1]) for number in range(2**7)])
    found = exact.least_order(table)
    assert sorted(found) == list(range(7))
    assert sum(log_rank(found[:k]) for k in range(1, 7)) == pytest.approx(6 * math.log(2))  # as planted


@pytest.mark.parametrize("seed", range(10))
def test_swaps_find_planted_trains(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planted = tt.randn((2,) * 10, 2, generator=generator, dtype=torch.float64)
    x = planted.permute(torch.randperm(10, generator=generator).tolist())
    found = x.permute(tt.order_sites(x, method="swap"))
    assert found.n_params <= 1.05 * planted.n_params < x.n_params


def test_swaps_take_a_tolerance() -> None:
    generator = torch.Generator().manual_seed(5)
    planted = tt.randn((2, 3, 2, 3, 2, 3), 2, generator=generator, dtype=torch.float64)
    noise = tt.randn(planted.shape, 12, generator=generator, dtype=torch.float64)
    x = (planted.normalize() + 1e-7 * noise.normalize()).permute(3, 0, 5, 1, 4, 2)
    found = tt.order_sites(x, method="swap", eps=1e-4)
    assert x.permute(found).round(eps=1e-4).n_params <= 1.05 * planted.n_params


def test_parts_that_share_nothing_stay_together() -> None:
    likeness = torch.zeros(6, 6)
    for i, j in ((0, 3), (1, 5), (5, 2)):
        likeness[i, j] = likeness[j, i] = 1.0
    assert tt.order_sites(likeness) == (0, 3, 1, 5, 2, 4)
    for method in METHODS:
        assert sorted(tt.order_sites(torch.zeros(5, 5), method=method)) == list(range(5))
        assert tt.order_sites(torch.zeros(7, 1).long(), method=method) == (0,)
        assert tt.order_sites(tt.ones((3,)), method=method) == (0,)


def test_twenty_sites_are_no_trouble() -> None:
    generator = torch.Generator().manual_seed(4)
    names = torch.randperm(20, generator=generator)
    places = names.double()
    likeness = torch.exp(-(places[:, None] - places).abs())
    for method in METHODS:
        assert is_line(tt.order_sites(likeness, method=method), names.tolist())


def test_bad_input_is_refused() -> None:
    x = torch.zeros(4, 3)
    check_refused(KindError, tt.mutual_information, [[0, 1]])
    check_refused(KindError, tt.mutual_information, x.to(torch.complex64))
    check_refused(ShapeError, tt.mutual_information, x[0])
    check_refused(ShapeError, tt.mutual_information, x[:, :0])
    check_refused(DataError, tt.mutual_information, x[:1])
    check_refused(DataError, tt.mutual_information, x[:0].long())
    check_refused(DataError, tt.mutual_information, x.log() * 0)
    check_refused(ShapeError, tt.mutual_information, tt.TensorTrain([torch.ones(2, 1, 3, 1)]))
    check_refused(ShapeError, lambda: tt.order_sites(tt.TensorTrain([torch.ones(2, 1, 3, 1)]), method="swap"))
    check_refused(KindError, lambda: tt.order_sites(x, method="magic"))
    check_refused(RankError, lambda: tt.order_sites(torch.ones(21, 21), method="exact"))
    check_refused(RankError, lambda: tt.order_sites(tt.ones((2, 2)), method="swap", eps=2.0))
    check_refused(NonFiniteError, tt.order_sites, -torch.ones(3, 3))
    check_refused(NonFiniteError, tt.order_sites, torch.ones(3, 3) * torch.nan)


def test_examples() -> None:
    for module in (information, order):
        assert doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS).failed == 0
