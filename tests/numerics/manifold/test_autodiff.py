import pytest
import torch

import tensortrain as tt
from tensortrain.errors import KindError, NonFiniteError, TTError
from tensortrain.manifold import Point, hvp, project, riemannian_grad
from tensortrain.testing import rel_error


@pytest.fixture
def quartic(make):
    """A function of dense tensors with a Hessian that is neither constant nor real-linear."""
    shape, dtype = make().shape, make().dtype
    a = torch.randn(*shape, dtype=dtype)

    def f(x):
        y = x - a
        return (y.abs() ** 2).sum() + 0.3 * ((y**2).sum().abs() ** 2) + (y**3).sum().real

    return f


def on_trains(f):
    return lambda x: f(x.to_dense())


def dense_gradient(f, x):
    at = x.to_dense().requires_grad_()
    return torch.autograd.grad(f(at), at)[0]


def dense_hessian_product(f, x, z):
    at = x.to_dense().requires_grad_()
    (g,) = torch.autograd.grad(f(at), at, create_graph=True)
    slope = (g * z.conj()).sum()
    return torch.autograd.grad(slope.real if slope.is_complex() else slope, at)[0]


def test_gradient_is_the_projected_dense_gradient(make, quartic):
    x = make()
    g = riemannian_grad(on_trains(quartic), x)
    exact = project(dense_gradient(quartic, x), at=x)
    assert rel_error(g.to_dense(), exact.to_dense()) <= 1e-12
    assert g.base is x


def test_gradient_predicts_the_change(make, quartic):
    x = make()
    f = on_trains(quartic)
    g = riemannian_grad(f, x)
    v = project(torch.randn(x.shape, dtype=x.dtype), at=g.point)
    t = 1e-5
    change = (f(x + t * v.value) - f(x - t * v.value)) / (2 * t)
    assert float(change) == pytest.approx(float(g.inner(v).real), rel=1e-6)


def test_hvp_is_the_projected_dense_product(make, quartic):
    x = make()
    point = Point.of(x)
    for z in (torch.randn(x.shape, dtype=x.dtype), make(3), project(make(2), at=make())):
        inner = project(z, at=point).to_dense()
        exact = project(dense_hessian_product(quartic, x, inner), at=point)
        assert rel_error(hvp(on_trains(quartic), x, z).to_dense(), exact.to_dense()) <= 1e-12


def test_hvp_is_symmetric(make, quartic):
    x = make()
    point = Point.of(x)
    v, w = (project(torch.randn(x.shape, dtype=x.dtype), at=point) for _ in range(2))
    f = on_trains(quartic)
    left, right = v.inner(hvp(f, point, w)).real, hvp(f, point, v).inner(w).real
    assert float(left) == pytest.approx(float(right), rel=1e-11)


def test_functions_of_trains(make):
    x, y = make(), make(3)
    for f, dense in (
        (lambda t: tt.dot(t, t).real / 2, x.to_dense()),
        (lambda t: tt.dot(y, t).real, y.to_dense()),
        (lambda t: t.norm() ** 2 / 2, x.to_dense()),
        (lambda t: t.log_norm(), x.to_dense() / x.norm() ** 2),
        (lambda t: t.norm(), x.to_dense() / x.norm()),
    ):
        g = riemannian_grad(f, x)
        assert rel_error(g.to_dense(), project(dense, at=x).to_dense()) <= 1e-11


def test_rayleigh_quotient_of_a_matrix_train(generator):
    a = tt.randn_matrix((3, 4, 2), (3, 4, 2), 2, generator=generator)
    a = a + a.T
    x = tt.randn((3, 4, 2), 2, generator=generator)
    g = riemannian_grad(lambda t: tt.dot(t, a @ t) / tt.dot(t, t), x)
    dense, matrix = x.to_dense().flatten(), a.to_dense()
    quotient = dense @ matrix @ dense / (dense @ dense)
    exact = 2 * (matrix @ dense - quotient * dense) / (dense @ dense)
    assert rel_error(g.to_dense(), project(exact.reshape(3, 4, 2), at=x).to_dense()) <= 1e-12


