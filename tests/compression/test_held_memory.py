"""A large model is compressed in place within little more memory than it takes itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_MOST = 1.6  # times the model's bytes; 1.3 were seen


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a while")
def test_no_stage_holds_more_than_the_model_and_what_one_layer_needs() -> None:
    script = Path(__file__).parents[1] / "helpers" / "held_memory.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shares = json.loads(done.stdout)["shares"]
    assert {"calibrate", "gradients", "widths", "candidates", "decompose"} <= {*shares}
    assert {name: share for name, share in shares.items() if share > _MOST} == {}
