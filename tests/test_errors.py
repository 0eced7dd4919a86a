"""Errors are ours and the built-ins that a caller would catch."""

import pytest
import torch

import tensortrain as tt
from tensortrain.errors import KindError, TTError

X = torch.ones(4, 4, 4)
TRAIN = tt.ones((4, 4, 4))
OPTIONS = {
    "tt_svd": lambda: tt.tt_svd(X, method="no such"),
    "tt_svd, no string": lambda: tt.tt_svd(X, method=["svd"]),
    "from_dense": lambda: tt.TensorTrain.from_dense(X, method="no such"),
    "round_tt": lambda: tt.round_tt(TRAIN, method="no such"),
    "hadamard": lambda: tt.hadamard(TRAIN, TRAIN, method="no such"),
    "round_sum": lambda: tt.round_sum([TRAIN], method="no such"),
    "matmul": lambda: tt.matmul(tt.eye((4, 4)), tt.ones((4, 4)), method="no such"),
    "unfolding_spectra": lambda: tt.tensor.unfolding_spectra(X, method="no such"),
    "rank": lambda: tt.randn((4, 4), "no such"),
    "implementation": lambda: tt.nn.Linear(4, 4, implementation="no such"),
    "format": lambda: tt.nn.Linear(4, 4, format="no such"),
    "init": lambda: tt.nn.Linear(4, 4, init="no such"),
    "mode": lambda: tt.nn.EmbeddingBag(4, 4, mode="no such"),
    "compress": lambda: tt.nn.LSTM(4, 4, compress="no such"),
    "orthogonal": lambda: tt.nn.orthogonal(tt.nn.Linear(4, 4), "no such"),
    "a function of the cores": lambda: tt.manifold.riemannian_grad(
        lambda y: y.cores[0].square().sum(), tt.randn((4, 4), 2)
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_unknown_option_is_a_value_error(name):
    with pytest.raises(ValueError, match=r"\.") as found:
        OPTIONS[name]()
    assert isinstance(found.value, TTError)


def test_a_wrong_kind_is_a_type_error_too():
    assert issubclass(KindError, TypeError)
    with pytest.raises(TypeError):
        TRAIN + "x"
