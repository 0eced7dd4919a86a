"""Suites to inherit: a new train, format or layer says how to make one of itself and gets its tests.

The suites are plain classes for pytest (or any runner that calls methods named ``test_...``); nothing is registered.
"""

from tensortrain.testing.chains import ChainSuite
from tensortrain.testing.compare import check_refused, is_left_orthogonal, rel_error, wide
from tensortrain.testing.formats import FormatSuite
from tensortrain.testing.layers import (
    IMPLEMENTATIONS,
    TOLERANCE,
    LayerSuite,
    assert_agrees,
    assert_gradcheck,
    dense_parts,
)
from tensortrain.testing.models import ModelSuite

__all__ = [
    "IMPLEMENTATIONS",
    "TOLERANCE",
    "ChainSuite",
    "FormatSuite",
    "LayerSuite",
    "ModelSuite",
    "assert_agrees",
    "assert_gradcheck",
    "check_refused",
    "dense_parts",
    "is_left_orthogonal",
    "rel_error",
    "wide",
]
