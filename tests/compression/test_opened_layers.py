"""Recurrent layers and attention under a plan: their maps are reached one by one, and the rest stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import assert_unchanged, snapshot
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.opened import close_composites, open_layers, opened_for_a_while
from tensortrain.nn.opening import composite_of, opened

LAYERS = {
    "lstm": lambda: nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(12, 16, proj_size=6),
    "gru": lambda: nn.GRU(12, 16, bias=False),
    "rnn": lambda: nn.RNN(12, 16, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(12, 16),
    "gru cell": lambda: nn.GRUCell(12, 16),
}
ATTENTION = {
    "attention": lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    "extended": lambda: nn.MultiheadAttention(12, 2, add_bias_kv=True, add_zero_attn=True),
    "unlike": lambda: nn.MultiheadAttention(12, 2, kdim=8, vdim=10, bias=False),
}


def outputs(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if "MultiheadAttention" in type(layer).__name__:
        q, k, v = (torch.randn(4, 5, n, generator=generator) for n in (12, layer.kdim, layer.vdim))
        return layer(q, k, v)[0]
    is_cell = "Cell" in type(layer).__name__
    found = layer(torch.randn((5, 12) if is_cell else (4, 5, 12), generator=generator))
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", [*LAYERS, *ATTENTION])
def test_opened_layers_compute_the_same_with_as_many_parameters(name: str) -> None:
    torch.manual_seed(0)
    layer = {**LAYERS, **ATTENTION}[name]()
    layer.requires_grad_(False).eval()
    new = opened(layer)
    torch.testing.assert_close(outputs(new), outputs(layer), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in layer.parameters())
    assert not any(p.requires_grad for p in new.parameters())
    assert all(type(one) is nn.Linear for _, one in new.named_maps())
    assert not new.training


class Tagger(nn.Module):
    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.body = getattr(nn, kind)(16, 24, num_layers=2, batch_first=True)
        self.mix = nn.MultiheadAttention(24, 3, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h, _ = self.body(self.table(ids))
        return self.head((h + self.mix(h, h, h, need_weights=False)[0]).mean(dim=1))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 40, (6, 9), generator=generator), torch.zeros(6, dtype=torch.long)) for _ in range(3)]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compress_reaches_all_maps_and_leaves_the_original_alone(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Tagger(kind).eval()
    before, ids = snapshot(model), data()[0][0]
    result = tt.compress(model, budget="2x", data=data(), measure=False, allow_slower=True)
    assert_unchanged(model, before)
    small = result.model
    total = sum(p.numel() for p in model.parameters())
    assert 0.95 * total / 2 <= sum(p.numel() for p in small.parameters()) <= total / 2
    names = {layer.name for layer in result.plan.layers}
    assert {"body.l0.ih", "body.l1.hh", "mix.q_proj", "mix.out_proj", "head", "table"} <= names
    assert not [layer for layer in result.plan.left_alone if "body" in layer.name or "mix" in layer.name]
    assert {layer.name for layer in result.report.layers} == names
    expected = small(ids)
    tt.save_pretrained(small, tmp_path / "saved")
    loaded = tt.load_pretrained(tmp_path / "saved", model=Tagger(kind)).eval()
    torch.testing.assert_close(loaded(ids), expected, rtol=0, atol=0)
    again = tt.apply_plan_(copy.deepcopy(model), tt.CompressionPlan.from_json(result.plan.to_json()))
    assert [type(one) for one in again.modules()] == [type(one) for one in small.modules()]
    tt.to_dense_(small)
    assert [type(one) for one in small.children()] == [type(one) for one in model.children()]
    torch.testing.assert_close(small(ids), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_which_no_map_changes_stay_torchs() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    plan = tt.plan_compression(model, budget=0.7, data=data(), exclude=["mix.*"], allow_slower=True)
    assert plan.opened == ("body",)
    changed = tt.apply_plan_(copy.deepcopy(model), plan)
    assert type(changed.mix) is nn.MultiheadAttention
    assert isinstance(changed.body, tt.nn.LSTM)


def test_a_bare_recurrent_layer_is_a_model_too() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(24, 24)
    result = tt.compress(lstm, budget="2x", data=[torch.randn(5, 3, 24)] * 2, measure=False, allow_slower=True)
    assert isinstance(result.model, tt.nn.LSTM)
    assert type(lstm) is nn.LSTM
    assert isinstance(tt.to_dense_(result.model), nn.LSTM)


def test_a_failure_puts_torchs_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    plan = tt.plan_compression(model, budget="2x", data=data(), allow_slower=True)
    before = snapshot(model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tensortrain.compression.surgery._build", fails)
    with pytest.raises(KeyboardInterrupt):
        tt.apply_plan_(model, plan)
    assert_unchanged(model, before)


def test_hooks_work_on_while_a_layer_stands_open_and_after() -> None:
    model, seen = Tagger().eval(), []
    handle = model.body.register_forward_hook(lambda *_: seen.append(1))
    with opened_for_a_while(model) as found:
        found.model(data()[0][0])
    model(data()[0][0])
    assert len(seen) == 2
    handle.remove()
    model(data()[0][0])
    assert len(seen) == 2


def test_shared_layers_stay_shared() -> None:
    model = nn.ModuleList([nn.GRU(8, 8)])
    model.append(model[0])
    found = open_layers(model)
    assert model[0] is model[1]
    assert composite_of(model[0]) is None
    found.close()
    assert model[0] is model[1]
    assert type(model[0]) is nn.GRU


def test_what_cannot_be_taken_apart_is_listed_with_its_reason() -> None:
    tied, odd = nn.ModuleList([nn.GRU(64, 64), nn.GRU(64, 64)]), nn.ModuleDict({"a": nn.GRU(64, 64)})
    tied[1].weight_hh_l0 = tied[0].weight_hh_l0
    odd["a"].register_buffer("note", torch.ones(3))
    hooked = nn.ModuleDict({"a": nn.GRU(64, 64)})
    hooked["a"].weight_hh_l0.register_hook(lambda grad: grad)
    for model, why in ((tied, "is tied"), (odd, "carries a 'note'"), (hooked, "hooks hang on its parameters")):
        with opened_for_a_while(model) as found:
            assert found.names == []
        assert all(why in layer.reason for layer in found.refused)
        told = tt.inspect(model).left_alone
        assert len(told) == len(model)
        assert all(why in str(layer) for layer in told)


def test_notes_on_a_layer_go_with_it() -> None:
    model = nn.ModuleDict({"a": nn.GRU(8, 8)})
    model["a"].note = "mine"
    with opened_for_a_while(model) as found:
        assert found.names == ["a"]
        assert model["a"].note == "mine"
    assert model["a"].note == "mine"


def test_full_backward_hooks_stay_what_they_are() -> None:
    model, seen = Tagger().eval(), []
    model.mix.register_full_backward_hook(lambda module, before, after: seen.append(len(before)))
    model(data()[0][0]).sum().backward()
    with opened_for_a_while(model) as found:
        found.model(data()[0][0]).sum().backward()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_an_interrupt_while_opening_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tagger().eval()
    before, real, calls = snapshot(model), opened, []

    def interrupted(layer: nn.Module) -> nn.Module:
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(layer)

    monkeypatch.setattr("tensortrain.compression.opened.opened", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_layers(model)
    assert_unchanged(model, before)


def test_cells_of_a_layer_that_stays_are_not_closed() -> None:
    torch.manual_seed(0)
    layer = tt.nn.LSTM(8, 8, num_layers=2, compress="none")
    layer.l1.hh = tt.nn.Linear.from_dense(layer.l1.hh)
    model = nn.Sequential(layer)
    close_composites(model)
    assert model[0] is layer
    assert isinstance(layer.l0, tt.nn.LSTMCell)


class Subclass(nn.LSTM):
    """Might have a forward of its own."""


def test_subclasses_are_left_alone() -> None:
    model = nn.ModuleDict({"a": Subclass(32, 32), "b": nn.Linear(32, 32)})
    assert [layer.name for layer in tt.inspect(model).left_alone] == ["a"]
