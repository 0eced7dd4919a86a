"""The examples in the docstrings of ``tensortrain.quantum`` hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import tensortrain
from tensortrain.models import quantum


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(quantum.__path__)])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"tensortrain.models.quantum.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch, "tensortrain": tensortrain}).failed == 0
