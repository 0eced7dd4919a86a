"""Samples and probabilities of both laws against the enumerated law."""

import math
from itertools import product

import pytest
import torch

from tensortrain.cores.algebra import contract
from tensortrain.cores.sampling import log_prob, sample
from tensortrain.errors import DataError, KindError, ModeIndexError
from tensortrain.system.native import python_only

BOTH_DEFAULTS = True
MODES = (2, 3, 2, 2)
LAWS = pytest.mark.parametrize("law", ["density", "born"])
KINDS = pytest.mark.parametrize(
    ("law", "dtype"), [("density", torch.float64), ("born", torch.float64), ("born", torch.complex128)], ids=str
)


def chain(law, dtype, generator, modes=MODES, rank=3):
    ranks = [1, *[rank] * (len(modes) - 1), 1]
    draw = torch.rand if law == "density" else torch.randn
    sizes = zip(ranks, modes, ranks[1:], strict=False)
    return [draw(size, dtype=dtype, generator=generator) for size in sizes]


def enumerated(cores, law):
    entries = contract(cores)
    p = entries.abs().square() if law == "born" else entries
    return p / p.sum()


def conditioned(p, given):
    """The law of all sites where some have values."""
    kept = torch.zeros_like(p)
    at = tuple(slice(None) if v < 0 else v for v in given)
    kept[at] = p[at]
    return kept / kept.sum()


def is_drawn_from(x, p):
    """Total variation within three standard deviations of what chance makes of it, and nothing impossible."""
    n = len(x)
    counts = torch.zeros_like(p)
    counts.index_put_(tuple(x.T), torch.ones(n, dtype=p.dtype), accumulate=True)
    assert float(counts[p == 0].sum()) == 0
    spread = (p * (1 - p) / n).sqrt()
    expected = 0.5 * spread.sum() * (2 / torch.pi) ** 0.5
    assert float(0.5 * (counts / n - p).abs().sum()) <= float(expected + 1.5 * (p * (1 - p) / n).sum().sqrt()) + 1e-12


@KINDS
def test_samples_follow_the_law(law, dtype, generator):
    cores = chain(law, dtype, generator)
    x = sample(cores, 20_000, law=law, generator=generator)
    assert x.dtype == torch.int64
    assert x.shape == (20_000, 4)
    is_drawn_from(x, enumerated(cores, law))


@KINDS
def test_every_condition_is_kept_exactly(law, dtype, generator):
    cores = chain(law, dtype, generator)
    p = enumerated(cores, law)
    for mask in product([False, True], repeat=4):
        given = torch.tensor([n - 1 if on else -1 for n, on in zip(MODES, mask, strict=True)])
        x = sample(cores, 4000, law=law, given=given, generator=generator)
        assert bool((x[:, list(mask)] == given[list(mask)]).all())
        is_drawn_from(x, conditioned(p, given.tolist()))


@KINDS
def test_every_sample_may_have_its_own_condition(law, dtype, generator):
    cores = chain(law, dtype, generator)
    p = enumerated(cores, law)
    conditions = torch.tensor([[-1, 2, -1, -1], [1, -1, -1, 0], [-1, -1, -1, -1]])
    x = sample(cores, 12_000, law=law, given=conditions.repeat_interleave(4000, 0), generator=generator)
    for part, given in zip(x.split(4000), conditions, strict=True):
        is_drawn_from(part, conditioned(p, given.tolist()))


@KINDS
def test_probabilities_and_marginals(law, dtype, generator):
    cores = chain(law, dtype, generator)
    p = enumerated(cores, law)
    every = torch.tensor(list(product(*map(range, MODES))))
    found = log_prob(cores, every, law=law)
    assert not found.is_complex()
    assert float((found.exp() - p.flatten()).abs().max()) < 1e-13
    some = torch.tensor(list(product(*(range(-1, n) for n in MODES))))
    expected = [p[tuple(slice(None) if v < 0 else v for v in row)].sum() for row in some.tolist()]
    assert float((log_prob(cores, some, law=law).exp() - torch.stack(expected)).abs().max()) < 1e-13
    assert abs(float(log_prob(cores, torch.full((1, 4), -1), law=law))) < 1e-13


@KINDS
def test_log_probabilities_have_gradients(law, dtype, generator):
    cores = [core.requires_grad_() for core in chain(law, dtype, generator)]
    for x in (torch.tensor([[0, 2, 1, 1], [1, 0, 0, 1]]), torch.tensor([[0, -1, 1, 1], [-1, 0, 0, -1]])):
        assert torch.autograd.gradcheck(lambda *cores, x=x: log_prob(cores, x, law=law), cores)


