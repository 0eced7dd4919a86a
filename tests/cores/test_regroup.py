"""Modes of lists of cores: merged, split, and put in another order."""

from __future__ import annotations

import pytest
import torch

from tensortrain.cores.algebra import contract
from tensortrain.cores.regroup import permuted, reshaped
from tensortrain.cores.setting import region_of
from tensortrain.cores.unfold import as_left
from tensortrain.errors import KindError
from tensortrain.testing import is_left_orthogonal, rel_error

RANKS = (1, 3, 4, 2, 1)


@pytest.fixture
def cores(generator):
    sizes = zip(RANKS[:-1], (2, 3, 4, 3), RANKS[1:], strict=True)
    return [torch.randn(*size, dtype=torch.float64, generator=generator) for size in sizes]


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_permutation_leaves_its_center_where_it_says(cores, order):
    found, (lo, hi) = permuted(cores, (0, 3), order, None)
    assert rel_error(contract(found), contract(cores).permute(order)) <= 1e-13
    assert lo == hi
    assert all(is_left_orthogonal(core) for core in found[:lo])
    assert all(is_left_orthogonal(core.transpose(0, 2)) for core in found[hi + 1 :])
    assert as_left(found[lo]).norm() > 0


def test_the_order_as_it_is_costs_nothing(cores):
    assert permuted(cores, (0, 3), (0, 1, 2, 3), None)[0] is cores


def test_splits_and_merges(cores):
    found, has_split = reshaped(cores, (6, 2, -1, 3))
    assert has_split
    assert rel_error(contract(found).reshape(-1), contract(cores).reshape(-1)) <= 1e-14


def test_a_train_is_set_in_a_box_only(cores):
    device = cores[0].device
    box = region_of((0, slice(None), slice(0, 2), slice(None)), (2, 3, 4, 3), device)
    exact = contract(cores).clone()
    exact[0, :, :2] = 0
    assert rel_error(contract(box.without(cores)), exact) <= 1e-14
    points = region_of(([0, 1], [0, 1], [0, 1], [0, 1]), (2, 3, 4, 3), device)
    with pytest.raises(KindError, match="set in a box"):
        points.filled_by_train(cores)
