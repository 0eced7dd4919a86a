"""Formats in double precision, some also under float32 as the default."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _default_dtype(default_dtype: torch.dtype) -> None:
    torch.set_default_dtype(default_dtype)  # the fixture of all tests puts it back
