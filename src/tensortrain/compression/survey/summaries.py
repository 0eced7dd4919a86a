"""Sums over what comes to a layer in one call: second moment, first moment, number of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import second_moment
from tensortrain.errors import NonFiniteError

__all__ = ["is_summarized", "patches_of", "summarize"]

PATCHES_PER_BATCH = 2048  # of a convolution: neighbouring patches say nearly the same

Summary = tuple[Tensor, Tensor | None, int]  # second moment, first moment (if there is one), number of rows


def summarize(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary | None:
    """Sums over the rows of a layer's input, without those that ``mask`` blanks out; None where none are taken.

    Raises:
        NonFiniteError: No row is finite.
    """
    of_kind = _SUMMARIES.get(layer.weight.kind)
    return None if of_kind is None else of_kind(layer, x, mask)


def is_summarized(layer: FoundLayer) -> bool:
    """Whether there are statistics of this kind of layer."""
    plain = not isinstance(layer.module, _ConvNd) or (
        type(layer.module) in (nn.Conv1d, nn.Conv2d) and layer.module.groups == 1
    )
    return layer.weight.kind in _SUMMARIES and plain


def _linear_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary:
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.shape == x.shape[:-1]:
        rows = rows[mask.reshape(-1).bool()]
    rows = _finite(layer, rows)
    return second_moment(rows), rows.sum(dim=0, dtype=torch.float64), rows.shape[0]


def _embedding_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary:
    ids = x[mask.bool()] if mask is not None and mask.shape == x.shape else x.reshape(-1)
    counts = torch.bincount(ids.reshape(-1).long(), minlength=layer.weight.in_features)
    return counts.double(), None, int(ids.numel())


def _conv_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary | None:
    conv = layer.module
    if not is_summarized(layer) or x.ndim != len(layer.weight.kernel) + 2:
        return None
    assert isinstance(conv, _ConvNd)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        x = F.pad(x, conv._reversed_padding_repeated_twice)  # zeros at the border change the moments little
        padding: Any = 0
    else:
        padding = conv.padding
    few = max(1, math.ceil(x.shape[0] / 8))  # unfolding multiplies memory by the kernel's size
    patches = patches_of(conv, x[:: max(1, x.shape[0] // few)], padding)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    stride = max(1, rows.shape[0] // PATCHES_PER_BATCH)
    rows = _finite(layer, rows[::stride])
    return second_moment(rows), rows.sum(dim=0, dtype=torch.float64), rows.shape[0]


def patches_of(conv: Any, x: Tensor, padding: Any) -> Tensor:
    """What the kernel is laid over: (b, channels times kernel size, places)."""
    if x.ndim == 4:
        return F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    size, stride, spread = ((1, *each) for each in (conv.kernel_size, conv.stride, conv.dilation))
    around = (0, *(padding if isinstance(padding, tuple) else (padding,)))
    return F.unfold(x.unsqueeze(2), size, spread, around, stride)


def _finite(layer: FoundLayer, rows: Tensor) -> Tensor:
    """Rows without NaN or Inf, which half precision gives now and then.

    Raises:
        NonFiniteError: There is none.
    """
    good = torch.isfinite(rows).all(dim=1)
    if bool(good.all()):  # one host sync per layer and batch
        return rows
    if not bool(good.any()):
        raise NonFiniteError(
            f"calibration data must give finite numbers: all rows that come to layer {layer.name!r} hold NaN or Inf. "
            "Check the calibration data, and the model's outputs on it."
        )
    return rows[good]


_SUMMARIES: dict[str, Callable[[FoundLayer, Tensor, Tensor | None], Summary | None]] = {
    "linear": _linear_summary,
    "conv": _conv_summary,
    "embedding": _embedding_summary,
}
