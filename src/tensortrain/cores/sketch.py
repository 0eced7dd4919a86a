"""Trains that are known by what they do to a carry, and their random sketches.

The product of two trains has the product of their ranks; all that sketching and zip-up need of it is how a matrix
passes through one of its cores, and that takes the two factors one after the other. So the product is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tensortrain.cores.canonical import orthogonalize_cores
from tensortrain.cores.linalg import orthonormal
from tensortrain.cores.scaling import split_pow2, spread_pow2
from tensortrain.cores.unfold import absorb_left, absorb_right, as_left

__all__ = ["OVERSAMPLING", "Hadamard", "Matmul", "Plain", "Sum", "Virtual", "sketched_cores"]

OVERSAMPLING = 10  # columns beyond the rank: the expected error is then within 1.5 of the best, see Halko et al.


class Virtual(Protocol):
    """A list of cores ``(.., R_k, n_k, R_{k+1})`` that need not exist."""

    @property
    def modes(self) -> tuple[int, ...]: ...

    @property
    def ranks(self) -> tuple[int, ...]: ...

    @property
    def like(self) -> Tensor:
        """A tensor ``(.., r, n, s)`` with the batch axes, dtype and device of the cores."""
        ...

    def pass_left(self, k: int, carry: Tensor) -> Tensor:
        """``(.., t, R_k)`` to ``(.., t, n_k, R_{k+1})``."""
        ...

    def pass_right(self, k: int, carry: Tensor) -> Tensor:
        """``(.., R_{k+1}, t)`` to ``(.., R_k, n_k, t)``."""
        ...

    def balanced(self) -> Virtual:
        """The same train from factors that are right-orthogonal, so that what lies right of a bond is near that."""
        ...


@dataclass(frozen=True)
class Plain:
    """Cores as they are, ``(.., r, n, s)``."""

    cores: Sequence[Tensor]

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(core.shape[-2] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (*(core.shape[-3] for core in self.cores), 1)

    @property
    def like(self) -> Tensor:
        return self.cores[0]

    def pass_left(self, k: int, carry: Tensor) -> Tensor:
        return absorb_left(carry, self.cores[k])

    def pass_right(self, k: int, carry: Tensor) -> Tensor:
        return absorb_right(self.cores[k], carry)

    def balanced(self) -> Plain:
        return Plain(_right_orthogonal(self.cores))


@dataclass(frozen=True)
class _Pair:
    _axes: ClassVar[int] = 3

    left: Sequence[Tensor]
    right: Sequence[Tensor]

    def _balanced_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return _right_orthogonal(self.left, self._axes), _right_orthogonal(self.right, self._axes)

    @property
    def ranks(self) -> tuple[int, ...]:
        pairs = zip(self.left, self.right, strict=True)
        return (*(a.shape[-self._axes] * b.shape[-self._axes] for a, b in pairs), 1)


class Matmul(_Pair):
    """Cores ``(.., r, i, j, s)`` times ``(.., t, j, k, u)``; the mode is ``i k``. A train has ``k = 1``."""

    _axes: ClassVar[int] = 4

    def balanced(self) -> Matmul:
        return Matmul(*self._balanced_factors())

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(a.shape[-3] * b.shape[-2] for a, b in zip(self.left, self.right, strict=True))

    @property
    def like(self) -> Tensor:
        return self.left[0].flatten(-3, -2)

    def pass_left(self, k: int, carry: Tensor) -> Tensor:
        a, b = self.left[k], self.right[k]
        state = carry.unflatten(-1, (a.shape[-4], b.shape[-4]))  # q r t
        state = torch.einsum("...qrt,...tjku->...qrjku", state, b)
        return torch.einsum("...qrjku,...rijs->...qiksu", state, a).flatten(-2, -1).flatten(-3, -2)

    def pass_right(self, k: int, carry: Tensor) -> Tensor:
        a, b = self.left[k], self.right[k]
        state = carry.unflatten(-2, (a.shape[-1], b.shape[-1]))  # s u q
        state = torch.einsum("...tjku,...suq->...tjksq", b, state)
        return torch.einsum("...rijs,...tjksq->...rtikq", a, state).flatten(-3, -2).flatten(-4, -3)


class Hadamard(_Pair):
    """Cores ``(.., r, n, s)`` times ``(.., t, n, u)``, entry by entry."""

    def balanced(self) -> Hadamard:
        return Hadamard(*self._balanced_factors())

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(a.shape[-2] for a in self.left)

    @property
    def like(self) -> Tensor:
        return self.left[0]

    def pass_left(self, k: int, carry: Tensor) -> Tensor:
        a, b = self.left[k], self.right[k]
        state = carry.unflatten(-1, (a.shape[-3], b.shape[-3]))  # q r t
        state = torch.einsum("...qrt,...tnu->...qrnu", state, b)
        return torch.einsum("...qrnu,...rns->...qnsu", state, a).flatten(-2, -1)

    def pass_right(self, k: int, carry: Tensor) -> Tensor:
        a, b = self.left[k], self.right[k]
        state = carry.unflatten(-2, (a.shape[-1], b.shape[-1]))  # s u q
        state = torch.einsum("...tnu,...suq->...tnsq", b, state)
        return torch.einsum("...rns,...tnsq->...rtnq", a, state).flatten(-4, -3)


@dataclass(frozen=True)
class Sum:
    """The sum of several; ranks add."""

    terms: Sequence[Virtual]

    @property
    def modes(self) -> tuple[int, ...]:
        return self.terms[0].modes

    @property
    def ranks(self) -> tuple[int, ...]:
        inner = zip(*(term.ranks[1:-1] for term in self.terms), strict=True)
        return (1, *(sum(found) for found in inner), 1)

    @property
    def like(self) -> Tensor:
        return self.terms[0].like

    def pass_left(self, k: int, carry: Tensor) -> Tensor:
        parts = [term.pass_left(k, part) for term, part in zip(self.terms, self._split(carry, k, -1), strict=True)]
        return torch.cat(parts, dim=-1) if k + 1 < len(self.modes) else sum(parts[1:], start=parts[0])

    def pass_right(self, k: int, carry: Tensor) -> Tensor:
        parts = [term.pass_right(k, part) for term, part in zip(self.terms, self._split(carry, k + 1, -2), strict=True)]
        return torch.cat(parts, dim=-3) if k > 0 else sum(parts[1:], start=parts[0])

    def balanced(self) -> Sum:
        return Sum([term.balanced() for term in self.terms])

    def _split(self, carry: Tensor, bond: int, axis: int) -> Sequence[Tensor]:
        if bond in (0, len(self.modes)):
            return [carry] * len(self.terms)
        return carry.split([term.ranks[bond] for term in self.terms], dim=axis)


def _right_orthogonal(cores: Sequence[Tensor], n_axes: int = 3) -> list[Tensor]:
    """Cores, all but the first right-orthogonal; a power of two goes to every core alike."""
    modes = [core.shape[1 - n_axes : -1] for core in cores]
    merged = [core.flatten(1 - n_axes, -2) for core in cores]
    out, exponent = orthogonalize_cores(merged, (0, len(merged) - 1), 0)
    return [core.unflatten(-2, sizes) for core, sizes in zip(spread_pow2(out, exponent), modes, strict=True)]


def sketched_cores(x: Virtual, widths: Sequence[int], seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Cores of a train of the given ranks close to a virtual one, all but the last left-orthogonal.

    The last one is still to be multiplied by ``2**exponent``, with the exponent that comes beside the cores.

    From the right the train is contracted with a random train; from the left each core becomes an orthonormal
    basis of what the sketch shows. The result is an orthogonal projection of ``x``.

    Args:
        x: Ranks ``R_k``.
        widths: Length ``d + 1``, ones at the ends; the wanted ranks and some more.
        seed: Of the sketch.

    Cost: O(d n R^2 w) flops for plain cores.
    Source: Al Daas et al., arXiv:2110.04393, Algorithm 3.2 (randomize, then orthogonalize).
    """
    like = x.like
    batch, n_batch, d = like.shape[:-3], like.ndim - 3, len(x.modes)
    generator = torch.Generator(like.device).manual_seed(seed)
    shows: list[Tensor] = [like.new_ones((*batch, 1, 1))] * (d + 1)
    for k in range(d - 1, 0, -1):
        shape = (x.modes[k], widths[k + 1], widths[k])
        # Uniform numbers serve a sketch as well as Gaussian ones, and are several times faster to draw.
        sketch = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
        sketch = (sketch - (0.5 + 0.5j if like.is_complex() else 0.5)) / math.sqrt(x.modes[k] * widths[k + 1] / 12)
        shows[k] = split_pow2(x.pass_right(k, shows[k + 1]).flatten(-2, -1) @ sketch.flatten(0, 1), n_batch)[0]
    carry = like.new_ones((*batch, 1, 1))
    exponent = torch.zeros(batch, dtype=torch.int32, device=like.device)
    cores: list[Tensor] = []
    for k in range(d - 1):
        full = x.pass_left(k, carry)  # r n R
        rows = as_left(full)
        basis = orthonormal(rows @ shows[k + 1])
        cores.append(basis.unflatten(-2, full.shape[-3:-1]))
        carry, step = split_pow2(basis.mH @ rows, n_batch)
        exponent = exponent + step
    last, step = split_pow2(x.pass_left(d - 1, carry), n_batch)
    return [*cores, last], exponent + step
