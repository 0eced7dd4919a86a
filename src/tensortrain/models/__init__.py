"""Tensor networks as machine-learning models. The example networks lie in ``tensortrain.networks``."""

from __future__ import annotations

import warnings
from typing import Any

from tensortrain import networks
from tensortrain.models.born import BornMachine
from tensortrain.models.classifier import MPSClassifier
from tensortrain.models.nonlinear import NonlinearTT

__all__ = ["BornMachine", "MPSClassifier", "NonlinearTT"]


def __getattr__(name: str) -> Any:
    """The example networks under their old names, for one more version."""
    if name not in networks.__all__:
        raise AttributeError(f"tensortrain.models has no {name!r}.")
    warnings.warn(
        f"tensortrain.models.{name} has moved to tensortrain.networks.{name}.", DeprecationWarning, stacklevel=2
    )
    return getattr(networks, name)
