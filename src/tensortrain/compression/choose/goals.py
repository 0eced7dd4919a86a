"""What a budget asks for, where it names more than one number: sizes, a time, a loss of the user's own figure.

Sizes are known from shapes, so one allocation keeps them. A time and a figure have to be measured on the compressed
model; ``find_plan`` looks among plans for one that holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from tensortrain.compression.choose.budget import Budget, BudgetLike, Measure, read_amount, read_budget
from tensortrain.errors import BudgetError

__all__ = ["Goals", "Sizes", "read_goals"]

_COUNTED: Mapping[str, str] = {"params": "parameters", "flops": "flops", "bytes": "bytes"}
_MEASURED = ("latency_ms", "batch_size", "max_metric_drop")
_HOW = (
    "Pass '20x', a share such as 0.05, or a dict with some of 'params', 'flops', 'bytes', 'latency_ms' (with "
    "'batch_size') and 'max_metric_drop'"
)
_ONE_EXAMPLE = 1  # what is timed where nobody says how many: one request


@dataclass(frozen=True)
class Sizes:
    """What a model has now; ``flops`` is ``None`` where its inputs are not known."""

    params: int
    n_bytes: int
    flops: int | None = None

    def with_more(self, beside: Iterable[tuple[int, int]]) -> Sizes:
        """The same with further parameters and bytes."""
        more = list(beside)
        return replace(
            self, params=self.params + sum(n for n, _ in more), n_bytes=self.n_bytes + sum(n for _, n in more)
        )


@dataclass(frozen=True)
class Goals:
    """What has to hold, all at once.

    Attributes:
        counted: Limits on parameters, flops and bytes, which shapes tell.
        latency_ms: Most milliseconds of one forward pass at ``batch_size``.
        metric_drop: By how much the user's figure may fall, in its own unit.
        text: The budget as it was asked for.
    """

    counted: tuple[Budget, ...]
    text: str
    latency_ms: float | None = None
    batch_size: int = _ONE_EXAMPLE
    metric_drop: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether shapes alone cannot tell that they hold."""
        return self.latency_ms is not None or self.metric_drop is not None

    def on_the_way(self, way: float, now: Sizes) -> Goals:
        """The same goals after a part of the way to them, in equal ratios; the figure is left for the end.

        Args:
            way: 1 is the end; 0.5 takes the square root of what the whole way takes.
        """
        if way >= 1:
            return self
        if not self.counted:
            raise BudgetError(
                f"a way in stages must have a size to go to: the budget is {self.text}, expected parameters, bytes or "
                "flops in it. Add one of these, or pass n_stages=1."
            )
        start = {"params": now.params, "bytes": now.n_bytes, "flops": now.flops}
        limits = tuple(_part_of(each, start[each.measure], way) for each in self.counted)
        return Goals(limits, f"{way:.3g} of the way to {self.text}")


def _part_of(budget: Budget, now: int | None, way: float) -> Budget:
    assert now is not None
    limit = math.floor(now ** (1 - way) * budget.limit**way)
    return Budget(budget.measure, max(budget.limit, limit), f"{limit} {budget.measure}")


def read_goals(
    budget: BudgetLike, now: Sizes, *, can_evaluate: bool = False, can_run: bool = True, batch_size: int | None = None
) -> Goals:
    """Turn what the user says into what has to hold.

    Args:
        budget: As ``plan_compression`` takes it.
        can_evaluate, can_run: Whether a function that judges the model, and inputs to run it with, are there.
        batch_size: What speed is judged at, where the budget does not say.

    Raises:
        BudgetError: It cannot be read, asks for growth, or needs what is not there.
    """
    if not isinstance(budget, Mapping):
        found = read_budget(budget, params=now.params)
        return Goals((found,), found.text)
    asked = {str(key): value for key, value in budget.items()}
    _check_names(asked)
    latency = _latency(asked.get("latency_ms"), can_run) if "latency_ms" in asked else None
    drop = _drop(asked.get("max_metric_drop"), can_evaluate) if "max_metric_drop" in asked else None
    counted = tuple(_counted(name, asked[name], now) for name in _COUNTED if name in asked)
    size = asked.get("batch_size", batch_size or _ONE_EXAMPLE)
    return Goals(counted, _told(asked), latency, _whole(size), drop)


def _check_names(asked: Mapping[str, Any]) -> None:
    unknown = [name for name in asked if name not in (*_COUNTED, *_MEASURED)]
    if unknown or not asked:
        found = unknown[0] if unknown else dict(asked)
        raise BudgetError(f"a budget must name 'params' or 'flops' or what else it bounds: found {found!r}. {_HOW}.")
    if "batch_size" in asked and "latency_ms" not in asked:
        raise BudgetError(
            "a batch size in a budget must belong to a time: found 'batch_size' without 'latency_ms'. Add latency_ms, "
            "or pass batch_size= beside the budget."
        )


def _counted(name: str, value: Any, now: Sizes) -> Budget:
    if name == "flops" and now.flops is None:
        raise BudgetError("a budget in flops needs to know the inputs: none were given. Pass example_inputs= or data=.")
    measures: dict[str, tuple[Measure, int]] = {
        "params": ("params", now.params),
        "bytes": ("bytes", now.n_bytes),
        "flops": ("flops", now.flops or 0),
    }
    measure, amount = measures[name]
    return Budget(measure, read_amount(value, amount, _COUNTED[name]), f"{value} {name}")


def _latency(value: Any, can_run: bool) -> float:
    if not _is_number(value) or not 0 < value < math.inf:
        raise BudgetError(f"a time must be a positive number of milliseconds: latency_ms has {value!r}. {_HOW}.")
    if not can_run:
        raise BudgetError("a budget in time needs inputs to run the model with: none were given. Pass data=.")
    return float(value)


def _drop(value: Any, can_evaluate: bool) -> float:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise BudgetError(
            f"a drop must be a number that is not negative: max_metric_drop has {value!r}, in the unit of the figure "
            "that evaluate gives. Pass such as 0.01."
        )
    if not can_evaluate:
        raise BudgetError(
            "a budget in the model's figure needs a function that gives it: max_metric_drop is there without "
            "evaluate. Pass evaluate=, a function model -> figure that is larger for better models."
        )
    return float(value)


def _whole(size: Any) -> int:
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise BudgetError(f"a batch size must be a positive whole number: batch_size has {size!r}. Pass 1 or more.")
    return int(size)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _told(asked: Mapping[str, Any]) -> str:
    """As short as ``20x params`` where it is one number."""
    counted = [f"{value} {name}" for name, value in asked.items() if name in _COUNTED]
    if "latency_ms" in asked:
        counted.append(
            f"{asked['latency_ms']} ms" + (f" at batch {asked['batch_size']}" if "batch_size" in asked else "")
        )
    if "max_metric_drop" in asked:
        counted.append(f"a drop of at most {asked['max_metric_drop']}")
    return " and ".join(counted)
