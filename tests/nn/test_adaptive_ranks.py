"""Ranks cut, grown and gated: what must stay the same, and what must go."""

import copy

import pytest
import torch
from planted import RANKS, Planted

import tensortrain as tt
from tensortrain.errors import KindError, RankError, ShapeError
from tensortrain.nn.adaptive.indices import bond_ranks, bonds, concentrate_, scores

LAYERS = {
    "tt": (lambda: tt.nn.Linear(24, 30, rank=(1, 4, 5, 1), in_modes=(2, 3, 4), out_modes=(3, 5, 2)), (5, 24)),
    "bare": (lambda: tt.nn.Linear(13, 7, rank=3, bias=False), (5, 13)),
    "cp": (lambda: tt.nn.Linear(24, 30, format="cp", rank=4), (5, 24)),
    "low_rank": (lambda: tt.nn.Linear(24, 30, format="low_rank", rank=5), (5, 24)),
    "tucker": (lambda: tt.nn.Linear(24, 30, format="tucker", rank=3), (5, 24)),
    "ring": (lambda: tt.nn.Linear(24, 30, format="ring", rank=3), (5, 24)),
    "block_term": (lambda: tt.nn.Linear(24, 30, format="block_term", rank=(2, 2, 2, 2, 2)), (5, 24)),
    "conv": (lambda: tt.nn.Conv2d(6, 8, 3, rank=3, padding=1), (2, 6, 5, 5)),
    "separate": (lambda: tt.nn.Conv2d(6, 8, 3, format="tt_separate", rank=3), (2, 6, 5, 5)),
    "tucker2": (lambda: tt.nn.Conv2d(6, 8, 3, format="tucker2", rank=3), (2, 6, 5, 5)),
    "grouped": (lambda: tt.nn.Conv2d(6, 8, 3, groups=2, format="tucker2", rank=2), (2, 6, 5, 5)),
    "grouped tt": (lambda: tt.nn.Conv2d(8, 12, 3, groups=2, rank=2), (2, 8, 5, 5)),
    "lstm": (lambda: tt.nn.LSTM(6, 8, rank=2), (4, 2, 6)),
}


