"""What layers are predicted to cost: called several times, in recurrent layers, with rows that stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import batches
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.choose.candidates import candidates
from tensortrain.compression.choose.cost import dense_cost, empty_twin, spec_cost
from tensortrain.compression.choose.load import Load, Turn, loads_of
from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import FoundLayer, find_layers
from tensortrain.nn.recurrent.ways import MapInCell

pytestmark = pytest.mark.usefixtures("fixed_plans")


class Steps(nn.Module):
    """A cell of torch's, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0]


class Again(nn.Module):
    """One layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def loads(model: nn.Module, data: Any) -> dict[str, tuple[FoundLayer, Load]]:
    """Of all layers, for a batch of the data."""
    with opened_for_a_while(model) as opened:
        layers = find_layers(opened.model)[0]
        seen = calibrate(opened.model, layers, data)
        return {layer.name: (layer, loads_of(layer, seen, None, opened.model)[0]) for layer in layers}


def test_a_layer_that_is_called_again_pays_for_every_call() -> None:
    layer, load = loads(Again(), batches(2, 6, 32))["layer"]
    assert (load.rows, load.calls) == (18, 3)
    once = Load(6, 6, (), seen=True)
    assert dense_cost(layer, load).seconds == pytest.approx(3 * dense_cost(layer, once).seconds)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("both_ways", [False, True])
def test_maps_of_a_sequence_know_its_steps(kind: Any, both_ways: bool) -> None:
    model = kind(20, 24, 2, batch_first=True, bidirectional=both_ways)
    found = loads(model, batches(2, 6, 11, 20))
    assert len(found) == 4 * (1 + both_ways)
    for layer, load in found.values():
        assert load.turn is not None
        assert (load.turn.n_sequences, load.turn.batch, load.turn.n_steps) == (1, 6, 11)
        assert load.turn.of.which == layer.name.rpartition(".")[2]


def test_maps_of_a_cell_are_called_step_by_step() -> None:
    for _, load in loads(Steps(), batches(2, 6, 11, 20)).values():
        assert load.turn is not None
        assert (load.turn.n_sequences, load.turn.batch, load.turn.n_steps) == (11, 6, 1)


def test_other_layers_take_no_turns() -> None:
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 8))
    assert all(load.turn is None for _, load in loads(model, batches(2, 6, 20)).values())


@pytest.mark.usefixtures("fixed_plans")
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_form_that_may_be_dense_is_as_fast_as_the_kernel_and_one_that_may_not_pays_for_its_steps(kind: Any) -> None:
    with opened_for_a_while(nn.Sequential(kind(64, 96))) as opened:
        cell: Any = opened.model.get_submodule("0.l0")
        for which in ("ih", "hh"):
            own = MapInCell.of(cell, which)
            layer = next(one for one in find_layers(opened.model)[0] if one.name == f"0.l0.{which}")
            form: Any = empty_twin(layer, candidates(layer, formats=("low_rank",))[3].spec)
            dense_s = own.seconds(None, 40 * 4, 4, 40)
            assert own.seconds(form, 40 * 4, 4, 40) <= dense_s * (1 + 1e-12)
            form.implementation = "factorized"
            stepwise_s = own.seconds(form, 40 * 4, 4, 40)
            assert stepwise_s > own.seconds(form, 20 * 4, 4, 20)
            if which == "hh":  # as one product of all rows it would look cheap
                assert stepwise_s > form.plan(40 * 4).predicted_s


def test_a_map_is_priced_by_its_turn() -> None:
    layer, load = loads(nn.GRU(20, 24, batch_first=True), batches(2, 6, 11, 20))["l0.hh"]
    assert isinstance(load.turn, Turn)
    spec = candidates(layer, formats=("low_rank",))[2].spec
    assert spec_cost(layer, spec, load).seconds == load.turn.seconds(empty_twin(layer, spec))  # type: ignore[arg-type]
    assert dense_cost(layer, load).seconds == load.turn.seconds(None)


def test_rows_that_stay_count_in_a_tied_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(300, 16), nn.Linear(16, 300, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(ids)))

    data = [torch.randint(300, (4, 9)) for _ in range(2)]
    layer, load = loads(Tied(), data)["table"]
    assert layer.head is not None
    spec = tt.nn.Embedding(300, 16, format="low_rank", rank=3).spec
    plain, hot = spec_cost(layer, spec, load), spec_cost(layer, spec, load, n_hot=20)
    assert plain.flops is not None
    assert hot.flops is not None
    assert hot.flops - plain.flops == 2 * 9 * 20 * 16
    assert hot.seconds > plain.seconds
