"""What users hang on layers goes over to the new ones and back, or the layer is left alone."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import batches, decay_, mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import carry, compress, find_layers, plan_compression, to_dense_
from tensortrain.system.copying import copy_model

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")

QUICK: dict[str, Any] = {"heal": False, "measure": False, "allow_slower": True}


def hung() -> nn.Sequential:
    """A model whose first layer carries something of every sort."""
    model = decay_(nn.Sequential(nn.Conv2d(4, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 1)))
    layer: Any = model[0]
    layer.f, layer.type, layer.where = -1, "models.common.Conv", [3, 4]
    layer.register_buffer("gain", torch.full((24,), 2.0))
    layer.register_buffer("seen", torch.zeros(()), persistent=False)
    layer.register_parameter("shift", nn.Parameter(torch.ones(24)))
    layer.act = nn.Linear(24, 24)
    layer.weight.lr_scale = 0.1
    layer.bias.no_decay = True
    return model


def test_everything_that_hangs_on_a_layer_is_the_same_object_on_the_new_one() -> None:
    model = hung()
    old: Any = model[0]
    keys = [key for key in model.state_dict() if "weight" not in key]
    new = compress(model, budget=0.7, include="0", inplace=True, **QUICK).model[0]
    assert isinstance(new, tt.nn.Conv2d)
    assert new is model[0]
    for name in ("f", "type", "where", "gain", "seen", "shift", "act"):
        assert getattr(new, name) is getattr(old, name)
    assert {"0.gain", "0.shift", "0.act.weight"} <= model.state_dict().keys()
    assert "0.seen" not in model.state_dict()
    assert new.transposed is False  # what torch's layer has and ours has no use for
    assert all(core.lr_scale == 0.1 for core in new.cores)
    assert new.bias.no_decay
    back: Any = to_dense_(model)[0]
    assert type(back) is nn.Conv2d
    assert back.where is old.where
    assert back.shift is old.shift
    assert back.weight.lr_scale == 0.1
    assert [key for key in model.state_dict() if "weight" not in key] == keys


def test_layers_hung_on_layers_are_replaced_too() -> None:
    model = hung()
    model.append(model[0].act)  # met by another name
    compressed = compress(model, budget=0.3, inplace=True, **QUICK).model
    assert isinstance(compressed[0], tt.nn.Conv2d)
    assert isinstance(compressed[0].act, tt.nn.Linear)
    assert compressed[3] is compressed[0].act
    bare = decay_(nn.Linear(24, 24))
    bare.inner = decay_(nn.Linear(24, 24))
    new = compress(bare, budget=0.6, **QUICK).model
    assert isinstance(new, tt.nn.Linear)
    assert isinstance(new.inner, tt.nn.Linear)


def test_hooks_that_know_their_layer_know_the_new_one() -> None:
    model = decay_(mlp(24, 24, 4))
    seen: list[nn.Module] = []
    model[0].register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    small = compress(model, budget=0.5, **QUICK).model
    small.load_state_dict(small.state_dict())
    assert seen == [small[0]]


TAKEN: dict[str, Any] = {
    "an attribute of ours": lambda layer: setattr(layer, "ranks", (3,)),
    "a child named as ours": lambda layer: setattr(layer, "cores", nn.Linear(2, 2)),
    "a buffer named as ours": lambda layer: layer.register_buffer("spec", torch.zeros(2)),
    "a method": lambda layer: setattr(layer, "state_dict", lambda *args, **kwargs: {}),
    "the inside of a call": lambda layer: setattr(layer, "_call_impl", lambda *args: args[0]),
    "compiled": lambda layer: layer.compile(),
    "forward": lambda layer: setattr(layer, "forward", lambda x: x),
    "forward with the weight": lambda layer: setattr(layer, "forward", lambda x: F.linear(x, 2 * layer.weight)),
    "a bound function": lambda layer: setattr(layer, "forward", types.MethodType(lambda self, x: x, layer)),
    "a hook on the weight": lambda layer: layer.weight.register_hook(lambda grad: 2 * grad),
    "another class": lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {})),
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_cannot_go_over_leaves_the_layer_alone(what: str) -> None:
    model = decay_(mlp(24, 24, 24))
    TAKEN[what](model[0])
    found, left = find_layers(model)
    assert "0" not in [layer.name for layer in found]
    assert [layer.name for layer in left] == ["0"]
    assert left[0].n_params == 600
    small = compress(model, budget=0.8, **QUICK)
    assert type(small.model[0]).__module__ != "tensortrain.nn.linear"
    assert any(note.startswith("0 (") for note in small.report.notes)


def test_a_patched_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Conv1d.forward
    monkeypatch.setattr(nn.Conv1d, "forward", lambda self, x: 2 * plain(self, x))
    found, left = find_layers(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4)))
    assert [layer.name for layer in found] == ["1"]
    assert "forward of all Conv1d layers was replaced" in left[0].reason


KEPT = decay_(nn.Linear(24, 24).double())
KEPT_FORWARD = KEPT.forward


def by_closure(layer: nn.Module) -> nn.Module:
    plain = layer.forward
    layer.forward = lambda x: 3 * plain(x)
    return layer


def by_global(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 3 * KEPT_FORWARD(x)
    return layer


@pytest.mark.parametrize("wrap", [by_closure, by_global])
def test_a_forward_that_wraps_the_layers_own_is_kept(wrap) -> None:
    layer = wrap(KEPT)
    model = nn.Sequential(layer, nn.Linear(24, 4))
    x = torch.randn(6, 24)
    try:
        exact = model(x).detach()
        small = compress(model, budget=0.9, include="0", data=batches(2, 40, 24), **QUICK).model
        assert isinstance(small[0], tt.nn.Linear)
        assert 1e-6 < ((small(x) - exact).norm() / exact.norm()).item() < 0.1
        torch.testing.assert_close(small[0](x), 3 * tt.nn.Linear.forward(small[0], x))
        assert torch.equal(model(x), exact)
        torch.testing.assert_close(to_dense_(copy_model(small))(x), small(x))
        plan = plan_compression(model, budget=0.9, include="0")
        assert isinstance(tt.apply_plan_(model, plan)[0], tt.nn.Linear)
        torch.testing.assert_close(model[0](x), 3 * tt.nn.Linear.forward(model[0], x))
    finally:
        del layer.forward


def test_to_dense_leaves_what_it_cannot_carry_and_says_so() -> None:
    model = compress(decay_(mlp(24, 24, 24)), budget=0.5, **QUICK).model
    model[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="left '0' .Linear. factorized: its forward was replaced"):
        to_dense_(model)
    assert [type(model[k]).__module__ for k in (0, 2)] == ["tensortrain.nn.linear", "torch.nn.modules.linear"]


def test_settings_of_factorized_layers_do_not_hinder() -> None:
    model = compress(decay_(mlp(24, 24)), budget=0.5, **QUICK).model
    model[0].dense_limit_bytes, model[0].may_time_plans = 0, False

    def double(x: Tensor) -> Tensor:
        return to_dense_(model)(x)

    assert double(torch.randn(2, 24)).shape == (2, 24)
    assert vars(model[0]).keys() == vars(nn.Linear(2, 2)).keys()


def test_names_of_a_layer_are_found_without_drawing_numbers(monkeypatch) -> None:
    def drawn(tensor: Tensor, *args: Any, **keywords: Any) -> Tensor:
        raise AssertionError("drawn")

    monkeypatch.setattr(carry, "_own_names_of", {})
    monkeypatch.setattr(Tensor, "normal_", drawn)
    for layer in (nn.Embedding(5, 4, _weight=torch.zeros(5, 4)), nn.Linear(4, 3), nn.Conv1d(4, 3, 2)):
        assert "weight" in carry.own_names(layer)
        assert not carry.cannot_carry(layer)