def made(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    build, shape = LAYERS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


def outputs(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def factorized(model: torch.nn.Module) -> list[tt.nn.FactorizedLayer]:
    return [one for one in model.modules() if isinstance(one, tt.nn.FactorizedLayer)]


# -- growth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_growing_changes_no_output_and_what_is_new_can_learn(name: str) -> None:
    model, x = made(name)
    before, ranks = outputs(model, x).detach(), [bond_ranks(layer) for layer in factorized(model)]
    assert tt.nn.grow_ranks_(model, by=2) is model
    y = outputs(model, x)
    torch.testing.assert_close(y.detach(), before, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    grown = 0
    for layer, old in zip(factorized(model), ranks, strict=True):
        for bond, n in zip(bonds(layer.spec), old, strict=True):
            core, axis = bond[-1]
            new = layer.cores[core].grad.movedim(axis, 0)[n:]
            grown += len(new)
            assert not len(new) or float(new.abs().max()) > 0
    assert grown
    for layer in factorized(model):
        assert tuple(core.shape for core in layer.cores) == layer.spec.core_shapes


def test_growing_stops_where_the_modes_have_no_room() -> None:
    layer = tt.nn.Linear(8, 8, in_modes=(2, 4), out_modes=(2, 4), rank=2)
    tt.nn.grow_ranks_(layer, by=100)
    assert layer.ranks == (1, 4, 1)
    published = tt.nn.Linear(8, 8, in_modes=(2, 4), out_modes=(2, 4), rank=(1, 9, 1))  # above the feasible
    tt.nn.grow_ranks_(published, by=3)
    assert published.ranks == (1, 9, 1)
    capped = tt.nn.grow_ranks_(tt.nn.Linear(64, 64, rank=2), by=9, max_rank=5)
    assert max(capped.ranks) == 5


def test_pairs_trained_together_find_the_ranks() -> None:
    planted = Planted(seed=0)
    layer = planted.layer(rank=1)

    def loss() -> torch.Tensor:
        x = torch.randn(300, 36)
        return (layer(x) - x @ planted.weight.T).square().mean()

    for sweep in range(5):
        tt.nn.grow_ranks_(layer, loss=loss, n_steps=40, lr=2e-2 if sweep < 3 else 5e-3, rel_error=3e-2)
    assert layer.ranks == RANKS
    assert planted.error(layer) < 0.05


def test_pairs_grow_to_the_planted_ranks_at_the_defaults() -> None:
    planted = Planted(seed=0)
    layer = planted.layer(rank=1)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(planted.x), (300,))
        return (layer(planted.x[rows]) - planted.y[rows]).square().mean()

    for _ in range(8):
        tt.nn.grow_ranks_(layer, loss=loss)
    assert layer.ranks == RANKS


def test_growth_of_pairs_needs_trains() -> None:
    with pytest.raises(KindError, match="format 'cp'"):
        tt.nn.grow_ranks_(made("cp")[0], loss=lambda: torch.zeros(()))
    with pytest.raises(RankError, match="by"):
        tt.nn.grow_ranks_(made("tt")[0], by=-1)


# -- pruning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_dead_indices_go_and_outputs_stay(name: str) -> None:
    model, x = made(name)
    wanted = [layer.ranks for layer in factorized(model)]
    before = outputs(model, x).detach()
    tt.nn.grow_ranks_(model, by=2)
    tt.nn.prune_ranks_(model)
    torch.testing.assert_close(outputs(model, x).detach(), before, rtol=1e-9, atol=1e-10)
    assert [layer.ranks for layer in factorized(model)] == wanted


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "block_term"])
def test_a_tolerance_is_kept(name: str) -> None:
    model, _ = made(name)
    before = [layer.to_dense().weight.detach() for layer in factorized(model)]
    n_params = sum(layer.n_params for layer in factorized(model))
    tt.nn.prune_ranks_(model, rel_error=0.7)
    for layer, weight in zip(factorized(model), before, strict=True):
        assert float((layer.to_dense().weight - weight).norm()) <= 0.7 * float(weight.norm()) * (1 + 1e-9)
    assert name == "grouped tt" or sum(layer.n_params for layer in factorized(model)) < n_params


@pytest.mark.parametrize("name", LAYERS)
def test_ranks_that_are_named_are_taken(name: str) -> None:
    model, x = made(name)
    tt.nn.prune_ranks_(model, ranks=1)
    assert all(set(bond_ranks(layer)) == {1} for layer in factorized(model))
    assert outputs(model, x).isfinite().all()


@pytest.mark.parametrize("name", ["tt", "cp", "conv", "low_rank"])
@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_a_budget_is_met_and_not_undercut_by_much(name: str, budget: float) -> None:
    model = torch.nn.Sequential(made(name)[0], tt.nn.Linear(64, 64, rank=6))
    full = sum(core.numel() for layer in tt.nn.prune_ranks_(model) for core in layer.core_list())
    tt.nn.prune_ranks_(model, budget=budget)
    left = sum(core.numel() for layer in model for core in layer.core_list())
    smallest = max(core.numel() // max(core.shape) for layer in model for core in layer.core_list())
    assert budget * full - 2 * smallest * 8 < left <= budget * full


def test_a_budget_takes_from_the_layer_that_needs_it_least() -> None:
    torch.manual_seed(0)
    poor = torch.randn(64, 2) @ torch.randn(2, 64) + 0.05 * torch.randn(64, 64)
    dense = {"needs": torch.randn(64, 64), "wastes": poor}
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in dense})
    for name, weight in dense.items():
        model[name].weight.data = weight
    model = torch.nn.ModuleDict(
        {name: tt.nn.Linear.from_dense(layer, format="low_rank", rank=12) for name, layer in model.items()}
    )
    tt.nn.prune_ranks_(model, budget=0.6)
    assert model["wastes"].ranks[1:-1] == (2,)
    assert model["needs"].ranks[1:-1] == (12,)


