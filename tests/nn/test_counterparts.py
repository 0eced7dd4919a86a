"""Which layer stands for which, those of transformers among them."""

from __future__ import annotations

import copy

import fresh
import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import KindError
from tensortrain.nn import counterpart, dense_twin, is_transformers_conv1d


@pytest.fixture
def layer() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    made = utils.Conv1D(24, 16).double()
    with torch.no_grad():
        made.bias.normal_()
    return made


def test_subclasses_have_no_counterpart() -> None:
    assert counterpart(nn.Linear(2, 2)) is tt.nn.Linear
    assert counterpart(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)) is None
    assert counterpart(None) is None


def test_a_class_of_the_same_name_is_none_of_theirs() -> None:
    assert not is_transformers_conv1d(type("Conv1D", (nn.Module,), {})())


def test_conv1d_of_transformers_becomes_a_linear_layer_and_comes_back(layer: nn.Module) -> None:
    layer.weight.requires_grad_(False)
    layer.eval()
    kind = counterpart(layer)
    assert kind is not None
    assert kind.weight_shape_of(layer).dense_shape == (24, 16)
    made = kind.from_dense(layer, format="low_rank")
    assert type(made) is tt.nn.Linear
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(made(x), layer(x))
    assert not made.training
    back = dense_twin(copy.deepcopy(made))
    assert type(back) is type(layer)
    torch.testing.assert_close(back.weight, layer.weight)
    assert torch.equal(back.bias, layer.bias)
    assert [p.requires_grad for p in back.parameters()] == [False, True]
    assert not back.training
    assert type(made.to_dense()) is nn.Linear


def test_only_conv1d_is_read_as_that(layer: nn.Module) -> None:
    kind = counterpart(layer)
    assert kind is not None
    with pytest.raises(KindError, match="Conv1D of transformers: found Linear"):
        kind.from_dense(nn.Linear(16, 24))


def test_transformers_is_not_imported_for_this() -> None:
    code = (
        "import sys, torch, tensortrain as tt; tt.compress(torch.nn.Linear(64, 64), budget=0.5, measure=False); "
        "assert 'transformers' not in sys.modules"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
