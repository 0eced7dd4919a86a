"""Kernels that keep BLAS to one thread for a moment leave torch's own number of threads alone."""

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
