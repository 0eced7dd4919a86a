"""The result of every approximation: a value, the error promised for it, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["Approximation", "Info"]

T_co = TypeVar("T_co", covariant=True)


class Info(dict[str, Any]):
    """A dict whose entries also read as attributes: ``info["n_evals"]`` is ``info.n_evals``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"info has no entry {name!r}, it holds {sorted(self)}") from None


@dataclass(frozen=True)
class Approximation(Generic[T_co]):
    """A value that stands for something larger, with the relative error promised for it.

    Attributes:
        value: What was built, for instance a ``TensorTrain``.
        rel_error_bound: Promised relative Frobenius error, dimensionless; ``None`` where there is
            none.
        info: How it was built (``method``, ``eps``, ``n_evals`` ...), also readable as attributes.

    Example:
        >>> Approximation("value", 1e-8, {"method": "svd"}).info.method
        'svd'
    """

    value: T_co
    rel_error_bound: float | None = None
    info: Mapping[str, Any] = field(default_factory=Info)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", Info(self.info))
