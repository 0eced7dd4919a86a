"""Priors on rank indices against brute force: the density, its closed-form updates, and planted ranks."""

import copy
import math

import pytest
import torch
from planted import RANKS, Planted

import tensortrain as tt
from tensortrain.errors import KindError, RankError
from tensortrain.nn.adaptive.indices import bonds

KINDS = ("gamma", "half-cauchy", "log-uniform")
LAYERS = {
    "tt": lambda: tt.nn.Linear(12, 18, rank=3, in_modes=(3, 4), out_modes=(6, 3)),
    "cp": lambda: tt.nn.Linear(12, 18, format="cp", rank=3),
    "low_rank": lambda: tt.nn.Linear(12, 18, format="low_rank", rank=4),
    "tucker": lambda: tt.nn.Linear(12, 18, format="tucker", rank=2),
    "ring": lambda: tt.nn.Linear(12, 18, format="ring", rank=2, in_modes=(3, 4), out_modes=(6, 3)),
    "conv": lambda: tt.nn.Conv2d(6, 8, 3, rank=3),
    "grouped conv": lambda: tt.nn.Conv2d(6, 8, 3, groups=2, format="tucker2", rank=2),
    "embedding": lambda: tt.nn.Embedding(20, 9, rank=3),
    "lstm": lambda: tt.nn.LSTM(6, 8, rank=2),
}


OWNERS = {
    "tt": {0: 0, 1: 0},
    "cp": dict.fromkeys(range(4), 0),
    "low_rank": {0: 0, 1: 0},
    "tucker": {0: 2, 1: 3, 2: 1, 3: 0, 4: 1},
    "ring": {0: 1, 1: 0},
}


def made(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype)


