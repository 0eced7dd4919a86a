"""How many whole heads an attention may keep: entries on the menus of the layers around them, taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tensortrain.compression.choose.widths import JointWidths, Members, Width
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.compression.survey.whole_heads import WholeHeads
from tensortrain.formats.narrowing import Narrowing, narrowing_of_blocks, shrunk

__all__ = ["WholeHeadWidths", "apart_whole", "whole_head_widths_of"]


@dataclass(frozen=True)
class WholeHeadWidths(JointWidths[WholeHeads, Narrowing]):
    """All numbers of groups of heads that an attention can be left with."""

    def kept(self, n_units: int) -> tuple[int, ...]:
        """Numbers of the groups that are best kept."""
        return tuple(self.order.kept(n_units).tolist())


def apart_whole(found: Sequence[WholeHeads], layers: Members, moments: Mapping[str, LayerMoments]) -> list[WholeHeads]:
    """The heads around layers that may be changed and that no others share.

    Args:
        layers: That may be changed, by name.
        moments: Of their inputs; those of the readers have to be known.
    """
    used: set[str] = set()
    kept = []
    for heads in found:
        known = heads.reader in moments and moments[heads.reader].gram is not None
        if known and all(name in layers for name in heads.names) and not used & {*heads.names}:
            used |= {*heads.names}
            kept.append(heads)
    return kept


def whole_head_widths_of(heads: WholeHeads, layers: Members, moments: LayerMoments) -> WholeHeadWidths:
    """What every number of heads costs and loses.

    Args:
        moments: Of the reader's inputs.

    Cost: O(n^3 + m n^2) flops for n numbers of all heads and m outputs of the reader.
    """
    reader = layers[heads.reader]
    gram, outputs = moments.gram, moments.output_gram
    assert gram is not None
    gram = shrunk((torch.diag(gram) if gram.ndim == 1 else gram).to(reader.kernel.device), moments.outside)
    outputs = torch.diag(outputs) if outputs is not None and outputs.ndim == 1 else outputs
    outputs = None if outputs is None else shrunk(outputs.to(reader.kernel.device))
    blocks = [heads.read([group]) for group in range(heads.n_groups)]
    order = narrowing_of_blocks(reader.kernel.flatten(1), gram, outputs, blocks)
    widths = range(1, heads.n_groups)
    menus = {name: tuple(_made(heads, layers[name], k) for k in widths) for name in heads.makers}
    menus[heads.reader] = tuple(_read(heads, reader, order, k) for k in widths)
    return WholeHeadWidths(heads, order, menus)


def _made(heads: WholeHeads, layer: FoundLayer, k: int) -> Width:
    n = layer.weight.out_features
    made = len(heads.made(layer.name, n, range(k)))
    has_bias = layer.module._parameters.get("bias") is not None
    return Width(k, made / n, made * layer.weight.in_features - (n - made) * has_bias, with_bias=True)


def _read(heads: WholeHeads, reader: FoundLayer, order: Narrowing, k: int) -> Width:
    worst = float(order.losses[-1])
    error = order.loss(k) / worst if worst > 0 else 0.0
    n_params = reader.weight.n_params * k // heads.n_groups
    return Width(k, k / heads.n_groups, n_params, error, True, with_bias=True)
