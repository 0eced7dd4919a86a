"""``search="structure"``: mode shapes, and the order of a linear layer's channels."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.compression import count_params
from tensortrain.compression.choose.candidates import families
from tensortrain.compression.choose.structure import more_arrangements
from tensortrain.compression.stages import Factorize, Refit
from tensortrain.compression.survey.layers import find_layers
from tensortrain.errors import CheckpointError, KindError
from tensortrain.formats import WeightShape
from tensortrain.testing import rel_error


def shuffled(m: tuple[int, ...], n: tuple[int, ...], rank: int = 2) -> nn.Linear:
    """A layer whose weight is close to a train, but for some channels that stand in each other's places."""
    outs, ins = math.prod(m), math.prod(n)
    layer = nn.Linear(ins, outs)
    train = tt.randn_matrix(m, n, rank).to_dense()
    train = train + 0.02 * train.std() * torch.randn_like(train)
    with torch.no_grad():
        layer.weight.copy_(train[swapped(outs)][:, swapped(ins)] / train.norm(dim=1).mean())
    return layer


def swapped(n: int) -> torch.Tensor:
    """A quarter of the channels in each other's places."""
    order, some = torch.arange(n), torch.randperm(n)[: n // 4]
    order[some] = some.roll(1)
    return order


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(shuffled((8, 6), (6, 8)), nn.ReLU(), shuffled((6, 8), (6, 8)), nn.ReLU(), nn.Linear(48, 5))


def batches() -> list[torch.Tensor]:
    return [torch.randn(32, 48) for _ in range(4)]


def plan(**more: Any) -> tt.CompressionPlan:
    options: dict[str, Any] = {"budget": "4x", "formats": ["tt"], "allow_slower": True, "search": "structure"}
    return tt.plan_compression(net(), **{**options, **more})


@pytest.mark.parametrize("with_data", [False, True])
def test_orders_lower_the_error_of_shuffled_trains(with_data: bool) -> None:
    data = batches() if with_data else None
    usual, found = plan(search=None, data=data), plan(data=data)
    assert any(layer.order.sides for layer in found.layers)
    assert not any(layer.order.sides for layer in usual.layers)
    assert found.params_after <= found.params_before / 4
    model, x = net(), torch.randn(64, 48)
    errors = [rel_error(tt.apply_plan_(copy.deepcopy(model), each)(x), model(x)) for each in (usual, found)]
    assert errors[1] < 0.95 * errors[0]


def test_the_usual_menu_is_what_it_was() -> None:
    layer = find_layers(net())[0][0]
    usual = families(layer, formats=("low_rank", "tt"))
    found = families(layer, formats=("low_rank", "tt"), search="structure")
    assert len(found) > len(usual)
    assert all(family.order.sides is None for family in usual)
    assert '"in_order"' not in plan(search=None).to_json()


def test_a_plan_with_orders_goes_through_json() -> None:
    found = plan(data=batches())
    again = tt.CompressionPlan.from_json(found.to_json())
    assert again == found
    assert "ordered" in str(found)
    ordered = next(layer for layer in found.layers if layer.order.sides)
    model = tt.apply_plan_(net(), again)
    layer: Any = model.get_submodule(ordered.name)
    assert layer.channel_order == ordered.order
    assert count_params(model) == found.params_after


@pytest.mark.parametrize("change", [("0,", "1,"), ("in_order", "in_ordre")])
def test_damaged_orders_are_refused(change: tuple[str, str]) -> None:
    text = plan().to_json()
    start = text.index('"in_order"')
    damaged = text[:start] + text[start:].replace(f" {change[0]}" if "," in change[0] else change[0], change[1], 1)
    with pytest.raises(CheckpointError):
        tt.CompressionPlan.from_json(damaged)


def test_all_the_way_with_checkpoint_and_back(tmp_path: Path) -> None:
    model, data = net(), batches()
    result = tt.compress(
        model,
        budget="4x",
        data=data,
        formats=["tt"],
        allow_slower=True,
        search="structure",
        measure=False,
        heal={"steps": 4, "loss": "feature"},
    )
    assert any(layer.order.sides for layer in result.plan.layers)
    tt.save_pretrained(result.model, tmp_path / "m")
    loaded = tt.load_pretrained(tmp_path / "m", model=net)
    assert torch.equal(loaded(data[0]), result.model.eval()(data[0]))
    back = tt.to_dense_(copy.deepcopy(result.model))
    assert type(back[0]) is nn.Linear
    assert rel_error(back(data[0]), result.model(data[0])) <= 1e-5


def test_refits_in_order() -> None:
    model, data = net(), batches()
    options: dict[str, Any] = {"budget": "6x", "data": data, "formats": ["tt"], "allow_slower": True}
    options |= {"search": "structure", "measure": False}
    plain = tt.compress(model, stages=[Factorize()], **options)
    assert any(layer.order.sides for layer in plain.plan.layers)
    fitted = tt.compress(model, stages=[Factorize(), Refit(n_held_back=1)], **options)
    x = torch.cat(data)
    assert rel_error(fitted.model(x), model(x)) < rel_error(plain.model(x), model(x))


def test_bytes_of_the_places_count() -> None:
    total = sum(p.numel() * p.element_size() for p in net().parameters())
    found = tt.compress(
        net(),
        budget={"bytes": total // 3},
        formats=["tt"],
        allow_slower=True,
        search="structure",
        measure=False,
        heal=False,
    )
    held = [*found.model.parameters(), *found.model.buffers()]
    assert sum(t.numel() * t.element_size() for t in held) <= total // 3
    assert any(layer.order.sides for layer in found.plan.layers)


def test_maps_and_other_kinds_of_layers_are_searched_too() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(24, 16), "conv": nn.Conv2d(16, 24, 3), "table": nn.Embedding(500, 16)})
    found = tt.plan_compression(model, budget="2x", formats=["tt"], allow_slower=True, search="structure")
    changed = tt.apply_plan_(model, found)
    assert count_params(changed) == found.params_after
    changed["rnn"](torch.randn(3, 2, 24))
    changed["conv"](torch.randn(1, 16, 5, 5))
    changed["table"](torch.arange(10))


@pytest.mark.parametrize("weight", [WeightShape("linear", 48, 36), WeightShape("linear", 13, 7)])
def test_shapes_multiply_to_the_sizes(weight: WeightShape) -> None:
    found = list(more_arrangements(weight, None))
    for outs, ins, order in found:
        assert (math.prod(outs), math.prod(ins)) == (weight.out_features, weight.in_features)
        assert len(outs) == len(ins)
        assert order.sides is None


def test_positions_of_a_flattened_map_come_first() -> None:
    found = list(more_arrangements(WeightShape("linear", 16, 8 * 3 * 3), (8, 3, 3)))
    orders = {order for _, _, order in found if order.sides}
    (order,) = orders
    assert order.inputs is not None
    assert order.inputs[:9] == (*range(0, 72, 9), 1)


def test_an_unknown_search() -> None:
    with pytest.raises(KindError, match="search must be of a known kind: found 'shapes'"):
        plan(search="shapes")
    with pytest.raises(KindError, match="search must be"):
        tt.compress(net(), budget="2x", search=True)  # type: ignore[arg-type]
