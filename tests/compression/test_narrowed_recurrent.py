"""Recurrent layers with fewer hidden units: found, tried, on the menu, fitted anew, applied, stored."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tensortrain as tt
from tensortrain.compression.choose.plan import NarrowedRecurrent
from tensortrain.compression.opened import open_layers
from tensortrain.compression.report.alone import loss_together, losses_alone
from tensortrain.compression.survey.layers import count_params
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven_recurrent import proven_recurrent
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.errors import CheckpointError, ShapeError
from tensortrain.system.observer import Silent

RECURRENT = ("recurrent",)
KINDS = (nn.LSTM, nn.GRU, nn.RNN)
H = 20


class Net(nn.Module):
    """A recurrent layer and a head; ``how`` says what the head reads."""

    def __init__(self, kind: Any = nn.LSTM, how: str = "last", **given: Any) -> None:
        super().__init__()
        self.how = how
        self.rnn = kind(6, H, **({"batch_first": True} | given))
        self.head = nn.Linear(H * (1 + self.rnn.bidirectional), 4)

    def forward(self, x: Tensor) -> Any:
        y, state = self.rnn(x)
        h = state[0] if isinstance(state, tuple) else state
        if self.how == "last":
            return self.head(y[:, -1])
        if self.how == "final":
            return self.head(torch.cat(list(h[-1 - self.rnn.bidirectional :]), dim=-1))
        if self.how == "mean":
            return self.head(torch.tanh(y).mean(dim=1))
        if self.how == "cells":
            return self.head(state[1][-1])
        if self.how == "lower":
            return self.head(y[:, -1] + h[0])
        if self.how == "returned":
            return self.head(y), h
        assert self.how == "viewed"
        return self.head(y[:, -1].reshape(len(x), 4, H // 4).flatten(1))


class Packed(Net):
    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [9, 7, 4, *[3] * len(x)][: len(x)], batch_first=True)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(dim=1))


class Given(Net):
    """The first state is made by the model's own code."""

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(1, len(x), H), x.new_zeros(1, len(x), H))
        return self.head(self.rnn(x, state)[0][:, -1])


