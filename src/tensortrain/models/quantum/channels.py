"""What disturbs qubits: channels on density matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.errors import RankError

__all__ = ["Noise"]


@dataclass(frozen=True)
class Noise:
    """A channel that acts on every qubit after each step.

    Attributes:
        amplitude_damping: Probability that a qubit falls from 1 to 0.
        dephasing: Probability that its sign flips: what is off the diagonal is multiplied by ``1 - 2 p``.

    Raises:
        RankError: A probability lies outside [0, 1], or a dephasing above 1/2, which is all that there is.

    Example:
        >>> found = tensortrain.quantum.Noise.of_times(30e-9, t1=5e-6, t2=7e-6)
        >>> round(found.amplitude_damping, 5), round(found.dephasing, 5)
        (0.00598, 0.00064)
    """

    amplitude_damping: float = 0.0
    dephasing: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("amplitude_damping", 1.0), ("dephasing", 0.5)):
            value = getattr(self, name)
            if not 0.0 <= value <= most:
                raise RankError(f"noise must be a probability: {name} has {value}, expected 0 to {most}. Lower it.")

    @classmethod
    def of_times(cls, duration: float, *, t1: float, t2: float) -> Noise:
        """What a step of some seconds does to qubits with relaxation time ``t1`` and coherence time ``t2``.

        Raises:
            RankError: ``t2`` is above ``2 t1``, which no qubit has.
        """
        if not (t1 > 0 and 0 < t2 <= 2 * t1 and duration >= 0):
            raise RankError(
                f"times must be those of a qubit: t1 has {t1}, t2 {t2}, duration {duration}, expected 0 < t2 <= 2 t1. "
                "Check the units."
            )
        return cls(-math.expm1(-duration / t1), -math.expm1(-duration * (1 / t2 - 0.5 / t1)) / 2)

    def on(self, rho: Tensor) -> Tensor:
        """The channel on every qubit of density matrices ``(.., 2**n, 2**n)``."""
        n_qubits = rho.shape[-1].bit_length() - 1
        for q in range(n_qubits):
            rho = self._on_qubit(rho, q, n_qubits)
        return rho

    def _on_qubit(self, rho: Tensor, q: int, n_qubits: int) -> Tensor:
        sizes = (2**q, 2, 2 ** (n_qubits - q - 1))
        apart = rho.reshape(*rho.shape[:-2], *sizes, *sizes)
        (low, cross), (back, high) = ([apart[..., :, i, :, :, j, :] for j in (0, 1)] for i in (0, 1))  # .. a c a c
        keep = math.sqrt(1 - self.amplitude_damping) * (1 - 2 * self.dephasing)
        rows = (
            torch.stack((low + self.amplitude_damping * high, keep * cross), dim=-2),
            torch.stack((keep * back, (1 - self.amplitude_damping) * high), dim=-2),
        )
        return torch.stack(rows, dim=-5).reshape(rho.shape)
