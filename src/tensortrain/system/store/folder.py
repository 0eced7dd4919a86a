"""A checkpoint's folder on disk: two files that change together, whatever else lies in it.

A save prepares both files in a hidden folder inside the checkpoint's own, so that mounts, links, the current folder
and folders under a parent that nobody may write to serve alike, and keep their mode. Two renames then put them in
place: the recipe first, which names its tensors by their checksum, the tensors next. Between the two, and after a kill
between the two, the tensors of the recipe are found in the hidden folder. What a killed save left is finished or
cleared by the next save; a lock, which ends with its process, tells it from that of a save at work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from tensortrain.errors import CheckpointError, DiskError
from tensortrain.system.files import DISK_FULL, sync

__all__ = [
    "RECIPE",
    "TENSORS",
    "fill_folder",
    "finish",
    "identity_on_disk",
    "read_recipe",
    "sha256_of",
    "state_of",
    "tensors_of",
]

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

TENSORS, RECIPE = "model.safetensors", "tensortrain.json"
_STAGE, _BEFORE = ".tensortrain-save-", "before"
_OF_TRANSFORMERS = "config.json"
_CHUNK_BYTES = 2**22
_LARGEST_RECIPE_BYTES = 2**26  # some 300,000 tensors; reading one takes about a second
_WAIT_S = 60.0  # for the two renames of another save
_ABANDONED_S = 86400.0  # age of what a killed save left, where the file system has no locks to tell


def fill_folder(folder: Path, fill: Callable[[Path], str]) -> None:
    """Let ``fill`` write both files into a hidden folder and return the tensors' checksum, then move them into place.

    When anything fails, what was there before stays as it was.

    Raises:
        DiskError: The disk is full, or the folder cannot be written.
        CheckpointError: ``folder`` is no folder.
    """
    made: list[Path] = []
    with _told_clearly(folder):
        try:
            whole = _as_folder(folder, made)
            with _stage_in(whole) as stage:
                checksum = fill(stage)
                os.replace(stage / TENSORS, stage / checksum)
                with _locked(whole):
                    _move_into_place(stage, checksum, whole)
        except BaseException:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise


def _as_folder(folder: Path, made: list[Path]) -> Path:
    """The folder behind links, made where it is missing; ``made`` lists the new ones, innermost first."""
    try:
        whole = folder.resolve()
    except (RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise CheckpointError(
            f"a checkpoint needs a usable path: {str(folder)!r} has {error}. Choose another."
        ) from error
    if whole.exists() and not whole.is_dir():
        raise CheckpointError(
            f"a checkpoint must be a folder: {folder} is a file, expected a folder or nothing. Choose another name."
        )
    made += [path for path in (whole, *whole.parents) if not path.exists()]
    whole.mkdir(parents=True, exist_ok=True)
    return whole


@contextlib.contextmanager
def _told_clearly(folder: Path) -> Iterator[None]:
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise _disk_error(folder, error) from error


def _disk_error(folder: Path, error: OSError) -> DiskError:
    why = error.strerror or str(error)
    if error.errno in DISK_FULL:
        told = DiskError(
            f"a checkpoint needs room on its disk: writing {folder} ended with {why!r}. What was there before is "
            "whole; free some space (or raise the limit on the size of files), or choose another folder."
        )
    else:
        told = DiskError(
            f"a checkpoint's folder must be writable: {folder} has {why!r} ({error.filename}). What was there before "
            "is whole; change its permissions, or choose another folder."
        )
    told.errno = error.errno
    return told


# -- moving into place -----------------------------------------------------------------------------------


def _move_into_place(stage: Path, checksum: str, folder: Path) -> None:
    if os.path.lexists(folder / RECIPE):
        shutil.copy2(folder / RECIPE, stage / _BEFORE)
    sync(stage)
    sync(folder)
    os.replace(stage / RECIPE, folder / RECIPE)  # from here on the new checkpoint is the one that loads
    try:
        os.replace(stage / checksum, folder / TENSORS)
    except OSError:
        _put_back(stage, folder)
        raise
    sync(folder)


def _put_back(stage: Path, folder: Path) -> None:
    if (stage / _BEFORE).exists():
        os.replace(stage / _BEFORE, folder / RECIPE)
    else:
        (folder / RECIPE).unlink()


def _settle(stage: Path, folder: Path) -> None:
    """Finish what was begun where the recipe is in place already, and clear the rest."""
    checksum = _checksum_in(_text_of(folder / RECIPE))
    if checksum is not None and (stage / checksum).is_file():
        os.replace(stage / checksum, folder / TENSORS)
        sync(folder)
    shutil.rmtree(stage, ignore_errors=True)


def finish(folder: Path) -> None:
    """Finish a save that was killed, if nobody else is at it and the folder can be written."""
    with contextlib.suppress(OSError, CheckpointError), _locked(folder, wait_s=0.0):
        _settle_all(folder)


def _settle_all(folder: Path) -> None:
    for stage in folder.glob(f"{_STAGE}*"):
        if stage.is_dir() and not stage.is_symlink() and _is_abandoned(stage):
            _settle(stage, folder)


def _text_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.stat().st_size <= _LARGEST_RECIPE_BYTES else None
    except OSError:
        return None


def _checksum_in(text: bytes | None) -> str | None:
    try:
        found = json.loads(text or b"")["sha256"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if _is_checksum(found) else None


def _is_checksum(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


# -- locks -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stage_in(folder: Path) -> Iterator[Path]:
    """A hidden folder for a save to write into, locked while it is at work."""
    stage = folder / f"{_STAGE}{secrets.token_hex(8)}"
    held: int | None = None
    try:
        with _locked(folder):  # so that nobody takes the new one for abandoned before it is locked
            _settle_all(folder)
            stage.mkdir()
            held = _lock(stage, wait_s=0.0)
        yield stage
    finally:
        with contextlib.suppress(OSError, CheckpointError), _locked(folder):
            _settle(stage, folder)
        _unlock(held)


@contextlib.contextmanager
def _locked(folder: Path, *, wait_s: float = _WAIT_S) -> Iterator[None]:
    """One save at a time moves files in and out of a folder."""
    held = _lock(folder, wait_s=wait_s)
    try:
        yield
    finally:
        _unlock(held)


def _lock(folder: Path, *, wait_s: float) -> int | None:
    """A descriptor that holds the lock, None where there are no locks."""
    if fcntl is None:
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        _wait_for(held, folder, wait_s)
    except BaseException:
        os.close(held)
        raise
    return held


def _wait_for(held: int, folder: Path, wait_s: float) -> None:
    assert fcntl is not None
    end = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise CheckpointError(
                    f"a checkpoint must be written by one save at a time: {folder} is held by another process for "
                    f"{wait_s:.0f} s. End that process, or choose another folder."
                ) from None
            time.sleep(0.005)
        except OSError:  # a file system without locks: one save at a time is up to the caller
            return None


def _unlock(held: int | None) -> None:
    if held is not None:
        with contextlib.suppress(OSError):
            assert fcntl is not None
            fcntl.flock(held, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile
        os.close(held)


def _is_abandoned(stage: Path) -> bool:
    """Whether the save that made a hidden folder is over."""
    try:
        if fcntl is None:
            return time.time() - stage.stat().st_mtime > _ABANDONED_S
        held = os.open(stage, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(held).st_mtime > _ABANDONED_S
    finally:
        _unlock(held)
    return True


# -- reading ---------------------------------------------------------------------------------------------


def read_recipe(folder: Path) -> str:
    """Return the text of a folder's recipe.

    Raises:
        CheckpointError: The folder or one of its two files is missing or unreadable.
    """
    try:
        _check_complete(folder)
        path = folder / RECIPE
        if path.stat().st_size > _LARGEST_RECIPE_BYTES:
            raise CheckpointError(
                f"a recipe must be as save_pretrained wrote it: {path} has {path.stat().st_size:,} bytes, expected at "
                f"most {_LARGEST_RECIPE_BYTES:,}. Save the model again."
            )
        return path.read_text(encoding="utf-8")
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"a recipe must be readable text: {str(folder / RECIPE)!r} has {error}. Save the model again."
        ) from error


def _check_complete(folder: Path) -> None:
    """Raise ``CheckpointError`` where something is missing."""
    if not folder.is_dir():
        raise CheckpointError(
            f"a checkpoint must be a folder: {folder} {'is a file' if folder.exists() else 'does not exist'}, expected "
            "one that save_pretrained wrote. Check the path."
        )
    # Not what lies in them: they may vanish while one looks.
    begun = (folder / RECIPE).is_file() and any(folder.glob(f"{_STAGE}*"))
    missing = [] if begun else [name for name in (TENSORS, RECIPE) if not (folder / name).is_file()]
    if missing:
        theirs = " (the model's own save_pretrained, which made this folder, does not)"
        raise CheckpointError(
            f"a checkpoint must have its two files: {folder} has no {' and no '.join(missing)}, expected "
            f"{TENSORS} and {RECIPE}. Save the model again with tensortrain.save_pretrained, which writes the forms of "
            f"its layers{theirs if (folder / _OF_TRANSFORMERS).is_file() else ''}."
        )


def tensors_of(folder: Path, checksum: str) -> Path:
    """Where the tensors of a recipe lie: in their place, or still where the save prepared them."""
    if _is_checksum(checksum):
        for stage in folder.glob(f"{_STAGE}*"):
            if (stage / checksum).is_file():
                return stage / checksum
    return folder / TENSORS


def state_of(folder: Path) -> tuple[tuple[int, ...] | None, ...]:
    """Differs before and after another process saves into the folder."""
    return tuple(identity_on_disk(folder / name) for name in (RECIPE, TENSORS))


def identity_on_disk(path: Path) -> tuple[int, ...] | None:
    """Another one for every other file under a name; None for no file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def sha256_of(path: Path) -> str:
    """Checksum of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
