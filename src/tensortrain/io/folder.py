"""A checkpoint's folder on disk: two files that appear together, beside nobody else's loss."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tensortrain.errors import CheckpointError

__all__ = ["RECIPE", "TENSORS", "fill_folder", "read_recipe", "sha256_of", "sync"]

TENSORS, RECIPE = "model.safetensors", "tensortrain.json"
_CHUNK_BYTES = 2**22


def fill_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write both files into a new folder beside ``folder``, then move them into place.

    A checkpoint that is there already is moved aside and removed after; in a folder with other files only
    the two are replaced. When ``fill`` raises, nothing changes.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"a checkpoint must be a folder: {folder} is a file, expected a folder or nothing. Choose another name."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        fill(new)
        _move_into_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_into_place(new: Path, folder: Path) -> None:
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not present:
        os.replace(new, folder)  # also onto an empty folder
    elif present <= {TENSORS, RECIPE}:
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        for name in (TENSORS, RECIPE):  # a kill between the two leaves a pair that the checksum refuses
            os.replace(new / name, folder / name)


def read_recipe(folder: Path) -> str:
    """Return the text of a folder's recipe.

    Raises:
        CheckpointError: The folder or one of its two files is missing or unreadable.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"a checkpoint must be a folder: {folder} "
            f"{'is a file' if folder.exists() else 'does not exist'}, "
            "expected one that save_pretrained wrote. Check the path."
        )
    missing = [name for name in (TENSORS, RECIPE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"a checkpoint must have its two files: {folder} has no {' and no '.join(missing)}, expected "
            f"{TENSORS} "
            f"and {RECIPE}. Save the model again with save_pretrained."
        )
    try:
        return (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"a recipe must be readable text: {folder / RECIPE} has {error}. Save the model again."
        ) from error


def sha256_of(path: Path) -> str:
    """Checksum of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file to the disk before its folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
