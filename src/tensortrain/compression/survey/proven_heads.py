"""Attention heads that a model really can do with fewer directions of: tried on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.narrow_heads import partial_maps, partial_pairs, partial_scores
from tensortrain.compression.survey.heads import AttentionHeads, find_heads
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven import Kind, proven
from tensortrain.compression.swap import swap
from tensortrain.formats.rotary_pairs import Pairing, pairs_of

__all__ = ["proven_heads"]

_PAIRINGS: tuple[Pairing, ...] = ("halves", "neighbours")


def proven_heads(
    model: nn.Module,
    calibration: Calibration,
    layers: Mapping[str, FoundLayer],
    choose: Callable[[list[AttentionHeads]], list[AttentionHeads]],
    notes: list[str],
) -> list[AttentionHeads]:
    """Attention heads that directions can be taken out of: found by gradients, and tried on a batch.

    Half of the directions, at random, are taken out for a moment: the model has to give what it gives where the
    reader sees the heads' outputs without these. So it does if attention does the same to all numbers of a value, and
    nothing else sees them; not where a norm, say, follows the heads. Of keys and queries both have to go for what goes
    where the keys alone are without them, and a shift of all keys has to change nothing: not so where positions turn
    them.

    Args:
        model: As before afterwards.
        layers: Those of ``choose``, by name.
        choose: Heads that are worth trying, of all found; no two of them around one layer.
        notes: Takes in why nothing was found, where that was an error.

    Cost: ``find_heads`` in eval and in train mode, and two forward passes, on two examples; two more for each
    pair of layers where some of them fail.
    """
    kind = Kind("Attention heads", find_heads, _projected, partial(_narrowed, layers=layers))
    found, left = proven(model, calibration, kind, choose, notes)
    turned = [one for one in left if one.kind == "scores" and one.size % 2 == 0]
    for pairing in _PAIRINGS if turned else ():
        pairs = [replace(one, kind=pairing) for one in turned]
        in_pairs = replace(kind, what="Rotary pairs", find=lambda *_, pairs=pairs, **__: pairs)
        more, _ = proven(model, calibration, in_pairs, list, notes)
        found += more
        turned = [one for one in turned if replace(one, kind=pairing) not in more]
    return found


def _half(heads: AttentionHeads) -> list[Tensor]:
    """Orthonormal rows of half of every head's directions, at random but the same each time; of pairs, some whole."""
    if heads.pairing is not None:
        pairs = pairs_of(heads.size, heads.pairing)
        return [
            _one_hot(pairs[group % 2 :: 2] if len(pairs) > 1 else pairs, heads.size) for group in range(heads.n_groups)
        ]
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(heads.n_groups, heads.size, heads.size, generator=generator, dtype=torch.float64)
    n = max(1, heads.size // 2)
    return [one.mT for one in torch.linalg.qr(squares)[0][..., :n]]


def _one_hot(numbers: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[numbers.flatten().sort().values]


@contextmanager
def _projected(model: nn.Module, found: Sequence[AttentionHeads]) -> Iterator[None]:
    """Nothing of the rest of the directions is handed on."""
    with ExitStack() as stack:
        for heads in found:
            own = _half(heads)
            if heads.kind == "values":
                hook = _projection(_wide(heads, own))
                handle = model.get_submodule(heads.reader).register_forward_pre_hook(hook)
            else:
                hook = _projected_keys(torch.block_diag(*own), shift=heads.pairing is None)
                handle = model.get_submodule(heads.maker).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def _wide(heads: AttentionHeads, bases: Sequence[Tensor]) -> Tensor:
    """What all heads of the outputs keep, ``(K, n)``."""
    return torch.block_diag(*(base for base in bases for _ in range(heads.per_group)))


def _projection(chosen: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args:
            return None
        matrix = (chosen.mT @ chosen).to(args[0].device, args[0].dtype)
        return (args[0] @ matrix, *args[1:])

    return hook


def _projected_keys(chosen: Tensor, *, shift: bool) -> Callable[..., Any]:
    """Keys without some directions, and all of them shifted alike if asked for."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        matrix = (chosen.mT @ chosen).to(output.device, output.dtype)
        return output @ matrix + (matrix.sum(dim=0) / len(matrix) ** 0.5 if shift else 0)

    return hook


@contextmanager
def _narrowed(model: nn.Module, found: Sequence[AttentionHeads], layers: Mapping[str, FoundLayer]) -> Iterator[None]:
    built = []
    for heads in found:
        own = _half(heads)
        maker, reader = layers[heads.maker], layers[heads.reader]
        device = reader.kernel.device
        if heads.pairing is not None:
            numbers = [base.argmax(dim=1).tolist() for base in own]
            built += partial_pairs(heads, numbers, maker, reader)
            continue
        if heads.kind == "scores":
            turned = [base.to(device) for base in own]
            built += partial_scores(heads, turned, turned, maker, reader)
            continue
        weight = reader.kernel.double() @ _wide(heads, own).mT.to(device)
        built += partial_maps(heads, [base.to(device) for base in own], maker, reader, weight)
    swap(model, built)
    try:
        yield
    finally:
        swap(model, [(names, new, old) for names, old, new in built])
