"""Lists of cores ``(.., r, i, j, s)`` of matrices: times trains, matrices and dense columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tensortrain.cores.scales import Exponents, Scale, guarded, plain_exponent
from tensortrain.cores.scaling import times_pow2

__all__ = ["applied", "bilinear_parts", "times_matrix_core"]


def times_matrix_core(a: Tensor, b: Tensor) -> Tensor:
    """``(.., r, i, j, s)`` and ``(.., t, j, k, u)`` to ``(.., r t, i, k, s u)``."""
    return torch.einsum("...rijs,...tjku->...rtiksu", a, b).flatten(-2, -1).flatten(-5, -4)


def applied(cores: Sequence[Tensor], columns: Tensor) -> Tensor:
    """A matrix times dense columns ``(.., b, N)``, as ``(.., b, M, 1)``."""
    state, n_batch = columns.unsqueeze(-1), cores[0].ndim - 4
    return guarded([state, *cores], partial(_applied, cores, state, n_batch), n_batch)


def _applied(cores: Sequence[Tensor], state: Tensor, n_batch: int, scale: Scale) -> Tensor:
    """Cores times columns ``(.., b, N, 1)``: modes are taken from the front, and what is done moves behind."""
    batch, b = state.shape[:n_batch], state.shape[-3]
    waiting: Exponents = 0
    of_columns: Exponents = 0
    for core in cores:
        # b (j_k rest) r to b rest (i_1 .. i_k) s
        state, step = scale.split(state, axis=-3)
        of_columns = plain_exponent(of_columns + step)
        state, step = scale.split(state)
        core, waiting = scale.weigh(core, waiting + step)
        r, _, j, s = core.shape[-4:]
        rest = state.shape[-2] // j
        split = state.reshape(*batch, b, j, rest, r).movedim(-3, -1)  # b rest r j
        weights = core.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)  # (r j) (i s)
        state = split.flatten(-2, -1).flatten(-3, -2) @ weights  # (b rest) (i s)
        state = state.reshape(*batch, b, -1 if b else 1, s)  # b (rest i) s
    return times_pow2(state, plain_exponent(of_columns + plain_exponent(waiting)))


def bilinear_parts(a: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, Exponents]:
    """``(m, e)`` with ``x^H A y = m * 2**e``; all have the same number of batch axes."""
    n_batch = a[0].ndim - 4
    return guarded([*a, *x, *y], partial(_sandwich, a, x, y), n_batch, factors=3)


def _sandwich(a: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], scale: Scale) -> tuple[Tensor, Exponents]:
    """``x^H A y`` up to a power of two; what is carried has an axis for the bond of x, of A and of y."""
    env = a[0].new_ones((1,) * (a[0].ndim - 1))  # t r u
    waiting: list[Exponents] = [0, 0, 0]
    for k, cores in enumerate(zip(x, a, y, strict=True)):
        for axis in range(-3, 0) if k else ():
            env, step = scale.split(env, axis)
            waiting[axis] = waiting[axis] + step
        weighed = [scale.weigh(core, w) for core, w in zip(cores, waiting, strict=True)]
        u, m, v = (core for core, _ in weighed)
        waiting = [exponent for _, exponent in weighed]
        half = torch.einsum("...tru,...ujv->...trjv", env, v)
        half = torch.einsum("...trjv,...rijs->...tisv", half, m)
        env = torch.einsum("...tin,...tisv->...nsv", u.conj(), half)
    total: Exponents = sum(plain_exponent(exponent) for exponent in waiting)
    return env[..., 0, 0, 0], total[..., 0] if isinstance(total, Tensor) else total
