"""Directions that inputs lie in, and whether others are to be expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.survey import span as spans
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import find_layers
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.compression.survey.span import Span
from tensortrain.formats.whitening import DAMPING
from tensortrain.system.parking import is_parked


def spanned(n_features: int, *calls: Tensor) -> Span:
    span = Span(n_features)
    for rows in calls:
        span.add(rows)
    return span


def test_rows_of_few_vectors_span_no_more_than_these() -> None:
    table = torch.randn(9, 40)
    span = spanned(40, *(table[torch.randint(9, (50,))] for _ in range(6)))
    assert span.rank == 9
    assert span.unexplained() < 1e-10


def test_directions_in_files_are_those_in_memory(monkeypatch) -> None:
    monkeypatch.setattr(spans, "_WORTH_PARKING", 1)
    calls = [torch.randn(3, 40).double() for _ in range(4)]
    calls.append(calls[0].flip(0))
    there = Span(40, parks=True)
    for rows in calls:
        there.add(rows)
    here = spanned(40, *calls)
    assert there.basis is not None
    assert here.basis is not None
    assert is_parked(there.basis)
    assert not is_parked(here.basis)
    assert torch.equal(there.basis, here.basis)
    assert there.unexplained() == here.unexplained()


def test_sums_of_two_tables_span_what_both_do() -> None:
    one, two = torch.randn(6, 64), torch.randn(11, 64)
    calls = [one[torch.randint(6, (80,))] + two[torch.randint(11, (80,))] for _ in range(6)]
    assert spanned(64, *calls).rank == 16  # one direction is a mean of both


def test_a_few_samples_of_anything_leave_more_to_come() -> None:
    span = spanned(60, *(torch.randn(4, 60) for _ in range(5)))
    assert span.rank == 20
    assert span.unexplained() > 0.5


def test_what_comes_late_is_counted() -> None:
    early, late = torch.eye(30)[:3].repeat(10, 1), torch.eye(30)[:4].repeat(10, 1)
    span = spanned(30, early, early, early, late)
    assert span.rank == 4
    assert span.unexplained() == pytest.approx(10 / 70)


@pytest.mark.parametrize("n_rows", [64, 20])
def test_inputs_that_fill_the_space_are_not_kept_track_of(n_rows: int) -> None:
    span = spanned(32, torch.randn(n_rows, 32), torch.randn(n_rows, 32))
    assert not span.is_small
    assert span.rank is None
    assert span.basis is None


def test_rows_of_zeros_and_no_rows_say_nothing() -> None:
    span = spanned(8, torch.zeros(3, 8), torch.zeros(0, 8), torch.zeros(20, 8))
    assert span.rank == 0
    assert span.unexplained() == 1.0


def test_nearly_equal_rows_are_equal_but_for_rounding() -> None:
    table = torch.randn(5, 24)
    calls = [table[torch.randint(5, (40,))] * (1 + 1e-7 * torch.randn(40, 24)) for _ in range(4)]
    assert spanned(24, *calls).rank == 5


def settled(*calls: Tensor, centred: bool = False) -> LayerMoments:
    moments = LayerMoments()
    for rows in calls:
        moments.add_rows(rows)
    moments.finish(centred=centred)
    return moments


def test_rows_that_wait_are_summed_up_as_they_came() -> None:
    calls = [torch.randn(5, 24) for _ in range(4)]
    moments = LayerMoments()
    for rows in calls:
        given = rows.clone()
        moments.add_rows(given)
        given.fill_(torch.nan)  # a model may write to its activations
    assert moments.span is not None
    assert not moments.span.is_small
    moments.finish(centred=True)
    rows = torch.cat(calls).double()
    assert moments.n_rows == 20
    assert moments.gram is not None
    torch.testing.assert_close(moments.gram, torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-6)
    few = LayerMoments()
    few.add_rows(calls[0])
    few.finish(centred=False)
    assert few.n_rows == 5
    assert few.gram is not None
    torch.testing.assert_close(few.gram, calls[0].double().T @ calls[0].double() / 5, rtol=1e-12, atol=1e-12)


def test_what_is_expected_elsewhere_follows_from_what_came_late() -> None:
    table = torch.randn(7, 48)
    few = settled(*(table[torch.randint(7, (60,))] for _ in range(4)))
    many, samples = settled(*torch.randn(4, 200, 48)), settled(*torch.randn(4, 3, 48))
    assert few.basis is not None
    assert len(few.basis) == 7
    assert few.outside == 0.0
    assert many.basis is many.outside is None
    assert samples.outside == DAMPING
    assert few.weighting.basis is few.basis
    assert samples.weighting.outside == samples.outside
    rare = torch.eye(48)[:6].repeat(100, 1)
    seldom = settled(rare, rare, rare, torch.cat([rare, torch.eye(48)[6:7]]))
    assert seldom.outside is not None
    assert 0 < seldom.outside < DAMPING


def test_rows_of_a_table_lie_in_it_whatever_came() -> None:
    table, calls = torch.randn(12, 20), [[0, 1, 1], [0, 2, 0], [3, 3, 0]]
    moments = LayerMoments()
    for ids in calls:
        moments.add_rows(table[ids], table)
    moments.finish(centred=False)
    assert moments.basis is not None
    assert len(moments.basis) == 12
    assert moments.outside == 0.0
    torch.testing.assert_close(table.double() @ moments.basis.T @ moments.basis, table.double())
    moments = LayerMoments()
    moments.add_rows(table[[0, 1]], table)
    moments.add_rows(torch.randn(2, 20))  # something else, too
    moments.finish(centred=False)
    assert moments.basis is None or len(moments.basis) == 4


@pytest.mark.parametrize(
    "change, is_known",
    [
        (lambda x: x, True),
        (lambda x: x.flip(0)[:, 1:], False),  # a copy
        (lambda x: x[:, 1:].transpose(0, 1), True),
        (lambda x: x.add_(1), False),
    ],
)
def test_a_layer_knows_the_table_that_it_reads(change: Any, is_known: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(15, 32), nn.Linear(32, 8, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(change(self.table(ids)))

    model, data = Reader(), [torch.randint(9, (12, 5)) for _ in range(6)]  # six rows are never met
    found = calibrate(model, find_layers(model)[0], data).of("out")
    assert found.basis is not None
    assert (len(found.basis) == 15) is is_known
    assert len(found.basis) in (9, 10, 15)


class Spells(nn.Module):
    """Reads letters of a small alphabet, each with its place, by two maps in a row."""

    def __init__(self, n_letters: int, n_places: int, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(n_letters, width), nn.Embedding(n_places, width)
        self.mix, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.letters(ids) + self.places.weight[: ids.shape[1]]
        return self.head(torch.relu(self.mix(x)))


@pytest.mark.usefixtures("fixed_plans")
@pytest.mark.parametrize("budget", ["1.3x", "2x"])
def test_ranks_that_no_input_has_are_not_bought(budget: str) -> None:
    torch.manual_seed(0)
    model = Spells(13, 5, 96)
    data = [torch.randint(13, (40, 5)) for _ in range(8)]
    plan = tt.plan_compression(model, budget=budget, data=data, formats=("low_rank", "tt"))
    mix = next(layer for layer in plan.layers if layer.name == "mix")
    assert mix.spec is not None
    assert max(mix.spec.ranks) <= 17  # letters and places share their mean
    if max(mix.spec.ranks) == 17:
        assert mix.rel_error == 0.0


@pytest.mark.usefixtures("fixed_plans")
def test_a_model_behind_a_small_table_loses_nothing_where_it_need_not() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 64))
    data = [torch.randint(11, (30, 6)) for _ in range(8)]
    small = tt.compress(model, budget="3x", data=data, heal=False, measure=False).model
    y = model(data[0]).detach()
    assert (small(data[0]) - y).norm() < 1e-5 * y.norm()


@pytest.mark.usefixtures("fixed_plans")
def test_a_few_samples_do_not_make_directions_free() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(96, 96))
    plan = tt.plan_compression(model, budget="3x", data=[torch.randn(4, 96) for _ in range(4)], formats=("low_rank",))
    (layer,) = plan.layers
    assert layer.spec is not None
    assert layer.rel_error is not None
    assert layer.rel_error > 0.01
    assert layer.spec.ranks[1] >= 15  # 16 samples, less their mean
