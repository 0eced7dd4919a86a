"""What repeats a result is told, and told of this package alone."""

from __future__ import annotations

import json
import subprocess

import torch

from tensortrain.system import provenance as module
from tensortrain.system.provenance import provenance


def test_provenance_tells_what_repeats_a_run() -> None:
    found = provenance("run it", seed=7)
    assert found["command"] == "run it"
    assert found["seed"] == 7
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    json.loads(json.dumps(found))


def test_commit_only_of_the_repository_that_tracks_the_file(tmp_path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init")
    for name in ("ours.py", "installed.py"):
        (tmp_path / name).write_text("x = 1\n")
    assert module._git_commit(tmp_path / "ours.py") is None
    git("add", "ours.py")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert module._git_commit(tmp_path / "ours.py") == head
    assert module._git_commit(tmp_path / "installed.py") is None
    (tmp_path / "ours.py").write_text("x = 2\n")
    assert module._git_commit(tmp_path / "ours.py") == head + "-dirty"
