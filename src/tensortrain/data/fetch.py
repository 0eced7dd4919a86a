"""How the files of data sets get into the user's cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tensortrain.errors import DataError
from tensortrain.system.files import fill_folder
from tensortrain.system.machine import cache_folder

__all__ = [
    "Messages",
    "cache_folder",
    "check_sha256",
    "copy_files",
    "fill_folder",
    "run",
    "say",
    "unpack_debian",
]

_COMMAND_TIMEOUT_S = 600


class Messages(Protocol):
    """The part of an observer that loaders use."""

    def message(self, text: str) -> None:
        """Say one sentence to the person who waits."""


def say(observer: Messages | None, text: str) -> None:
    """Pass a sentence to the observer, if there is one."""
    if observer is not None:
        observer.message(text)


def run(command: Sequence[str], *, cwd: Path) -> None:
    """Run a command to its end.

    Raises:
        DataError: It is not installed, fails, or takes more than ten minutes.
    """
    try:
        subprocess.run(
            command, cwd=cwd, check=True, capture_output=True, text=True, errors="replace", timeout=_COMMAND_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise DataError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]} took more than {_COMMAND_TIMEOUT_S} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no message").splitlines()[-1]
        raise DataError(f"{command[0]} failed: {last}") from error


def unpack_debian(package: str, scratch: Path) -> Path:
    """Download a Debian package and unpack it without installing it, which needs no rights.

    Args:
        package: Its name.
        scratch: An empty folder to work in.

    Returns:
        Path: The folder in which ``usr`` and so on lie.

    Raises:
        DataError: There is no apt-get or dpkg, or one of them fails.
    """
    run(("apt-get", "download", package), cwd=scratch)
    files = [path.name for path in scratch.glob("*.deb")]
    if len(files) != 1:
        raise DataError(f"apt-get download left {len(files)} packages")
    run(("dpkg", "-x", files[0], "unpacked"), cwd=scratch)
    return scratch / "unpacked"


def check_sha256(content: bytes, expected: str, *, where: str) -> None:
    """Refuse content of another checksum.

    Raises:
        DataError: The checksum differs.
    """
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DataError(
            f"a data file must be the published one: {where} has sha256 {actual[:12]}.., expected "
            f"{expected[:12]}... Remove it, so that it is fetched again."
        )


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy named files from one folder into another."""
    for name in names:
        shutil.copyfile(source / name, target / name)
