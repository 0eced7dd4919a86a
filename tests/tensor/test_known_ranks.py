"""Ranks, errors and integrals that are known beforehand, by theory or to many digits."""

import cmath
import itertools
import math

import numpy as np
import pytest
import torch

from tensortrain.tensor import (
    TensorTrain,
    TTMatrix,
    diag,
    dot,
    eye,
    max_ranks,
    ones,
    round_tt,
    tt_svd,
)
from tensortrain.testing import rel_error

METHODS = ("svd", "qr", "auto")
methods = pytest.mark.parametrize("method", METHODS)


def decomposed(x, eps, method):
    """The train of a dense tensor, its promise checked."""
    found = tt_svd(x, eps=eps, method=method)
    assert rel_error(found.value.to_dense(), x) <= found.rel_error_bound <= eps
    return found.value


def on_grid(f, *axes):
    return f(*torch.meshgrid(*axes, indexing="ij"))


def inner_ranks(x):
    return x.ranks[1:-1]


# -- Hilbert tensors ----------------------------------------------------------------------------------

EPS = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)


@methods
@pytest.mark.parametrize(
    "d, n, largest",
    [(3, 20, (3, 6, 7, 9, 11)), (4, 12, (3, 5, 7, 9, 10)), (5, 8, (3, 5, 7, 8, 10)), (6, 6, (3, 5, 7, 8, 10))],
)
def test_hilbert(d, n, largest, method):
    index = torch.arange(float(n))
    x = on_grid(lambda *i: 1 / (sum(i) + 1), *[index] * d)  # i counts from 0, so this is 1 / (i_1 + .. + i_d - d + 1)
    assert tuple(max(decomposed(x, eps, method).ranks) for eps in EPS) == largest


# -- analytic functions on grids ------------------------------------------------------------------------


def rastrigin(*x):
    return sum(10 + t**2 - 10 * torch.cos(2 * math.pi * t) for t in x)


def rosenbrock(*x):
    return sum(100 * (b - a**2) ** 2 + (1 - a) ** 2 for a, b in itertools.pairwise(x))


def griewank(*x):
    return 1 + sum(t**2 for t in x) / 4000 - math.prod(torch.cos(t / math.sqrt(k + 1)) for k, t in enumerate(x))


def ackley(*x):
    d = len(x)
    return (
        -20 * torch.exp(-0.2 * torch.sqrt(sum(t**2 for t in x) / d))
        - torch.exp(sum(torch.cos(2 * math.pi * t) for t in x) / d)
        + 20
        + math.e
    )


def ishigami(x, y, z):
    return torch.sin(x) + 7 * torch.sin(y) ** 2 + 0.1 * z**4 * torch.sin(x)


WEIGHTS, PLACES = (1.5, 0.8, 2.1, 0.4, 1.1), (0.3, 0.6, 0.45, 0.7, 0.2)


def weighted(x):
    return sum(c * t for c, t in zip(WEIGHTS, x, strict=True))


def terms(x):
    return zip(WEIGHTS, PLACES, x, strict=True)


GENZ = {
    "oscillatory": (lambda *x: torch.cos(2 * math.pi * PLACES[0] + weighted(x)), 2),
    "product peak": (lambda *x: math.prod(1 / (c**-2 + (t - w) ** 2) for c, w, t in terms(x)), 1),
    "Gaussian": (lambda *x: torch.exp(-sum((c * (t - w)) ** 2 for c, w, t in terms(x))), 1),
    "continuous": (lambda *x: torch.exp(-sum(c * (t - w).abs() for c, w, t in terms(x))), 1),
    "discontinuous": (
        lambda *x: torch.where((x[0] <= PLACES[0]) & (x[1] <= PLACES[1]), torch.exp(weighted(x)), 0.0),
        1,
    ),
}


@methods
@pytest.mark.parametrize(
    "f, low, high, d, ranks",
    [
        (rastrigin, -5.12, 5.12, 5, (2, 2, 2, 2)),
        (rosenbrock, -2.0, 2.0, 5, (3, 3, 3, 3)),
        (griewank, -60.0, 60.0, 5, (3, 3, 3, 3)),
        (ishigami, -math.pi, math.pi, 3, (2, 2)),
        (lambda *x: torch.sin(sum(x)), 0.0, 1.0, 5, (2, 2, 2, 2)),
    ],
    ids=["Rastrigin", "Rosenbrock", "Griewank", "Ishigami", "sine of the sum"],
)
def test_exact_ranks_of_functions(f, low, high, d, ranks, method):
    x = on_grid(f, *[torch.linspace(low, high, 9)] * d)
    assert inner_ranks(decomposed(x, 1e-10, method)) == ranks


