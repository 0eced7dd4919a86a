"""Exact operations that build new trains from old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from tensortrain.cores.algebra import dot_parts, hadamard_core, pad_zeros
from tensortrain.cores.scaling import times_pow2, work_dtype
from tensortrain.cores.walks import inner_walk
from tensortrain.errors import KindError, ShapeError
from tensortrain.tensor.base import CoreChain, broadcast_batch, check_same_kind, checked_chain
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.train import TensorTrain, checked_dims

__all__ = ["cat", "diag", "dot", "kron", "pad", "stack"]

AnyTrain = TypeVar("AnyTrain", bound=CoreChain)


@overload
def dot(a: AnyTrain, b: AnyTrain, dims: None = None) -> Tensor: ...


@overload
def dot(a: TensorTrain, b: TensorTrain, dims: Sequence[int] | int) -> Tensor | TensorTrain: ...


def dot(a: Any, b: Any, dims: Sequence[int] | int | None = None) -> Tensor | TensorTrain:
    """Inner product ``sum(conj(a) * b)``, as ``torch.vdot``.

    Args:
        a, b: Two trains, or two matrices (Frobenius inner product), of equal modes. Modes do not broadcast, batches do.
        dims: For trains, the modes of ``a`` to sum over; all if left out. ``b`` has either all the modes of ``a``, and
            those not summed over are multiplied entry by entry, or the modes ``dims`` alone, which are then summed
            away against ``a``.

    Returns:
        A tensor of ``batch_shape`` (0-d without a batch), or a train of the modes that are left, whose ranks are
        products.

    Raises:
        KindError, DTypeError, DeviceError, ShapeError: The operands do not match.
        ModeIndexError: ``dims`` names no mode, or one twice.

    Cost: O(d n r^3) flops. No intermediate overflows unless the result does.

    Example:
        >>> from tensortrain.tensor import ones
        >>> float(dot(ones((2, 3)), ones((2, 3)))), dot(ones((2, 3)), ones((2, 3)), dims=1).shape
        (6.0, (2,))
    """
    checked_chain("dot", a, "the left operand")
    # In one call, which looks at modes and dtypes itself: of many small cores the checks take longer than the product.
    if dims is None and type(a) is type(b) and (found := inner_walk(a.cores, b.cores, len(a._axes))) is not None:
        return found
    check_same_kind("dot", a, b)
    if dims is not None and isinstance(a, TensorTrain):
        chosen = checked_dims(dims, a.order)
        if len(chosen) < a.order or b.shape != a.shape:
            return _partial_dot(a, b, sorted(chosen))
    if a._modes_by_name() != b._modes_by_name():
        raise ShapeError(
            f"operands of dot must have equal modes: b has {b._modes_by_name()}, expected {a._modes_by_name()}. "
            "Reshape or pad one of them."
        )
    wide = work_dtype(a.dtype)
    left, right = (x._merged() for x in broadcast_batch(a, b))
    if wide != a.dtype:
        left, right = ([core.to(wide) for core in cores] for cores in (left, right))
    return times_pow2(*dot_parts(left, right)).to(a.dtype)


def _partial_dot(a: TensorTrain, b: TensorTrain, dims: Sequence[int]) -> Tensor | TensorTrain:
    summed = tuple(a.shape[k] for k in dims)
    if b.shape not in (a.shape, summed):
        raise ShapeError(
            f"b must have the modes of a, or those that are summed over: b has shape {b.shape}, expected {a.shape} or "
            f"{summed}. Reshape or pad one of them."
        )
    left, right = broadcast_batch(a.conj(), b)
    mine = list(left.cores)
    theirs = list(right.cores)
    if b.shape != a.shape:  # an identity core of size 1 carries the ranks of b past the other modes
        given, theirs, rank = iter(right.cores), [], 1
        for k in range(a.order):
            eye = torch.eye(rank, dtype=b.dtype, device=b.device).expand(*right.batch_shape, rank, rank)
            theirs.append(next(given) if k in dims else eye.unsqueeze(-2))
            rank = theirs[-1].shape[-1]
    pieces = []
    for k, (x, y) in enumerate(zip(mine, theirs, strict=True)):
        if k in dims:
            piece = torch.einsum("...rns,...tnu->...rtsu", x, y).flatten(-2, -1).flatten(-3, -2)
        else:
            piece = hadamard_core(x, y)
        pieces.append(piece)
    return left._joined(pieces)


def kron(x: AnyTrain, y: AnyTrain) -> AnyTrain:
    """Kronecker product: the cores of ``x`` followed by those of ``y``.

    For matrices this is ``torch.kron`` of the dense ones; for trains the outer product, with modes
    ``x.shape + y.shape``, which is ``torch.kron`` of the flattened tensors.

    Raises:
        KindError, DTypeError, DeviceError: The operands do not match.
    """
    checked_chain("kron", x)
    check_same_kind("kron", x, y)
    left, right = broadcast_batch(x, y)
    return type(x)((*left.cores, *right.cores))


def cat(trains: Sequence[TensorTrain], dim: int = 0) -> TensorTrain:
    """Concatenate along a mode, as ``torch.cat``; ranks add.

    Raises:
        ShapeError: There is nothing to join, or the other modes differ.
        ModeIndexError: There is no such mode.
    """
    parts = _checked_parts("cat", trains)
    (k,) = checked_dims(dim, parts[0].order)
    for at, part in enumerate(parts):
        if part.shape[:k] + part.shape[k + 1 :] != parts[0].shape[:k] + parts[0].shape[k + 1 :]:
            raise ShapeError(
                f"trains must agree in all modes but dim: trains[{at}] has shape {part.shape}, expected "
                f"{parts[0].shape} up to mode {k}. Pad or slice it."
            )
    total = sum(part.shape[k] for part in parts)
    out: TensorTrain | None = None
    before = 0
    for part in parts:
        widths = [(0, 0)] * part.order
        widths[k] = (before, total - before - part.shape[k])
        before += part.shape[k]
        padded = _pad_zeros(part, widths)
        out = padded if out is None else out + padded
    assert out is not None
    return out


def stack(trains: Sequence[TensorTrain], dim: int = 0) -> TensorTrain:
    """Join along a new mode, as ``torch.stack``; ranks add.

    Raises:
        ShapeError: There is nothing to join, or the modes differ.
        ModeIndexError: There is no such place for a mode.
    """
    parts = _checked_parts("stack", trains)
    (k,) = checked_dims(dim, parts[0].order + 1)
    expanded: list[Any] = [part[(slice(None),) * k + (None,)] for part in parts]
    return cat(expanded, dim=k)


def pad(x: TensorTrain, widths: Sequence[tuple[int, int]], value: complex = 0) -> TensorTrain:
    """Pad every mode with a constant.

    Args:
        x: Order d.
        widths: ``(before, after)`` for each of the d modes, counts of at least 0.
        value: The constant; anything but 0 adds 1 or 2 to the ranks.

    Raises:
        ShapeError: The widths do not fit the order, or are negative.
    """
    checked_chain("pad", x)
    pairs = [(int(before), int(after)) for before, after in widths]
    if len(pairs) != x.order or any(w < 0 for pair in pairs for w in pair):
        raise ShapeError(
            f"pad needs two widths of at least 0 for each mode: widths has {pairs}, expected {x.order} pairs. Pass "
            "((before, after), ...); slice to shrink."
        )
    if value == 0:
        return _pad_zeros(x, pairs)
    return _pad_zeros(x - value, pairs) + value


def diag(x: TensorTrain | TTMatrix) -> TTMatrix | TensorTrain:
    """From a train the square TTMatrix with it on the diagonal; from a square TTMatrix its diagonal.

    Raises:
        ShapeError: A matrix has modes that are not square.
    """
    if isinstance(x, TensorTrain):
        return TTMatrix(tuple(torch.diag_embed(core.mT).movedim(-3, -1) for core in x.cores))
    checked_chain("diag", x)
    if x.out_modes != x.in_modes:
        raise ShapeError(
            f"a diagonal needs square modes: in_modes has {x.in_modes}, expected {x.out_modes} as out_modes. "
            "Build the matrix with equal modes."
        )
    return TensorTrain(tuple(torch.diagonal(core, dim1=-3, dim2=-2).mT for core in x.cores))


def _pad_zeros(x: TensorTrain, widths: Sequence[tuple[int, int]]) -> TensorTrain:
    cores: Sequence[Tensor] = x.cores
    for k, width in enumerate(widths):
        cores = pad_zeros(cores, k, width)
    return TensorTrain(tuple(cores), x.center)


def _checked_parts(operation: str, trains: Sequence[TensorTrain]) -> list[TensorTrain]:
    parts = list(trains)
    if not parts:
        raise ShapeError(
            f"{operation} needs a train: trains has length 0, expected at least 1. Pass a tuple of trains."
        )
    for part in parts:
        if not isinstance(part, TensorTrain):
            raise KindError(
                f"{operation} joins trains: trains holds {type(part).__name__}, expected TensorTrain. "
                "Decompose dense tensors with tensortrain.tt_svd."
            )
        check_same_kind(operation, parts[0], part)
        if part.order != parts[0].order:
            raise ShapeError(
                f"{operation} needs trains of one order: one has {part.order} modes, expected {parts[0].order}. Insert "
                "a mode with x[None]."
            )
    return parts
