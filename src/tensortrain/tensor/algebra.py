"""Exact operations that build new trains from old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tensortrain.errors import KindError, ShapeError
from tensortrain.tensor import chain
from tensortrain.tensor.base import CoreChain, check_same_kind
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.scaling import times_pow2, work_dtype
from tensortrain.tensor.train import TensorTrain, checked_dims

__all__ = ["cat", "diag", "dot", "kron", "pad", "stack"]

Chain = TypeVar("Chain", bound=CoreChain)


def dot(a: Chain, b: Chain) -> Tensor:
    """Inner product ``sum(conj(a) * b)``, a 0-d tensor, as ``torch.vdot``.

    Args:
        a, b: Two trains, or two matrices (Frobenius inner product), of equal modes. Modes do not broadcast.

    Raises:
        KindError, DTypeError, DeviceError, ShapeError: The operands do not match.

    Cost: O(d n r^3) flops. No intermediate overflows unless the result does.
    """
    _check_chain("dot", a)
    check_same_kind("dot", a, b)
    if a._modes_by_name() != b._modes_by_name():
        raise ShapeError(
            f"operands of dot must have equal modes: b has {b._modes_by_name()}, expected "
            f"{a._modes_by_name()}. "
            "Reshape or pad one of them."
        )
    wide = work_dtype(a.dtype)
    left, right = ([core.to(wide) for core in x._merged()] for x in (a, b))
    return times_pow2(*chain.dot_parts(left, right)).to(a.dtype)


def kron(x: Chain, y: Chain) -> Chain:
    """Kronecker product: the cores of ``x`` followed by those of ``y``.

    For matrices this is ``torch.kron`` of the dense ones; for trains the outer product, with modes
    ``x.shape + y.shape``, which is ``torch.kron`` of the flattened tensors.

    Raises:
        KindError, DTypeError, DeviceError: The operands do not match.
    """
    _check_chain("kron", x)
    check_same_kind("kron", x, y)
    return type(x)((*x.cores, *y.cores))


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
    expanded = [part[(slice(None),) * k + (None,)] for part in parts]
    return cat([part for part in expanded if isinstance(part, TensorTrain)], dim=k)


def pad(x: TensorTrain, widths: Sequence[tuple[int, int]], value: complex = 0) -> TensorTrain:
    """Pad every mode with a constant.

    Args:
        x: Order d.
        widths: ``(before, after)`` for each of the d modes, counts of at least 0.
        value: The constant; anything but 0 adds 1 or 2 to the ranks.

    Raises:
        ShapeError: The widths do not fit the order, or are negative.
    """
    _check_chain("pad", x)
    pairs = [(int(before), int(after)) for before, after in widths]
    if len(pairs) != x.order or any(w < 0 for pair in pairs for w in pair):
        raise ShapeError(
            f"pad needs two widths of at least 0 for each mode: widths has {pairs}, expected {x.order} "
            f"pairs. "
            "Pass ((before, after), ...); slice to shrink."
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
        return TTMatrix(tuple(torch.diag_embed(core.movedim(1, 2)).movedim(1, 3) for core in x.cores))
    _check_chain("diag", x)
    if x.out_modes != x.in_modes:
        raise ShapeError(
            f"a diagonal needs square modes: in_modes has {x.in_modes}, expected {x.out_modes} as out_modes. "
            "Build the matrix with equal modes."
        )
    return TensorTrain(tuple(torch.diagonal(core, dim1=1, dim2=2).movedim(2, 1) for core in x.cores))


def _pad_zeros(x: TensorTrain, widths: Sequence[tuple[int, int]]) -> TensorTrain:
    pairs = zip(x.cores, widths, strict=True)
    return TensorTrain(
        tuple(torch.nn.functional.pad(core, (0, 0, *width)) if any(width) else core for core, width in pairs)
    )


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
                f"{operation} needs trains of one order: one has {part.order} modes, expected "
                f"{parts[0].order}. "
                "Insert a mode with x[None]."
            )
    return parts


def _check_chain(operation: str, x: object) -> None:
    if not isinstance(x, CoreChain):
        raise KindError(
            f"{operation} works on trains: an operand has {type(x).__name__}, expected TensorTrain or "
            f"TTMatrix. "
            "Decompose a dense tensor with tensortrain.tt_svd."
        )
