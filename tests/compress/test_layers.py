"""Which layers are found: by identity, under all their names, and never one that could break."""

from __future__ import annotations

import pytest
import torch
from small_models import TwoHeads, mlp
from torch import Tensor, nn
from torch.nn.utils import prune

import tensortrain as tt
from tensortrain.compress import count_params, find_layers
from tensortrain.errors import FilterError
from tensortrain.formats import WeightShape


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def names(model: nn.Module, **filters: object) -> list[str]:
    return [layer.name for layer in find_layers(model, **filters)[0]]  # type: ignore[arg-type]


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in find_layers(model)[1]}


def test_every_kind_is_found_with_the_shape_of_its_weight() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 4),
            "conv": nn.Conv2d(8, 12, (3, 5), groups=2),
            "conv1d": nn.Conv1d(3, 6, 7),
            "conv3d": nn.Conv3d(2, 4, 3),
            "embedding": nn.Embedding(20, 8),
            "norm": nn.LayerNorm(6),
            "act": nn.ReLU(),
        }
    )
    found, left = find_layers(model)
    assert {layer.name: layer.weight for layer in found} == {
        "linear": WeightShape("linear", 4, 6),
        "conv": WeightShape("conv", 12, 4, (3, 5), 2),
        "conv1d": WeightShape("conv", 6, 3, (7,)),
        "conv3d": WeightShape("conv", 4, 2, (3, 3, 3)),
        "embedding": WeightShape("embedding", 8, 20),
    }
    for layer in found:
        assert layer.weight.dense_shape == tuple(layer.module.weight.shape)
        assert layer.n_params == count_params(layer.module)
        assert layer.kind == type(layer.module).__name__
    assert left == []


def test_a_shared_module_is_one_layer_with_all_its_names() -> None:
    model = TwoHeads()
    found, left = find_layers(model)
    assert [layer.names for layer in found] == [("first", "blocks.1"), ("blocks.0",), ("head",)]
    assert found[0].module is model.first
    assert left == []


def test_tied_weights_are_left_alone() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False), "other": nn.Linear(8, 8)}
    )
    model["head"].weight = model["embed"].weight
    assert names(model) == ["other"]
    assert set(reasons(model)) == {"embed", "head"}
    assert all("tied" in reason for reason in reasons(model).values())


def test_a_tied_bias_is_left_alone_too() -> None:
    model = mlp(8, 8, 8)
    model[2].bias = model[0].bias
    assert names(model) == []
    assert all("bias" in reason and "tied" in reason for reason in reasons(model).values())


def test_a_weight_that_another_module_holds_is_tied() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    holder = nn.Module()
    holder.alias = model["fc"].weight
    model["holder"] = holder
    assert names(model) == []
    assert "tied" in reasons(model)["fc"]


def test_subclasses_are_left_alone_and_listed() -> None:
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    assert names(model) == ["1"]
    assert reasons(model)["0"] == "Doubled is a subclass that may have a forward of its own"
    assert "subclass" in reasons(model)["2.out_proj"]


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.orthogonal,
        torch.nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_computed_weights_are_left_alone(wrap) -> None:
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert names(model) == ["1"]
    assert "parametrization" in reasons(model)["0"]


def test_depthwise_convolutions_are_left_alone_but_grouped_ones_found() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4))
    assert names(model) == ["2"]
    assert all("depthwise" in reason for reason in reasons(model).values())
    assert len(reasons(model)) == 2


def test_weights_without_data_are_left_alone() -> None:
    empty = nn.Linear(4, 4)
    empty.weight = nn.Parameter(torch.empty(4, 0))
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4, device="meta"), empty)
    assert names(model) == []
    assert set(reasons(model)) == {"0", "1", "2"}


def test_factorized_layers_are_passed_over() -> None:
    model = nn.Sequential(tt.nn.Linear(16, 16), nn.Linear(16, 16))
    assert names(model) == ["1"]
    assert reasons(model) == {}


def test_a_bare_layer_has_the_empty_name() -> None:
    layer = nn.Linear(4, 4)
    found, _ = find_layers(layer)
    assert found[0].names == ("",)
    assert found[0].module is layer


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({"include": "blocks.0"}, ["blocks.0"]),
        ({"include": ["head", "first"]}, ["first", "head"]),
        ({"include": "blocks.*"}, ["first", "blocks.0"]),  # "first" is also "blocks.1"
        ({"exclude": "head"}, ["first", "blocks.0"]),
        ({"exclude": "*.?"}, ["head"]),
        ({"include": "b*", "exclude": "blocks.0"}, ["first"]),
        ({"include": "*"}, ["first", "blocks.0", "head"]),
    ],
)
def test_filters_take_names_and_patterns_on_every_alias(filters, expected) -> None:
    assert names(TwoHeads(), **filters) == expected


@pytest.mark.parametrize("filters", [{"include": "heads"}, {"exclude": ["head", "Blocks.*"]}, {"include": ["relu"]}])
def test_a_pattern_that_matches_nothing_is_an_error(filters) -> None:
    with pytest.raises(FilterError, match="matches none of 3 layers") as caught:
        find_layers(TwoHeads(), **filters)
    assert "first, blocks.0, head" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_parameters_are_counted_once() -> None:
    model = TwoHeads(24)
    assert count_params(model) == 2 * (24 * 24 + 24) + (24 * 4 + 4)
