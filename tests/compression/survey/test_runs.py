"""Whether layers run is seen by whatever way they are called."""

from __future__ import annotations

import cProfile
import sys

import pytest
import torch
from small_models import assert_unchanged, mlp, snapshot
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.survey.runs import check_new_layers_run, layers_that_run

X = torch.ones(2, 8)


class Net(nn.Module):
    """One layer is called, one by its bound forward, one not at all."""

    def __init__(self, kind: type = nn.Linear) -> None:
        super().__init__()
        self.called, self.bound, self.idle = kind(8, 8), kind(8, 8), kind(8, 8)
        self.short = self.bound.forward

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.short(self.called(x))


@pytest.mark.parametrize("kind", [nn.Linear, tt.nn.Linear])
def test_calls_and_bound_forwards_count(kind) -> None:
    model = Net(kind)
    before = snapshot(model)
    assert layers_that_run(model, ["called", "bound", "idle"], lambda m: m(X)) == {"called", "bound"}
    assert_unchanged(model, before)
    assert sys.getprofile() is None


def test_only_what_ran_before_is_missed() -> None:
    model = Net(tt.nn.Linear)
    names = ["called", "bound", "idle"]
    assert check_new_layers_run(model, names, lambda m: m(X)) == ["idle"]
    assert check_new_layers_run(model, names, lambda m: m(X), ran_before={"called", "bound"}) == []
    model.short = nn.Identity()
    assert check_new_layers_run(model, names, lambda m: m(X), ran_before={"called", "bound"}) == ["bound"]


def test_a_failing_run_leaves_nothing_behind() -> None:
    model = mlp(8, 8)
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        layers_that_run(model, ["0"], lambda m: m(torch.ones(2, 3)))
    assert_unchanged(model, before)
    assert sys.getprofile() is None


def test_a_bare_layer_has_the_empty_name() -> None:
    assert layers_that_run(nn.Linear(8, 8), [""], lambda m: m(X)) == {""}


def test_a_profiler_of_the_caller_goes_on() -> None:
    profiler, model = cProfile.Profile(), nn.Sequential(nn.Linear(2, 2))
    profiler.enable()
    try:
        ran = layers_that_run(model, ["0"], lambda net: net(torch.zeros(1, 2)))
        assert type(sys.getprofile()) is cProfile.Profile
    finally:
        profiler.disable()
    assert ran == {"0"}
