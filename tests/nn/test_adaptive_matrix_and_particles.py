"""The rank of a noisy matrix, and particles that stand for a posterior."""

import math

import pytest
import torch

import tensortrain as tt
from tensortrain.errors import NonFiniteError, RankError, ShapeError
from tensortrain.nn.adaptive.evbmf import _cutoff, _energy, _noise_variance
from tensortrain.nn.adaptive.svgd import _direction


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (25, 200), (50, 50)])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_planted_rank_is_found_at_any_scale(shape: tuple[int, int], rank: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    m, n = shape
    planted = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    noisy = planted + 0.3 * torch.randn(m, n, generator=generator)
    assert tt.nn.evbmf(scale * noisy) == rank


def test_noise_variance_is_that_of_the_least_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    matrix = (matrix + 0.5 * torch.randn(30, 50, generator=generator)).double()
    squares = torch.linalg.svdvals(matrix).square()
    found = _noise_variance(squares, 30, 50)
    assert found == pytest.approx(0.25, rel=0.1)
    grid = [found * 1.01**k for k in range(-40, 41)]
    energies = [_energy(squares / (50 * v), 0.6, _cutoff(0.6)) for v in grid]
    assert min(energies) >= _energy(squares / (50 * found), 0.6, _cutoff(0.6)) - 1e-6


def test_exact_low_rank_complex_and_zero_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator, dtype=torch.complex128) for s in ((20, 3), (3, 30)))
    assert tt.nn.evbmf(a @ b) == 3
    assert tt.nn.evbmf(torch.zeros(5, 6)) == 0
    assert tt.nn.evbmf(torch.ones(5, 6, dtype=torch.bfloat16)) == 1


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ShapeError, match="Flatten"):
        tt.nn.evbmf(torch.zeros(3, 3, 3))
    with pytest.raises(NonFiniteError):
        tt.nn.evbmf(torch.full((3, 3), math.nan))


def test_particles_take_the_shape_of_a_normal_density() -> None:
    torch.manual_seed(0)
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5])
    particles = 0.1 * torch.randn(60, 2)
    for _ in range(3000):
        particles = particles + 0.1 * _direction(particles, -(particles - mean) / std.square())
    torch.testing.assert_close(particles.mean(dim=0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(particles.std(dim=0), std, atol=0.0, rtol=0.25)


def test_a_step_lowers_the_loss_and_leaves_the_model_in_place() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(tt.nn.Linear(16, 16, rank=3), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    x = torch.randn(200, 16)
    y = x[:, :3].argmax(dim=1)
    posterior = tt.nn.SVGD(model, tt.nn.RankPrior(model), 4, lr=1e-2)

    def loss(one: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(one(x), y)

    before = [parameter.clone() for parameter in model.parameters()]
    losses = [posterior.step(loss, n_examples=200) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    log_prob = posterior.log_prob(lambda one: one(x))
    torch.testing.assert_close(log_prob.exp().sum(dim=1), torch.ones(200))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert posterior.outputs(lambda one: one(x)).std(dim=0).max() > 0


def test_a_log_uniform_scale_is_flat_in_its_logarithm() -> None:
    torch.manual_seed(0)
    layer = tt.nn.Linear(8, 8, format="low_rank", rank=2, bias=False)
    with torch.no_grad():
        for core in layer.cores:
            core.fill_(1e-12)  # the cores say nothing but how many they are
    posterior = tt.nn.SVGD(layer, tt.nn.RankPrior(layer, "log-uniform", floor=1e-2), 2)
    _, slope = posterior._slope(lambda model: model.cores[0].sum() * 0, n_examples=1)
    # Of the log density only the entries' normal densities are left, 16 to each of two scales.
    torch.testing.assert_close(slope[-2:], torch.full((2,), -8.0))


def test_one_particle_is_refused() -> None:
    layer = tt.nn.Linear(8, 8, rank=2)
    with pytest.raises(RankError, match="n_particles"):
        tt.nn.SVGD(layer, tt.nn.RankPrior(layer), 1)


def test_the_step_size_of_particles_can_fall() -> None:
    layer = tt.nn.Linear(16, 4, rank=2)
    posterior = tt.nn.SVGD(layer, tt.nn.RankPrior(layer), n_particles=2, lr=1e-2)
    assert posterior.lr == 1e-2
    posterior.lr = 0.0
    before = posterior.particles.detach().clone()
    posterior.step(lambda model: model(torch.ones(3, 16)).square().mean(), n_examples=100)
    torch.testing.assert_close(posterior.particles.detach(), before)
