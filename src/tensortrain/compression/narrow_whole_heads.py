"""Take whole attention heads out of a model: smaller dense layers, and the sizes that the code around them names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.made_up import Statistic
from tensortrain.compression.narrow import Undo, fitted, keep_channels, put, read_fewer, remember, resize
from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.compression.survey.whole_heads import WholeHeads
from tensortrain.errors import ShapeError

__all__ = ["HEAD_SIZES", "FewerHeads", "check_whole_heads", "fewer_heads", "narrow_whole_heads_"]

# Names by which the code of attention layers knows its heads, and the numbers of all of them.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_NUMBERS = ("all_head_size", "split_size", "inner_dim")
HEAD_SIZES = (*_HEADS, *_GROUPS, *_NUMBERS)


@dataclass(frozen=True)
class FewerHeads:
    """What a model needs to do with fewer heads: those that remain, and the layer that reads them fitted anew."""

    heads: WholeHeads
    kept: tuple[int, ...]
    weight: Tensor
    bias_shift: Tensor | None = None


@torch.no_grad()
def fewer_heads(
    model: nn.Module,
    heads: WholeHeads,
    kept: Sequence[int],
    layers: Mapping[str, FoundLayer],
    moments: LayerMoments,
) -> tuple[FewerHeads, list[Statistic]]:
    """The reader of some heads, fitted to its old outputs from those that remain; nothing is changed.

    Args:
        kept: Numbers of the groups that remain.
        layers: Of the model, by name.
        moments: Of what the reader was given.

    Returns:
        The heads that remain, and statistics of a batch norm that are still to be changed.

    Raises:
        ShapeError: The model lacks one of the layers, or has other sizes.
    """
    check_whole_heads(heads, layers)
    read = HiddenUnits((), (), heads.reader, heads.n_read)
    fit = fitted(model, read, heads.read(kept), layers, moments)
    return FewerHeads(heads, tuple(kept), fit.weight, fit.bias_shift), fit.statistics


@torch.no_grad()
def narrow_whole_heads_(model: nn.Module, fewer: FewerHeads) -> Undo:
    """Leave only some heads in a model, in place; layers stay the objects that they are.

    Returns:
        A function that puts everything back.
    """
    heads, n = fewer.heads, len(fewer.kept)
    around = {name.rpartition(".")[0] for name in heads.names}
    undo = [remember(model.get_submodule(name)) for name in (*heads.names, *around)]
    for name in heads.makers:
        maker: Any = model.get_submodule(name)
        n_outputs = maker.weight.shape[1] if hasattr(maker, "nf") else maker.weight.shape[0]
        made = torch.tensor(heads.made(name, n_outputs, fewer.kept))
        keep_channels(maker, made, n_outputs)
    reader = model.get_submodule(heads.reader)
    read_fewer(reader, fewer.weight)
    if fewer.bias_shift is not None:
        old = reader.bias
        assert isinstance(old, Tensor)
        put(reader, "bias", old + fewer.bias_shift.to(old.device, old.dtype))
    for name in around:
        part = model.get_submodule(name)
        for size, value in list(_sizes(part, heads)):
            resize(part, [size], value // heads.n_groups * n)

    def back() -> None:
        for one in undo:
            one()

    return back


def _sizes(part: nn.Module, heads: WholeHeads) -> Iterator[tuple[str, int]]:
    """Attributes of a module that count heads, or their numbers."""
    n_heads = heads.n_groups * heads.per_group
    known = dict.fromkeys(_HEADS, n_heads) | dict.fromkeys(_GROUPS, heads.n_groups)
    known |= dict.fromkeys(_NUMBERS, n_heads * heads.size)
    return ((name, value) for name, value in known.items() if vars(part).get(name) == value)


def check_whole_heads(heads: WholeHeads, layers: Mapping[str, FoundLayer]) -> None:
    """Raise ``ShapeError`` where a model lacks one of the layers around some heads, or has other sizes."""
    sizes = {one.maker: one.of(heads.n_groups - 1).stop for one in heads.rows} | {heads.reader: heads.n_read}
    for name, size in sizes.items():
        shape = layers[name].weight if name in layers else None
        is_reader = name == heads.reader
        found = None if shape is None else shape.in_features if is_reader else shape.out_features
        if found is None or found < size or (is_reader and found != size):
            where = "lacks it" if found is None else f"has {found}"
            raise ShapeError(
                f"a plan must fit its model: it counts {size} numbers of attention heads at layer {name!r}, the model "
                f"{where}. Plan again on this model. Nothing was changed."
            )
