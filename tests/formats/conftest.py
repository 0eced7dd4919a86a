"""Formats in double precision."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision() -> None:
    torch.set_default_dtype(torch.float64)  # the fixture of all tests puts it back
