"""What every core must be: axes, ranks, dtype, device, batch. Each fault has a message of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.walks import are_sound
from tensortrain.errors import DeviceError, DTypeError, KindError, ShapeError

__all__ = ["DTYPES", "checked_center", "checked_cores"]

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64, torch.bfloat16, torch.float16)


def checked_cores(cores: Any, axes: Sequence[str]) -> tuple[Tensor, ...]:
    """The cores as a tuple, all with the same batch axis or all without one.

    Args:
        cores: Tensors with ``axes``, or with one batch axis in front; batch sizes 1 and n give n.
        axes: Names of the axes of a core, the first and the last for ranks.
    """
    if isinstance(cores, Tensor) or not hasattr(cores, "__iter__"):
        raise KindError(
            f"cores must be a sequence of tensors: cores has {type(cores).__name__}, expected a list. "
            "Pass [core], or decompose a dense tensor with from_dense."
        )
    out = tuple(cores)
    if not out:
        raise ShapeError("a train must have a core: cores has length 0, expected at least 1. Pass one core or more.")
    if are_sound(out, len(axes)):  # in one look: of long trains these checks take longer than to walk through them
        return out
    for k, core in enumerate(out):
        _check_core(core, k, axes)
    _check_ranks(out, len(axes))
    _check_uniform(out)
    # Conjugated and negative views work in torch alone: not for SciPy, kernels and files.
    return _same_batch(tuple(core.resolve_conj().resolve_neg() for core in out), axes)


def _check_core(core: Any, k: int, axes: Sequence[str]) -> None:
    if not isinstance(core, Tensor):
        raise KindError(
            f"every core must be a tensor: cores[{k}] has {type(core).__name__}, expected torch.Tensor. "
            "Convert it with torch.as_tensor."
        )
    if core.ndim not in (len(axes), len(axes) + 1):
        raise ShapeError(
            f"every core must have {len(axes)} axes ({', '.join(axes)}), or a batch axis before them: cores[{k}] "
            f"has shape {tuple(core.shape)}, expected {len(axes)} or {len(axes) + 1} axes. "
            "Keep boundary ranks as axes of size 1."
        )
    if core.shape[-len(axes)] < 1 or core.shape[-1] < 1:
        raise ShapeError(
            f"ranks must be at least 1: cores[{k}] has shape {tuple(core.shape)}, expected positive first and last "
            "sizes. Use zero cores of rank 1 for the zero tensor."
        )
    if core.dtype not in DTYPES:
        raise DTypeError(
            f"cores must be of a floating or complex dtype: cores[{k}] has {core.dtype}, expected one of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}. Cast it with .to(torch.float64)."
        )


def _check_ranks(cores: Sequence[Tensor], n_axes: int) -> None:
    for end, size, k in (("start", cores[0].shape[-n_axes], 0), ("end", cores[-1].shape[-1], len(cores) - 1)):
        if size != 1:
            raise ShapeError(
                f"boundary ranks must be 1: cores[{k}] has {size} at the {end} of the train "
                f"(shape {tuple(cores[k].shape)}), expected 1. Sum over that axis, or keep it as a mode."
            )
    for k in range(len(cores) - 1):
        left, right = cores[k], cores[k + 1]
        if left.shape[-1] != right.shape[-n_axes]:
            raise ShapeError(
                f"neighbouring cores must share a rank: cores[{k}] has last size {left.shape[-1]} but cores[{k + 1}] "
                f"starts with {right.shape[-n_axes]} (shapes {tuple(left.shape)} and {tuple(right.shape)}), expected "
                "equal sizes. Build consistent cores with tensortrain.randn(shape, rank)."
            )


def _check_uniform(cores: Sequence[Tensor]) -> None:
    for k, core in enumerate(cores):
        if core.dtype != cores[0].dtype:
            raise DTypeError(
                f"cores must share a dtype: cores[{k}] has {core.dtype}, expected {cores[0].dtype} as cores[0]. Cast "
                "all with .to(dtype)."
            )
        if core.device != cores[0].device:
            raise DeviceError(
                f"cores must share a device: cores[{k}] has {core.device}, expected {cores[0].device} as cores[0]. "
                "Move all with .to(device)."
            )


def _same_batch(cores: tuple[Tensor, ...], axes: Sequence[str]) -> tuple[Tensor, ...]:
    batches = [core.shape[: core.ndim - len(axes)] for core in cores]
    if all(batch == batches[0] for batch in batches):
        return cores
    sizes = {batch[0] for batch in batches if len(batch) == 1}
    if any(len(batch) != 1 for batch in batches) or len(sizes - {1}) > 1:
        raise ShapeError(
            f"cores must share a batch axis or have none: cores have batch shapes {[tuple(b) for b in batches]}, "
            f"expected one size, or 1. Expand the smaller ones."
        )
    size = max(sizes - {1}, default=1)
    return tuple(core.expand(size, *core.shape[1:]) for core in cores)


def checked_center(center: tuple[int, int], order: int) -> tuple[int, int]:
    lo, hi = int(center[0]), int(center[1])
    hi = order - 1 if hi == -1 else hi
    if not 0 <= lo <= hi < order:
        raise ShapeError(
            f"the center must be a range of cores: center has {tuple(center)}, expected 0 <= lo <= hi <= {order - 1}. "
            "Leave it out if the canonical form is unknown."
        )
    return lo, hi
