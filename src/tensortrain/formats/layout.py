"""One group's weight as a matrix (outputs, inputs), whatever kind of layer it belongs to.

A convolution's inputs are ordered (kernel position, channel), position slowest; an embedding's inputs are its
words. A weight whose modes multiply to more than its size is padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract.hops import ConvNetwork
from tensortrain.errors import ShapeError

from .checks import check_modes
from .modes import default_order, suggest_modes, suggest_padded_modes
from .spec import WeightShape

__all__ = [
    "conv_network",
    "matrix_to_weight",
    "order_gram",
    "pad_gram",
    "paired_modes",
    "separate_modes",
    "single_modes",
    "weight_to_matrix",
]

Modes = tuple[int, ...]
PADDING_CHOSEN = 0.05  # most that a linear layer's sizes are padded by without being told to
PADDING_GIVEN = 0.5  # modes that exceed a size by more, or one that has good factors, are taken for a mistake


def weight_to_matrix(dense: Tensor, weight: WeightShape, n_inputs: int, n_outputs: int | None = None) -> Tensor:
    """``(n_outputs, n_inputs)`` from torch's layout; either exceeds the weight's own size where that is padded."""
    if weight.kind == "linear":
        more_rows = 0 if n_outputs is None else n_outputs - weight.out_features
        more_columns = n_inputs - weight.in_features
        return F.pad(dense, (0, more_columns, 0, more_rows)) if more_rows or more_columns else dense
    if weight.kind == "conv":
        axes = [0, *range(2, 2 + len(weight.kernel)), 1]
        return dense.permute(axes).reshape(weight.out_features, weight.fan_in)
    return F.pad(dense, (0, 0, 0, n_inputs - weight.in_features)).T


def matrix_to_weight(matrix: Tensor, weight: WeightShape) -> Tensor:
    """Torch's layout from ``(n_outputs, n_inputs)``."""
    if weight.kind == "linear":
        return matrix[: weight.out_features, : weight.in_features]
    if weight.kind == "conv":
        k = len(weight.kernel)
        kernel = matrix.reshape(weight.out_features, *weight.kernel, weight.in_features)
        return kernel.permute(0, k + 1, *range(1, k + 1))
    return matrix.T[: weight.in_features]


def conv_network(weight: WeightShape, cores: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> ConvNetwork:
    """A kernel's network from legs ``o..`` (outputs), ``i..`` (inputs), ``x0, x1, ..`` (axes) and others (bonds).

    Args:
        weight: Of one group.
        cores: Legs of every core; outputs and inputs come slowest first.
        sizes: Of all but the axes.
    """
    axes = tuple(f"x{axis}" for axis in range(len(weight.kernel)))
    known = {**sizes, **dict(zip(axes, weight.kernel, strict=True))}
    wide = {leg: size for leg, size in known.items() if size > 1}
    kept = tuple(tuple(leg for leg in legs if leg in wide) for legs in cores)
    outs, ins = (tuple(sorted((leg for leg in wide if leg[0] == side), key=_number)) for side in "oi")
    return ConvNetwork(kept, outs, ins, axes, tuple(wide.items()))


def _number(leg: str) -> int:
    return int(leg[1:])


def order_gram(gram: Tensor, weight: WeightShape, n_inputs: int) -> Tensor:
    """Second moment in the order of the matrix's columns, padded like it."""
    if weight.kind == "conv":
        positions, channels = math.prod(weight.kernel), weight.in_features
        order = torch.arange(weight.fan_in, device=gram.device).reshape(channels, positions).T.reshape(-1)
        return gram[order] if gram.ndim == 1 else gram[order][:, order]
    return pad_gram(gram, n_inputs)


def pad_gram(gram: Tensor, size: int) -> Tensor:
    """Second moment of inputs or outputs of which the last are always zero."""
    return F.pad(gram, (0, size - gram.shape[-1]) * gram.ndim)


def paired_modes(
    weight: WeightShape,
    out_modes: Sequence[int] | None,
    in_modes: Sequence[int] | None,
    *,
    order: int | None = None,
    pads_linear: bool = False,
) -> tuple[Modes, Modes]:
    """As many output as input modes, checked, balanced ones where they are left out.

    Args:
        order: How many; where left out it follows from the modes given, else from the sizes.
        pads_linear: Whether the modes of a linear weight may exceed sizes without good factors; the words of an
            embedding always may.

    Raises:
        ShapeError: Modes that do not multiply to the sizes, or not as many on one side as on the other.
    """
    pads_linear = pads_linear and weight.kind == "linear"

    def most(modes: Sequence[int], size: int) -> float | None:
        return PADDING_GIVEN if pads_linear and _factors_poorly(size, len(modes)) else None

    if in_modes is not None:
        n = weight.in_features
        in_modes = check_modes(in_modes, n, "in_modes", pad=_pads_words(weight), most_padding=most(in_modes, n))
    if out_modes is not None:
        m = weight.out_features
        out_modes = check_modes(out_modes, m, "out_modes", most_padding=most(out_modes, m))
    order = order or _order(weight, out_modes, in_modes)
    padding = PADDING_CHOSEN if pads_linear else False
    if _pads_words(weight):
        ins = in_modes or suggest_padded_modes(weight.in_features, order)
    else:
        ins = in_modes or suggest_modes(weight.in_features, order, pad=padding)
    # small inputs meet large outputs
    outs = out_modes or suggest_modes(weight.out_features, order, pad=padding)[::-1]
    if len(outs) != len(ins) or len(ins) != order:
        raise ShapeError(
            f"in_modes and out_modes must pair up: found {len(ins)} and {len(outs)} modes ({ins} and {outs}), expected "
            f"{order} each. Put modes of size 1 where one side has fewer."
        )
    return outs, ins


def separate_modes(
    weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
) -> tuple[Modes, Modes]:
    """Output and input modes that need not pair up, checked, balanced ones where they are left out."""
    pad = _pads_words(weight)
    suggest = suggest_padded_modes if pad else suggest_modes
    least = 3 if pad else 2
    ins = in_modes or suggest(weight.in_features, max(least, default_order(weight.in_features)))
    outs = out_modes or suggest_modes(weight.out_features, default_order(weight.out_features))
    return (
        check_modes(outs, weight.out_features, "out_modes"),
        check_modes(ins, weight.in_features, "in_modes", pad=pad),
    )


def single_modes(
    weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
) -> tuple[Modes, Modes]:
    """Separate modes, by default one for all input and one for all output channels of a convolution."""
    if weight.kind == "conv":
        out_modes, in_modes = out_modes or (weight.out_features,), in_modes or (weight.in_features,)
    return separate_modes(weight, out_modes, in_modes)


def _factors_poorly(size: int, order: int) -> bool:
    """Whether padding makes a train of so many modes cheaper."""
    return size > 1 and order > 0 and math.prod(suggest_modes(size, order, pad=PADDING_GIVEN)) > size


def _pads_words(weight: WeightShape) -> bool:
    return weight.kind == "embedding"


def _order(weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None) -> int:
    if in_modes is not None:
        return len(in_modes)
    if out_modes is not None:
        return len(out_modes)
    size = weight.out_features if weight.kind == "embedding" else max(weight.out_features, weight.in_features)
    return max(3, default_order(size)) if weight.kind == "embedding" else default_order(size)
