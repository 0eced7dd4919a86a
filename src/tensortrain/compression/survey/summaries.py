"""What comes to a layer in one call, summed up: as rows of numbers, or as counts of ids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.errors import NonFiniteError
from tensortrain.system.finite import finite

__all__ = ["is_summarized", "padded", "patches_of", "summarize"]

PATCHES_PER_BATCH = 2048  # of a convolution: neighbouring patches say nearly the same


def summarize(
    layer: FoundLayer, x: Tensor, mask: Tensor | None, moments: LayerMoments, table: Tensor | None = None
) -> None:
    """Add the rows of a layer's input to its moments, without those that ``mask`` blanks out, if any are taken.

    Args:
        table: That the rows were looked up in.

    Raises:
        NonFiniteError: No row is finite.
    """
    of_kind = _SUMMARIES.get(layer.weight.kind)
    if of_kind is not None:
        of_kind(layer, x, mask, moments, table)


def is_summarized(layer: FoundLayer) -> bool:
    """Whether there are statistics of this kind of layer."""
    plain = not isinstance(layer.module, _ConvNd) or (
        type(layer.module) in (nn.Conv1d, nn.Conv2d) and layer.module.groups == 1
    )
    return layer.weight.kind in _SUMMARIES and plain


def _linear_summary(
    layer: FoundLayer, x: Tensor, mask: Tensor | None, moments: LayerMoments, table: Tensor | None
) -> None:
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.shape == x.shape[:-1]:
        rows = rows[mask.reshape(-1).bool()]
    moments.add_rows(_finite(layer, rows), table)


def _embedding_summary(
    layer: FoundLayer, x: Tensor, mask: Tensor | None, moments: LayerMoments, table: Tensor | None
) -> None:
    ids = x[mask.bool()] if mask is not None and mask.shape == x.shape else x.reshape(-1)
    counts = torch.bincount(ids.reshape(-1).long(), minlength=layer.weight.in_features)
    moments.add(counts.double(), None, int(ids.numel()))


def _conv_summary(
    layer: FoundLayer, x: Tensor, mask: Tensor | None, moments: LayerMoments, table: Tensor | None
) -> None:
    conv = layer.module
    if not is_summarized(layer) or x.ndim != len(layer.weight.kernel) + 2:
        return
    few = max(1, math.ceil(x.shape[0] / 8))  # unfolding multiplies memory by the kernel's size
    few = max(few, math.ceil(PATCHES_PER_BATCH / max(1, math.prod(x.shape[2:]))))  # of small maps all examples
    patches = patches_of(conv, *padded(conv, x[:: max(1, x.shape[0] // few)]))
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    stride = max(1, rows.shape[0] // PATCHES_PER_BATCH)
    moments.add_rows(_finite(layer, rows[::stride]))


def padded(conv: Any, x: Tensor) -> tuple[Tensor, Any]:
    """The input of a convolution, padded where unfolding cannot; and the padding still to be made."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return x, conv.padding
    widths = conv._reversed_padding_repeated_twice if isinstance(conv, _ConvNd) else conv.conv_options().pad_widths()
    return F.pad(x, widths, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode), 0


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
    good = finite(rows).all(dim=1)
    if bool(good.all()):  # one host sync per layer and batch
        return rows
    if not bool(good.any()):
        raise NonFiniteError(
            f"calibration data must give finite numbers: all rows that come to layer {layer.name!r} hold NaN or Inf. "
            "Check the calibration data, and the model's outputs on it."
        )
    return rows[good]


_SUMMARIES: dict[str, Callable[[FoundLayer, Tensor, Tensor | None, LayerMoments, Tensor | None], None]] = {
    "linear": _linear_summary,
    "conv": _conv_summary,
    "embedding": _embedding_summary,
}