@methods
def test_ackley(method):
    x = on_grid(ackley, *[torch.linspace(-2, 2, 12)] * 5)
    assert tuple(max(decomposed(x, eps, method).ranks) for eps in (1e-2, 1e-4, 1e-6, 1e-8)) == (3, 5, 7, 9)


@methods
@pytest.mark.parametrize("name", GENZ)
def test_genz_family(name, method):
    f, rank = GENZ[name]
    x = on_grid(f, *[torch.linspace(0, 1, 10)] * 5)
    assert inner_ranks(decomposed(x, 1e-10, method)) == (rank,) * 4


@methods
def test_genz_corner_peak(method):
    # Its rank depends on the weights: 8 for 0.5 each on grids of 8 to 16 points, and 10 for 1 each.
    x = on_grid(lambda *x: (1 + 0.5 * sum(x)) ** -6.0, *[torch.linspace(0, 1, 10)] * 5)
    assert max(decomposed(x, 1e-10, method).ranks) == 8


# -- QTT of functions -----------------------------------------------------------------------------------

L = 12
QTT = {
    "exp": (lambda x: torch.exp(-1.7 * x), 1),
    "constant": (torch.ones_like, 1),
    "sine": (lambda x: torch.sin(5 * x + 0.3), 2),
    "cosine": (lambda x: torch.cos(31 * x), 2),
    "step": (lambda x: (x >= 0.37).double(), 2),
    **{f"degree {p}": (lambda x, p=p: sum((k + 1) * x**k for k in range(p + 1)), p + 1) for p in (1, 2, 3, 5)},
    "x sin": (lambda x: x * torch.sin(7 * x), 4),
    "kink": (lambda x: (x - 0.37).abs(), 3),
}
QTT_AT_EPS = {
    "sqrt": (14, torch.sqrt, 6, 8),
    "1 / (1 + x)": (L, lambda x: 1 / (1 + x), 4, 6),
    "1 / (0.01 + x)": (L, lambda x: 1 / (0.01 + x), 6, 9),
    "bump": (L, lambda x: torch.exp(-100 * (x - 0.5) ** 2), 8, 11),
    "chirp": (14, lambda x: torch.sin(60 * x**2), 11, 15),
}


def samples(f, n_bits):
    return f(torch.arange(2.0**n_bits) / 2**n_bits).reshape((2,) * n_bits)


@methods
@pytest.mark.parametrize("name", QTT)
def test_qtt_ranks_of_functions(name, method):
    f, rank = QTT[name]
    assert max(decomposed(samples(f, L), 1e-12, method).ranks) == rank


@methods
@pytest.mark.parametrize("name", QTT_AT_EPS)
def test_qtt_ranks_at_a_tolerance(name, method):
    n_bits, f, coarse, fine = QTT_AT_EPS[name]
    x = samples(f, n_bits)
    assert [max(decomposed(x, eps, method).ranks) for eps in (1e-8, 1e-12)] == [coarse, fine]


# Explicit cores, first bit slowest: x = sum_k bit_k 2^-k.


def halves(n_bits):
    return [2.0**-k for k in range(1, n_bits + 1)]


def exp_cores(a, n_bits):
    return [torch.tensor([1.0, math.exp(a * h)]).reshape(1, 2, 1) for h in halves(n_bits)]


def sine_cores(a, b, n_bits):
    """Rotations: (sin, cos) of the sum of the angles so far."""
    cores = [torch.stack([rotation(a * h * bit) for bit in (0, 1)], dim=1) for h in halves(n_bits)]
    cores[0] = torch.tensordot(torch.tensor([[math.sin(b), math.cos(b)]]), cores[0], dims=1)
    cores[-1] = cores[-1][:, :, :1]
    return cores


def rotation(t):
    return torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])


