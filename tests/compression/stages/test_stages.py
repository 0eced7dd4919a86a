"""A stage is one new class and its handler: compress, the report and the checkpoint carry it."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import batches, mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.stages import Factorize, Heal, Work, base, factorize, stage
from tensortrain.errors import BudgetError, KindError
from tensortrain.system.observer import Silent
from tensortrain.train.batches import n_examples, take


@dataclass(frozen=True)
class Rounded:
    """Round all weights to a shorter type and back."""

    dtype: torch.dtype = torch.bfloat16


@stage(Rounded, outcome="rounded")
def _rounded(work: Work, settings: Rounded) -> Work:
    with torch.no_grad():
        for parameter in work.model.parameters():
            parameter.copy_(parameter.to(settings.dtype))
    return work.noted(f"Weights were rounded to {settings.dtype}.")


def figure(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.ones(2, 24)).square().mean())


@functools.cache
def data() -> list[Any]:
    return batches(6, 8, 24)


def run(model: nn.Module, stages: list[Any] | None, **options: Any) -> tt.CompressionResult:
    given = {"budget": "2x", "data": data(), "measure": False, "allow_slower": True}
    return tt.compress(model, stages=stages, **(given | options))


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def is_rounded(model: nn.Module) -> bool:
    found = values(model)
    return torch.equal(found, found.bfloat16().to(found.dtype))


class Interrupted(Silent):
    """Fails at a step of one of the trainings, as a kill would end it."""

    def __init__(self, training: int, step: int) -> None:
        self.left, self.step, self.name = training, step, ""

    def on_start(self, name: str, total: int | None) -> None:
        self.name = name
        self.left -= name == "heal"

    def on_step(self, n: int, **figures: float) -> None:
        if self.name == "heal" and self.left < 0 and n == self.step:
            raise SystemExit("killed")


HEALING = Heal(steps=6, lr=1e-2)


# -- the stages that a call has without a list ----------------------------------------------------------


@pytest.mark.parametrize("heal", [False, {"steps": 4}, None])
def test_a_list_does_what_the_keywords_do(heal: Any) -> None:
    model = mlp(24, 40, 6)
    settings = [] if heal is False else [Heal(**(heal or {}))]
    by_list = run(model, [Factorize(), *settings], evaluate=figure)
    by_words = run(model, None, heal=heal, evaluate=figure)
    assert torch.equal(values(by_list.model), values(by_words.model))
    assert by_list.plan == by_words.plan
    told = [replace(each.report, provenance={}, healing=()) for each in (by_list, by_words)]
    assert told[0] == told[1]


# -- a third stage --------------------------------------------------------------------------------------


def test_a_third_stage_is_carried_through_compress_and_report() -> None:
    model = mlp(24, 40, 6)
    before = copy.deepcopy(model.state_dict())
    result = run(model, [Factorize(), HEALING, Rounded()], evaluate=figure)
    assert is_rounded(result.model)
    assert not is_rounded(run(model, [Factorize(), HEALING]).model)
    report = result.report
    assert [point.method for point in report.curve] == ["original", "before healing", "healed", "rounded"]
    assert report.metric_after == figure(result.model) == report.curve[-1].metric
    assert report.metric_compressed == report.curve[1].metric
    assert "Weights were rounded to torch.bfloat16." in report.notes
    assert tt.Report.from_json(report.to_json()) == report
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_third_stage_alone_needs_no_budget_and_works_on_a_copy() -> None:
    model = mlp(24, 40, 6)
    result = run(model, [Rounded()], budget=None, data=None)
    assert is_rounded(result.model)
    assert not is_rounded(model)
    assert result.plan.layers == result.report.layers == ()
    assert result.report.compression == 1.0
    with pytest.raises(BudgetError):
        run(model, [Factorize()], budget=None)


def test_in_place_all_stages_happen_or_none() -> None:
    @dataclass(frozen=True)
    class Failing:
        pass

    @stage(Failing, outcome="failed")
    def _fail(work: Work, settings: Failing) -> Work:
        raise RuntimeError("no more")

    model = mlp(24, 40, 6)
    before, kinds = values(model), [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="no more"):
        run(model, [Rounded(), Factorize(), Failing()], inplace=True)
    assert torch.equal(values(model), before)
    assert [type(m) for m in model.modules()] == kinds
    assert run(model, [Factorize(), Rounded()], inplace=True).model is model
    assert is_rounded(model)


def test_a_rounded_model_is_saved_and_loaded(tmp_path: Path) -> None:
    result = run(mlp(24, 40, 6), [Factorize(), Rounded()])
    tt.save_pretrained(result.model, tmp_path / "saved")
    again = tt.load_pretrained(tmp_path / "saved", model=mlp(24, 40, 6))
    assert torch.equal(values(again), values(result.model))


# -- kill and resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training, step", [(0, 3), (1, 2)])
def test_stages_go_on_after_a_kill_as_if_nothing_had_happened(training: int, step: int, tmp_path: Path) -> None:
    model, todo = mlp(24, 40, 6), [Factorize(), HEALING, Rounded(), replace(HEALING, lr=3e-3), Rounded()]
    whole = run(model, todo, evaluate=figure)
    file = tmp_path / "state.ckpt"
    with pytest.raises(SystemExit):
        run(model, todo, evaluate=figure, checkpoint=file, observer=Interrupted(training, step))
    again = run(model, todo, evaluate=figure, checkpoint=file)
    assert torch.equal(values(again.model), values(whole.model))
    assert again.report.curve == whole.report.curve
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-2.ckpt", "state.ckpt"]


# -- before anything is changed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        ({"stages": [Factorize(), "heal"]}, "a stage must be known: stages has 'heal'"),
        ({"stages": [Factorize()], "heal": True}, "heal is given beside them"),
        ({"stages": [Factorize()], "heal": {"steps": 3}}, "heal is given beside them"),
    ],
)
def test_lists_that_cannot_be_carried_out(options: dict[str, Any], says: str) -> None:
    with pytest.raises(KindError, match=says):
        tt.compress(mlp(24, 40, 6), budget="2x", data=data(), **options)


def test_what_stops_a_later_stage_is_known_before_the_first() -> None:
    @dataclass(frozen=True)
    class NeedsMany:
        examples: int

    def prepare(work: Work, settings: NeedsMany) -> Work:
        assert work.options.data is not None
        found = sum(map(n_examples, take(work.options.data, None)))
        if found < settings.examples:
            raise KindError(f"too few: {found}")
        return work

    @stage(NeedsMany, outcome="tried", prepare=prepare, needs_data=True)
    def _needs_many(work: Work, settings: NeedsMany) -> Work:
        return work

    @dataclass(frozen=True)
    class Forbidden:
        pass

    @stage(Forbidden, outcome="run")
    def _forbidden(work: Work, settings: Forbidden) -> Work:
        raise AssertionError("a stage ran")

    with pytest.raises(KindError, match="too few: 48"):
        run(mlp(24, 40, 6), [Forbidden(), NeedsMany(10_000)])
    assert run(mlp(24, 40, 6), [Factorize(), NeedsMany(48)]).report.curve == ()
    without = run(mlp(24, 40, 6), [Factorize(), NeedsMany(48)], data=None)
    assert "Nothing was tried: no data was given." in without.report.notes


def test_settings_of_a_subclass_are_those_of_their_parent() -> None:
    @dataclass(frozen=True)
    class Longer(Heal):
        steps: int | None = 3

    assert base.stage_of(Longer()) is base.stage_of(tt.stages.Heal())
    assert len(run(mlp(24, 40, 6), [Factorize(), Longer()]).report.healing) > 0


def test_a_stage_that_forgets_to_return_is_told_so() -> None:
    @dataclass(frozen=True)
    class Forgetful:
        pass

    stage(Forgetful, outcome="forgotten")(lambda work, settings: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(KindError, match="must return its work"):
        tt.compress(nn.Linear(8, 8), budget=None, stages=[Forgetful()], measure=False)


@pytest.mark.parametrize(
    "length, wanted",
    [
        ({"epochs": 2}, True),
        ({"epochs": 3}, "long"),
        ({"steps": 17}, True),
        ({"steps": 18}, "long"),
        ({"steps": 0}, False),
    ],
)
def test_a_plan_knows_how_long_a_healing_is(length, wanted, monkeypatch) -> None:
    """In passes over the data, however they are counted."""
    seen: list[Any] = []
    make_plan = factorize.make_plan

    def noted(model: nn.Module, options: Any) -> Any:
        seen.append(options.will_heal)
        return make_plan(model, options)

    monkeypatch.setattr(factorize, "make_plan", noted)
    model, data = mlp(12, 24, 4), batches(6, 8, 12, classes=4)
    tt.compress(model, budget="1.3x", data=data, heal=length, measure=False)
    assert seen == [wanted]
