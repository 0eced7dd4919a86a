"""Kernels that keep BLAS to one thread for a moment, or wake threads elsewhere, leave all as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tensortrain.system.native import library

_PROGRAM = """
import torch, tensortrain as tt
a = tt.randn((3, 4, 5), 2)
tt.dot(a, a)
tt.nn.Linear(6, 6, rank=2)(torch.ones(1, 6))
print(torch.get_num_threads())
"""


@pytest.mark.skipif(library() is None, reason="needs the kernels: build them with tensortrain build-kernels")
def test_the_first_call_of_a_process_leaves_torchs_threads() -> None:
    """Torch asks how many there are when it first needs to know: perhaps in the middle of such a call."""
    program = "import torch; print(torch.get_num_threads())"
    options: Any = {"capture_output": True, "text": True, "check": True, "env": {**os.environ, "OMP_NUM_THREADS": "2"}}
    outputs = [subprocess.run([sys.executable, "-c", one], **options).stdout.strip() for one in (program, _PROGRAM)]
    assert outputs[0] == outputs[1]


_WOKEN = """
import os, time, torch, tensortrain as tt
torch.manual_seed(0)
x, y = (tt.randn((9,) * 60, 33, dtype=torch.float64) for _ in range(2))
def allowed():
    return {thread: os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}
whole = os.sched_getaffinity(0)
first = tt.dot(x, y)
before = allowed()
for _ in range(20):
    time.sleep(0.02)  # longer than threads look out for work
    assert torch.equal(tt.dot(x, y), first)
assert allowed() == before, (allowed(), before)
assert all(cpus == whole for cpus in before.values()), before
if os.fork() == 0:  # a child, as that of a loader of data, has none of the threads whose numbers were kept
    torch.set_num_threads(1)
    time.sleep(0.02)
    os._exit(0 if torch.equal(tt.dot(x, x), tt.dot(x, x)) else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(library() is None, reason="needs the kernels: build them with tensortrain build-kernels")
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells where threads may run")
def test_threads_that_were_woken_may_run_where_they_could_before() -> None:
    options: Any = {"capture_output": True, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "2"}, "timeout": 60}
    found = subprocess.run([sys.executable, "-c", _WOKEN], **options)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "0"
