"""What a tensor is between the bases of a point: ``U_1^H .. U_{k-1}^H Z V_{k+1}^H .. V_d^H`` for every k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from tensortrain.cores.environments import Environments, Overlap
from tensortrain.cores.regroup import dense_to_paired
from tensortrain.cores.sketch import Plain
from tensortrain.numerics.manifold.point import Point

__all__ = ["components_of_dense", "components_of_trains", "zero_deltas"]


def components_of_trains(trains: Sequence[Sequence[Tensor]], point: Point) -> list[Tensor]:
    """Components ``(r, n, s)`` of the sum of trains of cores ``(s, n, u)``; those of equal ranks go side by side."""
    totals = zero_deltas(point)
    for _, group in groupby(sorted(trains, key=_ranks), key=_ranks):
        stacked = [torch.stack(cores) for cores in zip(*group, strict=True)]
        first = [*point.left, point.last][0]  # stands in its place until it is passed
        seen = Environments(Overlap(Plain(stacked)), [first, *point.right])
        for k in range(point.order):
            totals[k] = totals[k] + seen.at(k).adjoint().sum(0)
            if k < point.order - 1:
                seen.advance(k, point.left[k])
    return totals


def components_of_dense(z: Tensor, point: Point) -> list[Tensor]:
    """Components ``(r, n, s)`` of a dense tensor of the shape of the point."""
    modes = [core.shape[-3:-1] for core in point.base._paired()]
    outs, ins = ([pair[axis] for pair in modes] for axis in (0, 1))
    z = dense_to_paired(z.reshape(math.prod(outs), math.prod(ins)), outs, ins)
    out = []
    state = z[None]  # r n_k .. n_d
    for k in range(point.order):
        component = state[..., None]  # r n_k .. n_d t
        for v in reversed(point.right[k:]):
            component = torch.tensordot(component, v.conj(), dims=([-2, -1], [1, 2]))
        out.append(component)
        if k < point.order - 1:
            state = torch.tensordot(point.left[k].conj(), state, dims=([0, 1], [0, 1]))
    return out


def zero_deltas(point: Point) -> list[Tensor]:
    """Components of the zero vector."""
    return [torch.zeros_like(core) for core in (*point.left, point.last)]


def _ranks(cores: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(core.shape[0] for core in cores)
