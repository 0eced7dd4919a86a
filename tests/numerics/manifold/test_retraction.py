import math

import pytest
import torch

import tensortrain as tt
from tensortrain.errors import ConvergenceError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.manifold import armijo, project, retract, riemannian_grad
from tensortrain.testing import is_left_orthogonal, rel_error


def random_tangent(x):
    v = project(torch.randn(x.shape, dtype=x.dtype), at=x)
    return v * (x.norm() / v.norm())


def test_is_second_order(make):
    x = make()
    v = random_tangent(x)
    steps = (1e-2, 1e-3, 1e-4)
    errors = []
    for t in steps:
        exact = x.to_dense() + t * v.to_dense()
        errors.append(float((retract(x, v, t).to_dense() - exact).norm() / x.norm()))
    if x.order == 1:
        assert max(errors) <= 1e-15
        return
    assert abs(math.log10(errors[0] / errors[1]) - 2) <= 0.1
    assert abs(math.log10(errors[1] / errors[2]) - 2) <= 0.1


def test_result_is_a_canonical_train_of_the_same_ranks(make):
    x = make()
    v = random_tangent(x)
    for t in (1.0, -0.3, torch.tensor(1e-3)):
        y = retract(x, v, t)
        assert type(y) is type(x)
        assert (y.shape, y.ranks, y.dtype, y.center) == (x.shape, x.ranks, x.dtype, (0, 0))
        assert all(is_left_orthogonal(core.movedim(0, -1)) for core in y.cores[1:])


def test_error_is_quasi_optimal(make):
    x = make()
    v = random_tangent(x)
    exact = x.to_dense() + v.to_dense()
    error = float((retract(x, v).to_dense() - exact).norm())
    merged = (x + v.value)._merged()  # the cuts of the unfoldings bound every train of these ranks from below
    dense = tt.TensorTrain(merged).to_dense()
    cuts = [float(s[r:].norm()) for s, r in zip(tt.tensor.unfolding_spectra(dense), x.ranks[1:-1], strict=True)]
    assert max(cuts, default=0.0) - 1e-12 <= error <= math.hypot(*cuts) + 1e-12 * float(x.norm())


def test_matches_rounding_at_order_two(dtype, generator):
    x = tt.randn((6, 7), 3, generator=generator, dtype=dtype)
    v = random_tangent(x)
    expected = (x + v.value).round(max_rank=3)
    assert rel_error(retract(x, v).to_dense(), expected.to_dense()) <= 1e-13


def test_no_step_stays(make):
    x = make()
    assert rel_error(retract(x, random_tangent(x), 0.0).to_dense(), x.to_dense()) <= 1e-13


def test_along_the_point_it_scales(make):
    x = make()
    assert rel_error(retract(x, project(x, at=x), 2.0).to_dense(), 3 * x.to_dense()) <= 1e-13


def test_to_zero_loses_the_ranks(generator):
    x = tt.randn((3, 4, 5), 2, generator=generator)
    y = retract(x, project(x, at=x), -1.0)
    assert float(y.norm()) <= 1e-14 * float(x.norm())
    with pytest.raises(RankError):
        project(x, at=tt.TensorTrain([0 * core for core in y.cores]))


def test_does_not_depend_on_the_gauge(make, regauge):
    x = make()
    v = random_tangent(x)
    y = retract(x, v)
    for other in (x.orthogonalize(0), regauge(x)):
        assert rel_error(retract(other, v).to_dense(), y.to_dense()) <= 1e-11
        w = project(v.to_dense(), at=other)
        assert rel_error(retract(other, w).to_dense(), y.to_dense()) <= 1e-11


def test_long_trains(generator):
    x = tt.randn((2,) * 600, 2, generator=generator)
    x = tt.TensorTrain([4 * core for core in x.cores])  # its norm does not fit
    y = retract(x, project(tt.ones((2,) * 600), at=x) * 0.0)
    assert y.ranks == x.ranks
    assert float(y.log_norm()) == pytest.approx(float(x.log_norm()), rel=1e-12)


def test_bad_input(generator):
    x, y = (tt.randn((3, 4, 5), 2, generator=generator) for _ in range(2))
    v = project(y, at=x)
    with pytest.raises(ShapeError, match="starts at the base"):
        retract(y, v)
    with pytest.raises(KindError, match="tangent has TensorTrain"):
        retract(x, y)
    with pytest.raises(NonFiniteError, match="a step must be finite"):
        retract(x, v, float("nan"))


def test_armijo_finds_a_step_that_descends(generator):
    x, goal = (tt.randn((3, 4, 5), 2, generator=generator) for _ in range(2))

    def f(y):
        return (y - goal).norm() ** 2 / 2

    g = riemannian_grad(f, x)
    found = armijo(f, x, g, t=64.0)
    assert found.t < 64.0
    assert found.f == pytest.approx(float(f(found.value)))
    assert found.f <= float(f(x)) - 1e-4 * found.t * float(g.norm()) ** 2
    assert found.n_evals == 1 + round(math.log2(64.0 / found.t))
    with pytest.raises(KindError, match="must lead down"):
        armijo(f, x, g, direction=g)
    with pytest.raises(RankError, match="shrink has 2"):
        armijo(f, x, g, shrink=2.0)
    with pytest.raises(ConvergenceError, match="short enough"):
        armijo(lambda y: -f(y), x, g, max_evals=3)
