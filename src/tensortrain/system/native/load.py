"""Find and load the compiled kernels."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tensortrain.system.machine import cache_folder

__all__ = [
    "MODULE",
    "SOURCES",
    "built_path",
    "digest_path",
    "file_digest",
    "is_whole",
    "library",
    "loaded",
    "look_again",
    "python_only",
]

MODULE = "_kernels"
SOURCES = Path(__file__).parent
_SWITCH = "TENSORTRAIN_KERNELS"  # "off" in the environment: all runs in Python, whatever has been built


def built_path() -> Path:
    """Where the kernels of these sources, this torch, Python and machine lie once they are built."""
    name = f"kernels-{_digest()}"
    return cache_folder() / name / f"{MODULE}{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def digest_path(path: Path) -> Path:
    """Where the checksum of a library is kept: beside it."""
    return path.with_name(path.name + ".sha256")


def file_digest(path: Path) -> str:
    """The checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a library is the one that ``build`` left there, to the bit: running another could end the process."""
    try:
        return digest_path(path).read_text().strip() == file_digest(path)
    except (OSError, ValueError):
        return False


def library() -> Any | None:
    """The compiled module; ``None`` where it was not built, cannot be loaded, or is switched off."""
    if _state.is_off:
        return None
    if not _state.is_known:
        look_again()
    return _state.found


def loaded() -> Any | None:
    """The module if this process has loaded it, switched off or not: for what it must not miss."""
    return _state.found


def look_again() -> bool:
    """Look for the kernels at their place, as after a build; whether they are there and load."""
    _state.found, _state.is_known = _loaded(built_path()), True
    return _state.found is not None


@contextmanager
def python_only() -> Iterator[None]:
    """Everything inside runs without the kernels, in all threads."""
    before = _state.is_off
    _switch(is_off=True)
    try:
        yield
    finally:
        _switch(is_off=before)


def _switch(*, is_off: bool) -> None:
    _state.is_off = is_off
    if _state.found is not None:  # layers hold ways through it
        _state.found.set_idle(is_off)


class _State:
    """What this process knows of the kernels."""

    def __init__(self) -> None:
        self.is_off = os.environ.get(_SWITCH, "").lower() in ("off", "0", "no")
        self.is_known = False
        self.found: Any | None = None


_state = _State()
_modules: dict[Path, Any] = {}


def _loaded(path: Path) -> Any | None:
    """The module there. It is loaded once: Python cannot replace compiled code."""
    if path not in _modules:
        if not is_whole(path):
            return None
        spec = importlib.util.spec_from_file_location(MODULE, path)
        try:
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except (ImportError, OSError):  # built for what is no longer here
            return None
        _modules[path] = module
    return _modules[path]


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(path.read_bytes())
    digest.update(f"{torch.__version__} {sys.implementation.cache_tag} {platform.machine()}".encode())
    return digest.hexdigest()[:16]
