"""What the cores of a Born machine say of a string: four kinds of laws on strings, each with its logarithms.

================  ==========================================  ==============================
kind              parameters                                  probability of a string
================  ==========================================  ==============================
``"real"``        ``(r, n, s)``                               ``psi^2``
``"complex"``     ``(r, n, s)``, complex                      ``|psi|^2``
``"positive"``    ``(r, n, s)``, squared to cores             ``psi``: a hidden Markov model
``"purified"``    ``(r, n, p, s)``                            sum of ``psi^2`` over the p's
================  ==========================================  ==============================

All of them up to a factor, which is summed up exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.environments import Environments, SquaredData
from tensortrain.cores.halves import log_abs, log_square_norm, values_of_data
from tensortrain.cores.sampling import sample
from tensortrain.models.lengths import Allowed

__all__ = ["LAWS", "Law"]


class Law:
    """A law of amplitudes: the probability of a string is the squared modulus of an entry."""

    law = "born"
    takes_sweeps = True  # two sites at a time, by singular values
    n_axes = 3

    def dtype(self, real: torch.dtype) -> torch.dtype:
        """Of the parameters."""
        return real

    def cores(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The chain ``(r, m, s)`` that the parameters stand for."""
        return list(parameters)

    def parameters(self, cores: Sequence[Tensor], n_values: int) -> list[Tensor]:
        """Parameters that stand for a chain."""
        return list(cores)

    def log_weight(self, cores: Sequence[Tensor], x: Tensor) -> Tensor:
        """``ln`` of the probabilities of strings ``(b, d)`` without the factor that all share."""
        return 2 * log_abs(*values_of_data(cores, x))

    def log_sum(self, cores: Sequence[Tensor], x: Tensor, n_values: int, lengths: Tensor | None = None) -> Tensor:
        """The same for strings with sites that are summed out, -1; of known lengths, if these are given."""
        rows = SquaredData(_allowed(cores, x, n_values, lengths))
        value, exponent = Environments(rows, cores).left(len(cores))
        found = value.flatten()
        return log_abs(found.real if found.is_complex() else found, exponent)

    def log_total(self, cores: Sequence[Tensor]) -> Tensor:
        """``ln`` of the factor."""
        return log_square_norm(cores)

    def sample(
        self, cores: Sequence[Tensor], n: int, given: Tensor | None, n_values: int, generator: torch.Generator | None
    ) -> Tensor:
        """Strings ``(n, d)``."""
        return sample(cores, n, law=self.law, given=given, generator=generator)


class _Complex(Law):
    def dtype(self, real: torch.dtype) -> torch.dtype:
        return torch.complex128 if real == torch.float64 else torch.complex64

    def log_total(self, cores: Sequence[Tensor]) -> Tensor:
        found = log_square_norm(cores)
        return found.real if found.is_complex() else found


class _Positive(Law):
    law = "density"
    takes_sweeps = False

    def cores(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [parameter.square() for parameter in parameters]

    def parameters(self, cores: Sequence[Tensor], n_values: int) -> list[Tensor]:
        return [core.sqrt() for core in cores]

    def log_weight(self, cores: Sequence[Tensor], x: Tensor) -> Tensor:
        return log_abs(*values_of_data(cores, x))

    def log_sum(self, cores: Sequence[Tensor], x: Tensor, n_values: int, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.log_weight(cores, x)
        return log_abs(*values_of_data(cores, list(_allowed(cores, x, n_values, lengths))))

    def log_total(self, cores: Sequence[Tensor]) -> Tensor:
        every = torch.full((1, len(cores)), -1, device=cores[0].device)
        return self.log_weight(cores, every)[0]


class _Purified(Law):
    takes_sweeps = False
    n_axes = 4

    def cores(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [parameter.flatten(1, 2) for parameter in parameters]

    def parameters(self, cores: Sequence[Tensor], n_values: int) -> list[Tensor]:
        return [core.unflatten(1, (n_values, -1)) for core in cores]

    def log_weight(self, cores: Sequence[Tensor], x: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(
        self, cores: Sequence[Tensor], n: int, given: Tensor | None, n_values: int, generator: torch.Generator | None
    ) -> Tensor:
        halves = [half for core in cores for half in _apart(core.unflatten(1, (n_values, -1)))]
        condition = None
        if given is not None:
            condition = torch.stack((given, torch.full_like(given, -1)), dim=-1).flatten(-2)
        return sample(halves, n, law=self.law, given=condition, generator=generator)[:, ::2]


def _allowed(cores: Sequence[Tensor], x: Tensor, n_values: int, lengths: Tensor | None) -> Allowed:
    """What may stand at every site, for all p of a value."""
    return Allowed(x, n_values, cores[0].shape[1] // n_values, cores[0].dtype, lengths)


def _apart(core: Tensor) -> tuple[Tensor, Tensor]:
    """``(r, n, p, s)`` as two cores, of the value and of what is summed out, exactly: their bond is ``r n``."""
    r, n = core.shape[:2]
    first = torch.eye(r * n, dtype=core.dtype, device=core.device).unflatten(0, (r, n))
    return first, core.flatten(0, 1)


LAWS: dict[str, Law] = {"real": Law(), "complex": _Complex(), "positive": _Positive(), "purified": _Purified()}
