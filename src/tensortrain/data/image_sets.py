"""Image data sets: Fashion-MNIST, and scikit-learn's digits for machines without it."""

from __future__ import annotations

import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tensortrain.data.fetch import Messages, cache_folder, check_sha256, copy_files, fill_folder, say, unpack_debian
from tensortrain.data.idx import parse_idx, read_bytes
from tensortrain.errors import DataError, OptionalDependencyError

# Checksums are of the uncompressed content: gzip's header carries a time.
_FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_FILES = tuple(f"{name}.gz" for name in _FASHION_SHA256)
_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_PUBLIC_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_DOWNLOAD_TIMEOUT_S = 60


@dataclass(frozen=True)
class ImageData:
    """Images with labels, in the split that publications use.

    Attributes:
        name: Of the data set.
        train_images: uint8 ``(n, H, W)``.
        train_labels: int64 ``(n,)``.
        test_images: uint8 ``(m, H, W)``.
        test_labels: int64 ``(m,)``.
        source: Where it came from, and a warning when it stands in for another.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str


def fashion_mnist(
    root: str | Path | None = None, *, download: bool = True, observer: Messages | None = None
) -> ImageData:
    """Load Fashion-MNIST: 60,000 + 10,000 images of clothes, 28 x 28, ten classes.

    Looks in ``root`` alone when it is given, with or without ``.gz``. Otherwise in the Debian package's
    folder, in the user's cache, then fetches the Debian package (no root rights needed), then the
    authors' copy. What these give is checked against the published checksums.

    Args:
        root: Folder with the four IDX files.
        download: Allow fetching into the cache.
        observer: Gets a message before each fetch.

    Raises:
        DataError: A file is missing or damaged in ``root``; or no source works, and then it says what to do.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv:1708.07747.
    """
    if root is not None:
        return _read_own(Path(root))
    cache = cache_folder("fashion-mnist")
    failures = []
    for folder in (_DEBIAN_FOLDER, cache):
        try:
            return _read_published(folder)
        except DataError as error:
            failures.append(f"{folder}: {error}" if folder.exists() else f"{folder}: not there")
    for name, fetch in _FETCHERS.items() if download else ():
        say(observer, f"Fetching Fashion-MNIST (31 MB) from {name}.")
        try:
            fill_folder(cache, _checked(fetch))
            return _read_published(cache)
        except (DataError, OSError) as error:
            failures.append(f"{name}: {error}")
    raise DataError(
        f"Fashion-MNIST must be found: fashion_mnist has tried {'; '.join(failures)}, expected one to work. "
        f"Install the Debian package {_DEBIAN_PACKAGE}, or put {', '.join(_FASHION_FILES)} into a folder and "
        "pass it as root."
    )


def digits() -> ImageData:
    """Load scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 28 x 28 pixels.

    Each pixel becomes 3 x 3, with a frame of two. The split is fixed: 1,437 for training, 360 for testing.

    Raises:
        OptionalDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise OptionalDependencyError(
            "the digits must come from scikit-learn: this environment has none, expected scikit-learn 1.3 or "
            'later. Install it with pip install "tensortrain[dev]".'
        ) from error
    data = load_digits()
    pixels = torch.from_numpy(np.round(data.images * (255 / 16)).astype(np.uint8))
    pixels = pixels.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    pixels = F.pad(pixels, (2, 2, 2, 2))
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    train, test = order[:1437], order[1437:]
    return ImageData("digits", pixels[train], labels[train], pixels[test], labels[test], "scikit-learn's digits")


def images(root: str | Path | None = None, *, download: bool = True, observer: Messages | None = None) -> ImageData:
    """Load Fashion-MNIST, or the digits with a warning in ``source`` where it is not to be had.

    Args:
        root: As for :func:`fashion_mnist`; errors in a given root are raised.
        download: Allow fetching into the cache.
        observer: Gets messages.

    Raises:
        DataError: ``root`` is given and not good.
    """
    if root is not None:
        return fashion_mnist(root)
    try:
        return fashion_mnist(download=download, observer=observer)
    except DataError as error:
        data = digits()
        warning = f"{data.source}, in place of Fashion-MNIST; figures do not compare. {error}"
        say(observer, warning)
        return ImageData(**{**vars(data), "source": warning})


def _read_own(root: Path) -> ImageData:
    """Read the files of a user's folder; their content is theirs to choose."""
    contents = {}
    for name in _FASHION_SHA256:
        found = [path for path in (root / f"{name}.gz", root / name) if path.is_file()]
        if not found:
            raise DataError(
                f"the folder must hold all four IDX files: {root} has no {name}(.gz), expected it there. "
                "Complete the folder or leave root out."
            )
        contents[name] = read_bytes(found[0])
    return _assemble(contents, root)


def _read_published(folder: Path) -> ImageData:
    contents = {name: read_bytes(folder / f"{name}.gz") for name in _FASHION_SHA256}
    for name, expected in _FASHION_SHA256.items():
        check_sha256(contents[name], expected, where=str(folder / f"{name}.gz"))
    return _assemble(contents, folder)


def _assemble(contents: dict[str, bytes], folder: Path) -> ImageData:
    train_images, train_labels, test_images, test_labels = (
        parse_idx(content, where=str(folder / name)) for name, content in contents.items()
    )
    for pictures, labels in ((train_images, train_labels), (test_images, test_labels)):
        if pictures.ndim != 3 or labels.shape != pictures.shape[:1]:
            raise DataError(
                f"every image must have one label: {folder} has images {tuple(pictures.shape)} and labels "
                f"{tuple(labels.shape)}, expected (n, H, W) and (n,). Check the files."
            )
    return ImageData("fashion-mnist", train_images, train_labels.long(), test_images, test_labels.long(), str(folder))


def _checked(fetch: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make a filler that checks what it fetched before the folder gets its name."""

    def fill(folder: Path) -> None:
        fetch(folder)
        _read_published(folder)

    return fill


def _fetch_debian(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = unpack_debian(_DEBIAN_PACKAGE, Path(scratch))
        copy_files(_FASHION_FILES, unpacked.joinpath(*_DEBIAN_FOLDER.parts[1:]), folder)


def _fetch_public(folder: Path) -> None:
    # Plain http is all that the authors' address speaks; the checksums make up for it.
    for name in _FASHION_FILES:
        with (
            urllib.request.urlopen(_PUBLIC_URL + name, timeout=_DOWNLOAD_TIMEOUT_S) as answer,
            (folder / name).open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)


_FETCHERS = {"the Debian package": _fetch_debian, "the authors' address": _fetch_public}
