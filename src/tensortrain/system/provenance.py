"""What someone needs to repeat a result: command, commit, versions, machine."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from tensortrain._version import __version__
from tensortrain.system.machine import cpu_name

__all__ = ["own_commit", "provenance"]


def provenance(command: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """Collect what someone needs to repeat a result.

    Args:
        command: The command line; by default the one this process was started with.
        seed: The seed of the run.

    Returns:
        dict: ``command``, ``commit`` (None outside a checkout; ends in "-dirty" after local edits),
        ``versions``, ``platform``, ``cpu``, ``gpu``, ``threads``, ``seed``, ``date`` (UTC) and ``wall_s``,
        which is None for the caller to fill in.
    """
    return {
        "command": _command_line() if command is None else command,
        "commit": own_commit(),
        "versions": {
            "tensortrain": __version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_s": None,
    }


def _command_line() -> str:
    program, *arguments = sys.argv or [""]
    words = shlex.join([Path(program).name, *arguments])
    return words.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no text


@cache
def own_commit() -> str | None:
    """The commit of this package when it was first asked for: at the end of a long run it may be another."""
    return _git_commit(Path(__file__))


def _git_commit(source: Path) -> str | None:
    # An installed copy may lie in a virtual environment inside somebody else's checkout:
    # only the repository that tracks this very file is ours.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
