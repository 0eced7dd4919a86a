"""Narrowed layers against brute force: the error of every width, and units that were planted."""

import itertools

import pytest
import torch

from tensortrain.errors import RankError
from tensortrain.formats.narrowing import _moved_together, narrowing, refitted

Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(seed: int, n: int = 24, m: int = 10) -> Matrices:
    """A weight, a second moment of correlated units, and a weight of outputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    a = torch.randn(3 * n, n, generator=generator, dtype=torch.float64) @ torch.randn(
        n, n, generator=generator, dtype=torch.float64
    )
    g = torch.randn(2 * m, m, generator=generator, dtype=torch.float64)
    gram = a.T @ a / len(a)
    return weight, gram + 1e-3 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64), g.T @ g / len(g)


def true_loss(weight: torch.Tensor, gram: torch.Tensor, outputs: torch.Tensor, kept: torch.Tensor) -> float:
    change = weight.clone()
    change[:, kept] -= refitted(weight, gram, kept)
    return 0.5 * float(torch.trace(outputs @ change @ gram @ change.T))


@pytest.mark.parametrize("block", [1, 4, 7])
def test_losses_of_all_widths_are_those_of_the_layers_built(block: int) -> None:
    weight, gram, outputs = problem(0)
    found = narrowing(weight, gram, outputs, block=block)
    assert sorted(found.order.tolist()) == list(range(24))
    assert found.loss(24) == 0
    for width in range(1, 25):
        expected = true_loss(weight, gram, outputs, found.kept(width))
        assert found.loss(width) == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_never_worse_than_ridge_leverage() -> None:
    better = 0
    for seed in range(20):
        weight, gram, outputs = problem(seed)
        found = narrowing(weight, gram, outputs, block=1)
        leverage = torch.linalg.inv(gram).diagonal().argsort()  # the smallest are kept
        for width in (18, 12, 6):
            theirs = true_loss(weight, gram, outputs, leverage[:width].sort().values)
            assert found.loss(width) <= theirs * (1 + 1e-9)
            better += found.loss(width) < 0.9 * theirs
    assert better > 40


def test_close_to_the_best_of_all_sets() -> None:
    weight, gram, outputs = problem(3, n=10, m=4)
    found = narrowing(weight, gram, outputs, block=1)
    best = min(true_loss(weight, gram, outputs, torch.tensor(kept)) for kept in itertools.combinations(range(10), 5))
    assert best * (1 - 1e-9) <= found.loss(5) <= 1.5 * best


def test_planted_units_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = [2, 5, 11, 17]
    sources = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    mixed = torch.randn(4, 20, generator=generator, dtype=torch.float64) * 0.3
    mixed[:, planted] = torch.eye(4, dtype=torch.float64) * 3
    a = sources @ mixed
    gram = a.T @ a / 500 + 1e-6 * torch.eye(20, dtype=torch.float64)
    weight = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    found = narrowing(weight, gram, block=1)
    assert found.kept(4).tolist() == planted
    assert found.loss(4) < 1e-3 * found.loss(3)


def test_convolutions_count_every_position() -> None:
    _, gram, outputs = problem(1)
    kernel = torch.randn(5, 24, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = narrowing(kernel, gram, outputs[:5, :5])
    kept = found.kept(15)
    narrow = refitted(kernel, gram, kept)
    assert narrow.shape == (5, 15, 3, 3)
    by_position = sum(true_loss(kernel[:, :, i, j], gram, outputs[:5, :5], kept) for i in range(3) for j in range(3))
    assert found.loss(15) == pytest.approx(by_position, rel=1e-8)


def test_impossible_widths_are_refused() -> None:
    weight, gram, _ = problem(0)
    with pytest.raises(RankError, match="width"):
        narrowing(weight, gram).kept(0)


@pytest.mark.parametrize("n, gone", [(1, []), (7, [0]), (7, [6]), (300, [3, 4, 150, 299]), (300, [*range(0, 300, 2)])])
def test_what_stays_of_a_square_moves_together_in_its_memory(n: int, gone: list[int]) -> None:
    square = torch.randn(n, n)
    stay = torch.tensor([k for k in range(n) if k not in gone])
    wanted, place = square[stay][:, stay], square.data_ptr()
    found = _moved_together(square, stay)
    assert torch.equal(found, wanted)
    assert found.data_ptr() == place
    assert found.is_contiguous()


def test_many_blocks_leave_the_losses_of_the_layers_built_and_the_weight_as_it_was() -> None:
    """Units that are gone stay among the others for a while, and must not count."""
    weight, gram, outputs = problem(5, n=96, m=1)
    weight = weight.T.contiguous().T  # as the units lie while they go
    before, given = weight.clone(), gram.clone()
    found = narrowing(weight, gram, None, block=3, protected=5)
    assert torch.equal(weight, before)
    assert torch.equal(gram, given)
    assert sorted(found.order.tolist()) == list(range(96))
    whole = torch.eye(1, dtype=torch.float64)
    for width in (93, 80, 51, 17, 6, 5, 1):
        expected = true_loss(weight, gram, whole, found.kept(width))
        assert found.loss(width) == pytest.approx(expected, rel=1e-8, abs=1e-9)
    assert outputs.shape == (1, 1)
