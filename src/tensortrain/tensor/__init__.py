"""Tensor trains: the two types, exact algebra, decomposition and rounding."""

from tensortrain.cores.ranks import max_ranks, resolve_ranks
from tensortrain.cores.tolerance import default_eps
from tensortrain.tensor.algebra import cat, diag, dot, kron, pad, stack
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.creation import eye, ones, randn, randn_matrix, zeros
from tensortrain.tensor.decompose import tt_svd, unfolding_spectra
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.products import hadamard, matmul, round_sum
from tensortrain.tensor.rounding import round_tt
from tensortrain.tensor.train import TensorTrain

__all__ = [
    "Approximation",
    "TTMatrix",
    "TensorTrain",
    "cat",
    "default_eps",
    "diag",
    "dot",
    "eye",
    "hadamard",
    "kron",
    "matmul",
    "max_ranks",
    "ones",
    "pad",
    "randn",
    "randn_matrix",
    "resolve_ranks",
    "round_sum",
    "round_tt",
    "stack",
    "tt_svd",
    "unfolding_spectra",
    "zeros",
]
