"""Messages about budgets name what stands in the way."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import mlp
from torch import nn

from tensortrain.compression import Budget, plan_compression
from tensortrain.compression.choose.beyond_reach import unspent_note, what_stands_in_the_way
from tensortrain.compression.survey.layers import find_layers
from tensortrain.errors import BudgetError


def mixed() -> nn.ModuleDict:
    parts = {"a": nn.Bilinear(32, 32, 6), "b": nn.Linear(32, 32), "c": nn.Embedding(50, 32), "n": nn.LayerNorm(8)}
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("budget", ["2000x", {"params": 1}, 1e-9, "100x"])
@pytest.mark.parametrize("example", [None, torch.zeros(1)])
def test_a_missed_budget_names_what_holds_the_most(budget, example) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_compression(mixed(), budget=budget, example_inputs=example)
    text = str(caught.value)
    assert "'a' (Bilinear) with 6,150 (left alone: no plan reaches its weight (6, 32, 32)" in text
    assert re.search(r"(?<![\w'])-\d", text) is None
    assert "Ask for " in text


def test_what_a_filter_takes_out_stands_in_the_way_too() -> None:
    model = mixed()
    layers, left = find_layers(model, include="b")
    text = what_stands_in_the_way(model, layers, left)
    assert "'c' (Embedding) with 1,600 (passed over by include= or exclude=)" in text
    assert "'n' (LayerNorm) with 16" in text


def test_a_tied_table_counts_once() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(50, 32), "h": nn.Linear(32, 50, bias=False), "o": nn.Linear(32, 32)})
    model["f"] = nn.Embedding(50, 32)  # an encoder's and a decoder's, with the head
    model["h"].weight = model["f"].weight = model["e"].weight
    text = what_stands_in_the_way(model, find_layers(model)[0])
    assert text == (
        " Beyond reach are 60% of the parameters: 'e' (Embedding) with 1,600 (left alone: its weight is tied: it "
        "shares memory with h.weight)."
    )


def test_nothing_stands_in_the_way_of_plain_layers() -> None:
    model = mlp(8, 8)
    assert what_stands_in_the_way(model, find_layers(model)[0]) == ""


def test_a_model_without_layers_says_what_it_holds() -> None:
    model = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Bilinear(64, 64, 8))
    with pytest.raises(BudgetError) as caught:
        plan_compression(model, budget="2x")
    head, bilinear, linear = str(caught.value).splitlines()
    assert head.startswith("a model must have layers to compress: of its 36,936 parameters in 3 modules none")
    assert bilinear.startswith("  left alone: 1 (Bilinear, 32,776 parameters): no plan reaches")
    assert linear.startswith("  left alone: 0 (Linear, 4,160 parameters): its weight lies on the meta device")


def test_a_plan_that_loses_nothing_says_so() -> None:
    note = unspent_note(Budget("params", 100, "100 params"), 50, full=500, slower=("fc",), is_exact=True)
    assert note is not None
    assert "with less the model is predicted to give what it gave" in note


@pytest.mark.parametrize(
    "spent, full, slower, says",
    [
        (96, 500, (), None),
        (50, 50, (), "the model is that small as it is"),
        (50, 500, ("fc",), "larger forms of 1 layers (such as 'fc') are predicted slower"),
        (50, 500, (), "the next larger form of any layer would exceed it"),
    ],
)
def test_an_unspent_budget_is_explained(spent: int, full: int, slower: tuple[str, ...], says: str | None) -> None:
    note = unspent_note(Budget("params", 100, "100 params"), spent, full=full, slower=slower)
    if says is None:
        assert note is None
    else:
        assert note is not None
        assert note.startswith("The plan uses 50 of the 100 params of its budget: ")
        assert says in note
