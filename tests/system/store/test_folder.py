"""A checkpoint's folder: any kind of folder serves, and after a kill at any moment it is the old one or the new one."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import fresh
import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import CheckpointError, DiskError
from tensortrain.io import load_pretrained, pretrained, save_pretrained
from tensortrain.system.files import sync
from tensortrain.system.store.folder import fill_folder
from tensortrain.system.store.stored import StoredTensors

NAMES = ["model.safetensors", "tensortrain.json"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="folders of POSIX")


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(tt.nn.Linear(12, 12, rank=2), nn.Linear(12, 3))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def holds(folder: Path, model: nn.Module) -> bool:
    return same(load_pretrained(folder, dense), model)


# -- kills -----------------------------------------------------------------------------------------------


def die_at(line: int) -> Any:
    """A trace function that ends the process at the so-manieth line that the folder's code runs."""
    left = [line]

    def local(frame: FrameType, event: str, arg: object) -> Any:
        left[0] -= event == "line"
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return local

    watched = (fill_folder.__code__.co_filename, sync.__code__.co_filename, pretrained.__file__, "shutil.py")
    return lambda frame, event, arg: local if frame.f_code.co_filename.endswith(watched) else None


def save_and_die(model: nn.Module, folder: Path, line: int) -> bool:
    """Save in a process of its own that is killed at some line; whether it was."""
    stored = StoredTensors.of(model)
    recipe = pretrained._recipe_of(model, stored, folder)
    child = os.fork()
    if child == 0:
        sys.settrace(die_at(line))
        fill_folder(folder, lambda stage: pretrained._write(stored, recipe, stage))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@posix
@pytest.mark.parametrize("beside", [False, True])
def test_killed_at_any_line_it_is_the_old_or_the_new(tmp_path: Path, beside: bool) -> None:
    # Each line is a fork of the process, which is slow where much has been loaded.
    done = fresh.run_function(Path(__file__), "check_kills_at_any_line", str(tmp_path), "beside" * beside)
    assert done.returncode == 0, done.stderr


def check_kills_at_any_line(tmp: str, beside: str) -> None:
    tmp_path = Path(tmp)
    old, new, last, folder = small(1), small(2), small(3), tmp_path / "m"
    seen, line = set(), 0
    save_pretrained(old, folder)
    if beside:
        (folder / "notes.txt").write_text("mine")
    while save_and_die(new, folder, line):
        seen.add("new" if holds(folder, new) else "old" if holds(folder, old) else "lost")
        save_pretrained(old, folder)  # clears what the killed one left
        assert sorted(os.listdir(folder)) == NAMES[:1] + ["notes.txt"] * bool(beside) + NAMES[1:]
        line += 11
    assert seen == {"old", "new"}
    save_pretrained(last, folder)
    assert holds(folder, last)
    assert os.listdir(tmp_path) == ["m"]


@posix
def test_first_save_that_is_killed_leaves_nothing_or_all(tmp_path: Path) -> None:
    model, line = small(1), 0
    while save_and_die(model, tmp_path / str(line), line):
        try:
            assert holds(tmp_path / str(line), model)
        except CheckpointError as error:
            assert "model.safetensors" in str(error) or "does not exist" in str(error)  # noqa: PT017
        line += 23
    assert line > 50


@posix
def test_between_the_two_renames_a_load_finishes_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, folder = small(1), small(2), tmp_path / "m"
    save_pretrained(old, folder)
    child = os.fork()
    if child == 0:
        rename = os.replace

        def dying(source: Any, target: Any) -> None:
            rename(source, target)
            if Path(target).name == "tensortrain.json":
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying  # type: ignore[assignment]
        save_pretrained(new, folder)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(os.listdir(folder)) == 3
    assert holds(folder, new)
    assert sorted(os.listdir(folder)) == NAMES
    assert holds(folder, new)


@posix
def test_files_of_a_save_at_work_are_left_alone(tmp_path: Path) -> None:
    first, second, folder = small(1), small(2), tmp_path / "m"

    def slow(stage: Path) -> str:
        save_pretrained(second, folder)  # another one, meanwhile
        stored = StoredTensors.of(first)
        return pretrained._write(stored, pretrained._recipe_of(first, stored, folder), stage)

    fill_folder(folder, slow)
    assert holds(folder, first)
    assert sorted(os.listdir(folder)) == NAMES


