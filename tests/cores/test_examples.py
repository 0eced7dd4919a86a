"""The examples in the docstrings of ``cores`` hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import tensortrain.cores


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(tensortrain.cores.__path__)])
def test_examples(name):
    module = importlib.import_module(f"tensortrain.cores.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
