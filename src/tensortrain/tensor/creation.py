"""Trains from nothing: random, constant, identity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.ranks import RankLike, resolve_ranks
from tensortrain.errors import ShapeError
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.train import TensorTrain

__all__ = ["eye", "ones", "randn", "randn_matrix", "zeros"]


def randn(
    shape: Sequence[int],
    rank: RankLike,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TensorTrain:
    """A train of independent Gaussian cores whose dense entries have mean 0 and variance 1.

    Args:
        shape: Modes ``(n_1, .., n_d)``.
        rank: An int, a share or ``"same"``, clipped to what the modes allow, or a tuple, taken as given; see
            ``resolve_ranks``.
        generator: Source of randomness.
        dtype: Torch's default dtype if left out.
        device: Torch's default device if left out.

    Raises:
        RankError: The rank is out of range.
        ShapeError: A mode is below 1.

    Example:
        >>> randn((4, 5, 6), 3).ranks
        (1, 3, 3, 1)
    """
    modes = _checked_modes("shape", shape)
    cores = _gaussian(modes, resolve_ranks(modes, rank, clip=False), generator, dtype, device)
    return TensorTrain(tuple(cores))


def randn_matrix(
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    rank: RankLike,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TTMatrix:
    """A TTMatrix of independent Gaussian cores whose dense entries have mean 0 and variance 1.

    Args:
        out_modes, in_modes: Row and column modes.
        rank, generator, dtype, device: As for ``randn``, on the merged modes ``i_k * j_k``.

    Raises:
        RankError: The rank is out of range.
        ShapeError: A mode is below 1, or the numbers of modes differ.

    Example:
        >>> randn_matrix((4, 4), (3, 5), 2)
        TTMatrix(out_modes=(4, 4), in_modes=(3, 5), ranks=(1, 2, 1), n_params=64, dtype=torch.float32)
    """
    pairs = _pairs(out_modes, in_modes)
    modes = [i * j for i, j in pairs]
    cores = _gaussian(modes, resolve_ranks(modes, rank, clip=False), generator, dtype, device)
    return TTMatrix(tuple(core.unflatten(1, pair) for core, pair in zip(cores, pairs, strict=True)))


def zeros(
    shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> TensorTrain:
    """The zero tensor, of rank 1."""
    modes = _checked_modes("shape", shape)
    return TensorTrain(tuple(torch.zeros((1, n, 1), dtype=dtype, device=device) for n in modes))


def ones(
    shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> TensorTrain:
    """The tensor of ones, of rank 1."""
    modes = _checked_modes("shape", shape)
    return TensorTrain(tuple(torch.ones((1, n, 1), dtype=dtype, device=device) for n in modes))


def eye(
    modes: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> TTMatrix:
    """The identity matrix with ``out_modes == in_modes == modes``, of rank 1."""
    sizes = _checked_modes("modes", modes)
    return TTMatrix(tuple(torch.eye(n, dtype=dtype, device=device)[None, :, :, None] for n in sizes))


def _gaussian(
    modes: Sequence[int],
    ranks: Sequence[int],
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> list[Tensor]:
    # An entry sums prod(ranks) products of d independent factors; in logs, since that may overflow.
    std = math.exp(-sum(map(math.log, ranks)) / (2 * len(modes)))
    return [
        torch.randn((r, n, s), generator=generator, dtype=dtype, device=device) * std
        for r, n, s in zip(ranks[:-1], modes, ranks[1:], strict=True)
    ]


def _checked_modes(name: str, modes: Sequence[int]) -> tuple[int, ...]:
    sizes = (modes,) if isinstance(modes, int) else tuple(int(n) for n in modes)
    if not sizes or min(sizes) < 1:
        raise ShapeError(
            f"modes must be positive: {name} has {sizes}, expected at least one size, all 1 or more. "
            "Pass a tuple such as (4, 5, 6)."
        )
    return sizes


def _pairs(out_modes: Sequence[int], in_modes: Sequence[int]) -> list[tuple[int, int]]:
    out, into = _checked_modes("out_modes", out_modes), _checked_modes("in_modes", in_modes)
    if len(out) != len(into):
        raise ShapeError(
            f"out_modes and in_modes must have one length: they have {len(out)} and {len(into)} entries, expected "
            "equal lengths. Pad the shorter one with modes of size 1."
        )
    return list(zip(out, into, strict=True))