class Towers(nn.Module):
    """Layers one above the other, the upper one read by two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.GRU(6, H, batch_first=True), nn.GRU(H, 16, batch_first=True, bidirectional=True)
        self.start, self.end = nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.high(self.low(x)[0])[0]
        return torch.cat([self.start(y), self.end(y)], dim=-1)


def seeded(make: Any, *given: Any, **how: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*given, **how).eval()


def batches(n: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 9, 6, generator=generator) for _ in range(n)]


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def proven(net: nn.Module, notes: list[str] | None = None) -> list[RecurrentUnits]:
    opened = open_layers(net)
    try:
        calibration = Calibration(batches=batches()[:1])
        return proven_recurrent(opened.model, calibration, lambda found: found, [] if notes is None else notes)
    finally:
        opened.close()


def compressed(net: nn.Module, budget: Any = "1.5x", **how: Any) -> Any:
    how = {"data": batches(), "heal": False, "formats": RECURRENT, "measure": False} | how
    return tt.compress(net, budget=budget, **how)


# -- found and tried -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["last", "final", "mean"])
@pytest.mark.parametrize("given", [{}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True}])
def test_units_and_who_reads_them_are_found(kind: Any, how: str, given: dict[str, Any]) -> None:
    net = seeded(Net, kind, how, **given)
    sizes = (H, given.get("num_layers", 1), 1 + given.get("bidirectional", False))
    assert proven(net) == [RecurrentUnits("rnn", ("head",), *sizes)]


def test_packed_sequences_and_several_readers() -> None:
    assert proven(seeded(Packed)) == [RecurrentUnits("rnn", ("head",), H, 1, 1)]
    low, high = proven(seeded(Towers))
    assert low == RecurrentUnits("low", ("high.l0.ih", "high.l0_reverse.ih"), H, 1, 1)
    assert high == RecurrentUnits("high", ("start", "end"), 16, 1, 2)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        ((Net, nn.LSTM, "cells"), "final state"),
        ((Net, nn.GRU, "lower"), "final state"),
        ((Net, nn.GRU, "returned"), "output of the model"),
        ((Net, nn.LSTM, "viewed"), "does not compute"),
        ((Given,), "first state"),
    ],
)
def test_what_is_left_alone_has_its_reason(net: Any, why: str) -> None:
    make, *given = net
    how = {"num_layers": 2} if "lower" in given else {}
    notes: list[str] = []
    assert not proven(seeded(make, *given, **how), notes)
    assert len(notes) == 1
    assert "'rnn'" in notes[0]
    assert why in notes[0]
    plan = tt.plan_compression(
        seeded(make, *given, **how), budget=1.0, data=batches(), formats=("low_rank", *RECURRENT)
    )
    assert why in " ".join(plan.notes)


def test_projected_outputs_stay() -> None:
    net = nn.Sequential(nn.LSTM(6, H, batch_first=True, proj_size=5), _First(), nn.Linear(5, 3)).eval()
    notes: list[str] = []
    assert not proven(net, notes)
    assert "projected" in notes[0]


class Stepwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, H), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


def test_cells_stay() -> None:
    notes: list[str] = []
    assert not proven(seeded(Stepwise), notes)
    assert len(notes) == 1
    assert "state of a cell" in notes[0]


class _First(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0]


# -- the numbers ---------------------------------------------------------------------------------------


def by_hand(net: Any, kept: list[list[int]]) -> nn.Module:
    """The model with these units, cell by cell, its weights cut as they are."""
    small = copy.deepcopy(net)
    old, n_directions, n = net.rnn, 1 + net.rnn.bidirectional, len(kept[0])
    arguments = {name: getattr(old, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")}
    small.rnn = type(old)(6, n, **arguments).to(old.weight_ih_l0.dtype).eval()
    with torch.no_grad():
        for k, units in enumerate(kept):
            end = f"l{k // n_directions}" + ("_reverse" if k % n_directions else "")
            rows = [g + u for g in range(0, len(getattr(old, f"weight_hh_{end}")), H) for u in units]
            below = (k // n_directions - 1) * n_directions
            columns = [d * H + u for d in range(n_directions) for u in kept[below + d]] if below >= 0 else slice(None)
            getattr(small.rnn, f"weight_ih_{end}").copy_(getattr(old, f"weight_ih_{end}")[rows][:, columns])
            getattr(small.rnn, f"weight_hh_{end}").copy_(getattr(old, f"weight_hh_{end}")[rows][:, units])
            if old.bias:
                for name in (f"bias_ih_{end}", f"bias_hh_{end}"):
                    getattr(small.rnn, name).copy_(getattr(old, name)[rows])
        read = [d * H + u for d in range(n_directions) for u in kept[d - n_directions]]
        small.head = nn.Linear(len(read), 4).to(old.weight_ih_l0.dtype)
        small.head.weight.copy_(net.head.weight[:, read])
        small.head.bias.copy_(net.head.bias)
    return small


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given", [{}, {"bias": False}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}], ids=str
)
def test_plan_without_data_is_the_model_cut_by_hand(kind: Any, given: dict[str, Any]) -> None:
    net = seeded(Net, kind, **given).double()
    plan = compressed(net, data=[x.double() for x in batches()]).plan
    (one,) = plan.recurrent
    small = tt.apply_plan_(copy.deepcopy(net), tt.CompressionPlan.from_json(plan.to_json()))
    x = batches()[0].double()
    assert rel(small(x), by_hand(net, [list(some) for some in one.kept])(x)) < 1e-12
    assert type(small.rnn) is kind
    assert small.rnn.hidden_size == len(one.kept[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_units_that_nobody_reads_go_for_nothing(kind: Any, given: dict[str, Any]) -> None:
    net: Any = seeded(Net, kind, **given).double()
    kept = range(0, H, 2)
    is_dead = torch.ones(H, dtype=torch.bool)
    is_dead[list(kept)] = False
    with torch.no_grad():
        for name, weight in net.rnn.named_parameters():
            if name.startswith("weight_hh"):
                weight[:, is_dead] = 0
            elif name.startswith("weight_ih") and "l0" not in name:
                weight[:, is_dead.repeat(weight.shape[1] // H)] = 0
        net.head.weight[:, is_dead.repeat(net.head.weight.shape[1] // H)] = 0
    data = [x.double() for x in batches()]
    whole = sum(p.numel() for p in net.parameters())
    half = sum(
        p.numel() for p in by_hand(net, [list(kept)] * net.rnn.num_layers * (1 + net.rnn.bidirectional)).parameters()
    )
    result = compressed(net, {"params": half}, data=data)
    assert all(some == tuple(kept) for some in result.plan.recurrent[0].kept)
    assert rel(result.model(data[0]), net(data[0])) < 1e-6  # the second moments are shrunk a little
    assert count_params(result.model) == half < whole


def test_units_that_are_sums_of_others_are_made_up_for() -> None:
    net: Any = seeded(Net, nn.GRU)
    with torch.no_grad():
        for p in net.rnn.parameters():
            rows = [g + u % (H // 2) for g in range(0, len(p), H) for u in range(H)]
            p.copy_(p[rows])  # twins that do the same, each read with a weight of its own
    data = batches()
    result = compressed(net, "2x", data=data)
    assert rel(result.model(data[0]), net(data[0])) < 0.02
    cut = tt.apply_plan_(copy.deepcopy(net), tt.CompressionPlan.from_json(result.plan.to_json()))
    assert rel(cut(data[0]), net(data[0])) > 5 * rel(result.model(data[0]), net(data[0]))


class Filtered(nn.Module):
    """A convolution over time reads the units."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.conv = nn.GRU(6, H, batch_first=True), nn.Conv1d(H, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.rnn(x)[0].transpose(1, 2))