def polynomial_cores(coefficients, n_bits):
    """Binomial theorem: the powers of a sum from the powers of its parts, a triangular matrix for each bit."""
    p = len(coefficients)

    def shift(t):
        return torch.tensor([[math.comb(j, i) * t ** (j - i) if i <= j else 0.0 for j in range(p)] for i in range(p)])

    cores = [torch.stack([shift(h * bit) for bit in (0, 1)], dim=1) for h in halves(n_bits)]
    cores[0] = cores[0][:1]
    cores[-1] = cores[-1] @ torch.tensor(coefficients).reshape(-1, 1)
    return cores


@pytest.mark.parametrize(
    "cores, f, rank",
    [
        (lambda: exp_cores(-1.7, 10), lambda x: torch.exp(-1.7 * x), 1),
        (lambda: sine_cores(5.0, 0.3, 10), lambda x: torch.sin(5 * x + 0.3), 2),
        (lambda: polynomial_cores((1.0, -2.0, 0.5, 3.0), 10), lambda x: 1 - 2 * x + 0.5 * x**2 + 3 * x**3, 4),
    ],
    ids=["exp", "sine", "cubic"],
)
def test_explicit_qtt_cores(cores, f, rank):
    x = TensorTrain(cores())
    assert max(x.ranks) == rank
    assert rel_error(x.to_dense(), samples(f, 10)) <= 1e-13
    assert x.round(eps=1e-12).ranks == tuple(map(min, x.ranks, max_ranks(x.shape)))


# -- QTT matrices ---------------------------------------------------------------------------------------


def shift_matrix(n_bits, cyclic=False):
    """``(S x)[i] = x[i - 1]``: adding one, the carry running from the last bit to the first."""
    keep, carry_in = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # [out bit, in bit]
    # states: left index is the carry handed on, right index the carry received
    core = torch.zeros(2, 2, 2, 2)
    core[0, :, :, 0] = keep  # nothing received, nothing handed on
    core[0, :, :, 1] = carry_in.T  # a carry turns bit 0 into 1
    core[1, :, :, 1] = carry_in  # and bit 1 into 0, handing it on
    first = core[:1] + core[1:] if cyclic else core[:1]
    return TTMatrix([first, *[core] * (n_bits - 2), core[..., 1:]])


def laplacian(n_bits):
    s = shift_matrix(n_bits)
    return (2 * eye((2,) * n_bits) - s - s.T).round(eps=1e-13)


def tridiagonal(n):
    return 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)


def mixed(n):
    a = tridiagonal(n)
    a[-1, -1] = 1.0
    return a


def periodic(n):
    a = tridiagonal(n)
    a[0, -1] = a[-1, 0] = -1.0
    return a


def qtt_matrix(a, method, eps=1e-12):
    bits = (2,) * (a.shape[0].bit_length() - 1)
    found = tt_svd(a, eps=eps, method=method, out_modes=bits, in_modes=bits)
    assert rel_error(found.value.to_dense(), a) <= found.rel_error_bound <= eps
    return found.value


@methods
@pytest.mark.parametrize(
    "build, rank",
    [
        (tridiagonal, 3),
        (mixed, 4),
        (lambda n: torch.linalg.inv(mixed(n)), 4),
        (periodic, 3),
        (lambda n: torch.diag(torch.ones(n - 1), -1), 2),
        (lambda n: torch.roll(torch.eye(n), 1, 0), 2),
        (torch.eye, 1),
        (lambda n: torch.ones(n, n), 1),
    ],
    ids=[
        "Dirichlet",
        "Dirichlet-Neumann",
        "inverse Dirichlet-Neumann",
        "periodic",
        "shift",
        "cyclic shift",
        "identity",
        "ones",
    ],
)
def test_qtt_ranks_of_matrices(build, rank, method):
    found = qtt_matrix(build(256), method)
    assert max(found.ranks) == rank
    if build is periodic:
        assert found.ranks[1] == 2


@methods
def test_inverse_laplacian(method):
    assert max(qtt_matrix(torch.linalg.inv(tridiagonal(256)), method, eps=1e-10).ranks) <= 5


@methods
def test_diagonal_has_the_ranks_of_its_entries(method):
    x = samples(lambda x: x * torch.sin(7 * x), 8)
    assert qtt_matrix(torch.diag(x.flatten()), method).ranks == decomposed(x, 1e-12, method).ranks
    train = TensorTrain(sine_cores(5.0, 0.3, 10))
    assert diag(train).ranks == train.ranks


