"""Files and folders that appear whole or not at all: made beside their place, brought to the disk, then renamed.

A kill at any moment leaves the old one or the new one. What it leaves beside them is cleared by the next write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["fill_folder", "put_in_place", "sync", "whole_file", "write_text_atomic"]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a file of another name to write into; it becomes ``path`` once the block has ended without an error.

    The folder is made where it is missing. The file has the ending of ``path``, and the mode of any new file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    scratch = target.with_name(f".{target.stem}.{_owner()}-{secrets.token_hex(4)}{target.suffix}")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode & 0o777
        yield scratch
        scratch.chmod(mode)  # safetensors makes files for their owner alone
        put_in_place(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` beside ``path``, then rename: a reader never sees half a file.

    Returns:
        Path: ``path``, its folder created where it was missing.
    """
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def put_in_place(made: Path, target: Path) -> None:
    """Rename a finished file over another one, once it is on the disk."""
    sync(made)
    os.replace(made, target)


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
                sync(path)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # otherwise another process has just put its own there
                raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a crash must not leave a name with half of its content."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:  # some file systems cannot sync a folder, or nothing at all
            raise
    finally:
        os.close(held)


def _owner() -> str:
    """This process among those that may write into the same folder, from other machines too."""
    return f"{zlib.crc32(platform.node().encode()):08x}-{os.getpid()}"


def _clear_leftovers(target: Path) -> None:
    """Remove the unfinished files of writes to the same place that were killed on this machine."""
    machine = _owner().partition("-")[0]
    pattern = re.compile(rf"\.{re.escape(target.stem)}\.{machine}-(\d+)-[0-9a-f]{{8}}{re.escape(target.suffix)}")
    with contextlib.suppress(OSError):  # a folder that may be written to but not listed, a file that is gone by now
        for path in target.parent.iterdir():
            found = pattern.fullmatch(path.name)
            if found and not _runs(int(found[1])):
                path.unlink()


def _runs(pid: int) -> bool:
    if os.name != "posix":  # elsewhere this signal would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
