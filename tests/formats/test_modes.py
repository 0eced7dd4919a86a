"""Mode shapes: products, order, balance, padding."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.errors import ShapeError
from tensortrain.formats import default_order, modes, search_modes, suggest_modes, suggest_padded_modes

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


@given(n=st.integers(1, 3000), d=st.integers(1, 5))
@settings(max_examples=100)
def test_of_equally_balanced_factors_those_with_the_smallest_large_one_are_taken(n: int, d: int) -> None:
    every = _ascending_factors(n, d)
    assert suggest_modes(n, d) == min(every, key=lambda modes: (sum(modes), modes[::-1]))


def _ascending_factors(n: int, d: int, least: int = 1) -> list[tuple[int, ...]]:
    if d == 1:
        return [(n,)] if n >= least else []
    first = [k for k in range(least, n + 1) if n % k == 0 and k**d <= n]
    return [(k, *rest) for k in first for rest in _ascending_factors(n // k, d - 1, k)]


# -- padding -------------------------------------------------------------------------------------------


@given(n=st.integers(1, 10**9), d=st.integers(1, 10), pad=st.sampled_from([True, False, 0.0, 1e-7, 0.001, 0.02, 0.5]))
@settings(max_examples=200)
def test_padded_modes_reach_the_size_within_their_share(n: int, d: int, pad: bool | float) -> None:
    found = suggest_modes(n, d, pad=pad)
    product = math.prod(found)
    assert len(found) == d
    assert list(found) == sorted(found)
    assert product >= n
    if pad is not True:
        assert product <= n * (1 + pad)
    exact = suggest_modes(n, d)
    assert found == exact or sum(found) * product < 0.9 * sum(exact) * n  # it saves a tenth, or it is not done
    # Nothing is padded for nothing: one less in the last mode would fall short of the size.
    assert found == exact or math.prod(found[:-1]) * (found[-1] - 1) < n


@given(n=st.integers(2, 400), d=st.integers(2, 4))
@settings(max_examples=60)
def test_no_other_padded_modes_are_cheaper(n: int, d: int) -> None:
    every = [(sum(c) * math.prod(c), c) for c in itertools.combinations_with_replacement(range(1, 26), d)]
    cheapest = min(score for score, c in every if math.prod(c) >= n)
    found, exact = suggest_modes(n, d, pad=True), suggest_modes(n, d)
    if found == exact:
        assert cheapest >= 0.9 * sum(exact) * n
    else:
        assert sum(found) * math.prod(found) == cheapest


@pytest.mark.parametrize(
    "n, d, exact, padded",
    [
        (30522, 3, (2, 3, 5087), (29, 31, 34)),
        (50257, 3, (1, 29, 1733), (34, 37, 40)),
        (13824, 3, (24, 24, 24), (24, 24, 24)),
        (4099, 3, (1, 1, 4099), (12, 18, 19)),
        (1536, 3, (8, 12, 16), (8, 12, 16)),
        (768, 3, (8, 8, 12), (8, 8, 12)),
    ],
)
def test_table_of_the_documentation(n: int, d: int, exact: tuple[int, ...], padded: tuple[int, ...]) -> None:
    assert suggest_modes(n, d) == exact
    assert suggest_modes(n, d, pad=True) == padded


@pytest.mark.parametrize("n", [735134400, 999999937, 10**9, 2 * 499999993])
@pytest.mark.parametrize("d", [3, 6, 10])
def test_effort_is_bounded(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most factors, a prime, the most equal factors, a hard remainder: no size makes the search explode."""
    seen = []
    extend = modes._PaddedSearch._extend
    monkeypatch.setattr(modes._PaddedSearch, "_extend", lambda *args: (seen.append(1), extend(*args))[1])
    modes._exact.cache_clear()
    for pad in (True, 1e-8):
        suggest_modes(n, d, pad=pad)
    assert len(seen) < 200_000


@pytest.mark.parametrize("pad", [-0.1, math.inf, math.nan])
def test_shares_of_padding_outside_their_range_are_refused(pad: float) -> None:
    with pytest.raises(ShapeError, match="share of padding"):
        suggest_modes(10, 2, pad=pad)


def test_search_keeps_what_nothing_beats() -> None:
    found = search_modes(768, 3072, rank=8, batch=64)
    assert all(math.prod(one.out_modes) == 768 and math.prod(one.in_modes) == 3072 for one in found)
    assert all(one.padding == 0 for one in found)
    counts, times = [one.n_params for one in found], [one.predicted_s for one in found]
    assert counts == sorted(counts)
    assert times == sorted(times, reverse=True)
    assert found[0].n_params == sum(
        r * m * n * s
        for r, m, n, s in zip(found[0].ranks, found[0].out_modes, found[0].in_modes, found[0].ranks[1:], strict=False)
    )
    tried = search_modes(768, 3072, rank=8, batch=64, orders=(3,))
    assert min(one.n_params for one in found) <= min(one.n_params for one in tried)


def test_search_pads_where_asked() -> None:
    plain, padded = search_modes(4099, 4099, rank=4), search_modes(4099, 4099, rank=4, pad=True)
    assert {one.padding for one in plain} == {0.0}
    assert 0 < padded[0].padding < 0.12
    assert padded[0].n_params < plain[0].n_params / 10


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
