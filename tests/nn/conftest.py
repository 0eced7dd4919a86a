"""Layers in double precision, planned with constants that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tensortrain.contract import CostModel, use_cost_model


@pytest.fixture(autouse=True)
def _default_dtype_and_fixed_plans(default_dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(default_dtype)
    with use_cost_model(CostModel.reference("cpu")):
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What was compiled before, and in the test, is forgotten."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
