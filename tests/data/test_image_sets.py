"""Image data: the IDX format, the order of the sources, and what is said when none works."""

from __future__ import annotations

import gzip
import hashlib
import struct
import sys
from pathlib import Path

import pytest
import torch

from tensortrain.data import ImageData, digits, fashion_mnist, fetch, image_sets, images
from tensortrain.data.idx import parse_idx, read_bytes
from tensortrain.errors import DataError, OptionalDependencyError


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


SMALL = {
    "train-images-idx3-ubyte": idx((3, 2, 2), bytes(range(12))),
    "train-labels-idx1-ubyte": idx((3,), bytes((7, 8, 9))),
    "t10k-images-idx3-ubyte": idx((1, 2, 2), bytes((255, 0, 1, 2))),
    "t10k-labels-idx1-ubyte": idx((1,), bytes((4,))),
}


def write_small(folder: Path, *, zipped: bool = True) -> None:
    for name, content in SMALL.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


class Log:
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No installed package, an empty cache, and the small files as the published ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_sets, "_DEBIAN_FOLDER", tmp_path / "debian")
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in SMALL.items()}
    monkeypatch.setattr(image_sets, "_FASHION_SHA256", sums)
    monkeypatch.setattr(image_sets, "_FETCHERS", {})
    return tmp_path


def test_idx_reads_shape_and_order():
    value = parse_idx(idx((2, 3), bytes(range(6))), where="here")
    assert value.dtype == torch.uint8
    assert value.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "nothing"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "00 00 0d 01"),
        (b"\x00\x00\x08\x03\x00\x00", "6 bytes, expected 16"),
        (idx((2, 3), bytes(5)), "17 bytes, expected 18"),
        (idx((2, 3), bytes(7)), "19 bytes, expected 18"),
        (idx((2**32 - 1,) * 3, b""), "16 bytes"),
    ],
)
def test_idx_refuses_damage(content, says):
    with pytest.raises(DataError, match=says):
        parse_idx(content, where="here")


def test_truncated_and_damaged_gzip_are_data_errors(tmp_path):
    whole = gzip.compress(bytes(range(256)) * 20)
    for damaged in (whole[:-12], whole[:40] + bytes(40) + whole[80:], whole[:5]):
        path = tmp_path / "file.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="must be whole"):
            read_bytes(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_own_root_is_only_parsed(tmp_path, zipped):
    write_small(tmp_path, zipped=zipped)
    data = fashion_mnist(tmp_path)
    assert data.train_images.tolist()[2] == [[8, 9], [10, 11]]
    assert data.train_labels.tolist() == [7, 8, 9]
    assert data.train_labels.dtype == torch.int64
    assert data.test_images.dtype == torch.uint8
    assert data.source == str(tmp_path)


def test_own_root_must_be_complete(tmp_path, offline):
    write_small(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        fashion_mnist(tmp_path)
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        images(tmp_path)


def test_labels_must_match_images(tmp_path):
    write_small(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((2,), bytes(2))))
    with pytest.raises(DataError, match="one label"):
        fashion_mnist(tmp_path)


def test_installed_package_comes_before_the_cache(offline):
    for folder in (offline / "debian", fetch.cache_folder("fashion-mnist")):
        folder.mkdir(parents=True)
        write_small(folder)
    assert fashion_mnist().source == str(offline / "debian")
    (offline / "debian" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    assert fashion_mnist().source == str(fetch.cache_folder("fashion-mnist"))


def test_fetch_fills_the_cache_once(offline, monkeypatch):
    calls = []

    def fetcher(folder: Path) -> None:
        calls.append(folder)
        write_small(folder)

    monkeypatch.setattr(image_sets, "_FETCHERS", {"a test": fetcher})
    log = Log()
    first, second = fashion_mnist(observer=log), fashion_mnist(observer=log)
    assert len(calls) == 1
    assert log.said == ["Fetching Fashion-MNIST (31 MB) from a test."]
    assert torch.equal(first.train_images, second.train_images)
    assert [path.name for path in fetch.cache_folder("fashion-mnist").parent.iterdir()] == ["fashion-mnist"]


def test_wrong_content_never_gets_into_the_cache(offline, monkeypatch):
    def wrong(folder: Path) -> None:
        write_small(folder)
        (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((1,), bytes((5,)))))

    monkeypatch.setattr(image_sets, "_FETCHERS", {"wrong": wrong})
    with pytest.raises(DataError, match="wrong: a data file must be the published one"):
        fashion_mnist()
    assert list((offline / "cache" / "tensortrain").iterdir()) == []
    monkeypatch.setattr(image_sets, "_FETCHERS", {"wrong": wrong, "right": write_small})
    assert fashion_mnist().test_labels.tolist() == [4]


def test_a_damaged_cache_is_replaced(offline, monkeypatch):
    cache = fetch.cache_folder("fashion-mnist")
    cache.mkdir(parents=True)
    (cache / "train-images-idx3-ubyte.gz").write_bytes(b"cut")
    monkeypatch.setattr(image_sets, "_FETCHERS", {"a test": write_small})
    assert fashion_mnist().train_labels.tolist() == [7, 8, 9]


def test_nothing_found_says_what_to_do(offline, monkeypatch):
    with pytest.raises(DataError, match="Install the Debian package dataset-fashion-mnist"):
        fashion_mnist()
    monkeypatch.setattr(image_sets, "_FETCHERS", {"a test": write_small})
    with pytest.raises(DataError, match="not there"):
        fashion_mnist(download=False)


def test_debian_route_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get is not installed"):
        image_sets._fetch_debian(tmp_path)


def test_failed_fill_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "file").write_text("old")

    def fail(new: Path) -> None:
        (new / "file").write_text("new")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fetch.fill_folder(folder, fail)
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_failing_command_gives_its_last_line(tmp_path):
    with pytest.raises(DataError, match=r"ls failed: .*nowhere"):
        fetch.run(("ls", "nowhere"), cwd=tmp_path)


def test_digits_have_the_sizes_of_fashion_mnist():
    pytest.importorskip("sklearn")
    data = digits()
    assert data.train_images.shape == (1437, 28, 28)
    assert data.test_images.shape == (360, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.max() == 255
    assert data.train_images[:, :2].max() == 0
    assert sorted(set(data.test_labels.tolist())) == list(range(10))
    assert torch.equal(data.train_images, digits().train_images)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OptionalDependencyError, match="pip install"):
        digits()


def test_images_falls_back_to_digits_with_a_warning(offline):
    pytest.importorskip("sklearn")
    log = Log()
    data = images(observer=log)
    assert data.name == "digits"
    assert "in place of Fashion-MNIST" in data.source
    assert log.said == [data.source]


def test_images_prefers_fashion_mnist(offline):
    (offline / "debian").mkdir()
    write_small(offline / "debian")
    data = images()
    assert isinstance(data, ImageData)
    assert data.name == "fashion-mnist"


def test_real_fashion_mnist_when_it_is_here():
    try:
        data = fashion_mnist(download=False)
    except DataError:
        pytest.skip("Fashion-MNIST is not installed")
    assert data.train_images.shape == (60_000, 28, 28)
    assert data.test_images.shape == (10_000, 28, 28)
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