@LAWS
def test_one_generator_one_sequence(law, generator):
    cores = chain(law, torch.float64, generator)
    first, again = (sample(cores, 50, law=law, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


@LAWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_thousand_sites_stay_in_range(law, dtype, generator):
    cores = [1e3 * core for core in chain(law, dtype, generator, [2] * 1000, 2)]
    x = sample(cores, 5, law=law, generator=generator)
    found = log_prob(cores, x, law=law)
    assert found.dtype == dtype
    assert bool(torch.isfinite(found).all())
    assert bool((found < -10).all())


@LAWS
def test_what_has_no_mass_is_never_drawn(law):
    core = torch.zeros(1, 3, 1, dtype=torch.float64)
    core[0, 1, 0] = 1.0
    cores = [core, core]
    assert sample(cores, 100, law=law).unique().tolist() == [1]
    found = log_prob(cores, torch.tensor([[1, 1], [0, 1], [2, 2]]), law=law)
    assert found.tolist() == [0.0, -torch.inf, -torch.inf]
    with pytest.raises(DataError, match="a condition must have a probability"):
        sample(cores, 1, law=law, given=torch.tensor([-1, 2]))


@LAWS
def test_a_condition_that_only_rounding_allows_has_no_probability(law):
    """Two terms that cancel: 0.1 + 0.2 - 0.3 is not 0 in floating point."""
    first = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]], dtype=torch.float64)
    second = torch.tensor([[0.1, 1.0], [0.2, 1.0], [-0.3, 1.0]], dtype=torch.float64)[..., None]
    assert float(contract([first, second])[0, 0]) != 0.0
    with pytest.raises(DataError, match="a condition must have a probability"):
        sample([first, second], 1, law=law, given=torch.tensor([0, 0]))


def test_a_negative_density_is_refused(generator):
    cores = [torch.tensor([[[1.0], [-0.1]]], dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)]
    with pytest.raises(DataError, match="a density must not be negative"):
        sample(cores, 1)
    with pytest.raises(DataError, match="a density must not be negative"):
        log_prob(cores, torch.tensor([[1, 0]]))
    cores[0][0, 1, 0] = -1e-17  # of rounding
    assert sample(cores, 100, generator=generator)[:, 0].unique().tolist() == [0]
    assert log_prob(cores, torch.tensor([[1, 0]])).tolist() == [-torch.inf]


def test_what_is_asked_must_make_sense(generator):
    cores = chain("density", torch.float64, generator)
    with pytest.raises(KindError, match="a law must be known"):
        sample(cores, 1, law="gauss")
    for given in (torch.tensor([0, 0]), torch.tensor([0, 3, 0, 0]), torch.tensor([-2, 0, 0, 0])):
        with pytest.raises(ModeIndexError, match="a condition must give a value"):
            sample(cores, 1, given=given)


@LAWS
def test_a_sample_without_mass_leaves_the_gradients_of_the_others(law):
    first = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64, requires_grad=True)
    last = torch.tensor([[[3.0], [1.0]]], dtype=torch.float64, requires_grad=True)
    found = log_prob([first, last], torch.tensor([[0, 0], [1, 0]]), law=law)
    assert found[0].item() == -math.inf
    alone = log_prob([first, last], torch.tensor([[1, 0]]), law=law)
    torch.testing.assert_close(
        torch.autograd.grad(found.clamp_min(-1e3).sum(), (first, last)), torch.autograd.grad(alone.sum(), (first, last))
    )


def test_kernels_and_steps_draw_the_same() -> None:
    for dtype in (torch.float32, torch.float64):
        cores = [torch.randn(r, 3, s, dtype=dtype) for r, s in ((1, 4), (4, 5), (5, 4), (4, 1))]
        for given in (None, torch.tensor([-1, 2, -1, 0])):
            drawn = [
                sample(cores, 500, law="born", given=given, generator=torch.Generator().manual_seed(0))
                for _ in range(2)
            ]
            with python_only():
                steps = sample(cores, 500, law="born", given=given, generator=torch.Generator().manual_seed(0))
            assert torch.equal(*drawn)
            assert (drawn[0] != steps).any(1).float().mean() <= 0.01  # a number may lie within rounding of a border
