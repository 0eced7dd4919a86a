"""Folders that transformers wrote: a model and its tokenizer. Nothing is fetched, no code of a folder is run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tensortrain.errors import CheckpointError, KindError, OptionalDependencyError
from tensortrain.system.store.folder import RECIPE

__all__ = ["is_transformers_folder", "load_tokenizer", "load_transformers"]

_CONFIG = "config.json"


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder holds a model of transformers rather than one of this package."""
    return (folder / _CONFIG).is_file() and not (folder / RECIPE).is_file()


def load_transformers(folder: Path) -> nn.Module:
    """Load the model that a folder's configuration names, in eval mode.

    Raises:
        CheckpointError: The folder is damaged, or its model is not one that transformers knows.
        OptionalDependencyError: transformers is not installed.
    """
    transformers = _transformers(folder)
    try:
        names = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
        cls = getattr(transformers, str(names[0]), transformers.AutoModel)
        with _quiet(transformers):
            model: nn.Module = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:
        raise CheckpointError(
            f"a folder must hold a model that transformers loads: {folder} fails with {_said(error)}. "
            "Save it again with the model's save_pretrained."
        ) from error
    return model.eval()


def load_tokenizer(folder: Path | None) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        KindError: There is no folder, or it holds no tokenizer.
        OptionalDependencyError: transformers is not installed.
    """
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        where = "a model without a folder" if folder is None else f"{folder} without tokenizer_config.json"
        raise KindError(f"texts must be cut into tokens: found {where}. Pass --tokenizer with the tokenizer's folder.")
    transformers = _transformers(folder)
    try:
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise KindError(
            f"a tokenizer must be one that transformers loads: {folder} fails with {_said(error)}. "
            "Pass --tokenizer with another folder."
        ) from error


def _transformers(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise OptionalDependencyError(
            f"a folder of transformers needs the package: {folder} cannot be read without it. "
            'Install it with pip install "tensortrain[hf]".'
        ) from error
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep bars and remarks of transformers out of the output, and its settings as they were."""
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _said(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split()):.200})"
