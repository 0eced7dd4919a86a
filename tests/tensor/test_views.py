"""Tensors that are views: conjugates and negatives that torch has not carried out, adjoints, transposes, expansions."""

import pytest
import torch

from tensortrain.tensor import TensorTrain, TTMatrix, dot, randn, round_tt, tt_svd, unfolding_spectra
from tensortrain.testing import rel_error

BOTH_DEFAULTS = True
VIEWS = {
    "conjugate": lambda x: x.conj(),
    "adjoint": lambda x: x.mH,
    "imaginary part of a conjugate": lambda x: x.conj().imag,
    "transpose": lambda x: x.movedim(0, -1),
    "slice": lambda x: x.conj()[:, ::2, 1:],
    "expanded": lambda x: x[:, :1].conj().expand(-1, 5, -1),
    "in lower precision": lambda x: x.to(torch.complex64).conj(),
}


@pytest.fixture
def x(generator):
    return torch.randn(4, 6, 5, dtype=torch.complex128, generator=generator)


@pytest.mark.parametrize("method", ["auto", "svd", "qr", "gram", "randomized"])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_decompositions_take_views(name, method, batch_dims, x):
    view = VIEWS[name](x)
    plain = torch.empty(view.shape, dtype=view.dtype).copy_(view)
    found = tt_svd(view, method=method, eps=0.2, batch_dims=batch_dims)
    assert rel_error(found.value.to_dense(), plain) <= found.rel_error_bound <= 0.2
    exact = TensorTrain.from_dense(view, method=method, batch_dims=batch_dims)
    assert rel_error(exact.to_dense(), plain) <= (1e-5 if view.dtype == torch.complex64 else 1e-12)


def test_matrices_of_views(x):
    w = x[0]
    for view, modes in ((w.mH, ((5, 1), (2, 3))), (w.conj(), ((2, 3), (5, 1))), (w.T, ((5, 1), (3, 2)))):
        assert rel_error(TTMatrix.from_dense(view, *modes).to_dense(), view.resolve_conj()) <= 1e-13


def test_spectra_of_views(x):
    for found, exact in zip(unfolding_spectra(x.conj()), unfolding_spectra(x), strict=True):
        assert rel_error(found, exact) <= 1e-13
    assert len(unfolding_spectra(x.conj().imag, method="gram")) == 2


def test_the_gradient_passes_through_a_view(x):
    x.requires_grad_()
    tt_svd(x.conj(), eps=0).value.norm().square().backward()
    assert rel_error(x.grad, 2 * x.detach()) <= 1e-10


def test_cores_may_be_views(generator):
    t = randn((4, 5, 6), 3, dtype=torch.complex128, generator=generator)
    for cores in ([core.conj() for core in t.cores], [core.conj().imag for core in t.cores]):
        y = TensorTrain(cores)
        dense = TensorTrain([core.resolve_conj().resolve_neg().clone() for core in cores]).to_dense()
        assert y.cores[0].numpy().shape == (1, 4, 3)  # carried out: NumPy and SciPy take them
        assert rel_error(y.to_dense(), dense) <= 1e-13
        assert rel_error(dot(y, y), dense.abs().square().sum()) <= 1e-13
        for method in ("svd", "gram", "randomized"):
            assert rel_error(round_tt(y + y, method=method, eps=1e-6).value.to_dense(), 2 * dense) <= 1e-6


def test_a_parameter_stays_the_same_object():
    core = torch.nn.Parameter(torch.ones(1, 2, 1))
    assert TensorTrain([core]).cores[0] is core
