"""Python processes that have loaded torch and nothing else of note: started in a moment, where forking is known.

A process that imports torch anew needs two to three seconds for that alone. One server per run of the tests has
done so, and each of these processes is forked from it: it has seen nothing of the tests' process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["METHOD", "Done", "join", "process_group", "run", "run_function", "start"]

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: Any = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])  # the optimizers load the latter


@dataclass(frozen=True)
class Done:
    """How a program ended; a negative code is the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


def start(code: str, *arguments: str, stdout: Path | None = None, stderr: Path | None = None) -> BaseProcess:
    """A process that runs a program with these ``sys.argv[1:]``; what it prints goes to files, or nowhere."""
    paths = [str(path or os.devnull) for path in (stdout, stderr)]
    process = _CONTEXT.Process(target=_work, args=(code, ["-c", *arguments], *paths))
    process.start()
    return process


def run(code: str, *arguments: str, timeout_s: float = 300.0) -> Done:
    """Run a program to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(code, *arguments, stdout=out, stderr=err)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return Done(process.exitcode, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def run_function(file: Path, name: str, *arguments: str) -> Done:
    """Call a function of a file of tests with these words, in a process of its own."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='tests')[sys.argv[2]](*sys.argv[3:])"
    return run(code, str(file), name, *arguments)


def join(running: Any, timeout_s: float) -> None:
    """Wait for the end of processes that torch has started; raises what one of them raised, and leaves none behind."""
    end = time.monotonic() + timeout_s
    try:
        while not running.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f"processes must come to an end: found some at work after {timeout_s:.0f} s")
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextlib.contextmanager
def process_group(rank: int, n: int, folder: str, timeout_s: float) -> Iterator[None]:
    """Inside, this is one of so many processes that meet in a folder, on one thread and with nothing timed."""
    import torch
    import torch.distributed as dist

    from tensortrain.contract import CostModel, use_cost_model

    torch.set_num_threads(1)
    store, timeout = f"file://{Path(folder) / 'store'}", timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=timeout)
    try:
        with use_cost_model(CostModel.reference("cpu")):
            yield
    finally:
        dist.destroy_process_group()


def _work(code: str, arguments: Sequence[str], stdout: str, stderr: str) -> None:
    import sys

    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        stream.flush()
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, stream.fileno())
        os.close(target)
    sys.argv = list(arguments)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
