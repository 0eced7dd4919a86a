"""Tensor trains for machine learning and everything else, on PyTorch.

``tensortrain.compress(model, budget="20x", data=loader)`` makes a trained model smaller and reports on it;
``tensortrain.nn`` has layers to build with; ``TensorTrain`` and ``TTMatrix`` are the numbers behind both.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

from . import _command as _command  # first: from here on Ctrl-C on the command line is one line
from . import contract, errors, formats, manifold, models, networks, nn, tensor
from ._moved import answer_old_names
from ._version import __version__
from .compression import (
    CompressionPlan,
    CompressionResult,
    Heal,
    Pareto,
    Report,
    apply_plan_,
    compress,
    inspect,
    pareto,
    plan_compression,
    to_dense_,
)
from .compression import stages as stages
from .errors import TTError
from .io import load_pretrained, save_pretrained
from .models import quantum as quantum
from .numerics.ordering import mutual_information, order_sites
from .system.native import build as build_kernels
from .tensor import (
    Approximation,
    TensorTrain,
    TTMatrix,
    cat,
    diag,
    dot,
    eye,
    hadamard,
    kron,
    matmul,
    ones,
    pad,
    randn,
    randn_matrix,
    round_sum,
    round_tt,
    stack,
    tt_svd,
    zeros,
)
from .viz.draw import draw, plot_entropy, plot_ranks, plot_spectrum

__all__ = [
    "Approximation",
    "CompressionPlan",
    "CompressionResult",
    "Heal",
    "Pareto",
    "Report",
    "TTError",
    "TTMatrix",
    "TensorTrain",
    "__version__",
    "apply_plan_",
    "build_kernels",
    "cat",
    "compress",
    "contract",
    "diag",
    "dot",
    "draw",
    "errors",
    "eye",
    "formats",
    "hadamard",
    "inspect",
    "kron",
    "load_pretrained",
    "manifold",
    "matmul",
    "models",
    "mutual_information",
    "networks",
    "nn",
    "ones",
    "order_sites",
    "pad",
    "pareto",
    "plan_compression",
    "plot_entropy",
    "plot_ranks",
    "plot_spectrum",
    "quantum",
    "randn",
    "randn_matrix",
    "round_sum",
    "round_tt",
    "save_pretrained",
    "stack",
    "tensor",
    "to_dense_",
    "tt_svd",
    "zeros",
]

answer_old_names()


_LAZY = {"sklearn": "tensortrain.io.frameworks.sklearn"}  # modules that need another library, by their short names


def __getattr__(name: str) -> _Any:
    """Modules for users of other libraries, imported when they are asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'tensortrain' has no attribute {name!r}")
    return _import_module(_LAZY[name])