def one_entry_at_a_time(prior: tt.nn.RankPrior, layer: tt.nn.FactorizedLayer) -> float:
    """The negative log prior, from its definition."""
    scales, found = prior.scales()[""], bonds(layer.spec)
    owners = OWNERS.get(layer.spec.format, {})
    total = 0.0
    for k, core in enumerate(layer.core_list()):
        over = [(b, axis) for b, places in enumerate(found) for c, axis in places if c == k]
        over = over if prior.kind == "gamma" else [one for one in over if one[0] == owners[k]]
        for index in torch.cartesian_prod(*(torch.arange(n) for n in core.shape)).reshape(-1, core.ndim).tolist():
            variance = math.prod(float(scales[b][index[axis]]) for b, axis in over)
            total += float(core[tuple(index)]) ** 2 / (2 * variance) + 0.5 * math.log(variance)
    for scale in torch.cat(list(scales)).tolist():
        total += {
            "gamma": prior.b * scale - (prior.a - 1) * math.log(scale),
            "half-cauchy": math.log(prior.eta**2 + scale),
            "log-uniform": 0.5 * math.log(scale),
        }[prior.kind]
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tt", "cp", "low_rank", "tucker", "ring"])
def test_loss_is_the_density_written_out(name: str, kind: str) -> None:
    layer = made(name)
    prior = tt.nn.RankPrior(layer, kind, a=1.7, b=2.0, eta=0.4)
    assert float(prior.loss().detach()) == pytest.approx(one_entry_at_a_time(prior, layer), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_update_finds_the_least_loss_in_every_scale(name: str, kind: str) -> None:
    model = made(name)
    prior = tt.nn.RankPrior(model, kind, a=1.3, b=0.7, eta=0.2)
    for _ in range(300 if kind == "gamma" else 1):  # scales of one core depend on each other there
        prior.update_()
    best = float(prior.loss().detach())
    for scale in dict(prior.named_buffers()).values():
        for factor in (0.97, 1.03):
            with torch.no_grad():
                scale[0] *= factor
                worse = float(prior.loss().detach())
                scale[0] /= factor
            assert worse > best


@pytest.mark.parametrize("kind", KINDS)
def test_loss_has_the_right_gradient(kind: str) -> None:
    layer = made("tt")
    prior = tt.nn.RankPrior(layer, kind)
    cores = [core.detach().clone().requires_grad_() for core in layer.core_list()]

    def loss(*given: torch.Tensor) -> torch.Tensor:
        layer.stand_ins = list(given)
        try:
            return prior.loss()
        finally:
            layer.stand_ins = None

    assert torch.autograd.gradcheck(loss, cores)


def test_damping_goes_part_of_the_way() -> None:
    layer = made("tt")
    whole, half = tt.nn.RankPrior(layer, "log-uniform"), tt.nn.RankPrior(layer, "log-uniform", damping=0.5)
    with torch.no_grad():
        for core in layer.cores:
            core.mul_(2.0)
    before = half.scales()[""][0].clone()
    whole.update_()
    half.update_()
    torch.testing.assert_close(half.scales()[""][0], (before + whole.scales()[""][0]) / 2)


def test_scales_are_saved_and_never_vanish() -> None:
    layer = made("tt")
    prior = tt.nn.RankPrior(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for core in layer.cores:
            core.zero_()
    prior.update_()
    assert all(float(scale.min()) > 0 for scale in prior.scales()[""])
    assert math.isfinite(float(prior.loss().detach()))
    restored = tt.nn.RankPrior(other)
    restored.load_state_dict(prior.state_dict())
    assert torch.equal(restored.scales()[""][0], prior.scales()[""][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_entries_of_half_precision_count(dtype: torch.dtype) -> None:
    layer = made("tt", dtype)
    with torch.no_grad():
        for core in layer.cores:
            core.fill_(1e-4)
    prior, exact = tt.nn.RankPrior(layer), tt.nn.RankPrior(copy.deepcopy(layer).double())
    prior.loss().backward()
    assert prior.scales()[""][0].dtype == torch.float32
    assert layer.cores[0].grad.dtype == dtype
    torch.testing.assert_close(prior.scales()[""][0].double(), exact.scales()[""][0], rtol=0.05, atol=0)
    assert float(prior.loss().detach()) == pytest.approx(float(exact.loss().detach()), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_complex_cores_count_with_both_parts(kind: str) -> None:
    torch.manual_seed(0)
    layer = tt.nn.Linear(12, 18, format="cp", rank=3, dtype=torch.complex128, init=None)
    with torch.no_grad():
        for core in layer.cores:
            core.copy_(1j * torch.randn(core.shape, dtype=torch.float64))
    real = tt.nn.Linear(12, 18, format="cp", rank=3, dtype=torch.float64)
    with torch.no_grad():
        for core, value in zip(real.cores, layer.cores, strict=True):
            core.copy_(value.imag)
    found, exact = tt.nn.RankPrior(layer, kind), tt.nn.RankPrior(real, kind)
    torch.testing.assert_close(found.scales()[""][0], exact.scales()[""][0])
    torch.testing.assert_close(found.loss(), exact.loss())


def test_bad_requests_name_what_is_wrong() -> None:
    with pytest.raises(KindError, match="factorized layer"):
        tt.nn.RankPrior(torch.nn.Linear(3, 3))
    with pytest.raises(RankError, match="damping"):
        tt.nn.RankPrior(made("tt"), damping=1.5)
    with pytest.raises(ValueError, match="half-cauchy"):
        tt.nn.RankPrior(made("tt"), "cauchy")


@pytest.mark.parametrize("kind", KINDS)
def test_indices_that_died_have_no_vote_on_those_that_live(kind: str) -> None:
    torch.manual_seed(0)
    modes = {"in_modes": (4, 4, 4, 4), "out_modes": (4, 4, 4, 4)}
    small = tt.nn.Linear(256, 256, rank=(1, 2, 4, 3, 1), **modes).double()
    large = tt.nn.Linear(256, 256, rank=(1, 9, 4, 8, 1), **modes).double()
    with torch.no_grad():
        for core, inner in zip(large.core_list(), small.core_list(), strict=True):
            core.mul_(1e-7)[tuple(slice(n) for n in inner.shape)] = inner
    few, many = (tt.nn.RankPrior(layer, kind) for layer in (small, large))
    for ours, theirs in zip(few.scales()[""], many.scales()[""], strict=True):
        ours.copy_(torch.linspace(1.0, 2.0, len(ours)))
        theirs.fill_(1e-8)[: len(ours)] = ours
    few.update_()
    many.update_()
    for ours, theirs in zip(few.scales()[""], many.scales()[""], strict=True):
        torch.testing.assert_close(theirs[: len(ours)], ours, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_ranks_are_recovered(kind: str) -> None:
    planted = Planted(seed=3)
    layer = planted.layer(rank=7)
    planted.train(layer, 3, 1e-2)
    prior = tt.nn.RankPrior(layer, kind)
    planted.train(layer, 17, 3e-3, penalty=lambda: prior.loss() / len(planted.x), after=prior.update_)
    assert prior.ranks()[""] == RANKS
    assert tt.nn.prune_ranks_(layer).ranks == RANKS
    assert planted.error(layer) < 0.1
