"""Lists of cores ``(.., r, i, j, s)`` of matrices: times trains, matrices and dense columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tensortrain.cores.scales import Exponents, Scale, guarded, plain_exponent
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.walks import product_walk

__all__ = ["applied", "times_matrix_core", "times_matrix_cores", "times_train_core"]


def times_matrix_core(a: Tensor, b: Tensor) -> Tensor:
    """``(.., r, i, j, s)`` and ``(.., t, j, k, u)`` to ``(.., r t, i, k, s u)``."""
    return torch.einsum("...rijs,...tjku->...rtiksu", a, b).flatten(-2, -1).flatten(-5, -4)


def times_matrix_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``times_matrix_core`` of every pair."""
    return product_walk(left, right, 4) or [times_matrix_core(a, b) for a, b in zip(left, right, strict=True)]


def times_train_core(a: Tensor, x: Tensor) -> Tensor:
    """``(.., r, i, j, s)`` and ``(.., t, j, u)`` to ``(.., r t, i, s u)``."""
    return times_matrix_core(a, x.unsqueeze(-2)).squeeze(-2)


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
