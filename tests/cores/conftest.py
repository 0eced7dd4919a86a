import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _default_dtype(default_dtype):
    torch.set_default_dtype(default_dtype)  # the fixture of all tests puts it back
