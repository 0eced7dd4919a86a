"""Plans chosen by running them."""

import pytest
import torch

import tensortrain as tt
from tensortrain.contract import Chain, CostModel, fastest_plan, plan_chain, trials, tune, use_cost_model
from tensortrain.contract.choose import chain_candidates
from tensortrain.nn.runner import PlanKey

CHAIN = Chain((4, 4, 4), (4, 4, 4), (1, 5, 5, 1))
OPTIONS = {"batch": 8, "dtype": torch.float64}


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """Nothing known, and a file of our own to keep what is found."""
    monkeypatch.setattr(tune, "_KNOWN", {})
    monkeypatch.setattr(trials, "known_file", lambda name, key: tmp_path / "kept" / f"{name}.json")
    return tmp_path / "kept" / "plans-3.json"


@pytest.fixture
def timed(monkeypatch):
    """Plans that were run; the one that comes last is the fastest by a clock of our own."""
    seen = []

    def call(plan, device):
        seen.append(plan)
        return len(seen)

    monkeypatch.setattr(tune, "_call", call)
    monkeypatch.setattr(tune, "_timed", lambda number, device: 1.0 / number)
    return seen


def test_candidates_come_in_the_order_of_predicted_time():
    plans = chain_candidates(CHAIN, cost_model=CostModel.reference(), **OPTIONS)
    assert [plan.predicted_s for plan in plans] == sorted(plan.predicted_s for plan in plans)
    assert plans[0] == plan_chain(CHAIN, cost_model=CostModel.reference(), **OPTIONS)
    assert {len(plan.steps) for plan in plans} == {1, 2, 3}
    assert len(set(plans)) == len(plans)


def test_the_fastest_one_run_is_kept(timed):
    found = fastest_plan(CHAIN, **OPTIONS)
    n_run = len(timed)
    assert n_run > 1
    assert found == timed[-1]
    assert fastest_plan(CHAIN, **OPTIONS) is found
    assert len(timed) == n_run  # remembered


@pytest.mark.parametrize("training", [False, True])
def test_another_process_takes_the_same_plan(timed, training):
    found = fastest_plan(CHAIN, training=training, **OPTIONS)
    assert found == timed[-1]
    n_run = len(timed)
    tune._KNOWN.clear()
    assert fastest_plan(CHAIN, training=training, **OPTIONS) == found
    assert len(timed) == n_run
    other = fastest_plan(CHAIN, training=training, **{**OPTIONS, "batch": 4})
    assert other.batch == 4
    assert len(timed) > n_run
    tune._KNOWN.clear()
    assert fastest_plan(CHAIN, training=training, **OPTIONS) == found  # the second entry did not push out the first


def test_the_plan_that_is_kept_tells_how_long_it_took(timed, monkeypatch):
    monkeypatch.setattr(tune.Watch, "is_alone", lambda self: True)
    found = fastest_plan(CHAIN, **OPTIONS)
    assert found.is_measured
    assert found.predicted_s == pytest.approx(1.0 / len(timed))
    tune._KNOWN.clear()
    again = fastest_plan(CHAIN, **OPTIONS)  # as another process
    assert again.is_measured
    assert again.predicted_s == pytest.approx(found.predicted_s)
    assert not plan_chain(CHAIN, **OPTIONS).is_measured


def test_seconds_taken_beside_other_programs_are_not_kept(timed, monkeypatch):
    monkeypatch.setattr(tune.Watch, "is_alone", lambda self: False)
    found = fastest_plan(CHAIN, **OPTIONS)
    tune._KNOWN.clear()
    again = fastest_plan(CHAIN, **OPTIONS)
    assert again == found
    assert not again.is_measured


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "null"])
def test_a_damaged_file_is_replaced(timed, file, text):
    file.parent.mkdir()
    file.write_text(text)
    assert fastest_plan(CHAIN, **OPTIONS) == timed[-1]
    tune._KNOWN.clear()
    n_run = len(timed)
    assert fastest_plan(CHAIN, **OPTIONS) == timed[-1]
    assert len(timed) == n_run


def test_a_plan_that_is_not_to_be_had_is_timed_anew(timed, file):
    fastest_plan(CHAIN, **OPTIONS)
    file.write_text(file.read_text().replace('": "', '": "0'))
    tune._KNOWN.clear()
    n_run = len(timed)
    fastest_plan(CHAIN, **OPTIONS)
    assert len(timed) > n_run


def test_without_a_place_to_keep_it_the_process_remembers(timed, file):
    file.parent.write_text("a file where the folder should be")
    assert fastest_plan(CHAIN, **OPTIONS) == fastest_plan(CHAIN, **OPTIONS) == timed[-1]


def test_a_hair_faster_is_level(monkeypatch):
    monkeypatch.setattr(tune, "_call", lambda plan, device: plan)
    likely = tune._likely(chain_candidates(CHAIN, **OPTIONS))
    monkeypatch.setattr(tune, "_timed", lambda plan, device: 1.0 if plan == likely[0] else 0.98)
    assert fastest_plan(CHAIN, **OPTIONS) == likely[0]