@methods
def test_fourier_matrix(method):
    n_bits, n = 6, 64
    k = torch.arange(n)
    fourier = torch.exp(-2j * math.pi * (k[:, None] * k) / n) / 8
    reverse = torch.arange(n).reshape((2,) * n_bits).permute(*reversed(range(n_bits))).flatten()
    ranks = [max(qtt_matrix(fourier[:, reverse], method, eps).ranks) for eps in (1e-3, 1e-6, 1e-9, 1e-12)]
    assert ranks == [5, 7, 8, 8]
    assert max(qtt_matrix(fourier, method, 1e-9).ranks) == 64


def test_explicit_qtt_matrices():
    for n_bits in (5, 10):
        n = 2**n_bits
        assert torch.equal(shift_matrix(n_bits).to_dense(), torch.diag(torch.ones(n - 1), -1))
        assert torch.equal(shift_matrix(n_bits, cyclic=True).to_dense(), torch.roll(torch.eye(n), 1, 0))
        found = laplacian(n_bits)
        assert max(found.ranks) == 3
        assert rel_error(found.to_dense(), tridiagonal(n)) <= 1e-13


def test_laplacian_in_many_dimensions():
    """``sum_k I .. D .. I`` has rank 2."""
    d, n = 4, 3
    one, two = torch.eye(n), tridiagonal(n)
    none = torch.zeros(n, n)

    def core(rows):
        return torch.stack([torch.stack(row, dim=-1) for row in rows])

    first, middle, last = [[two, one]], [[one, none], [two, one]], [[one], [two]]
    found = TTMatrix([core(first), *[core(middle)] * (d - 2), core(last)])
    exact = sum(kron_all([two if at == k else one for at in range(d)]) for k in range(d))
    assert max(found.ranks) == 2
    assert torch.equal(found.to_dense(), exact)
    assert found.round(eps=1e-12).ranks == found.ranks


def kron_all(factors):
    product = factors[0]
    for factor in factors[1:]:
        product = torch.kron(product, factor)
    return product


@pytest.mark.parametrize("n_bits, size", [(10, 2.922612986), (20, 93.47802772)])
def test_poisson_solution(n_bits, size):
    """``-u'' = 1``: the solution x (1 - x) / 2 at the points i / (N + 1) has QTT rank 3 and a known norm."""
    n = 2**n_bits
    h = 1 / (n + 1)
    u = TensorTrain(polynomial_cores((h * (1 - h) / 2, n * h * (1 - 2 * h) / 2, -((n * h) ** 2) / 2), n_bits))
    assert max(u.ranks) == 3
    assert float(u.norm()) == pytest.approx(size, rel=1e-9)
    residual = laplacian(n_bits) @ u - h**2 * ones(u.shape)
    assert float(residual.norm()) <= 1e-14 * float(u.norm())


@pytest.mark.parametrize("n_bits, value", [(6, 2.3355463e-3), (10, 9.3940242e-6)])
def test_smallest_eigenvalue_of_the_laplacian(n_bits, value):
    """The eigenvector is a sine, hence of rank 2."""
    n = 2**n_bits
    t = math.pi / (n + 1)
    v = TensorTrain(sine_cores(n * t, t, n_bits))
    assert max(v.ranks) == 2
    assert float(dot(v, laplacian(n_bits) @ v) / dot(v, v)) == pytest.approx(value, rel=1e-7)
    assert 4 * math.sin(t / 2) ** 2 == pytest.approx(value, rel=1e-7)


# -- integrals ------------------------------------------------------------------------------------------

SINE_OF_SUM = {3: 0.8793549306, 10: -0.6299352591, 20: -0.2347680338, 50: -0.0161915234, 100: -0.0039267953}


@pytest.mark.parametrize("d", SINE_OF_SUM)
def test_integral_of_the_sine_of_a_sum(d):
    nodes, weights = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(12))
    nodes = nodes + 0.5
    core = torch.stack([rotation(float(t)) for t in nodes], dim=1)
    first, last = torch.tensordot(torch.tensor([[0.0, 1.0]]), core, dims=1), core[:, :, :1]
    x = TensorTrain([first, *[core] * (d - 2), last])
    rule = TensorTrain([weights.reshape(1, -1, 1)] * d)
    assert float(x[(3,) * d]) == pytest.approx(math.sin(d * float(nodes[3])), abs=1e-13)
    exact = (((cmath.exp(1j) - 1) / 1j) ** d).imag
    for found in (float(dot(rule, x)), float((x * rule).sum())):
        assert found == pytest.approx(exact, rel=1e-11)
        assert found == pytest.approx(SINE_OF_SUM[d], abs=6e-11)


