"""Tensor networks as machine-learning models. The example networks lie in ``tensortrain.networks``."""

from __future__ import annotations

import warnings
from typing import Any

from tensortrain import networks
from tensortrain.models.arithmetic_circuit import RecurrentArithmeticCircuit
from tensortrain.models.born import BornMachine
from tensortrain.models.cells import HOTTLSTMCell, HOTTRNNCell
from tensortrain.models.classifier import MPSClassifier
from tensortrain.models.exponential import ExponentialMachine
from tensortrain.models.forecast import Forecaster
from tensortrain.models.nonlinear import NonlinearTT
from tensortrain.models.score import ScoreNetwork
from tensortrain.models.separation import min_cut_rank, separation_rank

__all__ = [
    "BornMachine",
    "ExponentialMachine",
    "Forecaster",
    "HOTTLSTMCell",
    "HOTTRNNCell",
    "MPSClassifier",
    "NonlinearTT",
    "RecurrentArithmeticCircuit",
    "ScoreNetwork",
    "min_cut_rank",
    "separation_rank",
]


def __getattr__(name: str) -> Any:
    """The example networks under their old names, for one more version."""
    if name not in networks.__all__:
        raise AttributeError(f"tensortrain.models has no {name!r}.")
    warnings.warn(
        f"tensortrain.models.{name} has moved to tensortrain.networks.{name}.", DeprecationWarning, stacklevel=2
    )
    return getattr(networks, name)
