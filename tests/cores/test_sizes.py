"""Sizes as numbers and as tensors tell the same."""

import math

import pytest
import torch

from tensortrain.cores.sizes import any_above, larger, least_of, nothing_like, root_sum, worst_of

NUMBERS = [3.0, 0.0, 4.0]


@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_numbers_and_tensors_agree(batch):
    tensors = [torch.full(batch, x, dtype=torch.float64) for x in NUMBERS]
    assert root_sum(NUMBERS) == 5.0
    assert torch.equal(root_sum(tensors), torch.full(batch, 5.0, dtype=torch.float64))
    assert torch.equal(root_sum([*tensors[:2], 4.0]), root_sum(tensors))
    assert torch.equal(root_sum(torch.stack(tensors)), root_sum(tensors))
    assert worst_of(NUMBERS) == NUMBERS
    assert worst_of([tensors[0], 0.0, tensors[2]]) == ([0.0] * 3 if 0 in batch else NUMBERS)
    for given in (tensors, torch.stack(tensors)):
        assert any_above(given, 3.5) is (0 not in batch)
        assert any_above(given, 4.0) is False
    assert torch.equal(nothing_like(tensors[0]), torch.zeros(batch, dtype=torch.float64))


def test_numbers():
    assert any_above(NUMBERS, 3.5)
    assert not any_above(NUMBERS, 4.0)
    assert any_above(math.inf, 1e300)
    assert not any_above(math.nan, 0.0)
    assert larger([1.0, 5.0], [2.0, 4.0]) == [2.0, 5.0]
    assert torch.equal(torch.as_tensor(larger(torch.tensor([1.0, 5.0]), [2.0, 4.0])), torch.tensor([2.0, 5.0]))
    assert least_of(2.0) == 2.0
    assert least_of(torch.tensor([2.0, 1.0])) == 1.0
    assert nothing_like(3.0) == 0.0
    assert root_sum([]) == 0.0


def test_the_worst_member_counts():
    assert worst_of([torch.tensor([1.0, 3.0]), 2.0]) == [3.0, 2.0]
    assert any_above([torch.tensor([1.0, 3.0]), 0.0], 2.0)


def test_numbers_beside_a_tensor_keep_their_digits():
    found = larger([1.0 + 1e-12, 1e200], torch.ones(2, dtype=torch.float64))
    assert found.tolist() == [1.0 + 1e-12, 1e200]
