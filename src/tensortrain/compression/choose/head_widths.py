"""How many directions attention heads may keep: entries on the menus of the two layers that meet there, taken together.

As for hidden units, a share of the directions costs that share of the parameters. Heads keep different numbers of
directions, since some need far fewer than others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensortrain.compression.choose.widths import JointWidths, Members, Width
from tensortrain.compression.narrow_heads import can_be_partial, head_moments, score_moments
from tensortrain.compression.survey.heads import AttentionHeads
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.formats.head_narrowing import HeadSteps, head_steps, score_steps
from tensortrain.formats.rotary_pairs import pair_steps

__all__ = ["HeadWidths", "apart", "head_widths_of"]

_MOVED = 40  # multiply-adds in the time that it takes to put one number in its place, as seen on two cores
_INDEX_BYTES = 8


@dataclass(frozen=True)
class HeadWidths(JointWidths[AttentionHeads, HeadSteps]):
    """All numbers of directions that some heads can be left with; ``order`` says what each head keeps at every step."""

    def kept(self, n_units: int) -> tuple[int, ...]:
        """What each head of the maker keeps of so many directions in all."""
        return next(widths for widths in self.order.widths if sum(widths) == n_units)


def apart(
    found: Sequence[AttentionHeads], layers: Members, moments: Mapping[str, LayerMoments], taken: set[str]
) -> list[AttentionHeads]:
    """The heads around layers that may be changed and that no others share.

    Args:
        layers: That may be changed, by name.
        moments: Of their inputs; those of the layers where errors are told have to be known.
        taken: Names of layers that are narrowed at otherwise.
    """
    used, kept = set(taken), []
    for heads in found:
        known = heads.judged in moments and moments[heads.judged].gram is not None
        fit = known and all(name in layers and can_be_partial(layers[name]) for name in heads.names)
        if fit and heads.size > 1 and heads.maker != heads.reader and not used & {*heads.names}:
            used |= {*heads.names}
            kept.append(heads)
    return kept


def head_widths_of(heads: AttentionHeads, layers: Members, moments: LayerMoments, *, allow_slower: bool) -> HeadWidths:
    """What every number of directions of some heads costs and loses.

    Args:
        moments: Of ``heads.judged``.
        allow_slower: Also those with which the two layers take longer than they do.

    Cost: O(n^3 + m n^2) flops for n numbers of all heads and m outputs of the reader.
    """
    maker, reader = layers[heads.maker], layers[heads.reader]
    steps = _steps(heads, maker, reader, moments)
    widths = _value_widths if heads.kind == "values" else _score_widths
    pairs = [widths(heads, maker, reader, steps, k) for k in range(1, len(steps.widths))]
    pairs = [pair for pair in pairs if allow_slower or _is_quick(maker, reader, *pair)]
    return HeadWidths(heads, steps, {name: tuple(pair[k] for pair in pairs) for k, name in enumerate(heads.names)})


def _steps(heads: AttentionHeads, maker: FoundLayer, reader: FoundLayer, moments: LayerMoments) -> HeadSteps:
    if heads.pairing is not None:
        return pair_steps(*score_moments(heads, maker, reader, moments), heads.pairing)
    if heads.kind == "scores":
        return score_steps(*score_moments(heads, maker, reader, moments))
    gram, outputs = head_moments(heads, maker, reader, moments)
    return head_steps(reader.kernel.flatten(1), gram, outputs, heads.n_groups, heads.n_heads)


def _value_widths(
    heads: AttentionHeads, maker: FoundLayer, reader: FoundLayer, steps: HeadSteps, step: int
) -> tuple[Width, Width]:
    """Of the layer of the values and of their reader at one step."""
    n, error = sum(steps.widths[step]), _relative(steps, step)
    read, inputs = heads.per_group * n, reader.weight.in_features
    moved = _MOVED * read / (reader.weight.out_features * inputs)
    n_params = reader.weight.n_params * read // inputs
    at_reader = Width(
        n, read / inputs, n_params, error, True, time=read / inputs + moved, index_bytes=_INDEX_BYTES * read
    )
    return _made(maker, n, heads.n_groups * heads.size - n), at_reader


def _score_widths(
    heads: AttentionHeads, maker: FoundLayer, reader: FoundLayer, steps: HeadSteps, step: int
) -> tuple[Width, Width]:
    """Of the layers of the keys and of the queries at one step."""
    n = sum(steps.widths[step])
    gone = heads.n_groups * heads.size - n
    keys = _made(maker, n, gone, error=_relative(steps, step), judges=True)
    return keys, _made(reader, n, heads.per_group * gone)


def _relative(steps: HeadSteps, step: int) -> float:
    return steps.losses[step] / steps.worst if steps.worst > 0 else 0.0


def _made(layer: FoundLayer, n: int, gone: int, *, error: float = 0.0, judges: bool = False) -> Width:
    """Of a layer that makes fewer numbers, beside others that stay."""
    outputs, inputs = layer.weight.out_features, layer.weight.in_features
    made = outputs - gone
    n_params = made * inputs - (0 if layer.module._parameters.get("bias") is None else gone)
    time = made / outputs + _MOVED / inputs
    return Width(n, made / outputs, n_params, error, judges=judges, time=time, index_bytes=_INDEX_BYTES * made)


def _is_quick(maker: FoundLayer, reader: FoundLayer, first: Width, second: Width) -> bool:
    before = maker.weight.n_params + reader.weight.n_params
    return first.seconds * maker.weight.n_params + second.seconds * reader.weight.n_params <= before
