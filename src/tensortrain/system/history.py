"""What a long run has seen: one entry for each sweep or epoch, under the names of the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["History"]


class History:
    """Figures of a run in order, read as attributes: ``history.loss`` is the list of the losses, the first one first.

    Example:
        >>> history = History()
        >>> history.append(loss=0.5, ranks=(1, 2, 1))
        >>> history.append(loss=0.25, ranks=(1, 3, 1))
        >>> history.loss
        [0.5, 0.25]
        >>> len(history), history.last("ranks")
        (2, (1, 3, 1))
    """

    def __init__(self, columns: Mapping[str, list[Any]] | None = None, stop: str | None = None) -> None:
        self.columns: dict[str, list[Any]] = {name: list(entries) for name, entries in (columns or {}).items()}
        self.stop = stop  # why the run ended, once it has

    def append(self, **figures: Any) -> None:
        """Add the figures of one sweep or epoch; where a name has none, its list holds ``None``."""
        n = len(self)
        for name in dict.fromkeys((*self.columns, *figures)):
            self.columns.setdefault(name, [None] * n).append(figures.get(name))

    def last(self, name: str) -> Any:
        """The newest figure of that name; ``None`` before the first entry."""
        entries = self.columns.get(name)
        return entries[-1] if entries else None

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def __getattr__(self, name: str) -> list[Any]:
        columns = self.__dict__.get("columns", {})  # absent while a copy is being made
        if name not in columns:
            raise AttributeError(f"this history has no {name!r}: it holds {', '.join(columns) or 'no figures yet'}.")
        found: list[Any] = columns[name]
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and (self.columns, self.stop) == (other.columns, other.stop)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        ends = f", stopped by {self.stop}" if self.stop else ""
        return f"History({len(self)} entries of {', '.join(self.columns)}{ends})"

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each sweep or epoch, with the figures it has."""
        entries = ({name: column[k] for name, column in self.columns.items()} for k in range(len(self)))
        return [{name: value for name, value in row.items() if value is not None} for row in entries]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> History:
        """What ``rows`` gave."""
        history = cls()
        for row in rows:
            history.append(**row)
        return history

    def to_state(self) -> dict[str, Any]:
        """Plain data, as a checkpoint keeps it."""
        return {"columns": {name: list(entries) for name, entries in self.columns.items()}, "stop": self.stop}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """What ``to_state`` gave."""
        return cls(state["columns"], state["stop"])