@pytest.mark.parametrize("case", ["forbidden", "constants given", "deterministic", "transform", "dispatch mode"])
def test_where_nothing_may_be_timed_the_prediction_decides(case, timed):
    from torch.utils.flop_counter import FlopCounterMode

    if case == "forbidden":
        assert fastest_plan(CHAIN, may_time=False, **OPTIONS) == plan_chain(CHAIN, **OPTIONS)
    elif case == "constants given":
        with use_cost_model(CostModel.reference()):
            assert fastest_plan(CHAIN, **OPTIONS) == plan_chain(CHAIN, **OPTIONS)
    elif case == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            assert fastest_plan(CHAIN, **OPTIONS) == plan_chain(CHAIN, **OPTIONS)
        finally:
            torch.use_deterministic_algorithms(False)
    elif case == "transform":
        torch.vmap(lambda x: fastest_plan(CHAIN, **OPTIONS) and x)(torch.ones(2))
    else:
        with FlopCounterMode(display=False):
            fastest_plan(CHAIN, **OPTIONS)
    assert timed == []


def test_long_rounds_are_not_run(timed, monkeypatch):
    monkeypatch.setattr(tune, "_TOO_LONG_S", 0.0)
    assert fastest_plan(CHAIN, **OPTIONS) == plan_chain(CHAIN, **OPTIONS)
    assert timed == []


def test_plans_that_hold_much_are_not_run(timed, monkeypatch):
    plans = chain_candidates(CHAIN, **OPTIONS)
    sizes = sorted(tune._held_bytes(plan) for plan in plans)
    assert sizes[0] >= 8 * 8 * (64 + 64)  # input and output
    limit = max(tune._held_bytes(plans[0]), sizes[0])
    monkeypatch.setattr(tune, "_MOST_BYTES", limit)
    fastest_plan(CHAIN, **OPTIONS)
    assert all(tune._held_bytes(plan) <= limit for plan in timed)
    tune._KNOWN.clear()
    timed.clear()
    monkeypatch.setattr(tune, "_MOST_BYTES", 0)
    assert fastest_plan(CHAIN, **{**OPTIONS, "batch": 16}) == plan_chain(CHAIN, **{**OPTIONS, "batch": 16})
    assert timed == []


@pytest.mark.parametrize("training", [False, True])
def test_running_leaves_no_trace(training):
    state = torch.get_rng_state()
    with torch.inference_mode(not training):
        fastest_plan(CHAIN, training=training, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_hooks_on_saved_tensors_do_not_see_a_trial():
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        fastest_plan(CHAIN, training=True, **OPTIONS)
    assert tune._KNOWN
    assert seen == []


def test_the_first_training_call_may_be_inside_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layer, x = tt.nn.Linear(64, 64, rank=4), torch.randn(16, 64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert tune._KNOWN
    assert all(core.grad is not None for core in layer.cores)


def test_a_trial_is_in_the_dtype_of_the_layer(monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "_timed", lambda call, device: (seen.append(torch.is_autocast_enabled("cpu")), 1.0)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastest_plan(CHAIN, **OPTIONS)
    assert seen
    assert not any(seen)


def test_what_another_process_found_meanwhile_counts(monkeypatch, timed):
    others = chain_candidates(CHAIN, **OPTIONS)[1]
    found = tune._fastest

    def meanwhile(plans, device):
        options = {"batch": OPTIONS["batch"], "dtype": OPTIONS["dtype"], "training": False, "allow_dense": True}
        key = tune._key(CHAIN, device, {**options, "force": None})
        tune._NOTES.write(key, device, trials.digest(others.course))
        return found(plans, device)

    monkeypatch.setattr(tune, "_fastest", meanwhile)
    assert fastest_plan(CHAIN, **OPTIONS) == others


def test_without_memory_for_a_trial_the_prediction_decides(monkeypatch, timed):
    def fail(plans, device):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(tune, "_fastest", fail)
    assert fastest_plan(CHAIN, **OPTIONS) == plan_chain(CHAIN, **OPTIONS)


def test_layers_without_memory_are_not_timed(timed):
    layer = tt.nn.Linear(64, 64, rank=4, device="meta")
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 64)
    assert timed == []


def test_switching_trials_off_holds_from_the_next_call_on(timed):
    layer = tt.nn.Linear(64, 64, rank=4)
    chosen = layer.plan(8)
    assert chosen == timed[-1]
    layer.may_time_plans = False
    assert layer.plan(8) != chosen
    layer.may_time_plans = True
    torch.use_deterministic_algorithms(True)
    try:
        assert layer.plan(8) != chosen
    finally:
        torch.use_deterministic_algorithms(False)
    assert layer.plan(8) == chosen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(0,), (1,), (3, 5)])
def test_flipped_products_are_the_same(lead, bias):
    layer = tt.nn.Linear(12, 20, rank=3, bias=bias, dtype=torch.float64)
    x = torch.randn(*lead, 12, dtype=torch.float64)
    for force in ("dense", "left-to-right", "right-to-left"):
        plan = layer.plan(8, force=force)
        found = plan.flipped()
        assert found.flips
        expected = plan.execute(x, list(layer.cores))
        torch.testing.assert_close(found.execute(x, list(layer.cores)), expected, rtol=1e-13, atol=1e-13)
        assert found.execute(x, list(layer.cores)).is_contiguous()
    layer.runner.plans[PlanKey.of(layer, max(1, x.numel() // 12), False)] = layer.plan(8, force="dense").flipped()
    with torch.no_grad():
        for _ in range(2):  # the second call finds the dense weight kept
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        assert layer(x).is_contiguous()
