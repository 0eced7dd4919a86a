"""The allocation against brute force, on menus small enough to try everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortrain.compression.choose.allocate import Option, allocate
from tensortrain.errors import BudgetError

OPTIONS = st.builds(Option, st.integers(0, 40), st.integers(0, 60).map(lambda n: n / 4))
MENUS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=4)


def cost(picks) -> int:
    return sum(pick.cost for pick in picks)


def loss(picks) -> float:
    return sum(pick.loss for pick in picks)


def best_loss(menus, budget: int) -> float:
    return min(loss(picks) for picks in itertools.product(*menus) if cost(picks) <= budget)


def largest_step(menus) -> float:
    """The largest gain between neighbours on the lower convex hull of a menu."""
    gains = [0.0]
    for menu in menus:
        here = min(menu, key=lambda o: (o.cost, o.loss))
        while better := [o for o in menu if o.cost > here.cost and o.loss < here.loss]:
            there = min(better, key=lambda o: ((o.loss - here.loss) / (o.cost - here.cost), o.cost))
            gains.append(here.loss - there.loss)
            here = there
    return max(gains)


def cheapest(menus) -> int:
    return sum(min(option.cost for option in menu) for menu in menus)


@given(menus=MENUS, extra=st.integers(0, 80))
def test_within_one_step_of_the_optimum_and_never_above_the_budget(menus, extra) -> None:
    budget = cheapest(menus) + extra
    picks = allocate(menus, budget)
    assert all(pick in menu for pick, menu in zip(picks, menus, strict=True))
    assert cost(picks) <= budget
    assert loss(picks) <= best_loss(menus, budget) + largest_step(menus) + 1e-9


@given(menus=MENUS)
def test_a_budget_for_everything_buys_the_least_loss(menus) -> None:
    budget = sum(max(option.cost for option in menu) for menu in menus)
    assert loss(allocate(menus, budget)) == pytest.approx(best_loss(menus, budget))


def convex_menu(steps: list[int], unit: int) -> list[Option]:
    """Equal costs with falling gains: every option lies on the hull."""
    gains = sorted(steps, reverse=True)
    return [Option(k * unit, float(sum(gains) - sum(gains[:k]))) for k in range(len(gains) + 1)]


CONVEX = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=4)


@given(steps=CONVEX, budget=st.integers(0, 60))
def test_unit_steps_on_convex_menus_are_solved_exactly(steps, budget) -> None:
    menus = [convex_menu(one, 3) for one in steps]
    assert loss(allocate(menus, budget)) == pytest.approx(best_loss(menus, budget))


@given(
    menus=st.lists(
        st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 9)), min_size=1, max_size=4
    ),
    budgets=st.tuples(st.integers(0, 90), st.integers(0, 90)),
)
def test_more_budget_never_loses_on_convex_menus(menus, budgets) -> None:
    built = [convex_menu(*one) for one in menus]
    small, large = sorted(budgets)
    assert loss(allocate(built, large)) <= loss(allocate(built, small)) + 1e-9


@given(menus=MENUS, extras=st.tuples(st.integers(0, 80), st.integers(0, 80)))
def test_more_budget_loses_at_most_one_step_on_any_menus(menus, extras) -> None:
    small, large = (cheapest(menus) + extra for extra in sorted(extras))
    assert loss(allocate(menus, large)) <= loss(allocate(menus, small)) + largest_step(menus) + 1e-9


def test_spends_where_it_helps_most() -> None:
    steep = [Option(1, 100.0, "small"), Option(10, 1.0, "large")]
    flat = [Option(1, 2.0, "small"), Option(10, 1.0, "large")]
    assert [pick.choice for pick in allocate([flat, steep, flat], 12)] == ["small", "large", "small"]


def test_what_is_left_over_is_spent_off_the_hull() -> None:
    # (6, 5.5) lies above the line from (0, 10) to (10, 0), but ten do not fit.
    menu = [Option(0, 10.0), Option(6, 5.5), Option(10, 0.0)]
    assert allocate([menu], 9) == [menu[1]]


def test_a_step_too_large_does_not_keep_a_layer_from_smaller_ones() -> None:
    # On the hull the loud layer goes from 1 to 100 at once; 60 of the 70 to spend help it most.
    loud = [Option(1, 100.0), Option(60, 45.0), Option(100, 0.0)]
    faint = [Option(1, 1.0), Option(30, 0.5), Option(60, 0.1)]
    assert allocate([faint, loud], 71) == [faint[0], loud[1]]


def test_dominated_options_are_never_taken() -> None:
    good, bad = Option(3, 1.0, "good"), Option(5, 2.0, "bad")
    assert allocate([[Option(0, 9.0), bad, good]], 100) == [good]


def test_a_budget_below_the_cheapest_is_an_error() -> None:
    menus = [[Option(5, 1.0), Option(7, 0.0)], [Option(6, 1.0)]]
    assert allocate(menus, 11) == [menus[0][0], menus[1][0]]
    with pytest.raises(BudgetError, match="need at least 11, expected at most 10"):
        allocate(menus, 10)
