"""How long work tells its progress: through an observer that the caller passes; the library never prints."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Observer", "Silent"]


@runtime_checkable
class Observer(Protocol):
    """What a progress bar, a log or a test implements."""

    def on_start(self, name: str, total: int | None) -> None:
        """Work called ``name`` begins; ``total`` steps are expected, None when unknown."""

    def on_step(self, n: int, **figures: float) -> None:
        """``n`` steps are done, counted from the first, also after a resume; ``figures`` such as the loss."""

    def on_end(self) -> None:
        """The work has ended, by success or by an error."""

    def message(self, text: str) -> None:
        """Say one sentence to the person who waits."""


class Silent:
    """The observer that does nothing; the default everywhere."""

    def on_start(self, name: str, total: int | None) -> None:
        """Do nothing."""

    def on_step(self, n: int, **figures: float) -> None:
        """Do nothing."""

    def on_end(self) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""
