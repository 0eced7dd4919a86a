"""How many directions attention heads may keep: entries on the menus of the two layers around them, taken together.

As for hidden units, a share of the directions costs that share of the parameters. Heads keep different numbers of
directions, since some need far fewer than others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensortrain.compression.choose.widths import Members, Width
from tensortrain.compression.narrow_heads import can_be_partial, head_moments
from tensortrain.compression.survey.heads import ValueHeads
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.formats.head_narrowing import HeadSteps, head_steps

__all__ = ["HeadWidths", "apart", "head_widths_of"]

_MOVED = 100  # multiply-adds in the time that it takes to put one number in its place
_INDEX_BYTES = 8


@dataclass(frozen=True)
class HeadWidths:
    """All numbers of directions that some heads can be left with.

    Attributes:
        steps: What each head keeps at every entry of the menus, and what that costs.
        menus: By layer name, in the same order for both.
    """

    heads: ValueHeads
    steps: HeadSteps
    menus: Mapping[str, tuple[Width, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.heads.names

    @property
    def reader(self) -> str:
        return self.heads.reader

    def kept(self, n_directions: int) -> tuple[int, ...]:
        """What each head of the values keeps of so many in all."""
        return next(widths for widths in self.steps.widths if sum(widths) == n_directions)


def apart(
    found: Sequence[ValueHeads], layers: Members, moments: Mapping[str, LayerMoments], taken: set[str]
) -> list[ValueHeads]:
    """The heads around layers that may be changed and that no others share.

    Args:
        layers: That may be changed, by name.
        moments: Of their inputs; those of the readers have to be known.
        taken: Names of layers that are narrowed at otherwise.
    """
    used, kept = set(taken), []
    for heads in found:
        known = heads.reader in moments and moments[heads.reader].gram is not None
        fit = known and all(name in layers and can_be_partial(layers[name]) for name in heads.names)
        if fit and heads.size > 1 and heads.maker != heads.reader and not used & {*heads.names}:
            used |= {*heads.names}
            kept.append(heads)
    return kept


def head_widths_of(heads: ValueHeads, layers: Members, moments: LayerMoments, *, allow_slower: bool) -> HeadWidths:
    """What every number of directions of some heads costs and loses.

    Args:
        moments: Of the reader's inputs.
        allow_slower: Also those with which the two layers take longer than they do.

    Cost: O(n^3 + m n^2) flops for n numbers of all heads and m outputs of the reader.
    """
    maker, reader = layers[heads.maker], layers[heads.reader]
    gram, outputs = head_moments(heads, maker, reader, moments)
    steps = head_steps(reader.kernel.flatten(1), gram, outputs, heads.n_groups, heads.n_heads)
    pairs = [_widths(heads, maker, reader, steps, k) for k in range(1, len(steps.widths))]
    pairs = [pair for pair in pairs if allow_slower or _is_quick(maker, reader, *pair)]
    return HeadWidths(heads, steps, {name: tuple(pair[k] for pair in pairs) for k, name in enumerate(heads.names)})


def _widths(
    heads: ValueHeads, maker: FoundLayer, reader: FoundLayer, steps: HeadSteps, step: int
) -> tuple[Width, Width]:
    """Of the two layers at one step."""
    n = sum(steps.widths[step])
    gone = heads.n_groups * heads.size - n
    bias = maker.module._parameters.get("bias")
    made, read = maker.weight.out_features - gone, heads.per_group * n
    params = made * maker.weight.in_features - (0 if bias is None else gone)
    error = steps.losses[step] / steps.worst if steps.worst > 0 else 0.0
    time = made / maker.weight.out_features, read / reader.weight.in_features
    moved = _MOVED / maker.weight.in_features, _MOVED * read / (reader.weight.out_features * reader.weight.in_features)
    return (
        Width(n, time[0], params, time=time[0] + moved[0], index_bytes=_INDEX_BYTES * made),
        Width(
            n,
            time[1],
            reader.weight.n_params * read // reader.weight.in_features,
            error,
            True,
            time=time[1] + moved[1],
            index_bytes=_INDEX_BYTES * read,
        ),
    )


def _is_quick(maker: FoundLayer, reader: FoundLayer, made: Width, read: Width) -> bool:
    before = maker.weight.n_params + reader.weight.n_params
    return made.seconds * maker.weight.n_params + read.seconds * reader.weight.n_params <= before
