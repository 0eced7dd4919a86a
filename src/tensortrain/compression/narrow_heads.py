"""Take directions out of attention heads: smaller maps of values and after the heads, of keys and of queries.

The sizes that the model's own code sees stay as they are, so that it goes on running as it does, its cache included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.carry import cannot_carry, carry
from tensortrain.compression.made_up import Statistic, make_up
from tensortrain.compression.survey.heads import AttentionHeads
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.compression.swap import Built
from tensortrain.errors import ShapeError
from tensortrain.formats.head_narrowing import head_bases, refit_heads, score_bases
from tensortrain.formats.narrowing import SHRINKAGE, shrunk
from tensortrain.formats.rotary_pairs import kept_pairs
from tensortrain.formats.weighting import times_moment
from tensortrain.nn import PartialLinear

__all__ = [
    "can_be_partial",
    "check_heads",
    "head_moments",
    "narrowed_heads",
    "partial_maps",
    "partial_pairs",
    "partial_scores",
    "score_moments",
]

_NOTHING = 1e-30
_LITTLE = 1e-6  # of the mean diagonal: moments that follow from weights alone are as exact as these


@torch.no_grad()
def narrowed_heads(
    model: nn.Module,
    heads: AttentionHeads,
    kept: Sequence[int],
    layers: Mapping[str, FoundLayer],
    moments: LayerMoments,
) -> tuple[list[Built], list[Statistic]]:
    """The two maps around some heads with fewer directions, fitted to the old outputs; nothing is changed.

    Args:
        kept: How many directions each head of the maker keeps.
        layers: Of the model, by name.
        moments: Of ``heads.judged``; without them as if all inputs were alike.

    Returns:
        The new layers, and statistics of a batch norm after them that are still to be changed.

    Raises:
        ShapeError: The model lacks one of the layers, or has other sizes.
    """
    check_heads(heads, layers)
    maker, reader = layers[heads.maker], layers[heads.reader]
    if heads.pairing is not None:
        pairing, both = heads.pairing, zip(*score_moments(heads, maker, reader, moments), kept, strict=True)
        numbers = [kept_pairs(key, gradient, pairing, k) for key, gradient, k in both]
        return partial_pairs(heads, numbers, maker, reader), []
    if heads.kind == "scores":
        keys, queries = score_bases(*score_moments(heads, maker, reader, moments), kept)
        return partial_scores(heads, keys, queries, maker, reader), []
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
    heads: AttentionHeads, maker: FoundLayer, reader: FoundLayer, moments: LayerMoments
) -> tuple[Tensor, Tensor | None]:
    """Second moment of the heads' outputs, and the weight of the reader's outputs, both positive definite."""
    device, gram, outputs = reader.kernel.device, moments.gram, moments.output_gram
    if gram is None:
        return _of_values(heads, maker), None
    full = torch.diag(gram) if gram.ndim == 1 else gram
    if outputs is not None:
        outputs = shrunk(torch.diag(outputs) if outputs.ndim == 1 else outputs).to(device)
    return shrunk(full).to(device), outputs


def score_moments(
    heads: AttentionHeads, maker: FoundLayer, reader: FoundLayer, moments: LayerMoments
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each head's keys: their second moment, and that of the gradients that come to them, positive definite.

    Args:
        maker, reader: Of the keys and of the queries.
        moments: Of the keys' layer.
    """
    keys, queries = maker.kernel.double(), reader.kernel.double()
    given = None if moments.gram is None else moments.gram.to(keys.device)
    found, gradients = [], []
    for group in range(heads.n_groups):
        rows = keys[list(heads.made(group))]
        found.append(times_moment(rows, given) @ rows.mT)
        gradients.append(_of_head(heads, group, queries, moments.output_gram))
    return found, gradients


def _of_head(heads: AttentionHeads, group: int, queries: Tensor, outputs: Tensor | None) -> Tensor:
    """Second moment of the gradients of a head's keys; that of queries of inputs that are all alike without them."""
    if outputs is None:
        own = range(group * heads.per_group, (group + 1) * heads.per_group)
        blocks = [queries[list(heads.read(head))] for head in own]
        return _positive(torch.stack([block @ block.mT for block in blocks]).sum(dim=0), _LITTLE)
    places = list(heads.made(group))
    full = torch.diag(outputs[places]) if outputs.ndim == 1 else outputs[places][:, places]
    return _positive(full.to(queries.device))