@posix
def test_saves_and_loads_at_once(tmp_path: Path) -> None:
    models, folder, wrong = [small(k) for k in range(3)], tmp_path / "m", []
    save_pretrained(models[0], folder)

    def repeat(model: nn.Module) -> None:
        for _ in range(5):
            save_pretrained(model, folder)

    threads = [threading.Thread(target=repeat, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = load_pretrained(folder, dense)
        wrong += [] if any(same(found, model) for model in models) else [found]
    assert not wrong
    assert any(holds(folder, model) for model in models)
    assert sorted(os.listdir(folder)) == NAMES


# -- kinds of folders ------------------------------------------------------------------------------------


@posix
def test_links_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, link = small(1), tmp_path / "link"
    (tmp_path / "real").mkdir()
    link.symlink_to("real")
    save_pretrained(model, link)
    assert link.is_symlink()
    assert holds(tmp_path / "real", model)
    monkeypatch.chdir(tmp_path / "real")
    save_pretrained(small(2), ".")
    assert holds(Path(), small(2))
    assert sorted(os.listdir(".")) == NAMES


@posix
@pytest.mark.parametrize("mode", [0o2775, 0o700, 0o1777])
def test_the_folder_stays_the_same_one(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    folder.chmod(mode)
    before = folder.stat()
    for _ in range(2):
        save_pretrained(small(1), folder)
    assert (folder.stat().st_ino, stat.S_IMODE(folder.stat().st_mode)) == (before.st_ino, mode)


@posix
@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_are_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = save_pretrained(small(1), tmp_path / "m")
        (folder / "model.safetensors").chmod(0o444)
        save_pretrained(small(1), folder)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in NAMES} == {0o666 & ~umask}


@posix
def test_parent_that_nobody_may_write_to(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    tmp_path.chmod(0o555)
    try:
        save_pretrained(small(1), folder)
        assert holds(folder, small(1))
    finally:
        tmp_path.chmod(0o755)


@posix
def test_mount_points(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount")
    try:
        save_pretrained(small(1), folder)
        with pytest.raises(DiskError, match=r"needs room on its disk: .*No space left") as caught:
            save_pretrained(nn.Sequential(nn.Linear(200, 200)), folder)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(os.listdir(folder)) == NAMES
        assert holds(folder, small(1))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_foreign_folders_with_like_names_stay(tmp_path: Path) -> None:
    (tmp_path / ".tensortrain-notes").mkdir()
    (tmp_path / ".model.tmp").write_text("mine")
    save_pretrained(small(1), tmp_path)
    assert {".tensortrain-notes", ".model.tmp"} < set(os.listdir(tmp_path))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/m"])
def test_paths_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError):
        save_pretrained(small(1), tmp_path / name)
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path / name, dense)
    assert os.listdir(tmp_path) == ["file"]


# -- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    save_pretrained(small(1), tmp_path / "m")

    def full(*args: object, **kwargs: object) -> None:
        from safetensors import SafetensorError

        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for folder in (tmp_path / "m", tmp_path / "new" / "m"):
        with pytest.raises(DiskError, match="needs room on its disk") as caught:
            save_pretrained(small(2), folder)
        assert caught.value.errno == code
        assert isinstance(caught.value, OSError)
    assert os.listdir(tmp_path) == ["m"]
    assert sorted(os.listdir(tmp_path / "m")) == NAMES
    assert holds(tmp_path / "m", small(1))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_failure_at_each_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    folder = save_pretrained(small(1), tmp_path / "m")
    rename, calls = os.replace, [0]

    def refusing(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == at + 1:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(DiskError, match=r"must be writable: .*busy"):
        save_pretrained(small(2), folder)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == NAMES
    assert holds(folder, small(1))


def test_ctrl_c_between_the_renames_leaves_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pretrained(small(1), tmp_path / "m")
    rename = os.replace

    def interrupted(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == "tensortrain.json":
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(small(2), folder)
    assert sorted(os.listdir(folder)) == NAMES
    assert holds(folder, small(2))