def test_genz_integrals():
    """Closed forms against Gauss-Legendre contracted with rank-1 and rank-2 trains."""
    nodes, weights = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(40))
    nodes = nodes + 0.5
    rule = TensorTrain([weights.reshape(1, -1, 1)] * 5)
    pairs = list(zip(WEIGHTS, PLACES, strict=True))

    def product(f):
        return float(dot(rule, TensorTrain([f(c, w).reshape(1, -1, 1) for c, w in pairs])))

    peak = product(lambda c, w: 1 / (c**-2 + (nodes - w) ** 2))
    assert peak == pytest.approx(
        math.prod(c * (math.atan(c * (1 - w)) + math.atan(c * w)) for c, w in pairs), rel=1e-12
    )
    gauss = product(lambda c, w: torch.exp(-((c * (nodes - w)) ** 2)))
    closed = math.prod(math.sqrt(math.pi) / (2 * c) * (math.erf(c * (1 - w)) + math.erf(c * w)) for c, w in pairs)
    assert gauss == pytest.approx(closed, rel=1e-12)
    cores = [torch.stack([rotation(c * float(t)) for t in nodes], dim=1) for c in WEIGHTS]
    start = 2 * math.pi * PLACES[0]
    cores[0] = torch.tensordot(torch.tensor([[math.sin(start), math.cos(start)]]), cores[0], dims=1)
    cores[-1] = cores[-1][:, :, 1:]
    closed = (cmath.exp(1j * start) * math.prod((cmath.exp(1j * c) - 1) / (1j * c) for c in WEIGHTS)).real
    assert float(dot(rule, TensorTrain(cores))) == pytest.approx(closed, rel=1e-12)


def test_ishigami_moments():
    """Mean and variance from the exact train; x^4 and the sines are resolved by 24 nodes."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))
    x = tt_svd(on_grid(ishigami, *[math.pi * nodes] * 3), eps=1e-13).value
    rule = TensorTrain([weights.reshape(1, -1, 1) / 2] * 3)
    mean = float(dot(rule, x))
    assert mean == pytest.approx(3.5, abs=1e-12)
    assert float(dot(rule, x * x)) - mean**2 == pytest.approx(13.84458794, abs=5e-9)


# -- errors ---------------------------------------------------------------------------------------------


@methods
def test_error_is_near_the_tolerance_in_random_trials(method):
    generator = torch.Generator().manual_seed(0)
    n_cut = 0
    for trial in range(100):
        shape = torch.randint(3, 7, (3 + trial % 3,), generator=generator).tolist()
        x = torch.randn(shape, generator=generator)
        for k, n in enumerate(shape):  # entries fall off along every mode, and singular values with them
            x = x * (0.6 ** torch.arange(n)).reshape(-1, *[1] * (len(shape) - 1 - k))
        eps = 10.0 ** float(-0.4 - 1.2 * torch.rand((), generator=generator))
        found = tt_svd(x, eps=eps, method=method)
        error = rel_error(found.value.to_dense(), x)
        assert error <= found.rel_error_bound <= eps
        if found.value.ranks != max_ranks(shape):
            n_cut += 1
            assert error > 0.1 * eps
    assert n_cut >= 80


@methods
def test_quasi_optimal_on_hilbert(method):
    """At equal ranks the error is that of the sheet's best approximation: rank 3 and 5, d = 4, n = 12."""
    x = on_grid(lambda *i: 1 / (sum(i) + 1), *[torch.arange(12.0)] * 4)
    for rank, error in ((3, 5.8975e-3), (5, 6.1711e-5)):
        found = tt_svd(x, max_rank=rank, method=method)
        assert rel_error(found.value.to_dense(), x) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("eps", [1e-2, 1e-6, 1e-10])
def test_rounding_is_idempotent(eps):
    x = on_grid(lambda *i: 1 / (sum(i) + 1), *[torch.arange(8.0)] * 5)
    once = tt_svd(x, eps=eps).value.round(eps=eps)
    again = round_tt(once, eps=eps)
    assert again.value.ranks == once.ranks
    assert rel_error(again.value.to_dense(), once.to_dense()) <= 1e-13