def _positive(moment: Tensor, share: float = SHRINKAGE) -> Tensor:
    """Shrunk; a little of the identity for a head that nothing comes from, so that it costs next to nothing."""
    if not bool(moment.diagonal().sum() > 0):
        return _NOTHING * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return shrunk(moment, share)


def _of_values(heads: AttentionHeads, maker: FoundLayer) -> Tensor:
    """Second moment of heads that hand on values of inputs that are all alike: head by head, as nothing is mixed."""
    rows = maker.kernel.double()
    blocks = [rows[list(heads.made(head // heads.per_group))] for head in range(heads.n_heads)]
    return _positive(torch.block_diag(*(block @ block.mT for block in blocks)), _LITTLE)


def partial_maps(
    heads: AttentionHeads,
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
    new_maker = _turned(maker, [heads.made(group) for group in range(heads.n_groups)], bases)
    own = reader.module._parameters.get("bias")
    shifted = None if own is None else own.double() + (0 if bias_shift is None else bias_shift.to(own.device))
    new_reader = _like(reader, weight, shifted, read=read)
    return [new_maker, (reader.names, reader.module, new_reader)]


def partial_scores(
    heads: AttentionHeads,
    keys: Sequence[Tensor],
    queries: Sequence[Tensor],
    maker: FoundLayer,
    reader: FoundLayer,
) -> list[Built]:
    """New layers of keys and queries for what their heads keep: matrices ``(k, size)`` by head of the keys."""
    own = [heads.made(group) for group in range(heads.n_groups)]
    each = [heads.read(head) for head in range(heads.n_heads)]
    repeated = [queries[head // heads.per_group] for head in range(heads.n_heads)]
    return [_turned(maker, own, keys), _turned(reader, each, repeated)]


def partial_pairs(
    heads: AttentionHeads, numbers: Sequence[Sequence[int]], maker: FoundLayer, reader: FoundLayer
) -> list[Built]:
    """New layers of keys and queries that make some numbers of their heads, by head of the keys, as they were."""
    keys = [places[k] for group, some in enumerate(numbers) for places in [heads.made(group)] for k in some]
    queries = [heads.read(head)[k] for head in range(heads.n_heads) for k in numbers[head // heads.per_group]]
    own = {k for group in range(heads.n_groups) for k in heads.made(group)}
    keys += [k for k in range(maker.weight.out_features) if k not in own]
    return [_making(maker, sorted(keys)), _making(reader, sorted(queries))]


def _making(layer: FoundLayer, made: Sequence[int]) -> Built:
    bias = layer.module._parameters.get("bias")
    rows = list(made)
    return layer.names, layer.module, _like(layer, layer.kernel[rows], None if bias is None else bias[rows], made=rows)


def _turned(layer: FoundLayer, places: Sequence[range], bases: Sequence[Tensor]) -> Built:
    """A layer that makes fewer numbers of some heads, in another basis."""
    rows, made = _turned_rows(places, bases, layer)
    bias = layer.module._parameters.get("bias")
    turned = None if bias is None else rows @ bias.double()
    return layer.names, layer.module, _like(layer, rows @ layer.kernel.double(), turned, made=made)


def _turned_rows(heads: Sequence[range], bases: Sequence[Tensor], layer: FoundLayer) -> tuple[Tensor, list[int]]:
    """What a layer's outputs have to be multiplied by, and the numbers of those that remain."""
    n = layer.weight.out_features
    inside = {k for places in heads for k in places}
    rows = torch.eye(n, dtype=torch.float64, device=layer.kernel.device)
    made = [k for k in range(n) if k not in inside]
    for places, base in zip(heads, bases, strict=True):
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


def check_heads(heads: AttentionHeads, layers: Mapping[str, FoundLayer]) -> None:
    """Raise ``ShapeError`` where a model lacks one of the layers around some heads, or has other sizes."""
    sizes = {heads.maker: heads.made(heads.n_groups - 1).stop, heads.reader: heads.n_heads * heads.size}
    for name, size in sizes.items():
        shape = layers[name].weight if name in layers else None
        reads = name == heads.reader and heads.kind == "values"
        found = None if shape is None else shape.in_features if reads else shape.out_features
        if found is None or found < size or (name == heads.reader and found != size):
            where = "lacks it" if found is None else f"has {found}"
            raise ShapeError(
                f"a plan must fit its model: it counts {size} numbers of attention heads at layer {name!r}, the model "
                f"{where}. Plan again on this model. Nothing was changed."
            )
