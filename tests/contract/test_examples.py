"""The examples in the docstrings run as printed."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from tensortrain import contract
from tensortrain.contract import CostModel, lookup, merge, use_cost_model

MODULES = ["cache", "choose", "cost", "lookup", "merge", "network", "network_plan", "plan", "products", "shape"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    names = {"torch": torch, "merge_order": merge.merge_order, "lookup_groups": lookup.lookup_groups}
    names.update({public: getattr(contract, public) for public in contract.__all__})
    module = importlib.import_module(f"tensortrain.contract.{name}")
    with use_cost_model(CostModel.reference("cpu")):
        result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
