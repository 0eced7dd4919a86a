"""A budget is spent to half a per cent where a finer rank is to be had, and nothing gets slower by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, batches, decay_, mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import count_params, plan_compression
from tensortrain.compression.choose.chooser import Chooser
from tensortrain.compression.choose.clock import family_of

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(40, 48, 2, batch_first=True), nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


CASES: dict[str, Any] = {
    "mlp": (lambda: mlp(96, 128, 64, 96), lambda: batches(6, 32, 96)),
    "norm": (lambda: ConvNet(24), lambda: batches(4, 16, 3, 8, 8)),
    "shared": (lambda: TwoHeads(64), lambda: batches(6, 32, 64)),
    "gru": (Reads, lambda: batches(6, 32, 5, 40)),
    "tokens": (lambda: Tagger(90, 48, 12), lambda: [{"input_ids": torch.randint(0, 90, (8, 7))} for _ in range(6)]),
}


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    build, data = CASES[name]
    return decay_(build(), 0.7).eval(), data()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [1.3, 1.7, 2.6])
def test_all_but_half_a_per_cent_is_spent_or_what_one_rank_costs(name: str, budget: float) -> None:
    model, data = made(name)
    limit = int(count_params(model) / budget)
    plan = plan_compression(model, budget=f"{budget}x", data=data, formats=("low_rank",), allow_slower=True)
    assert plan.params_after <= limit
    factored = [layer for layer in plan.layers if layer.spec is not None]
    assert factored
    one_rank = min(layer.spec.n_params // layer.spec.ranks[1] for layer in factored if layer.spec is not None)
    assert plan.params_after >= min(0.995 * limit, limit - one_rank)


@pytest.mark.parametrize("measure", ["bytes", "flops"])
def test_budgets_of_other_kinds_are_spent_too(measure: str) -> None:
    model, data = made("mlp")
    plan = plan_compression(model, budget={measure: "1.7x"}, data=data, formats=("low_rank",), allow_slower=True)
    before = sum(layer.params_before if measure == "bytes" else layer.flops_before or 0 for layer in plan.layers)
    after = sum(layer.params_after if measure == "bytes" else layer.flops_after or 0 for layer in plan.layers)
    assert 0.985 * before / 1.7 <= after <= before / 1.7 * 1.001


def test_units_are_spent_in_steps_of_their_own() -> None:
    model, data = made("mlp")
    plan = plan_compression(model, budget="1.4x", data=data, formats=("narrow",), allow_slower=True)
    assert plan.narrowed
    assert 0.95 * plan.params_before / 1.4 <= plan.params_after <= plan.params_before / 1.4


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_the_rest_goes_into_the_same_families_and_nothing_gets_slower(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = made(name)
    seen: list[tuple[Chooser, Chooser]] = []
    spend_rest = Chooser.spend_rest

    def watched(self: Chooser, growth: float) -> Any:
        finer, choice = spend_rest(self, growth)
        seen.append((self, finer))
        return finer, choice

    monkeypatch.setattr(Chooser, "spend_rest", watched)
    plan_compression(model, budget="1.6x", data=data)
    assert seen
    for coarse, finer in seen:
        assert finer.loss <= coarse.loss
        assert coarse.spent() <= finer.spent() <= finer.budget.limit
        assert not finer._slower(finer.picks)
        for before, after in zip(coarse.picks, finer.picks, strict=True):
            if before is None:
                assert after is None
            elif hasattr(after, "spec"):
                assert family_of(after) == family_of(before)  # type: ignore[arg-type]
                assert after.point.n_params >= before.point.n_params  # type: ignore[union-attr]


def test_a_larger_form_that_would_be_too_slow_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every larger form struck off, what was chosen at first stays."""
    model, data = made("mlp")
    spend_rest, slower = Chooser.spend_rest, Chooser._slower
    found: list[tuple[Any, Any]] = []

    def watched(self: Chooser, growth: float) -> Any:
        finer, choice = spend_rest(self, growth)
        found.append((self.picks, finer.picks))
        return finer, choice

    def too_slow(self: Chooser, picks: Any) -> Any:
        return slower(self, picks) if self.begun is None else self._grown(picks)

    monkeypatch.setattr(Chooser, "spend_rest", watched)
    monkeypatch.setattr(Chooser, "_slower", too_slow)
    plan_compression(model, budget="1.6x", data=data)
    assert found
    for before, after in found:
        assert all(one is other or other is None for one, other in zip(before, after, strict=True))


def test_an_exact_model_is_left_small_and_the_plan_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 80), nn.Linear(80, 200), nn.ReLU(), nn.Linear(200, 80))
    plan = tt.plan_compression(model, budget="1.5x", data=[torch.randint(7, (30, 5)) for _ in range(6)])
    assert plan.params_after < plan.params_before / 4
    assert any("predicted to give what it gave" in note for note in plan.notes)