def test_hvp_of_a_linear_function_is_zero(make):
    x, y = make(), make()
    assert float(hvp(lambda t: tt.dot(y, t).real, x, y).norm()) == 0.0


def test_gradient_takes_one_pass(generator):
    calls = []

    def f(x):
        calls.append(torch.is_grad_enabled() and x.cores[-1].requires_grad)
        return x.norm() ** 2

    x = tt.randn((3, 4, 5), 2, generator=generator)
    riemannian_grad(f, x, check=False)
    assert calls == [True]
    calls.clear()
    riemannian_grad(f, x)
    assert calls == [False, False, True]


def test_nothing_depends_on_the_gauge(make, quartic, regauge):
    x, z = make(), make(2)
    f = on_trains(quartic)
    g, h = riemannian_grad(f, x), hvp(f, x, z)
    for other in (x.orthogonalize(0), regauge(x)):
        assert rel_error(riemannian_grad(f, other).to_dense(), g.to_dense()) <= 1e-10
        assert rel_error(hvp(f, other, z).to_dense(), h.to_dense()) <= 1e-10


CORE_FUNCTIONS = {
    "sum of squares": lambda x: sum((core.abs() ** 2).sum() for core in x.cores),
    "one core": lambda x: x.cores[0].abs().sum(),
    "ranks": lambda x: x.norm() ** 2 * sum(x.ranks),
    "core penalty": lambda x: x.norm() ** 2 + 1e-6 * sum((core.abs() ** 2).sum() for core in x.cores),
    "random": lambda x: x.norm() ** 2 * torch.rand(()),
}


@pytest.mark.parametrize("name", CORE_FUNCTIONS)
def test_functions_of_the_cores_are_refused(name, dtype, generator):
    x = tt.randn((3, 4, 5), 2, generator=generator, dtype=dtype)
    a = tt.randn_matrix((3, 4), (2, 2), 3, generator=generator, dtype=dtype)
    for at in (x, x.orthogonalize(0), x.orthogonalize(2), a):
        with pytest.raises(TTError, match="not on its cores"):
            riemannian_grad(CORE_FUNCTIONS[name], at)
        with pytest.raises(KindError, match="not on its cores"):
            hvp(CORE_FUNCTIONS[name], at, at)


def test_functions_of_the_tensor_pass_at_a_minimum(make):
    x = make()
    target, dense = make(), x.to_dense()
    for f in (
        lambda t: (t.to_dense() - dense).abs().square().sum(),
        lambda t: (t - x).norm() ** 2,
        lambda t: tt.dot(t - target, t - target).real,
        lambda t: 0 * t.norm(),
    ):
        riemannian_grad(f, x)


def test_functions_defined_close_by_only_pass(generator):
    x = tt.ones((3, 4, 5)) + 1e-4 * tt.randn((3, 4, 5), 1, generator=generator)
    g = riemannian_grad(lambda t: t.to_dense().log().sum(), x.round(max_rank=2, eps=1e-12))
    assert rel_error(g.to_dense(), project(1 / x.to_dense(), at=x).to_dense()) <= 1e-8


def test_single_precision(generator):
    x = tt.randn((3, 4, 5), 2, generator=generator)
    a = torch.randn(3, 4, 5)

    def f(t):
        return (t.to_dense() - a.to(t.dtype)).square().sum()

    g = riemannian_grad(f, x.to(torch.float32))
    assert rel_error(g.to_dense(), riemannian_grad(f, x).to_dense()) <= 1e-5


def test_bad_functions(generator):
    x = tt.randn((3, 4, 5), 2, generator=generator, dtype=torch.complex128)
    for f, message in (
        (lambda t: t.to_dense(), "complex128 of shape"),
        (lambda t: tt.dot(t, t), "take .real"),
        (lambda t: 1.0, "f\\(x\\) has float"),
        (lambda t: t.detach().norm(), "must be differentiable"),
        (lambda t: t.norm().detach(), "must be differentiable"),
    ):
        with pytest.raises(KindError, match=message):
            riemannian_grad(f, x)
    with pytest.raises(NonFiniteError, match="f\\(x\\) has nan"):
        riemannian_grad(lambda t: t.norm() * float("nan"), x)
