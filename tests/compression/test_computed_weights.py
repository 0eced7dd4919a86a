"""Layers whose weight is computed at every call: weight norm, spectral norm, orthogonality, pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tensortrain as tt
from tensortrain.compression import count_params
from tensortrain.nn import FactorizedLayer
from tensortrain.testing import rel_error

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")

Change = Callable[[Any], Any]


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _Drawn(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def _halved(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", _Halved())
    return layer


def _pruned_twice(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.2)
    prune.random_unstructured(layer, "weight", amount=0.2)
    return prune.l1_unstructured(layer, "bias", amount=0.5)


WAYS: dict[str, Change] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of before": torch.nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm of before": torch.nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "halved": _halved,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "pruned twice, bias too": _pruned_twice,
    "weight norm of what is pruned": lambda layer: prune.l1_unstructured(
        torch.nn.utils.weight_norm(layer), "weight_v", amount=0.3
    ),
}


class Vocoder(nn.Module):
    """As generators of speech are built: transposed convolutions that widen in time, all under weight norm."""

    def __init__(self, change: Change = torch.nn.utils.weight_norm) -> None:
        super().__init__()
        self.pre = change(nn.Conv1d(20, 64, 7, padding=3))
        self.up = change(nn.ConvTranspose1d(64, 32, 8, stride=4, padding=2))
        self.block = nn.ModuleList(change(nn.Conv1d(32, 32, 3, padding=d, dilation=d)) for d in (1, 3))
        self.post = change(nn.Conv1d(32, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.pre(x).relu())
        for conv in self.block:
            x = x + conv(x.relu())
        return self.post(x).tanh()


def perceptron(change: Change) -> nn.Module:
    return nn.Sequential(change(nn.Linear(48, 64)), nn.ReLU(), change(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 5))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_replaced_whatever_computes_its_weight(way: str) -> None:
    model = perceptron(WAYS[way])
    x = torch.randn(7, 48)
    model(x)  # power iterations move on in train mode
    before, kinds = state(model), [type(module) for module in model.modules()]
    exact = copy.deepcopy(model).eval()(x) if "before" not in way and "prun" not in way else model.eval()(x)
    model.train()
    result = tt.compress(model, budget="1.3x", measure=False, heal=False, allow_slower=True, formats=["low_rank"])
    assert equal(state(model), before)
    assert [type(module) for module in model.modules()] == kinds
    changed = [layer.name for layer in result.plan.layers if layer.spec is not None]
    assert any(name in ("0", "2") for name in changed)
    (note,) = [note for note in result.plan.notes if "computed" in note]
    assert "'0', '2'" in note
    assert result.plan.params_after == count_params(result.model)
    assert result.plan.params_before == count_params(model)
    full = tt.apply_plan_(copy.deepcopy(result.model), result.plan) if not changed else result.model
    for name in changed:
        layer = full.get_submodule(name)
        assert isinstance(layer, FactorizedLayer)
        assert not hasattr(layer, "parametrizations")
    assert rel_error(result.model.eval()(x), exact) < 1  # the numbers are those of the layer, cut


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_are_those_of_eval_mode(way: str) -> None:
    model = perceptron(WAYS[way])
    x = torch.randn(7, 48)
    model(x)
    model.eval()
    exact = model(x).detach()
    plan = tt.plan_compression(model, budget="1.05x", allow_slower=True, formats=["tt"], include="2")
    assert plan.layers[0].spec is not None
    model.train()
    changed = tt.apply_plan_(model, plan)
    layer = changed.get_submodule("2")
    assert isinstance(layer, FactorizedLayer)
    assert rel_error(changed.eval()(x), exact) <= 2 * plan.layers[0].rel_error  # type: ignore[operator]


@pytest.mark.parametrize("change", [torch.nn.utils.weight_norm, parametrizations.weight_norm])
def test_a_vocoder_under_weight_norm(change: Change, tmp_path: Path) -> None:
    model = Vocoder(change)
    data = [torch.randn(4, 20, 12) for _ in range(3)]
    result = tt.compress(model, budget="1.5x", data=data, heal=False, measure=False, allow_slower=True)
    assert count_params(result.model) <= count_params(model) / 1.5
    assert result.plan.params_after == count_params(result.model)
    assert {"up", "pre"} & {layer.name for layer in result.plan.layers if layer.decision.split(":")[0] != "left dense"}
    again = tt.apply_plan_(Vocoder(change), tt.CompressionPlan.from_json(result.plan.to_json()))
    assert count_params(again) == count_params(result.model)
    tt.save_pretrained(result.model, tmp_path / "small")
    exact = result.model.eval()(data[0])
    for target in (Vocoder(change), lambda: Vocoder(change)):
        loaded = tt.load_pretrained(tmp_path / "small", model=target)
        assert torch.equal(loaded(data[0]), exact)


def test_what_stays_dense_goes_on_being_computed() -> None:
    model = perceptron(parametrizations.weight_norm)
    result = tt.compress(model, budget="1.2x", include="0", measure=False, heal=False, allow_slower=True)
    assert isinstance(result.model[0], FactorizedLayer)
    assert parametrize.is_parametrized(result.model[2])
    assert result.plan.opened == ("0",)
    assert result.plan.params_after == count_params(result.model)
    old = perceptron(torch.nn.utils.weight_norm)
    result = tt.compress(old, budget="1.2x", include="0", measure=False, heal=False, allow_slower=True)
    kept = result.model[2]
    with torch.no_grad():
        kept.weight_g.mul_(2)  # type: ignore[operator]
    x = torch.randn(3, 64)
    assert rel_error(kept(x) - kept.bias, 2 * (old[2](x) - old[2].bias)) <= 1e-6


def test_maps_of_an_lstm_under_weight_norm(tmp_path: Path) -> None:
    def make() -> nn.Module:
        lstm = nn.LSTM(64, 64, batch_first=True)
        parametrizations.weight_norm(lstm, "weight_ih_l0")
        return nn.ModuleDict({"lstm": parametrizations.weight_norm(lstm, "weight_hh_l0")})

    model, x = make(), torch.randn(3, 5, 64)
    before = state(model)
    plan = tt.plan_compression(model, budget="1.2x", allow_slower=True, include="lstm.l0.ih")
    assert equal(state(model), before)
    assert plan.opened == ("lstm",)
    small = tt.apply_plan_(copy.deepcopy(model), plan)
    assert count_params(small) == plan.params_after
    assert isinstance(small.get_submodule("lstm.l0.ih"), FactorizedLayer)
    exact, found = model["lstm"](x)[0], small["lstm"](x)[0]  # type: ignore[index]
    assert rel_error(found, exact) < 0.7
    tt.save_pretrained(small, tmp_path / "small")
    loaded = tt.load_pretrained(tmp_path / "small", model=make)
    assert torch.equal(loaded["lstm"](x)[0], found)  # type: ignore[index]


def test_narrowed_units_of_layers_under_weight_norm() -> None:
    model = perceptron(parametrizations.weight_norm)
    data = [torch.randn(32, 48) for _ in range(4)]
    result = tt.compress(model, budget="1.4x", data=data, heal=False, measure=False, formats=["narrow"])
    assert result.plan.narrowed
    assert count_params(result.model) == result.plan.params_after
    result.model(data[0])


def test_what_cannot_be_computed_once_is_left_alone_with_its_reason() -> None:
    drawn = nn.Linear(64, 64)
    parametrize.register_parametrization(drawn, "weight", _Drawn())
    tied = nn.ModuleList(parametrizations.weight_norm(nn.Linear(64, 64)) for _ in range(2))
    one, two = (layer.parametrizations.weight for layer in tied)
    two.original1 = one.original1
    hooked = parametrizations.weight_norm(nn.Linear(64, 64))
    hooked.parametrizations.weight.original1.register_hook(lambda grad: grad)
    model = nn.ModuleDict({"drawn": drawn, "tied": tied, "hooked": hooked, "plain": nn.Linear(64, 64)})
    plan = tt.plan_compression(model, budget="1.1x", allow_slower=True)
    reasons = {layer.name: layer.reason for layer in plan.left_alone}
    assert "drawn anew" in reasons["drawn"]
    assert "shares memory" in reasons["tied.0"]
    assert "hooks hang" in reasons["hooked"]
    assert [layer.name for layer in plan.layers] == ["plain"]


def test_a_bare_layer_under_weight_norm() -> None:
    layer = parametrizations.weight_norm(nn.Linear(64, 64))
    found = tt.compress(layer, budget="2x", measure=False, heal=False, allow_slower=True).model
    assert isinstance(found, tt.nn.Linear)
    assert parametrize.is_parametrized(layer)


def test_a_failure_halfway_leaves_everything_computed() -> None:
    model = perceptron(torch.nn.utils.weight_norm)
    plan = tt.plan_compression(model, budget="1.3x", allow_slower=True)
    with torch.no_grad():
        model[4].weight.fill_(float("nan"))
        model[2].weight_v.fill_(float("nan"))
    before, hooks = state(model), [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(tt.errors.NonFiniteError):
        tt.apply_plan_(model, plan)
    assert state(model).keys() == before.keys()
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_hooks_of_the_user_go_on() -> None:
    calls: list[int] = []
    model = perceptron(torch.nn.utils.weight_norm)
    handle = model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    result = tt.compress(model, budget="1.3x", measure=False, heal=False, allow_slower=True, inplace=True, include="0")
    calls.clear()
    result.model(torch.randn(2, 48))
    assert calls == [1]
    handle.remove()
    result.model(torch.randn(2, 48))
    assert calls == [1]
