"""Fixtures of the compression tests; the models are in small_models.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tensortrain.contract import CostModel, use_cost_model

sys.path.append(str(Path(__file__).parent))  # small_models.py


@pytest.fixture
def double() -> None:
    """Double precision; the fixture of the root folder puts the default back."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def fixed_plans() -> Iterator[None]:
    """Plans from constants that do not depend on the machine."""
    with use_cost_model(CostModel.reference("cpu")):
        yield
