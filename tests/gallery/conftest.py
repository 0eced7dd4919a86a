"""The cases are in gallery_*.py, what must hold for them in gallery_checks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("gallery_checks")
sys.path.append(str(Path(__file__).parent))
