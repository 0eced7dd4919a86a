"""Experiments run again: in full or quickly, each beside what was published and what is recorded."""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table

from tensortrain.cli.catalogue import INSTALLED, MISSING, Card, find_cards
from tensortrain.cli.output import print_json, print_rich
from tensortrain.errors import DataError
from tensortrain.system.files import write_text_atomic

__all__ = ["ReproduceOptions", "list_experiments", "reproduce"]

_THE_END = 3  # lines of what a script said last, for the error


@dataclass(frozen=True)
class ReproduceOptions:
    """How to run: where to, how much of it, with which data and seed, and whether the project's record is replaced."""

    out: Path
    quick: bool
    record: bool
    data: Path | None
    seed: int | None
    json: bool


def list_experiments(*, json: bool) -> None:
    """Print all experiments: what was published, what is recorded here, how long they take."""
    cards = find_cards()
    if json:
        print_json([_told(card, {}) for card in cards.values()])
        return
    for card in cards.values():
        record = card.recorded()
        ours = "; ".join(f"{figure.name} {figure.text(record)}" for figure in card.figures)
        minutes = f"{card.minutes:g} min, quick {card.quick_minutes:g} min"
        lines = [card.question, f"published: {card.published or MISSING}", f"here: {ours}"]
        print_rich(f"{card.name} ({card.system}; {minutes})", *(Padding(line, (0, 0, 0, 4)) for line in lines))
    print_rich("Run some: tensortrain reproduce NAME .. --quick, or in full without --quick; two cores are assumed.")


def reproduce(names: Sequence[str], options: ReproduceOptions) -> None:
    """Run experiments, each into a folder of its own below ``options.out``, and print their figures.

    A finished part of a run is not done twice: the same command goes on where it was killed.

    Raises:
        DataError: No experiment has that name, a package is missing, or the run failed; nothing is begun before all
            names and packages are looked up.
    """
    cards = _chosen(names, options)
    told = []
    for card in cards:
        seconds = _run(card, options)
        found = _read((card.folder if options.record else _folder(card, options)) / card.record)
        told.append(_told(card, found) | {"seconds": round(seconds, 1)})
        if not options.json:
            print_rich(f"{card.name}: {card.question}", _compared(card, found, options.quick))
            print_rich(f"published: {card.published or MISSING}", f"{seconds:.0f} s; {_folder(card, options)}")
    if options.json:
        print_json(told)


def _chosen(names: Sequence[str], options: ReproduceOptions) -> list[Card]:
    cards = find_cards()
    if "all" in names:
        names = list(cards)
    for name in names:
        if name not in cards:
            raise DataError(f"NAME must be all or one of {', '.join(cards)}: got {name!r}")
    if options.record and (options.quick or options.seed is not None):
        raise DataError(
            "--record replaces the project's record, which is that of whole runs: leave out --quick and --seed"
        )
    chosen = [cards[name] for name in names]
    if options.record and chosen[0].folder.parent.name == INSTALLED:
        raise DataError(
            "--record replaces a record of the repository: run it in a checkout, installed with pip install -e ."
        )
    for card in chosen:
        card.check_needs()
        if options.data is not None and not card.takes_data:
            raise DataError(f"{card.name} reads no data set from a folder: leave out --data")
    return chosen


def _folder(card: Card, options: ReproduceOptions) -> Path:
    return options.out / (f"{card.name}-quick" if options.quick else card.name)


def _run(card: Card, options: ReproduceOptions) -> float:
    """Run the script of an experiment; seconds.

    Raises:
        DataError: It failed.
    """
    folder = _folder(card, options).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    record = card.folder if options.record else folder
    command = [sys.executable, str(card.folder / card.script), "--out", str(folder / "work"), "--record", str(record)]
    config = _config(card, options)
    if config is not None:
        write_text_atomic(folder / "config.json", json_module.dumps(config, indent=1) + "\n")
        command += ["--config", str(folder / "config.json")]
    if options.data is not None:
        command += ["--data", str(options.data.absolute())]
    command += card.arguments if not options.quick or card.quick_arguments is None else card.quick_arguments
    expected = card.quick_minutes if options.quick else card.minutes
    print(f"{card.name}: about {expected:g} min on two cores", file=sys.stderr, flush=True)
    _watched(command, card.name)
    return time.perf_counter() - start


def _watched(command: list[str], name: str) -> None:
    """Run a command and show what it says, on stderr."""
    last: list[str] = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            last = [*last, line.strip()][-_THE_END:]
    if process.returncode:
        raise DataError(f"{name} did not end well (exit code {process.returncode}): {' '.join(last)}")


def _config(card: Card, options: ReproduceOptions) -> dict[str, Any] | None:
    """The config of the experiment, as this run wants it."""
    path = card.folder / card.config
    if not path.is_file():
        return None
    config = json_module.loads(path.read_text(encoding="utf-8"))
    if options.quick:
        config = _merged(config, {card.part: card.quick} if card.part else card.quick)
    if options.seed is not None:
        _with_seed(config[card.part] if card.part else config, options.seed)
    return config


def _merged(value: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7396): None takes a key away, what is no object replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(value) if isinstance(value, dict) else {}
    for key, change in patch.items():
        if change is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), change)
    return merged


def _with_seed(config: dict[str, Any], seed: int) -> None:
    """One seed in place of those of a config: wherever it lists ``seeds``, and its own ``seed``."""
    told = _replaced(config, seed)
    if "seed" in config:
        config["seed"] = seed
    elif not told:
        config["seeds"] = [seed]


def _replaced(config: dict[str, Any], seed: int) -> bool:
    """Whether there was a list of seeds to replace."""
    inside = [_replaced(value, seed) for value in config.values() if isinstance(value, dict)]
    if "seeds" in config:
        config["seeds"] = [seed]
    return "seeds" in config or any(inside)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"the run must end with a record at {path}: there is none")
    return json_module.loads(path.read_text(encoding="utf-8"))


def _told(card: Card, found: Any) -> dict[str, Any]:
    recorded = card.recorded()
    figures = [{"name": one.name, "recorded": one.text(recorded), "now": one.text(found)} for one in card.figures]
    return {
        "name": card.name,
        "system": card.system,
        "question": card.question,
        "published": card.published,
        "figures": figures,
        "minutes": card.minutes,
        "quick_minutes": card.quick_minutes,
    }


def _compared(card: Card, found: Any, quick: bool) -> Table:
    table = Table()
    table.add_column("figure", overflow="fold")
    table.add_column("recorded here", justify="right")
    table.add_column("this run, quick" if quick else "this run", justify="right")
    recorded = card.recorded()
    for figure in card.figures:
        table.add_row(figure.name, figure.text(recorded), figure.text(found))
    return table
