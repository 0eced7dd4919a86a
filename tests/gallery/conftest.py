"""The cases are in gallery_*.py, what must hold for them in gallery_checks.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
