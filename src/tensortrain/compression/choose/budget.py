"""Reading a budget: how small the model has to be, in one number of one unit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from tensortrain.errors import BudgetError

__all__ = ["Budget", "BudgetLike", "Measure", "read_amount", "read_budget"]

BudgetLike = str | float | Mapping[str, Any]
Measure = Literal["params", "flops", "bytes", "time"]
_HOW = "Pass '20x', a share such as 0.05, {'params': n} or {'flops': n}"


@dataclass(frozen=True)
class Budget:
    """At most ``limit``: parameters or bytes of the whole model, flops per example, or predicted nanoseconds per batch.

    Attributes:
        rates: Where several measures are weighed against each other, what a unit of each costs; ``measure`` is then the
            first of them, and ``limit`` on the sum of these costs.
    """

    measure: Measure
    limit: int
    text: str
    rates: tuple[tuple[Measure, float], ...] = ()

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All that it bounds."""
        return tuple(measure for measure, _ in self.rates) or (self.measure,)

    def total(self, amount: Callable[[Measure], int]) -> int:
        """What amounts come to in the unit of the limit."""
        if not self.rates:
            return amount(self.measure)
        return math.ceil(sum(rate * amount(measure) for measure, rate in self.rates))


def read_budget(budget: BudgetLike, *, params: int, flops: int | None = None) -> Budget:
    """Turn what the user says into a limit.

    Args:
        budget: ``"20x"`` (so many times fewer parameters), a share in (0, 1], ``{"params": n}`` or
            ``{"flops": n}``; n may itself be a ratio such as ``"4x"``.
        params, flops: What the model has now.

    Raises:
        BudgetError: The budget cannot be read, asks for growth, or needs figures that are not known.
    """
    if isinstance(budget, Mapping):
        if len(budget) != 1:
            raise BudgetError(f"a budget must name one measure: found {dict(budget)!r}. {_HOW}.")
        measure, value = next(iter(budget.items()))
        return _measured(str(measure), value, params=params, flops=flops)
    return Budget("params", _limit(budget, params, "parameters"), str(budget))


def _measured(measure: str, value: Any, *, params: int, flops: int | None) -> Budget:
    text = f"{value} {measure}"
    if measure == "params":
        return Budget("params", _limit(value, params, "parameters", absolute=True), text)
    if measure == "flops":
        if flops is None:
            raise BudgetError(
                "a budget in flops needs to know the inputs: none were given. Pass example_inputs= or data=."
            )
        return Budget("flops", _limit(value, flops, "flops", absolute=True), text)
    raise BudgetError(f"a budget must name 'params' or 'flops': found {measure!r}. {_HOW}.")


def read_amount(value: Any, now: int, unit: str) -> int:
    """The limit that a number, a share or a ratio stands for, where there are ``now``.

    Raises:
        BudgetError: It cannot be read, or asks for growth.
    """
    return _limit(value, now, unit, absolute=True)


def _limit(value: Any, now: int, unit: str, *, absolute: bool = False) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*[xX]?\s*", value)
        if not match:
            raise BudgetError(f"a budget must be a ratio such as '20x': found {value!r}. {_HOW}.")
        ratio = float(match.group(1))
        if ratio < 1:
            raise BudgetError(f"a ratio must be at least 1: found {value!r}, which asks for growth. {_HOW}.")
        return math.floor(now / ratio)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise BudgetError(f"a budget must be a number or a ratio: found {value!r}. {_HOW}.")
    number = float(value)
    if absolute and (isinstance(value, Integral) or number > 1):
        if not 1 <= number <= now:
            raise BudgetError(f"a budget must lie between 1 and the {now:,} {unit} there are: found {value}. {_HOW}.")
        return int(number)
    if not 0 < number <= 1:
        raise BudgetError(f"a share must lie in (0, 1]: found {value}. {_HOW}.")
    return math.floor(now * number)
