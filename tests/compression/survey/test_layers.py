"""Which layers are found: by identity, under all their names, and never one that could break."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import TwoHeads, mlp
from torch import Tensor, nn
from torch.nn.utils import prune

import tensortrain as tt
from tensortrain.compression import count_params, find_layers
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
    model = nn.ModuleDict({"a": nn.Linear(8, 20), "b": nn.Linear(8, 20, bias=False), "other": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    assert names(model) == ["other"]
    assert set(reasons(model)) == {"a", "b"}
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


def with_weight(change: Callable[[Tensor], Tensor], *, grad: bool = False) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=grad)
    return layer


def computed_bias() -> nn.Module:
    """By a hook that is none of torch's."""
    layer: Any = nn.Linear(8, 8)
    layer.raw = layer.bias
    del layer._parameters["bias"]
    layer.bias = 2 * layer.raw.detach()
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "bias", 2 * module.raw))
    return layer  # type: ignore[no-any-return]


def dynamic() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), dtype=torch.qint8)[0]


ODD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "float8": (lambda: with_weight(lambda w: w.to(torch.float8_e5m2)), "float8_e5m2"),
    "integers": (lambda: with_weight(lambda w: w.to(torch.int8)), "int8"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "complex64"),
    "sparse": (lambda: with_weight(lambda w: w.to_sparse()), "sparse_coo"),
    "sparse rows": (lambda: with_weight(lambda w: w.to_sparse_csr()), "sparse_csr"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "run the model once"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "meta device"),
    "expanded": (lambda: with_weight(lambda w: w[:1].expand(8, 8)), "repeats numbers"),
    "another shape": (lambda: with_weight(lambda w: w[:5]), "shape (5, 8)"),
    "computed bias": (computed_bias, "its bias is computed"),
    "quantized": (dynamic, "quantized: Linear keeps 64 packed numbers"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_weights_are_left_alone_and_listed(odd: str) -> None:
    build, reason = ODD[odd]
    model = nn.Sequential(nn.Linear(8, 8), build())
    assert names(model) == ["0"]
    assert reason in reasons(model)["1"]
    plan = tt.plan_compression(model, budget=0.95)
    assert plan.params_before == count_params(model)
    assert reason in str(plan)


def test_a_bias_of_another_dtype_is_left_alone() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    layer.bias.data = layer.bias.data.float()
    assert "its bias is torch.float32" in reasons(nn.Sequential(layer))["0"]


def test_layers_offloaded_by_accelerate_are_named_as_that() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(mlp(8, 8))
    assert "meta device" in reasons(model)["0"]
    assert "offloaded by accelerate (AlignDevicesHook)" in reasons(model)["0"]
    hooked = mlp(8, 8)
    accelerate.hooks.add_hook_to_module(hooked[0], accelerate.hooks.ModelHook())
    assert reasons(hooked)["0"] == "accelerate's ModelHook replaced its forward"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 16))
        self.scale = nn.Parameter(torch.ones(4))


def test_whatever_holds_parameters_is_listed_with_its_parameters() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(16, 16),
            "cell": nn.GRUCell(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "experts": Experts(),
            "norm": nn.LayerNorm(3000),
            "prelu": nn.PReLU(),
            "head": nn.Linear(16, 4),
        }
    )
    model.register_parameter("positions", nn.Parameter(torch.zeros(40, 16)))
    _, left = find_layers(model)
    listed = {layer.name: layer for layer in left}
    assert {name: layer.n_params for name, layer in listed.items()} == {
        "": 640,
        "lstm": 2176,
        "cell": 1632,
        "attention": 816,
        "attention.out_proj": 272,
        "experts": 2052,
    }
    assert sum(layer.n_params for layer in left) == count_params(model) - 6000 - 1 - 68
    assert "tensortrain.nn.LSTM.from_dense" in listed["lstm"].reason
    assert "gate_up_proj (4, 32, 16), scale (4,)" in listed["experts"].reason
    assert str(listed[""]).startswith("the model itself (ModuleDict, 640 parameters): no plan reaches its positions")


def test_cores_are_no_parameters_out_of_reach() -> None:
    model = nn.Sequential(tt.nn.Linear(64, 64), tt.nn.orthogonal(tt.nn.Linear(64, 64), "left"), tt.nn.LSTM(32, 32))
    assert all(layer.kind == "Linear" for layer in find_layers(model)[1])
    weighed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    (layer,) = find_layers(weighed)[1]
    assert layer.n_params == count_params(weighed)


def test_a_pattern_that_meets_only_what_is_left_alone_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    with pytest.raises(FilterError, match=r"none of 1 layers \(0\). Left alone is 1 \(Doubled, 20 parameters\)"):
        find_layers(model, include="1")
    assert names(model, exclude="1") == ["0"]  # it is left out already