def test_a_train_is_cut_as_well_as_it_can_be() -> None:
    layer, _ = made("tt")
    weight = layer.to_dense().weight.detach()
    best = tt.nn.Linear.from_dense(
        layer.to_dense(), rank=(1, 2, 3, 1), in_modes=layer.in_modes, out_modes=layer.out_modes
    )
    tt.nn.prune_ranks_(layer, ranks=(2, 3))
    mine, theirs = (float((one.to_dense().weight - weight).norm()) for one in (layer, best))
    assert mine == pytest.approx(theirs, rel=1e-6)


def test_names_choose_layers() -> None:
    model = torch.nn.Sequential(tt.nn.Linear(16, 16, rank=4), torch.nn.ReLU(), tt.nn.Linear(16, 16, rank=4))
    tt.nn.prune_ranks_(model, ranks={"2": 2})
    assert max(model[0].ranks) == 4
    assert max(model[2].ranks) == 2


def test_shared_cores_stay_shared_and_tied_heads_follow() -> None:
    first = tt.nn.Linear(16, 16, rank=4)
    second = copy.deepcopy(first)
    second.cores = first.cores
    model = torch.nn.ModuleList([first, second, tt.nn.Embedding(60, 16, rank=4)])
    model.append(tt.nn.tied_head(model[2]))
    x = torch.randn(3, 16)
    model[3](x)
    tt.nn.prune_ranks_(model, ranks=2)
    assert first.cores is second.cores
    torch.testing.assert_close(first(x) - first.bias, second(x) - second.bias)
    torch.testing.assert_close(model[3](x), x @ model[2].to_dense().weight.T, rtol=1e-4, atol=1e-5)


def test_frozen_cores_stay_frozen_and_biases_stay() -> None:
    layer = tt.nn.Linear(16, 16, rank=4)
    layer.cores.requires_grad_(False)
    bias = layer.bias
    tt.nn.prune_ranks_(layer, ranks=2)
    assert not any(core.requires_grad for core in layer.cores)
    assert layer.bias is bias


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"rel_error": 1.0}, RankError, "rel_error"),
        ({"rel_error": 0.1, "ranks": 2}, ShapeError, "not both"),
        ({"budget": 0.5, "ranks": 2}, ShapeError, "not both"),
        ({"budget": 0}, RankError, "positive"),
        ({"budget": 3}, RankError, "cores of rank 1"),
        ({"ranks": 0}, RankError, "at least 1"),
        ({"ranks": (1, 2, 3, 4, 5)}, RankError, "whole numbers"),
        ({"ranks": {"nobody": 2}}, ShapeError, "nobody"),
    ],
)
def test_bad_requests_change_nothing(keywords: dict, error: type[Exception], words: str) -> None:
    layer, _ = made("tt")
    cores = list(layer.cores)
    with pytest.raises(error, match=words):
        tt.nn.prune_ranks_(layer, **keywords)
    assert all(a is b for a, b in zip(cores, layer.cores, strict=True))


def test_constrained_cores_are_refused() -> None:
    layer = tt.nn.orthogonal(tt.nn.Linear(16, 16, rank=4), kind="left")
    with pytest.raises(KindError, match="plain parameters"):
        tt.nn.prune_ranks_(layer)


