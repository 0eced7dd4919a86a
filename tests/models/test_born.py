"""Born machines: every number against enumeration, exact samples, and what they learn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import tensortrain as tt
from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models import BornMachine
from tensortrain.testing import ModelSuite

KINDS = ("real", "complex", "positive", "purified")


def strings(n_sites: int, n_values: int = 2) -> Tensor:
    return torch.tensor(list(itertools.product(range(n_values), repeat=n_sites)))


def bars_and_stripes(n: int) -> Tensor:
    rows = {tuple(bit for bit in bits for _ in range(n)) for bits in itertools.product((0, 1), repeat=n)}
    columns = {tuple(bits) * n for bits in itertools.product((0, 1), repeat=n)}
    return torch.tensor(sorted(rows | columns))


def machine(
    kind: str, n_sites: int = 5, n_values: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> BornMachine:
    """A model with parameters far from the first ones."""
    model = BornMachine(n_sites, n_values, bond_dim=3, kind=kind, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for core in model.cores:
            core.copy_(torch.randn(core.shape, generator=generator, dtype=torch.float64))
            if core.is_complex():
                core.add_(1j * torch.randn(core.shape, generator=generator, dtype=torch.float64))
    return model


def by_enumeration(model: BornMachine) -> Tensor:
    """Probabilities of all strings, ``(n_values,) * n_sites``, from the parameters by one dense contraction."""
    cores = [core.detach() for core in model.cores]
    if model.kind == "positive":
        cores = [core.square() for core in cores]
    latent = model.kind == "purified"
    whole = cores[0][0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, dims=1)
    whole = whole[..., 0]
    weights = whole if model.kind == "positive" else whole.abs().square()
    if latent:
        weights = weights.sum(dim=tuple(range(1, 2 * model.n_sites, 2)))
    return weights / weights.sum()


class BornSuite(ModelSuite):
    kind = "real"

    def make(self, dtype: torch.dtype) -> BornMachine:
        return machine(self.kind, dtype=dtype)

    def data(self, dtype: torch.dtype) -> Tensor:
        return strings(5, 3)[::17]

    def exact(self, model: BornMachine, data: Tensor) -> Tensor:
        return by_enumeration(model)[tuple(data.T)].log()

    def learn(self, model: BornMachine, **options: object) -> object:
        return model.fit(strings(5, 3)[::7], n_sweeps=3, **options)

    def bad(self, model: BornMachine):
        good = strings(5, 3)
        yield DataError, model.log_prob, (good + 1,)
        yield DataError, model.log_prob, (good - 1,)
        yield DataError, model.log_prob, (good.double(),)
        yield DataError, model.log_prob, (good[:, :4],)
        yield DataError, model.log_prob, (good[0],)
        yield DataError, model.log_marginal, (good - 2,)
        yield DataError, model.fit, (good[:0],)
        yield DataError, model.fit, (good * 9,)
        yield DataError, model.sample, (2,), {"given": torch.tensor([7, -1, -1, -1, -1])}
        yield DataError, model.sample, (2,), {"given": good[:5]}
        yield KindError, model.fit, (good,), {"method": "magic"}
        yield RankError, model.fit, (good,), {"max_bond": 0}


class TestReal(BornSuite):
    pass


class TestComplex(BornSuite):
    kind = "complex"


class TestPositive(BornSuite):
    kind = "positive"


class TestPurified(BornSuite):
    kind = "purified"


class TestRealByAdam(BornSuite):
    def learn(self, model: BornMachine, **options: object) -> object:
        generator = torch.Generator().manual_seed(3)
        return model.fit(strings(5, 3)[::7], method="adam", batch_size=8, n_sweeps=3, generator=generator, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_agree_with_sums(kind: str) -> None:
    model = machine(kind)
    p = by_enumeration(model)
    for mask in itertools.product((0, 1), repeat=5):
        open_sites = [k for k in range(5) if mask[k]]
        x = strings(5, 3)[::29].clone()
        x[:, open_sites] = -1
        summed = p.sum(dim=open_sites, keepdim=True).expand(p.shape) if open_sites else p
        exact = summed[tuple(x.clamp_min(0).T)].log()
        torch.testing.assert_close(model.log_marginal(x).detach(), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_law(kind: str) -> None:
    model = machine(kind, n_sites=4)
    p = by_enumeration(model).flatten()
    drawn = model.sample(20_000, generator=torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.int64
    assert drawn.shape == (20_000, 4)
    counts = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    seen = p * 20_000 >= 5
    rest = torch.tensor([counts[~seen].sum(), p[~seen].sum() * 20_000])
    found = [*counts[seen].tolist(), rest[0].item()] if rest[1] >= 1 else counts[seen].tolist()
    expected = [*(p[seen] * 20_000).tolist(), rest[1].item()] if rest[1] >= 1 else (p[seen] * 20_000).tolist()
    expected = [value * sum(found) / sum(expected) for value in expected]
    assert stats.chisquare(found, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_hold_wherever_they_lie(kind: str) -> None:
    model = machine(kind, n_sites=4)
    p = by_enumeration(model)
    given = torch.tensor([-1, 2, -1, 1])
    drawn = model.sample(6000, given=given, generator=torch.Generator().manual_seed(2))
    assert bool((drawn[:, 1] == 2).all())
    assert bool((drawn[:, 3] == 1).all())
    law = p[:, 2, :, 1] / p[:, 2, :, 1].sum()
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 2], minlength=9).double() / 6000
    spread = (law.flatten() * (1 - law.flatten()) / 6000).sqrt()
    assert bool(((counts - law.flatten()).abs() <= 4.5 * spread + 1e-12).all())


def test_a_condition_of_probability_zero_is_refused() -> None:
    model = BornMachine.from_train(tt.TensorTrain([torch.eye(2)[None], torch.eye(2)[..., None]]))  # 00 or 11
    with pytest.raises(DataError, match="probability"):
        model.sample(3, given=torch.tensor([0, 1]))
    assert model.log_prob(torch.tensor([[0, 1], [0, 0]])).tolist() == pytest.approx([-math.inf, -math.log(2)])
    assert model.sample(3, given=torch.tensor([-1, 1])).tolist() == [[1, 1]] * 3


def test_no_gradient_is_nan_where_a_string_has_no_mass() -> None:
    model = BornMachine.from_train(tt.TensorTrain([torch.eye(2)[None], torch.eye(2)[..., None]]))
    model.log_prob(torch.tensor([[0, 1], [0, 0]]))[1].backward()
    assert all(bool(torch.isfinite(core.grad).all()) for core in model.cores)


def test_thousands_of_sites_in_single_precision() -> None:
    model = BornMachine(2500, bond_dim=4, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    x = model.sample(4, generator=torch.Generator().manual_seed(0))
    found = model.log_prob(x)
    assert bool(torch.isfinite(found).all())
    assert float(found.detach().mean()) == pytest.approx(-2500 * math.log(2), rel=0.1)  # near the uniform law at first
    found.sum().backward()
    assert all(bool(torch.isfinite(core.grad).all()) for core in model.cores)


def test_bars_and_stripes_are_learnt_exactly() -> None:
    x = bars_and_stripes(4)
    for seed in range(3):
        model = BornMachine(16, bond_dim=2, generator=torch.Generator().manual_seed(seed))
        history = model.fit(x, n_sweeps=4)
        assert -1e-5 <= history.nll[-1] - math.log(30) < 1e-4
        assert model.ranks == (1, 2, 4, 8, 15, 16, 16, 16, 15, 16, 16, 16, 15, 8, 4, 2, 1)
        assert history.nll[-1] == pytest.approx(float(model.nll(x).detach()), abs=1e-6)
        drawn = model.sample(10_000, generator=torch.Generator().manual_seed(seed))
        place = {tuple(row): k for k, row in enumerate(x.tolist())}
        counts = [0] * 30
        for row in drawn.tolist():
            counts[place[tuple(row)]] += 1
        assert stats.chisquare(counts).pvalue > 0.01
        half = x.clone()
        half[:, 8:] = -1
        completed = model.sample(30, given=half, generator=torch.Generator().manual_seed(seed))
        assert all(tuple(row) in place for row in completed.tolist())


def test_sweeps_over_hundreds_of_sites_in_single_precision() -> None:
    model = BornMachine(400, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    x = (torch.arange(400) // 40 % 2).repeat(3, 1) ^ torch.tensor([[0], [1], [0]])
    history = model.fit(x, n_sweeps=1, n_steps=3)
    assert 0.6 < history.nll[-1] < 400 * math.log(2) / 3


def test_ranks_stay_below_the_cap() -> None:
    seen = []
    model = BornMachine(9, bond_dim=2)
    model.fit(bars_and_stripes(3), n_sweeps=3, max_bond=4, observer=lambda history: seen.append(max(history.ranks[-1])))
    assert max(seen) <= 4
    assert max(model.ranks) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_adam_comes_near_the_entropy(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
    model = BornMachine(4, bond_dim=4, kind=kind, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    history = model.fit(x, method="adam", n_sweeps=400, lr=0.05)
    assert history.nll[-1] == pytest.approx(math.log(3), abs=0.02)
    assert history.nll[-1] == pytest.approx(float(model.nll(x).detach()), abs=1e-9)


def test_validation_is_watched_and_ends_a_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(60, 12, generator=generator) < 0.3).long()
    history = BornMachine(12).fit(x[:30], validation=x[30:], n_sweeps=30, patience=2)
    assert len(history.validation_nll) == len(history) < 30
    assert history.stop == "validation"


@pytest.mark.parametrize("method", ["two-site", "adam"])
def test_sweeps_need_amplitudes(method: str) -> None:
    model = BornMachine(3, kind="positive")
    if method == "two-site":
        with pytest.raises(KindError, match="adam"):
            model.fit(strings(3), method=method)
    else:
        assert len(model.fit(strings(3), method=method, n_sweeps=2)) == 2


def test_a_train_is_its_law() -> None:
    x = tt.randn((3, 3, 3, 3), 2, dtype=torch.complex128)
    model = BornMachine.from_train(x)
    dense = x.to_dense().abs().square()
    exact = (dense / dense.sum()).flatten().log()
    torch.testing.assert_close(model.log_prob(strings(4, 3)).detach(), exact)
    assert float(model.state.norm()) == pytest.approx(1)
    torch.testing.assert_close(model.entropy(2), x.normalize().entropy(2))
    with pytest.raises(DataError, match="alphabet"):
        BornMachine.from_train(tt.randn((2, 3), 2))
    with pytest.raises(DataError, match="negative"):
        BornMachine.from_train(tt.randn((3, 3), 2), kind="positive")


def test_the_state_of_a_hidden_markov_model_is_its_probabilities() -> None:
    model = machine("positive")
    dense = model.state.to_dense()
    assert bool((dense >= 0).all())
    torch.testing.assert_close(dense / dense.sum(), by_enumeration(model))


def test_one_site() -> None:
    model = BornMachine(1, 4)
    x = torch.tensor([[0], [0], [0], [2]])
    model.fit(x, n_sweeps=60)
    torch.testing.assert_close(
        model.log_prob(torch.tensor([[0], [2]])).exp().detach(), torch.tensor([0.75, 0.25]), atol=0.02, rtol=0
    )


def even_strings(n_sites: int) -> Tensor:
    every = (torch.arange(2**n_sites)[:, None] >> torch.arange(n_sites - 1, -1, -1)) & 1
    return every[every.sum(1) % 2 == 0]


def minus_log_overlap(model: BornMachine, support: Tensor) -> float:
    """``-ln`` of the squared overlap with the uniform superposition of some strings."""
    psi = model.log_prob(support).detach()  # signs agree: all sums are of positive terms
    return float(-2 * (torch.logsumexp(psi / 2, 0) - 0.5 * math.log(len(support))))


def test_samples_without_a_cut_are_memorized() -> None:
    x = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [0, 1, 2, 0], [1, 0, 0, 2]])
    model = BornMachine.from_samples(x, max_bond=50, n_values=3, dtype=torch.float64)
    torch.testing.assert_close(
        model.log_prob(x).exp().detach(), torch.tensor([0.5, 0.25, 0.5, 0.25], dtype=torch.float64)
    )
    assert model.ranks == (1, 3, 3, 3, 1) or max(model.ranks) <= 3


def test_parity_is_learnt_from_a_few_percent() -> None:
    even = even_strings(16)
    generator = torch.Generator().manual_seed(0)
    distances = []
    for share in (0.05, 0.1, 0.2, 1.0):
        rows = torch.randperm(len(even), generator=generator)[: int(share * len(even))]
        model = BornMachine.from_samples(even[rows], max_bond=2, dtype=torch.float64)
        distances.append(minus_log_overlap(model, even))
        odd = even.clone()
        odd[:, 0] = 1 - odd[:, 0]
        assert bool((model.log_prob(odd) < math.log(1e-20)).all())  # true of failed runs too: see the docs
    assert distances[0] < 0.3  # arXiv:1910.07425 predicts 0.12 +- 0.04 at 5 %
    assert distances[1] < 0.05
    assert distances[3] < 1e-12
    assert distances == sorted(distances, reverse=True)


def test_divisible_by_three_needs_rank_three() -> None:
    n = 12
    numbers = torch.arange(2**n)
    bits = (numbers[:, None] >> torch.arange(n - 1, -1, -1)) & 1
    divisible = bits[numbers % 3 == 0]
    rows = torch.randperm(len(divisible), generator=torch.Generator().manual_seed(1))[: len(divisible) // 5]
    model = BornMachine.from_samples(divisible[rows], max_bond=3, dtype=torch.float64)
    assert minus_log_overlap(model, divisible) < 0.2
    assert bool((model.log_prob(bits[numbers % 3 != 0]) < math.log(1e-20)).all())


def test_samples_must_be_there() -> None:
    with pytest.raises(DataError, match="must have some"):
        BornMachine.from_samples(torch.zeros(0, 3, dtype=torch.int64), max_bond=2)
    with pytest.raises(RankError, match="max_bond"):
        BornMachine.from_samples(torch.zeros(2, 3, dtype=torch.int64), max_bond=0)


def test_a_machine_is_a_distribution_of_torch() -> None:
    model = machine("complex", n_sites=3)
    law = model.distribution()
    drawn = law.sample((4, 5))
    assert drawn.shape == (4, 5, 3)
    assert bool(law.support.check(drawn).all())
    torch.testing.assert_close(law.log_prob(drawn).flatten(), model.log_prob(drawn.flatten(0, 1)))
    assert float(law.log_prob(strings(3, 3)).exp().sum().detach()) == pytest.approx(1)
    assert law.event_shape == (3,)
    assert law.batch_shape == ()


# -- strings of unequal length -------------------------------------------------------------------------


def all_of_every_length(n_sites: int, n_values: int) -> tuple[Tensor, Tensor]:
    """Every string of 0 to ``n_sites`` values, filled with ``n_values``, and its length."""
    rows = [
        [*word, *[n_values] * (n_sites - n)]
        for n in range(n_sites + 1)
        for word in itertools.product(range(n_values), repeat=n)
    ]
    x = torch.tensor(rows)
    return x, (x < n_values).sum(1)


def open_machine(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> BornMachine:
    model = BornMachine(4, 2, bond_dim=3, kind=kind, variable_length=True, dtype=dtype)
    model.load_state_dict(machine(kind, 4, 3, dtype, seed).state_dict())
    return model


def by_enumeration_of_lengths(model: BornMachine) -> Tensor:
    """Probabilities of all padded strings ``(3,) * 4``: those of a law on three values, without impossible strings."""
    plain = BornMachine(4, 3, bond_dim=3, kind=model.kind, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    x, _ = all_of_every_length(4, 2)
    p = torch.zeros((3,) * 4, dtype=torch.float64)
    p[tuple(x.T)] = by_enumeration(plain)[tuple(x.T)]
    return p / p.sum()


class OfUnequalLengthSuite(ModelSuite):
    kind = "real"

    def make(self, dtype: torch.dtype) -> BornMachine:
        return open_machine(self.kind, dtype)

    def data(self, dtype: torch.dtype) -> Tensor:
        return all_of_every_length(4, 2)[0][::3]

    def exact(self, model: BornMachine, data: Tensor) -> Tensor:
        return by_enumeration_of_lengths(model)[tuple(data.T)].log()

    def learn(self, model: BornMachine, **options: object) -> object:
        x, lengths = all_of_every_length(4, 2)
        return model.fit(x[::2], lengths=lengths[::2], n_sweeps=3, **options)

    def bad(self, model: BornMachine):
        x, lengths = all_of_every_length(4, 2)
        ended = torch.tensor([[0, 2, 1, 2]])
        yield DataError, model.log_prob, (x + 1,)
        yield DataError, model.log_prob, (x, lengths + 1)
        yield DataError, model.log_prob, (x, lengths.double())
        yield DataError, model.log_prob, (x, lengths[1:])
        yield DataError, model.log_prob, (x, torch.full_like(lengths, 4))  # an end within a string
        yield DataError, model.log_prob, (x[:, :2], torch.full_like(lengths, 3))
        yield DataError, model.fit, (ended,)
        yield DataError, model.fit, (x,), {"validation": ended}
        yield DataError, model.sample, (2,), {"lengths": 5}
        yield DataError, model.sample, (2,), {"given": ended}
        yield DataError, model.sample, (2,), {"given": torch.tensor([0, 1, -1, -1]), "lengths": 1}
        yield KindError, machine("real", 4).log_prob, (x.clamp_max(1), lengths)
        yield KindError, machine("real", 4).sample, (2,), {"lengths": 2}
        yield KindError, machine("real", 4).length_log_probs, ()


class TestRealOfUnequalLength(OfUnequalLengthSuite):
    pass


class TestComplexOfUnequalLength(OfUnequalLengthSuite):
    kind = "complex"


class TestPositiveOfUnequalLength(OfUnequalLengthSuite):
    kind = "positive"


class TestPurifiedOfUnequalLength(OfUnequalLengthSuite):
    kind = "purified"


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_of_lengths_is_exact(kind: str) -> None:
    model, (x, lengths) = open_machine(kind), all_of_every_length(4, 2)
    p = by_enumeration_of_lengths(model)[tuple(x.T)]
    assert float(model.log_prob(x).exp().sum().detach()) == pytest.approx(1, abs=1e-12)
    exact = torch.zeros(5, dtype=torch.float64).index_add_(0, lengths, p)
    torch.testing.assert_close(model.length_log_probs().exp().detach(), exact)
    assert model.end == 2
    assert torch.equal(model.lengths(x), lengths)
    dense = model.state.to_dense()
    if kind in ("real", "complex"):
        torch.testing.assert_close(dense.abs().square(), by_enumeration_of_lengths(model))
    value_behind_an_end = torch.tensor([[0, 2, 1, 2], [0, 2, 2, 2]])
    found = model.log_prob(value_behind_an_end)
    assert found[0] == -math.inf
    assert found[1] > -math.inf


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_behind_a_string_is_not_read(kind: str) -> None:
    model, (x, lengths) = open_machine(kind), all_of_every_length(4, 2)
    behind = torch.where(x == 2, torch.randint(-9, 9, x.shape, generator=torch.Generator().manual_seed(0)), x)
    assert torch.equal(model.log_prob(behind, lengths), model.log_prob(x))
    short = lengths <= 2
    assert torch.equal(model.log_prob(x[short, :2], lengths[short]), model.log_prob(x[short]))
    assert torch.equal(model.nll(behind, lengths), model.nll(x))


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_with_and_without_lengths(kind: str) -> None:
    model, (x, lengths) = open_machine(kind), all_of_every_length(4, 2)
    p = by_enumeration_of_lengths(model)
    for mask in itertools.product((False, True), repeat=4):
        open_sites = torch.tensor(mask)
        asked = torch.where(open_sites, -1, x)
        fits = ((asked[:, None] == x) | (asked[:, None] < 0)).all(-1)  # question, string
        exact = (fits * p[tuple(x.T)]).sum(1).log()
        torch.testing.assert_close(model.log_marginal(asked).detach(), exact, rtol=1e-10, atol=1e-10)
        exact = (fits * (lengths[:, None] == lengths) * p[tuple(x.T)]).sum(1).log()
        torch.testing.assert_close(model.log_marginal(asked, lengths).detach(), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", ["none", "lengths", "given", "both"])
def test_samples_of_unequal_length_have_the_law(kind: str, condition: str) -> None:
    model, n = open_machine(kind), 6000
    x, lengths = all_of_every_length(4, 2)
    given = torch.tensor([-1, 1, -1, -1]) if condition in ("given", "both") else None
    asked = torch.arange(n) % 2 + 2 if condition in ("lengths", "both") else None
    p = by_enumeration_of_lengths(model)[tuple(x.T)]
    if given is not None:
        p = p * (x[:, 1] == 1)
    if asked is None:
        law = p / p.sum()
    else:
        law = sum(0.5 * p * (lengths == n) / p[lengths == n].sum() for n in (2, 3))
    drawn = model.sample(n, given=given, lengths=asked, generator=torch.Generator().manual_seed(3))
    assert asked is None or torch.equal(model.lengths(drawn), asked)
    counts = (drawn[:, None] == x).all(-1).double().sum(0)
    assert counts.sum() == n
    spread = (law * (1 - law) / n).sqrt()
    assert bool(((counts / n - law).abs() <= 4.5 * spread + 1e-12).all())


def test_lengths_are_learnt() -> None:
    x = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 7, 7, 7, 7], [1, 0, 1, 7, 7, 7], [7, 7, 7, 7, 7, 7]])
    lengths = torch.tensor([6, 2, 3, 0])
    model = BornMachine(6, variable_length=True, generator=torch.Generator().manual_seed(0))
    history = model.fit(x, lengths=lengths, validation=(x, lengths), n_sweeps=8)
    assert history.nll[-1] == pytest.approx(math.log(4), abs=1e-3)
    assert history.validation_nll == history.nll
    torch.testing.assert_close(
        model.length_log_probs().exp().detach(), torch.tensor([1, 0, 1, 1, 0, 0, 1.0]) / 4, atol=1e-3, rtol=0
    )
    exact = BornMachine.from_samples(x, max_bond=9, lengths=lengths, dtype=torch.float64)
    assert exact.variable_length
    assert exact.n_values == 2
    torch.testing.assert_close(exact.log_prob(x, lengths).exp().detach(), torch.full((4,), 0.25, dtype=torch.float64))


def test_long_strings_of_unequal_length_in_single_precision() -> None:
    model = BornMachine(1500, variable_length=True, bond_dim=3, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([0, 1, 700, 1500])
    x = model.sample(4, lengths=lengths, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.lengths(x), lengths)
    found = model.log_prob(x)
    found.sum().backward()
    assert bool(torch.isfinite(found).all())
    assert all(bool(torch.isfinite(core.grad).all()) for core in model.cores)
    assert len(model.sample(3).unique(dim=0)) == 3


def test_a_distribution_of_strings_of_unequal_length() -> None:
    law = open_machine("real").distribution()
    drawn = law.sample((50,))
    assert bool(law.support.check(drawn).all())
    assert bool((drawn == 2).any())
    assert bool(torch.isfinite(law.log_prob(drawn)).all())


def test_a_negative_number_of_samples_and_arrays_of_others_are_refused_in_plain_words() -> None:
    model = BornMachine(4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="0 or more: n is -3"):
        model.sample(-3)
    with pytest.raises(DataError, match=r"it has ndarray.*torch\.as_tensor\(x\)"):
        model.log_prob(torch.zeros(2, 4, dtype=torch.int64).numpy())  # type: ignore[arg-type]
