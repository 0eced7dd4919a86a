"""What a plan is asked for: the common options of ``plan_compression`` and ``compress`` as one record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tensortrain.compression.choose.budget import BudgetLike
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS
from tensortrain.compression.choose.structure import Search
from tensortrain.errors import CheckpointError, KindError
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.evaluation import Evaluate
from tensortrain.train.outputs import Output, check_output
from tensortrain.train.task import Task, TaskName, check_task_name

__all__ = ["PlanOptions"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The keywords of ``plan_compression``, which explains them; names are checked when it is made.

    ``way`` is how much of the way to the budget is gone, in equal ratios: less than all for a stage before the last.
    """

    budget: BudgetLike
    data: Iterable[Any] | None = None
    example_inputs: Any = None
    formats: Sequence[str] = DEFAULT_FORMATS
    include: Sequence[str] | str | None = None
    exclude: Sequence[str] | str | None = None
    allow_slower: bool = False
    batch_size: int | None = None
    n_batches: int = 16
    will_heal: bool | Literal["long"] = False
    task: TaskName | Task | None = None
    output: Output | None = None
    observer: Observer = field(default_factory=Silent)
    evaluate: Evaluate | None = None
    way: float = 1.0
    search: Search | None = None
    work_dir: str | Path | None = None
    measure_losses: bool = False

    def __post_init__(self) -> None:
        if self.work_dir is not None and (not isinstance(self.work_dir, (str, Path)) or Path(self.work_dir).is_file()):
            raise CheckpointError(
                f"a planning must be kept in a folder: work_dir has {self.work_dir!r}, expected the path of a folder. "
                "Name one that is there or can be made."
            )
        if self.search is not None and self.search not in get_args(Search):
            raise KindError(
                f"search must be of a known kind: found {self.search!r}, expected one of {get_args(Search)} or None. "
                "Leave it out for the usual menu."
            )
        if self.evaluate is not None and not callable(self.evaluate):
            raise KindError(
                f"evaluate must be a function: found {type(self.evaluate).__name__}, expected model -> figure. Pass "
                "one."
            )
        check_output(self.output)
        check_task_name(self.task.kind if isinstance(self.task, Task) else self.task)

    @property
    def known_task(self) -> Task | None:
        """The task, where it is more than a name."""
        return self.task if isinstance(self.task, Task) else None