# -- gates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["concrete", "l1"])
@pytest.mark.parametrize("name", LAYERS)
def test_gates_folded_into_cores_give_what_they_gave(name: str, kind: str) -> None:
    model, x = made(name)
    before = outputs(model, x).detach()
    gates = tt.nn.RankGates(model, kind)
    model.eval()
    torch.testing.assert_close(outputs(model, x).detach(), before, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        for gate in gates.gates:
            if len(gate) > 1:
                gate[0] = -1.0 if kind == "concrete" else 0.0  # shut
                gate[1] *= 1.5
    gated = outputs(model, x).detach()
    assert float(gates.share().detach()) < 1
    expected = [tuple(ranks) for ranks in gates.ranks().values()]
    tt.nn.prune_ranks_(model)
    torch.testing.assert_close(outputs(model, x).detach(), gated, rtol=1e-6, atol=1e-8)
    for layer, most in zip(factorized(model), expected, strict=True):
        assert all(a <= b for a, b in zip(layer.ranks, most, strict=True))


def test_drawn_gates_vary_in_training_only() -> None:
    model, x = made("tt")
    tt.nn.RankGates(model, "concrete")
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", ["concrete", "l1"])
def test_the_penalty_has_the_gradient_of_its_value(kind: str) -> None:
    model, _ = made("tt")
    gates = tt.nn.RankGates(model, kind).double()
    for gate in gates.gates:
        loss = gates.loss()
        (grad,) = torch.autograd.grad(loss, [gate])
        with torch.no_grad():
            gate[0] += 1e-6
            above = float(gates.loss())
            gate[0] -= 2e-6
            below = float(gates.loss())
            gate[0] += 1e-6
        assert float(grad[0]) == pytest.approx((above - below) / 2e-6, rel=1e-5)


def test_a_budget_ends_the_penalty() -> None:
    model, _ = made("tt")
    gates = tt.nn.RankGates(model, "concrete", budget=0.5)
    assert float(gates.loss().detach()) > 0
    with torch.no_grad():
        for gate in gates.gates:
            gate[1:] = -1.0
    assert float(gates.loss().detach()) == 0


def test_the_late_stage_pulls_at_what_is_farther_from_its_target() -> None:
    model, x = made("tt")
    gates = tt.nn.RankGates(model, "l1")
    loss = model(x).square().mean()
    at_goal = gates.late_loss(loss, target_loss=float(loss.detach()) / 100, target_share=1.0)
    torch.testing.assert_close(at_goal, 1.1 * loss + 0.01 * gates.size())
    too_large = gates.late_loss(loss, target_loss=float(loss.detach()), target_share=0.2)
    torch.testing.assert_close(too_large, 0.1 * loss + 1.01 * gates.size())


def test_gates_can_be_taken_off() -> None:
    model, x = made("tt")
    gates = tt.nn.RankGates(model, "l1")
    before = model(x).detach()
    with torch.no_grad():
        gates.gates[0].zero_()
    assert not torch.allclose(model(x), before)
    gates.remove()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)


def half_shut(gates: tt.nn.RankGates) -> None:
    with torch.no_grad():
        for gate in gates.gates:
            gate[0] = -1.0


@pytest.mark.parametrize("act", ["prune a part", "prune by name", "grow", "fold"])
def test_gates_of_several_layers_act_to_the_end(act: str) -> None:
    torch.manual_seed(0)
    first, second, third = (tt.nn.Linear(16, 16, rank=4).double() for _ in range(3))
    third.cores = second.cores  # shared
    model = torch.nn.Sequential(first, second, third).eval()
    gates = tt.nn.RankGates(model, "concrete")
    half_shut(gates)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = model(x).detach()
    if act == "prune a part":
        tt.nn.prune_ranks_(first)
    elif act == "prune by name":
        tt.nn.prune_ranks_(model, ranks={"1": 4})
    elif act == "grow":
        tt.nn.grow_ranks_(model, by=1)
    else:
        gates.fold_()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-8, atol=1e-9)
    assert second.cores is third.cores


def test_gates_refuse_what_they_cannot_finish() -> None:
    embedding = tt.nn.Embedding(60, 16, rank=4)
    with pytest.raises(KindError, match="tied head"):
        tt.nn.RankGates(torch.nn.ModuleList([embedding, tt.nn.tied_head(embedding)]))
    with pytest.raises(KindError, match="plain parameters"):
        tt.nn.RankGates(tt.nn.orthogonal(tt.nn.Linear(16, 16, rank=4), kind="left"))
    gated, _ = made("tt")
    tt.nn.RankGates(gated)
    with pytest.raises(KindError, match="one set of gates"):
        tt.nn.RankGates(gated)


def test_layers_that_share_some_cores_are_not_turned_and_not_cut() -> None:
    torch.manual_seed(0)
    first, second = (tt.nn.Linear(16, 16, rank=4).double() for _ in range(2))
    second.cores[0] = first.cores[0]
    model = torch.nn.Sequential(first, second)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = model(x).detach()
    tt.nn.RankPrior(model)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=0)
    with pytest.raises(KindError, match="shares some"):
        tt.nn.prune_ranks_(model, ranks=2)


