"""Where data sets are kept, and how files get there: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tensortrain.errors import DataError

_COMMAND_TIMEOUT_S = 600


class Messages(Protocol):
    """The part of an observer that loaders use."""

    def message(self, text: str) -> None:
        """Say one sentence to the person who waits."""


def say(observer: Messages | None, text: str) -> None:
    """Pass a sentence to the observer, if there is one."""
    if observer is not None:
        observer.message(text)


def cache_folder(name: str) -> Path:
    """Return the user's cache folder for a data set: under ``XDG_CACHE_HOME``, else under ``~/.cache``."""
    # Unlike Path.home(), expanduser does not fail for a user without a home.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tensortrain" / name


def fill_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a new folder beside ``folder``, then move it there by rename.

    A folder that is in the place already, damaged or outdated, is replaced. When ``fill`` raises, nothing
    changes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        fill(new)
        for path in new.rglob("*"):
            if path.is_file():
                _sync(path)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # otherwise another process has just put its own there
                raise


def _sync(path: Path) -> None:
    """Bring a file to the disk before the folder gets its name: a crash must not leave half of it there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