def test_losses_at_convolutions_are_those_of_what_is_built() -> None:
    net: Any = seeded(Filtered)
    data = batches()
    with torch.no_grad():
        net.conv.weight[:, ::2] *= 1e-4
    result = compressed(net, "1.6x", data=data)
    assert result.plan.recurrent
    assert result.model.conv.in_channels == result.model.rnn.hidden_size < H
    entry = {layer.name: layer for layer in result.plan.layers}["conv"]
    seen = torch.cat([net.rnn(x)[0].transpose(1, 2).unfold(2, 3, 1) for x in data])  # b h t 3
    (kept,) = result.plan.recurrent[0].kept
    wanted = torch.einsum("bhtk,ohk->bto", seen - seen.mean((0, 2), keepdim=True), net.conv.weight)
    given = torch.einsum(
        "bhtk,ohk->bto", (seen - seen.mean((0, 2), keepdim=True))[:, list(kept)], result.model.conv.weight
    )
    assert 0.3 * rel(given, wanted) < entry.rel_error < 3 * rel(given, wanted)  # outputs count differently


# -- plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, Packed, Towers])
def test_budget_is_met_and_counted(make: Any) -> None:
    net = seeded(make)
    before = copy.deepcopy(net.state_dict())
    result = compressed(net, "1.3x")
    assert result.plan.recurrent
    assert result.plan.params_after == count_params(result.model) <= count_params(net) / 1.3
    assert result.model(batches()[0]).shape == net(batches()[0]).shape
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert result.model(torch.empty(0, 9, 6)[:0] if make is Towers else batches()[0]).isfinite().all()


def test_a_plan_for_another_kind_of_cell_is_refused() -> None:
    plan = compressed(seeded(Net, nn.LSTM)).plan
    other = seeded(Net, nn.GRU)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ShapeError, match="Nothing was changed"):
        tt.apply_plan_(other, plan)
    assert type(other.rnn) is nn.GRU
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())


def test_what_fewer_units_spoil_is_measured() -> None:
    net = seeded(Net)
    result = compressed(net, measure=True)
    plan = result.plan
    assert plan.recurrent
    alone = tt.apply_plan_(copy.deepcopy(net), replace(plan, layers=()).with_groups(plan.recurrent))
    wanted = loss_together(net, alone, plan, batches=plan.calibration.batches[:1])
    found = losses_alone(net, result.model, plan)
    told = {layer.name for layer in plan.layers if layer.loss and layer.name in plan.recurrent[0].names}
    assert told == {name for name in found if name in plan.recurrent[0].names}
    torch.testing.assert_close(sum(found[name] for name in told), wanted)
    assert {layer.name for layer in result.report.layers if layer.measured_loss is not None} >= told


def test_time_first_and_gradients_and_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net: Any = seeded(Net, nn.LSTM, "final", batch_first=False).to(dtype)
        data = [x.to(dtype) for x in batches()]
        small = compressed(net, data=data).model
        assert {p.dtype for p in small.parameters()} == {dtype}
        small.train()
        small(data[0]).square().mean().backward()
        assert all(p.grad is not None for p in small.parameters())


def test_what_hangs_on_the_layer_goes_along() -> None:
    net: Any = seeded(Net)
    seen = []
    net.rnn.register_forward_hook(lambda *_: seen.append(1))
    net.rnn.own_note = "kept"
    net.rnn.weight_hh_l0.requires_grad_(False)
    small = compressed(net, inplace=True).model
    assert small is net
    seen.clear()
    small(batches()[0])
    assert seen == [1]
    assert small.rnn.own_note == "kept"
    assert not small.rnn.weight_hh_l0.requires_grad
    assert small.rnn.weight_ih_l0.requires_grad


