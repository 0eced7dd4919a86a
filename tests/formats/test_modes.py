"""Mode shapes: products, order, balance, padding."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.errors import ShapeError
from tensortrain.formats import default_order, suggest_modes, suggest_padded_modes

sizes = st.integers(1, 200_000)
orders = st.one_of(st.none(), st.integers(1, 8))


@given(n=sizes, d=orders)
@settings(max_examples=150)
def test_factors_multiply_to_the_size_in_ascending_order(n: int, d: int | None) -> None:
    modes = suggest_modes(n, d)
    assert math.prod(modes) == n
    assert list(modes) == sorted(modes)
    assert len(modes) == (default_order(n) if d is None else d)
    assert suggest_modes(n, d) == modes


@given(n=st.integers(1, 400), d=st.integers(1, 4))
@settings(max_examples=60)
def test_no_other_factors_are_more_balanced(n: int, d: int) -> None:
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    every = [c for c in itertools.combinations_with_replacement(divisors, d) if math.prod(c) == n]
    assert sum(suggest_modes(n, d)) == min(map(sum, every))


@given(n=sizes, d=st.one_of(st.none(), st.integers(1, 6)))
@settings(max_examples=100)
def test_padded_factors_reach_the_size(n: int, d: int | None) -> None:
    modes = suggest_padded_modes(n, d)
    order = default_order(n) if d is None else d
    assert math.prod(modes) >= n
    assert len(modes) == order
    assert list(modes) == sorted(modes)
    # No mode is above what is needed: one less would fall short of the size.
    assert (modes[-1] - 1) * math.prod(modes[:-1]) < n


@given(n=st.integers(1000, 200_000), d=st.integers(2, 4))
@settings(max_examples=60)
def test_padding_is_small_and_balanced(n: int, d: int) -> None:
    modes = suggest_padded_modes(n, d)
    assert math.prod(modes) <= 1.06 * n
    root = n ** (1 / d)
    assert root / 1.6 - 1 <= modes[0]
    assert modes[-1] <= 1.6 * root + 2


@pytest.mark.parametrize(
    "n, d, modes",
    [
        (4096, 3, (16, 16, 16)),
        (768, 3, (8, 8, 12)),
        (10, 3, (1, 2, 5)),
        (13, 2, (1, 13)),
        (1, 4, (1, 1, 1, 1)),
        (7, 1, (7,)),
        (2**10, 10, (2,) * 10),
    ],
)
def test_known_shapes(n: int, d: int, modes: tuple[int, ...]) -> None:
    assert suggest_modes(n, d) == modes


@pytest.mark.parametrize("n", [30522, 50257, 32000, 25000, 17200, 128256])
def test_vocabularies(n: int) -> None:
    modes = suggest_padded_modes(n, 3)
    assert n <= math.prod(modes) <= 1.02 * n
    assert modes[2] - modes[0] <= 0.5 * modes[0]


@given(n=sizes)
@settings(max_examples=50)
def test_default_order_keeps_modes_small(n: int) -> None:
    assert 2 <= default_order(n) <= 6
    assert n ** (1 / default_order(n)) <= 45


@pytest.mark.parametrize("n, d", [(0, None), (-4, 2), (12, 0), (12, -1), (0, 0)])
@pytest.mark.parametrize("suggest", [suggest_modes, suggest_padded_modes])
def test_sizes_and_orders_below_one_are_refused(suggest: object, n: int, d: int | None) -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        suggest(n, d)  # type: ignore[operator]
