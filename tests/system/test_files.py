"""Files appear whole or not at all, after errors and kills too, and nothing is left beside them."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fresh
import pytest
import torch
from safetensors.torch import save_file

from tensortrain.system import files
from tensortrain.system.files import put_in_place, sync, whole_file, write_text_atomic

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = write_text_atomic(tmp_path / "new" / "a.json", "ä\n\udc80")
    assert path.read_text(encoding="utf-8") == "ä\n\\udc80"
    assert names(path.parent) == ["a.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as scratch:
        scratch.write_text("half\udc80", encoding="utf-8")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_ending_tells_writers_what_to_write(tmp_path: Path) -> None:
    with whole_file(tmp_path / "figure.svg") as scratch:
        assert scratch.suffix == ".svg"
        assert scratch.parent == tmp_path


@posix
def test_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    with whole_file(tmp_path / "weights.safetensors") as scratch:  # its writer makes files for their owner alone
        save_file({"a": torch.zeros(2)}, scratch)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@posix
def test_a_link_is_replaced_and_what_it_led_to_is_not_touched(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    (tmp_path / "a.txt").symlink_to(other)
    write_text_atomic(tmp_path / "a.txt", "ours")
    assert (other.read_text(), (tmp_path / "a.txt").read_text()) == ("theirs", "ours")


def test_put_in_place(tmp_path: Path) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    made.write_text("new")
    target.write_text("old")
    put_in_place(made, target)
    assert names(tmp_path) == ["target"]
    assert target.read_text() == "new"


def test_file_systems_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(handle: int) -> None:
        raise OSError(errno.EINVAL, "no sync of folders here")

    monkeypatch.setattr(files.os, "fsync", cannot)
    sync(tmp_path)


def die_at(line: int) -> Callable[[FrameType, str, object], Any]:
    """A trace function that ends the process at the so-manieth line of these functions."""
    left = [line]

    def local(frame: FrameType, event: str, arg: object) -> Any:
        left[0] -= event == "line"
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return local

    watched = (files.__file__, "pathlib.py", "_local.py")
    return lambda frame, event, arg: local if frame.f_code.co_filename.endswith(watched) else None


def killed_at(line: int, work: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        sys.settrace(die_at(line))
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@posix
def test_killed_at_many_lines_it_is_the_old_or_the_new(tmp_path: Path) -> None:
    # Each line is a fork of the process, which is slow where much has been loaded.
    done = fresh.run_function(Path(__file__), "check_kills_at_many_lines", str(tmp_path))
    assert done.returncode == 0, done.stderr


def check_kills_at_many_lines(folder: str) -> None:
    tmp_path = Path(folder)
    path, seen, line = write_text_atomic(tmp_path / "a.json", "old"), set(), 0
    while killed_at(line, lambda: write_text_atomic(path, "new")):
        seen.add(path.read_text())
        write_text_atomic(path, "old")  # clears what the killed one left
        assert names(tmp_path) == ["a.json"]
        line += 3
    assert seen == {"old", "new"}
    assert line > 20


@posix
def test_unfinished_files_of_writes_at_work_are_left_alone(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.json") as scratch:
        scratch.write_text("slow")
        write_text_atomic(tmp_path / "a.json", "quick")
        write_text_atomic(tmp_path / "ab.json", "other")
        assert scratch.read_text() == "slow"
    assert (tmp_path / "a.json").read_text() == "slow"
    assert names(tmp_path) == ["a.json", "ab.json"]
