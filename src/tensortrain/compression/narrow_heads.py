"""Take directions out of attention heads: a smaller value map and a smaller map after the heads.

The sizes that the model's own code sees stay as they are, so that it goes on running as it does, its cache included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.carry import cannot_carry, carry
from tensortrain.compression.made_up import Statistic, make_up
from tensortrain.compression.survey.heads import ValueHeads
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.compression.swap import Built
from tensortrain.errors import ShapeError
from tensortrain.formats.head_narrowing import head_bases, refit_heads
from tensortrain.formats.narrowing import shrunk
from tensortrain.nn import PartialLinear

__all__ = ["can_be_partial", "check_heads", "head_moments", "narrowed_heads", "partial_maps"]

_LITTLE = 1e-6  # of the mean diagonal: moments that follow from weights alone are as exact as these


@torch.no_grad()
def narrowed_heads(
    model: nn.Module,
    heads: ValueHeads,
    kept: Sequence[int],
    layers: Mapping[str, FoundLayer],
    moments: LayerMoments,
) -> tuple[list[Built], list[Statistic]]:
    """The two maps around some heads with fewer directions, fitted to the old outputs; nothing is changed.

    Args:
        kept: How many directions each head of the values keeps.
        layers: Of the model, by name.
        moments: Of what the reader was given; without them those of values of inputs that are all alike.

    Returns:
        The new layers, and statistics of a batch norm after them that are still to be changed.

    Raises:
        ShapeError: The model lacks one of the layers, or has other sizes.
    """
    check_heads(heads, layers)
    maker, reader = layers[heads.maker], layers[heads.reader]
    old = reader.kernel.flatten(1)
    gram, outputs = head_moments(heads, maker, reader, moments)
    bases = head_bases(old, gram, outputs, heads.n_heads, kept)
    weight, chosen = refit_heads(old, gram, bases, heads.n_heads)
    shift: Tensor | None = None
    statistics: list[Statistic] = []
    if moments.mean is not None:
        has_bias = reader.module._parameters.get("bias") is not None
        shift, statistics = make_up(model, old, weight @ chosen, moments, has_bias=has_bias)
        shift = shift if has_bias else None
    moments.forget_derived()
    return partial_maps(heads, bases, maker, reader, weight, shift), statistics


def head_moments(
    heads: ValueHeads, maker: FoundLayer, reader: FoundLayer, moments: LayerMoments
) -> tuple[Tensor, Tensor | None]:
    """Second moment of the heads' outputs, and the weight of the reader's outputs, both positive definite."""
    device, gram, outputs = reader.kernel.device, moments.gram, moments.output_gram
    if gram is None:
        return _of_values(heads, maker), None
    full = torch.diag(gram) if gram.ndim == 1 else gram
    if outputs is not None:
        outputs = shrunk(torch.diag(outputs) if outputs.ndim == 1 else outputs).to(device)
    return shrunk(full).to(device), outputs


def _of_values(heads: ValueHeads, maker: FoundLayer) -> Tensor:
    """Second moment of heads that hand on values of inputs that are all alike: head by head, as nothing is mixed."""
    rows = maker.kernel.double()
    blocks = [rows[list(heads.made(head // heads.per_group))] for head in range(heads.n_heads)]
    return shrunk(torch.block_diag(*(block @ block.mT for block in blocks)), _LITTLE)


def partial_maps(
    heads: ValueHeads,
    bases: Sequence[Tensor],
    maker: FoundLayer,
    reader: FoundLayer,
    weight: Tensor,
    bias_shift: Tensor | None = None,
) -> list[Built]:
    """New layers for what the heads keep.

    Args:
        bases: ``(k, size)`` by head of the values.
        weight: Of the reader, ``(outputs, K)``.
    """
    read = [heads.read(head)[k] for head in range(heads.n_heads) for k in range(len(bases[head // heads.per_group]))]
    rows, made = _turned_rows(heads, bases, maker)
    bias = maker.module._parameters.get("bias")
    turned = None if bias is None else (rows @ bias.double())
    new_maker = _like(maker, rows @ maker.kernel.double(), turned, made=made)
    own = reader.module._parameters.get("bias")
    shifted = None if own is None else own.double() + (0 if bias_shift is None else bias_shift.to(own.device))
    new_reader = _like(reader, weight, shifted, read=read)
    return [(maker.names, maker.module, new_maker), (reader.names, reader.module, new_reader)]


def _turned_rows(heads: ValueHeads, bases: Sequence[Tensor], maker: FoundLayer) -> tuple[Tensor, list[int]]:
    """What the maker's outputs have to be multiplied by, and the numbers of those that remain."""
    n = maker.weight.out_features
    values = {k for g in range(heads.n_groups) for k in heads.made(g)}
    rows = torch.eye(n, dtype=torch.float64, device=maker.kernel.device)
    made = [k for k in range(n) if k not in values]
    for g, base in enumerate(bases):
        places = heads.made(g)
        here = list(places)[: len(base)]
        rows[here] = 0
        rows[here[0] : here[-1] + 1, places.start : places.stop] = base.to(rows.device)
        made += here
    made.sort()
    return rows[made], made


def _like(
    layer: FoundLayer,
    weight: Tensor,
    bias: Tensor | None,
    *,
    read: Sequence[int] | None = None,
    made: Sequence[int] | None = None,
) -> PartialLinear:
    """A partial layer in the place of a dense one, with what hangs on that."""
    old: Any = layer.module
    shape = layer.weight
    read = None if read is None or len(read) == shape.in_features else read
    made = None if made is None or len(made) == shape.out_features else made
    how = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = PartialLinear(shape.in_features, shape.out_features, bias is not None, read=read, made=made, **how)
    new.weight.copy_(weight)
    new.weight.requires_grad_(old.weight.requires_grad)
    if bias is not None:
        new.bias.copy_(bias)
        new.bias.requires_grad_(old.bias.requires_grad)
    carry(old, new)
    return new.train(old.training)


def can_be_partial(layer: FoundLayer) -> bool:
    """Whether a partial layer can take the place of one, with all that hangs on it."""
    return layer.weight.kind == "linear" and not cannot_carry(layer.module, to=PartialLinear)


def check_heads(heads: ValueHeads, layers: Mapping[str, FoundLayer]) -> None:
    """Raise ``ShapeError`` where a model lacks one of the layers around some heads, or has other sizes."""
    sizes = {heads.maker: heads.made(heads.n_groups - 1).stop, heads.reader: heads.n_heads * heads.size}
    for name, size in sizes.items():
        shape = layers[name].weight if name in layers else None
        found = None if shape is None else shape.in_features if name == heads.reader else shape.out_features
        if found is None or found < size or (name == heads.reader and found != size):
            where = "lacks it" if found is None else f"has {found}"
            raise ShapeError(
                f"a plan must fit its model: it counts {size} numbers of attention heads at layer {name!r}, the model "
                f"{where}. Plan again on this model. Nothing was changed."
            )
