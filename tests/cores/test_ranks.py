import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortrain.cores.ranks import count_params, max_ranks, resolve_ranks
from tensortrain.errors import RankError, ShapeError

modes_lists = st.lists(st.integers(1, 9), min_size=1, max_size=7).map(tuple)


@given(modes_lists)
def test_caps_are_the_smaller_product(modes):
    expected = tuple(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(len(modes) + 1))
    assert max_ranks(modes) == expected
    assert resolve_ranks(modes, "full") == expected


@given(modes_lists, st.integers(1, 100))
def test_an_int_is_clipped(modes, rank):
    assert resolve_ranks(modes, rank) == tuple(min(rank, cap) for cap in max_ranks(modes))
    assert resolve_ranks(modes, rank, clip=False) == resolve_ranks(modes, rank)


@given(modes_lists, st.floats(0.0, 1.0, exclude_min=True))
def test_a_share_is_the_largest_rank_that_fits(modes, share):
    ranks = resolve_ranks(modes, share)
    uniform = max(ranks)
    assert ranks == resolve_ranks(modes, uniform)
    if uniform > 1:
        assert count_params(modes, ranks) <= share * math.prod(modes)
    larger = resolve_ranks(modes, uniform + 1)
    if larger != ranks:
        assert count_params(modes, larger) > share * math.prod(modes)


@given(modes_lists)
def test_same_is_the_uniform_rank_closest_to_dense(modes):
    ranks, dense = resolve_ranks(modes, "same"), math.prod(modes)
    assert ranks == resolve_ranks(modes, max(ranks))
    gap = abs(count_params(modes, ranks) - dense)
    for other in {1, max(1, max(ranks) - 1), max(ranks) + 1}:
        assert gap <= abs(count_params(modes, resolve_ranks(modes, other)) - dense)


def test_words():
    assert resolve_ranks((28, 28), "same") == (1, 14, 1)
    assert resolve_ranks((28, 28), "full") == (1, 28, 1)
    with pytest.raises(RankError, match="'same' or 'full'"):
        resolve_ranks((4, 4), "all")


def test_tuples():
    assert resolve_ranks((4, 4, 4), (8, 2)) == (1, 4, 2, 1)
    assert resolve_ranks((4, 4, 4), (8, 2), clip=False) == (1, 8, 2, 1)
    assert resolve_ranks((4, 4, 4), (1, 8, 2, 1), clip=False) == (1, 8, 2, 1)
    assert resolve_ranks((4, 4, 4), [np.int64(3), 2]) == (1, 3, 2, 1)
    assert resolve_ranks((4,), ()) == (1, 1)
    assert resolve_ranks((4,), np.int64(3)) == (1, 1)


def test_thousands_of_modes():
    assert max(resolve_ranks((2,) * 2000, 7)) == 7
    assert max(resolve_ranks((2,) * 2000, 1e-300)) > 10**6


def test_published_counts():
    # Novikov et al. 2015: VGG fc6 25088 x 4096 at rank 4, and 1024 x 1024 as 4^5 at rank 8
    merged = [4 * n for n in (2, 7, 8, 8, 7, 4)]
    assert count_params(merged, resolve_ranks(merged, 4)) == 2016
    assert count_params([16] * 5, resolve_ranks([16] * 5, 8)) == 3328


@pytest.mark.parametrize(
    "rank, words",
    [
        (0, "at least 1: rank has 0"),
        (-3, "at least 1: rank has -3"),
        (0.0, r"\(0, 1\]: rank has 0.0"),
        (1.5, r"\(0, 1\]: rank has 1.5"),
        (float("nan"), r"\(0, 1\]: rank has nan"),
        ((2,), "1 entries, expected 2 inner ranks or 4"),
        ((2, 3, 4), "3 entries"),
        ((2, 3, 4, 1), "boundary ranks must be 1: rank has 2 and 1"),
        ((2, 0), "rank has 0"),
        ((2, 1.5), "whole number: rank has 1.5"),
        ("all", "rank has 'all', expected 'same'"),
        (True, "rank has True"),
        (None, "rank has None"),
    ],
)
def test_bad_ranks_say_what_is_wrong(rank, words):
    with pytest.raises(RankError, match=words):
        resolve_ranks((4, 5, 6), rank)


def test_no_modes():
    with pytest.raises(ShapeError, match="modes has length 0"):
        resolve_ranks((), 2)
