"""One batch proves that a compressed model runs, and that its new layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import batches
from torch import Tensor, nn
from torch.nn import functional as F

import tensortrain as tt
from tensortrain.compression import compress
from tensortrain.errors import BudgetError, KindError

QUICK: dict[str, Any] = {"measure": False, "allow_slower": True, "formats": ("low_rank", "tt")}
ELSEWHERE: list[nn.Module] = []


class Reads(nn.Module):
    """Its code looks into one of its layers, past what a module promises."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "parameters":
            h = F.linear(x, self.a._parameters["weight"], self.a.bias)
        else:
            if type(self.a) is not nn.Linear:
                raise RuntimeError("this needs a Linear")
            h = self.a(x)
        return self.c(torch.relu(self.b(torch.relu(h))))


@pytest.mark.parametrize("heal", [False, {"steps": 2}])
@pytest.mark.parametrize("how", ["parameters", "class"])
def test_a_layer_that_the_model_cannot_do_without_is_left_dense(how: str, heal: Any) -> None:
    model, data = Reads(how), batches(4, 16, 24)
    result = compress(model, budget="2.4x", data=data, heal=heal, **QUICK)  # the plan cannot do without that layer
    assert type(result.model.a) is nn.Linear
    assert isinstance(result.model.b, tt.nn.Linear)
    assert any("'a'" in note and "left dense" in note for note in result.report.notes)
    assert result.report.params_after == result.plan.params_after == sum(p.numel() for p in result.model.parameters())
    result.model(data[0][0])


def test_the_budget_is_kept_without_that_layer_or_it_is_an_error_before_healing() -> None:
    model, data = Reads("class"), batches(4, 16, 24)
    total = sum(p.numel() for p in model.parameters())
    result = compress(model, budget="1.8x", data=data, heal=False, **QUICK)
    assert result.report.params_after <= total / 1.8
    assert isinstance(result.model.b, tt.nn.Linear)

    class NoHealing(tt.compression.Silent):
        def on_start(self, name: str, total: int | None) -> None:
            assert name != "heal"

    with pytest.raises(BudgetError, match=r"must be reachable: 2\.8x .* 'a' \(Linear\) with 1,000"):
        compress(model, budget="2.8x", data=data, heal={"steps": 2}, observer=NoHealing(), **QUICK)


def test_in_place_such_a_model_is_refused_and_whole() -> None:
    model, data = Reads("parameters"), batches(4, 16, 24)
    before = list(model.children())
    with pytest.raises(KindError, match="must run"):
        compress(model, budget="2.4x", data=data, inplace=True, **QUICK)
    assert list(model.children()) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_no_longer_run_are_named(inplace: bool) -> None:
    class Global(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 40)
            ELSEWHERE[:] = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(_from_elsewhere()(x)))

    result = compress(Global(), budget="2x", data=batches(4, 16, 24), heal=False, inplace=inplace, **QUICK)
    assert any("'a'" in note and "exclude=" in note for note in result.report.notes)


def _from_elsewhere() -> nn.Module:
    return ELSEWHERE[0]


def test_units_that_a_copy_cannot_do_without_stay() -> None:
    """A copy of the model runs a layer of the original, which keeps its size."""

    class Global(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 50), nn.Linear(50, 24)
            ELSEWHERE[:] = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.relu(self.c(self.b(torch.relu(_from_elsewhere()(x))))))

    model, data = Global(), batches(4, 16, 24)
    quick = {**QUICK, "formats": ("narrow",)}
    result = compress(model, budget="1.4x", data=data, heal=False, **quick)
    assert result.model.b.in_features == 40
    assert result.model.d.in_features < 50
    assert any("'b'" in note and "left dense" in note for note in result.report.notes)
    assert result.report.params_after == result.plan.params_after == sum(p.numel() for p in result.model.parameters())