def test_in_place_an_error_brings_everything_back() -> None:
    net = seeded(Net)
    objects = [*net.modules(), *net.parameters()]
    x = batches()[0]
    wanted = net(x)
    with pytest.raises(RuntimeError, match="stopped"):
        compressed(net, inplace=True, heal={"steps": 1}, observer=_Stops())
    assert all(p is q for p, q in zip([*net.modules(), *net.parameters()], objects, strict=True))
    assert torch.equal(net(x), wanted)


class _Stops(Silent):
    def on_start(self, name: str, total: int | None) -> None:
        if name == "heal":
            raise RuntimeError("stopped")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_keep_the_sizes(kind: Any, tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, how = batches()[0], {"num_layers": 2, "bidirectional": True}
    small = compressed(seeded(Net, kind, **how)).model
    tt.save_pretrained(small, tmp_path / "a")
    loaded = tt.load_pretrained(tmp_path / "a", model=lambda: Net(kind, **how))
    assert torch.equal(loaded(x), small(x))
    given = seeded(Net, kind, **how)
    assert tt.load_pretrained(tmp_path / "a", model=given) is given
    assert torch.equal(given(x), small(x))
    tt.save_pretrained(given, tmp_path / "b")
    again = tt.load_pretrained(tmp_path / "b", model=given)
    assert torch.equal(again(x), small(x))
    with pytest.raises(CheckpointError, match="narrowed layer"):
        tt.load_pretrained(tmp_path / "b", model=lambda: _with_units(Net(kind, **how), 4))


def _with_units(net: Any, n: int) -> nn.Module:
    net.rnn = type(net.rnn)(6, n, 2, batch_first=True, bidirectional=True)
    return net


def test_narrowed_then_factorized_then_dense_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, net = batches()[0], seeded(Net)
    small = compressed(net).model
    both = compressed(small, "1.5x", formats=("low_rank",), allow_slower=True).model
    assert both.rnn.hidden_size == small.rnn.hidden_size < H
    tt.save_pretrained(both, tmp_path)
    assert torch.equal(tt.load_pretrained(tmp_path, model=Net)(x), both(x))
    dense = tt.to_dense_(copy.deepcopy(both))
    assert type(dense.rnn) is nn.LSTM
    torch.testing.assert_close(dense(x), both(x))


def test_a_reader_among_the_maps_of_another_layer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, net = batches()[0], seeded(Towers)
    plan = compressed(net, "1.2x", include=["low.*", "high.*ih"]).plan
    assert [one.units.layer for one in plan.recurrent] == ["low"]
    both = tt.compress(
        tt.apply_plan_(copy.deepcopy(net), plan), budget="1.2x", data=batches(), heal=False, formats=("low_rank",),
        include=["high.*hh"], allow_slower=True, measure=False,
    ).model  # fmt: skip
    assert both.high.input_size == both.low.hidden_size < H
    tt.save_pretrained(both, tmp_path)
    assert torch.equal(tt.load_pretrained(tmp_path, model=Towers)(x), both(x))


def test_plans_that_do_not_fit_change_nothing() -> None:
    plan = compressed(seeded(Net)).plan
    wide = seeded(Net)
    wide.head = nn.Linear(H + 1, 4)
    for other in (wide, _with_units(seeded(Net), 4), nn.Sequential(nn.Linear(6, 4))):
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ShapeError, match="Nothing was changed"):
            tt.apply_plan_(other, plan)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


def test_a_damaged_plan_is_refused() -> None:
    plan = compressed(seeded(Net)).plan
    assert '"version": 6' in plan.to_json()
    with pytest.raises(CheckpointError, match="must be the text"):
        tt.CompressionPlan.from_json(plan.to_json().replace(f'"n_units": {H}', '"n_units": 3'))
    units = RecurrentUnits("rnn", ("head",), 4, 2, 1)
    for kept in (((0, 1),), ((0, 1), (2,)), ((), ()), ((0, 9), (1, 2))):
        with pytest.raises(ValueError, match="equally many"):
            NarrowedRecurrent(units, kept)


def test_units_have_to_be_asked_for() -> None:
    how = {"budget": "1.3x", "data": batches(), "allow_slower": True}
    assert not tt.plan_compression(seeded(Net), **how).recurrent
    with_them = tt.plan_compression(seeded(Net), **how, formats=("low_rank", "narrow", "recurrent"))
    assert with_them.params_after <= with_them.params_before / 1.3