def test_layers_without_ranks_are_passed_over() -> None:
    model = torch.nn.Sequential(tt.nn.Linear(4, 4, in_modes=(4,), out_modes=(4,)), tt.nn.Linear(16, 16, rank=4))
    prior = tt.nn.RankPrior(model)
    assert prior.loss().isfinite()
    assert list(prior.ranks()) == ["1"]
    alone = tt.nn.RankPrior(model[0])
    assert float(alone.loss()) == 0
    assert float(tt.nn.RankGates(model[0], "l1").loss()) == 0


def test_growth_passes_over_frozen_layers() -> None:
    layer = tt.nn.Linear(16, 16, rank=2)
    layer.cores.requires_grad_(False)
    cores = list(layer.cores)
    tt.nn.grow_ranks_(layer, loss=lambda: layer(torch.ones(1, 16)).sum())
    assert all(a is b for a, b in zip(cores, layer.cores, strict=True))


@pytest.mark.parametrize("kind", ["concrete", "l1"])
def test_gates_recover_planted_ranks(kind: str) -> None:
    planted = Planted(seed=4)
    layer = planted.layer(rank=7)
    planted.train(layer, 6, 1e-2)
    gates = tt.nn.RankGates(layer, kind)
    for epochs, lr in ((14, 1e-2), (6, 1e-3)):
        planted.train(layer, epochs, lr, more=gates.parameters(), penalty=gates.loss)
    assert gates.ranks()[""] == RANKS
    assert tt.nn.prune_ranks_(layer).ranks == RANKS


@pytest.mark.parametrize(
    "name", ["tt", "bare", "conv", "separate", "low_rank", "tucker", "tucker2", "grouped", "grouped tt"]
)
def test_turning_indices_keeps_the_weight(name: str) -> None:
    model, x = made(name)
    before = outputs(model, x).detach()
    concentrate_(model, model)
    torch.testing.assert_close(outputs(model, x).detach(), before, rtol=1e-9, atol=1e-10)
    sizes = scores(model.core_list(), bonds(model.spec)[0])
    assert (sizes[:-1] >= sizes[1:] - 1e-9).all()


@pytest.mark.parametrize("name", ["tucker", "tucker2", "grouped"])
def test_mixed_indices_of_cores_on_one_core_are_told_apart(name: str) -> None:
    model, x = made(name)
    tt.nn.prune_ranks_(model, ranks=2)
    before = outputs(model, x).detach()
    tt.nn.grow_ranks_(model, by=2)
    grown = max(model.ranks)
    with torch.no_grad():  # the same weight by other bases, in which every index looks alike
        cores = list(model.core_list())
        for first, second in bonds(model.spec):
            (core, axis), (other, other_axis) = first, second
            turn = torch.linalg.qr(torch.randn(cores[core].shape[axis], cores[core].shape[axis]).double()).Q
            cores[core].copy_(torch.tensordot(turn, cores[core], ([1], [axis])).movedim(0, axis))
            cores[other].copy_(torch.tensordot(turn, cores[other], ([1], [other_axis])).movedim(0, other_axis))
    torch.testing.assert_close(outputs(model, x).detach(), before, rtol=1e-9, atol=1e-10)
    tt.nn.prune_ranks_(model)
    assert max(model.ranks) == 2 < grown
    torch.testing.assert_close(outputs(model, x).detach(), before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("budget", "weight"), [(None, 1e-2), (0.4, 1.0), (50, 1.0)])
def test_a_budget_is_pulled_at_by_default(budget: float | None, weight: float) -> None:
    layer = tt.nn.Linear(24, 30, format="cp", rank=6)
    gates = tt.nn.RankGates(layer, budget=budget)
    assert float(gates.loss().detach()) == pytest.approx(weight * float(gates.size().detach()))
    gates.remove()
    assert tt.nn.RankGates(layer, budget=budget, weight=0.3).weight == 0.3
