"""Linear layers whose channels stand in another order in the train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import ShapeError
from tensortrain.formats.channel_order import ChannelOrder
from tensortrain.nn import FactorizedLayer
from tensortrain.testing import LayerSuite, assert_agrees, rel_error


def order_of(n: int) -> list[int]:
    return torch.randperm(n).tolist()


class _Ordered(LayerSuite):
    sides = "both"

    def make(self, **options: Any) -> FactorizedLayer:
        torch.manual_seed(3)
        outs, ins = order_of(20), order_of(12)
        order = ChannelOrder.of(outs if self.sides != "in" else None, ins if self.sides != "out" else None)
        return tt.nn.Linear(12, 20, rank=3, **options).set_order_(order)

    def example(self) -> Tensor:
        return torch.randn(5, 12)

    def test_state_dict_holds_cores_and_bias_alone(self) -> None:
        layer = self.make()
        names = {"in": {"in_order"}, "out": {"out_places"}, "both": {"in_order", "out_places"}}[self.sides]
        assert set(dict(layer.named_buffers())) == names
        assert names < set(layer.state_dict())


class TestOrderedInputs(_Ordered):
    sides = "in"


class TestOrderedOutputs(_Ordered):
    sides = "out"


class TestOrderedBoth(_Ordered):
    pass


def test_from_dense_is_exact_in_any_order() -> None:
    dense = nn.Linear(12, 20)
    layer = tt.nn.Linear.from_dense(dense, in_order=order_of(12), out_order=order_of(20), in_modes=(3, 4))
    x = torch.randn(2, 3, 12)
    assert rel_error(layer.weight, dense.weight) <= 1e-12
    for implementation in ("auto", "factorized", "dense"):
        layer.implementation = implementation  # type: ignore[assignment]
        for training in (True, False):
            with torch.set_grad_enabled(training):
                assert rel_error(layer(x), dense(x)) <= 1e-12
                assert rel_error(layer(x), dense(x)) <= 1e-12
    assert rel_error(layer.to_dense().weight, dense.weight) <= 1e-12
    again = tt.nn.Linear.from_dense(dense, **_told(layer))
    assert rel_error(again(x), dense(x)) <= 1e-12


def _told(layer: Any) -> dict[str, Any]:
    order = layer.channel_order
    return {"in_order": order.inputs, "out_order": order.outputs}


def test_moments_are_those_of_the_layer_as_it_is() -> None:
    dense, x = nn.Linear(12, 12, bias=False), torch.randn(400, 12) * torch.logspace(0, -2, 12)
    order = order_of(12)
    gram = x.T @ x / 400
    layer = tt.nn.Linear.from_dense(dense, rank=3, in_modes=(3, 4), out_modes=(4, 3), in_order=order, input_gram=gram)
    moved = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        moved.weight.copy_(dense.weight[:, order])
    other = tt.nn.Linear.from_dense(moved, rank=3, in_modes=(3, 4), out_modes=(4, 3), input_gram=gram[order][:, order])
    assert rel_error(layer(x), other(x[:, order])) <= 1e-10


def test_a_padded_train_in_order() -> None:
    layer = tt.nn.Linear(1009, 53, rank=2, ordered="both")
    assert layer.in_modes != (1009,)
    layer.set_order_(ChannelOrder.of(order_of(53), order_of(1009)))
    assert_agrees(layer, torch.randn(4, 1009), torch.nn.functional.linear)


def test_a_state_dict_brings_the_order() -> None:
    one = tt.nn.Linear(12, 20, rank=3).set_order_(ChannelOrder.of(order_of(20), order_of(12)))
    other = tt.nn.Linear(12, 20, rank=3, ordered="both")
    x = torch.randn(5, 12)
    with torch.no_grad():
        other(x)
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(x), other(x))
    with pytest.raises(RuntimeError, match="in_order"):
        tt.nn.Linear(12, 20, rank=3).load_state_dict(one.state_dict())


def test_a_checkpoint_brings_the_order(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))

    model = make()
    model[0] = tt.nn.Linear.from_dense(model[0], rank=2, in_order=order_of(12), out_order=order_of(20))
    x = torch.randn(5, 12)
    tt.save_pretrained(model, tmp_path / "m")
    for target in (make, make()):
        loaded = tt.load_pretrained(tmp_path / "m", model=target)
        assert torch.equal(loaded(x), model.eval()(x))
    back = tt.to_dense_(copy.deepcopy(model))
    assert rel_error(back(x), model(x)) <= 1e-10


def test_compiled_and_traced() -> None:
    layer = tt.nn.Linear(12, 20, rank=3).set_order_(ChannelOrder.of(order_of(20), order_of(12)))
    x = torch.randn(5, 12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert rel_error(compiled(x), layer(x)) <= 1e-10
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert rel_error(graph(x), layer(x)) <= 1e-12
    exported = torch.export.export(layer, (x,)).module()
    assert rel_error(exported(x), layer(x)) <= 1e-10


def test_ranks_are_pruned_in_the_order_of_the_train() -> None:
    for name in ("tt", "cp"):
        dense = nn.Linear(12, 20)
        layer = tt.nn.Linear.from_dense(dense, format=name, rank=2, in_order=order_of(12), out_order=order_of(20))
        before = layer.weight.clone()
        tt.nn.prune_ranks_(layer, rel_error=1e-9)
        assert rel_error(layer.weight, before) <= 1e-6
    layer = tt.nn.Linear.from_dense(nn.Linear(12, 12), in_order=order_of(12), out_order=order_of(12))
    before = layer.weight.clone()
    tt.nn.orthogonal(layer, "spectral", max_norm=None)
    assert rel_error(layer.weight, before) <= 1e-9


def test_a_recurrent_map_in_order() -> None:
    layer = tt.nn.LSTM(12, 8, rank=3)
    one: Any = layer.l0.ih
    x = torch.randn(5, 2, 12)
    one.implementation = "factorized"
    one.set_order_(ChannelOrder.of(order_of(32), order_of(12)))
    exact = layer.to_dense()(x)[0]
    for training in (True, False):
        with torch.set_grad_enabled(training):
            assert rel_error(layer(x)[0], exact) <= 1e-10


@pytest.mark.parametrize("given", ["all", "inputs", 3])
def test_sides_that_are_none(given: Any) -> None:
    with pytest.raises(ShapeError, match="must name sides"):
        tt.nn.Linear(12, 20, ordered=given)


def test_orders_that_are_none() -> None:
    with pytest.raises(ShapeError, match="out_order has 3 numbers"):
        tt.nn.Linear.from_dense(nn.Linear(4, 4), out_order=(0, 1, 2))
