"""The experiments that can be run again: what each asks, what was published, what is recorded, how long it takes.

Each folder of ``experiments/`` says so in its ``about.json``, a list of cards; figures are read from its records,
never written by hand. A wheel carries the folder as ``tensortrain/_experiments``, a checkout has it beside ``src/``.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensortrain
from tensortrain.errors import DataError

__all__ = ["INSTALLED", "MISSING", "Card", "Figure", "experiments_folder", "find_cards"]

MISSING = "-"  # in place of a figure that a record doesn't have
INSTALLED = "_experiments"  # the folder within an installed package


@dataclass(frozen=True)
class Figure:
    """A figure of a record.

    Attributes:
        name: What it is.
        at: The way to it: keys; ``{"key": value}`` for those of a list that have it; ``"*"`` for every one. Several
            values are shown as mean and standard deviation, as is one that has another beside it called ``.._std``.
        unit: "%" shows a share as percent; else it is put behind the number.
    """

    name: str
    at: Sequence[Any]
    unit: str = ""

    def text(self, record: Any) -> str:
        """The figure as a record has it, such as ``88.54 ± 0.03 %``."""
        found = [
            (parent, key) for parent, key in _follow(record, list(self.at)) if isinstance(parent[key], int | float)
        ]
        if not found:
            return MISSING
        values = [float(parent[key]) for parent, key in found]
        parent, key = found[0]
        spread = statistics.stdev(values) if len(values) > 1 else None
        if len(values) == 1 and isinstance(key, str):
            spread = parent.get(key.removesuffix("_mean") + "_std")
        return self._shown(statistics.mean(values), spread)

    def _shown(self, value: float, spread: float | None) -> str:
        if self.unit == "%":
            numbers = [f"{100 * one:.2f}" for one in (value, spread or None) if one is not None]
        else:
            numbers = [f"{one:.{digits}g}" for one, digits in ((value, 4), (spread or None, 2)) if one is not None]
        return " ± ".join(numbers) + (f" {self.unit}" if self.unit else "")


def _follow(found: Any, way: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The places that a way leads to, each as a container and a key."""
    step, rest = way[0], way[1:]
    if step == "*":
        keys = list(range(len(found)) if isinstance(found, list) else found if isinstance(found, dict) else ())
    elif isinstance(step, dict):
        rows = found if isinstance(found, list) else []
        keys = [i for i, row in enumerate(rows) if all(row.get(name) == value for name, value in step.items())]
    else:
        inside = isinstance(found, dict) and step in found
        keys = [step] if inside or (isinstance(found, list) and step in range(-len(found), len(found))) else []
    for key in keys:
        if rest:
            yield from _follow(found[key], rest)
        else:
            yield found, key


@dataclass(frozen=True)
class Card:
    """An experiment as its ``about.json`` tells it.

    Attributes:
        name: What ``tensortrain reproduce`` calls it.
        system: What of the field it is about.
        question: One sentence.
        published: What others published, with the source; None where nobody did.
        figures: Of the record, the most telling first.
        minutes: Of the whole run, on two cores.
        quick_minutes: Of the quick one.
        quick: What the quick run has otherwise in its config, merged into it (RFC 7396).
        part: The key of the config that holds its seeds and settings; None for all of it.
        script: In its folder.
        arguments: Of the script, besides where things lie.
        record: The file in its folder that its figures are read from.
        takes_data: Whether the script reads a data set that ``--data`` can name.
        needs: Packages to import, each with what installs it.
        folder: Where it lies.
    """

    name: str
    system: str
    question: str
    figures: list[Figure]
    minutes: float
    quick_minutes: float
    folder: Path
    published: str | None = None
    quick: dict[str, Any] = field(default_factory=dict)
    quick_arguments: list[str] | None = None
    part: str | None = None
    script: str = "run.py"
    config: str = "config.json"
    arguments: list[str] = field(default_factory=list)
    record: str = "results.json"
    takes_data: bool = False
    needs: dict[str, str] = field(default_factory=dict)

    def recorded(self) -> Any:
        """The record of the project; an empty one where there is none yet."""
        path = self.folder / self.record
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def check_needs(self) -> None:
        """Raises:
        DataError: A package is missing; says what installs it.
        """
        for package, requirement in self.needs.items():
            if importlib.util.find_spec(package) is None:
                raise DataError(
                    f"{self.name} needs the package {package}, which is not installed. Run: pip install {requirement}"
                )


def experiments_folder() -> Path:
    """Where the experiments lie.

    Raises:
        DataError: This installation has none.
    """
    package = Path(tensortrain.__file__).parent
    for folder in (package.parents[1] / "experiments", package / INSTALLED):
        if (folder / "study.py").is_file():
            return folder
    raise DataError(
        "the experiments must lie beside the package: this installation has none. Clone the repository and install it "
        "with pip install -e ."
    )


def find_cards(folder: Path | None = None) -> dict[str, Card]:
    """All experiments by name, in the order of their folders."""
    cards: dict[str, Card] = {}
    for path in sorted((folder or experiments_folder()).glob("*/about.json")):
        for told in json.loads(path.read_text(encoding="utf-8")):
            figures = [Figure(**one) for one in told.pop("figures")]
            cards[told["name"]] = Card(**told, figures=figures, folder=path.parent)
    return cards
