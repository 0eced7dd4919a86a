"""Cut the ranks of trained layers: dead indices, a tolerance, or ranks that the caller names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from tensortrain.cores.canonical import singular_values_at
from tensortrain.cores.rounding import round_cores
from tensortrain.errors import RankError, ShapeError
from tensortrain.formats import FactorSpec
from tensortrain.nn.adaptive.budget import checked_budget, sizes_within
from tensortrain.nn.adaptive.gates import fold_gates_
from tensortrain.nn.adaptive.indices import (
    CLEARLY,
    bond_ranks,
    bonds,
    check_can_resize,
    from_train,
    is_train,
    layers_with_bonds,
    present,
    scores,
    set_cores_,
    spec_with,
    take_indices,
    to_train,
    turned,
)
from tensortrain.nn.base import FactorizedLayer

__all__ = ["effective_ranks", "prune_ranks_"]

Model = TypeVar("Model", bound=nn.Module)
Ranks = int | Sequence[int] | Mapping[str, int | Sequence[int]]


@torch.no_grad()
def prune_ranks_(
    model: Model, rel_error: float | None = None, ranks: Ranks | None = None, *, budget: float | None = None
) -> Model:
    r"""Cut the ranks of every factorized layer, in place.

    Without further arguments what a prior or gates have emptied goes: gates are multiplied into the cores and taken
    off, indices whose size ``prod_k ||G_k[.., r, ..]||`` is below a hundredth of the largest one of their bond are
    dropped, and trains are rounded, so that a bond holds no direction below a hundredth of its largest singular
    value.

    Args:
        model: Any module with factorized layers, or one of them.
        rel_error: Round every layer to this relative Frobenius error instead: of its weight, or, where modes are padded
            or rows kept exactly beside the cores, of the train that holds it.
        ranks: Cut to these ranks instead: one number for all, a tuple, or a mapping from layer names to either
            (layers it does not name keep their ranks).
        budget: After what is dead, cut on until the cores of all layers together store so many parameters: a number,
            or a share in (0, 1) of those at present. The rank index goes first whose share of its layer's squared
            norm is least for what it stores.

    Returns:
        The same model. The cores are new parameters: an optimizer must be made anew.

    Raises:
        KindError: There is no factorized layer, one whose format does not tell where its ranks are, or one with
            constrained cores.
        RankError: A rank below one, a tuple of another length, ``rel_error`` outside [0, 1), or a budget that is not
            positive or too small for cores of rank 1.
        ShapeError: A name that is none of the model's layers, or two of the arguments at once.

    Cost: O(d r^3 n) flops for a train; formats without a rounding of their own are fitted anew from the dense weight.
    Source: score: the sizes of rank indices; rounding: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, algorithm 2.

    Example:
        >>> layer = prune_ranks_(tensortrain.nn.Linear(64, 64, rank=8), ranks=3)
        >>> max(layer.ranks)
        3
    """
    named = layers_with_bonds(model, "prune_ranks_")
    _check(rel_error, ranks, budget, [name for name, _ in named])
    asked = {name: _asked(name, layer, ranks) for name, layer in named}
    for name, layer in named:
        check_can_resize(model, name, layer)
    goal = None if budget is None else checked_budget([layer for _, layer in named], budget)
    fold_gates_(model)
    for name, layer in named:
        wanted = asked[name]
        if wanted is not None:
            spec, cores = _cut_to(layer, wanted)
        elif ranks is not None:
            continue
        else:
            spec, cores = _without_dead(layer) if rel_error is None else _within(layer, rel_error)
        set_cores_(model, layer, spec, cores)
    if goal is not None:
        for (_, layer), sizes in zip(named, sizes_within([layer for _, layer in named], goal), strict=True):
            set_cores_(model, layer, *_cut_to(layer, sizes))
    return model


@torch.no_grad()
def effective_ranks(layer: FactorizedLayer) -> tuple[int, ...]:
    """The ranks that ``prune_ranks_`` would leave a layer."""
    return _without_dead(layer)[0].ranks


# -- ways to cut -------------------------------------------------------------------------------------------


def _without_dead(layer: FactorizedLayer) -> tuple[FactorSpec, Sequence[Tensor]]:
    found = bonds(layer.spec)
    cores = list(layer.core_list() if is_train(layer) else turned(layer))
    for bond in found:
        cores = take_indices(cores, bond, present(cores, bond).nonzero()[:, 0])
    spec = spec_with(layer.spec, [cores[core].shape[axis] for (core, axis), *_ in found])
    return _rounded(layer, spec, cores, weak=CLEARLY) if is_train(layer) else (spec, cores)


def _within(layer: FactorizedLayer, rel_error: float) -> tuple[FactorSpec, Sequence[Tensor]]:
    if is_train(layer):
        return _rounded(layer, layer.spec, layer.core_list(), eps=rel_error)
    dense = layer.format.to_dense(layer.core_list(), layer.spec)
    fit = layer.format.fit(dense, layer.spec, eps=rel_error)
    return fit.spec, list(fit.cores)


def _cut_to(layer: FactorizedLayer, sizes: Sequence[int]) -> tuple[FactorSpec, Sequence[Tensor]]:
    if is_train(layer):
        return _rounded(layer, layer.spec, layer.core_list(), max_rank=(1, *sizes, 1))
    cores = list(layer.core_list())
    for bond, size in zip(bonds(layer.spec), sizes, strict=True):
        kept = scores(cores, bond).topk(min(size, cores[bond[0][0]].shape[bond[0][1]])).indices.sort().values
        cores = take_indices(cores, bond, kept)
    return spec_with(layer.spec, [cores[core].shape[axis] for (core, axis), *_ in bonds(layer.spec)]), cores


def _rounded(
    layer: FactorizedLayer,
    spec: FactorSpec,
    cores: Sequence[Tensor],
    *,
    eps: float | None = None,
    max_rank: Sequence[int] | None = None,
    weak: float | None = None,
) -> tuple[FactorSpec, Sequence[Tensor]]:
    """A train rounded to a tolerance, to ranks, or to the singular values above a share of the largest of a bond."""
    train = to_train(layer, spec, cores)
    if weak is not None:
        max_rank = (1, *_strong(train, weak), 1)
    done = round_cores(train, (0, len(train) - 1), eps=eps or 0.0, max_rank=max_rank)
    return from_train(layer, spec, done.cores)


def _strong(train: Sequence[Tensor], share: float) -> list[int]:
    """How many singular values at each bond lie above a share of the largest one."""
    values = [singular_values_at(train, (0, len(train) - 1), bond)[0] for bond in range(1, len(train))]
    return [max(1, int((some > share * some.max()).sum())) for some in values]


# -- what the caller asked for -----------------------------------------------------------------------------


def _check(rel_error: float | None, ranks: Ranks | None, budget: float | None, names: Sequence[str]) -> None:
    given = {"rel_error": rel_error, "ranks": ranks, "budget": budget}
    named = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    if len(named) > 1:
        raise ShapeError(
            f"ranks follow from rel_error or a budget, or are given, not both: found {' and '.join(named)}. Leave one "
            "out."
        )
    if budget is not None and budget <= 0:
        raise RankError(f"budget must be positive: found {budget!r}. Pass a number of parameters, or 0.5 for half.")
    if rel_error is not None and not 0 <= rel_error < 1:
        raise RankError(f"rel_error must lie in [0, 1): found {rel_error!r}. Pass for example 0.01.")
    unknown = sorted(set(ranks) - set(names)) if isinstance(ranks, Mapping) else []
    if unknown:
        raise ShapeError(
            f"every name in ranks must be that of a factorized layer: found {unknown[0]!r}, expected one of "
            f"{sorted(names)}. Take it out."
        )


def _asked(name: str, layer: FactorizedLayer, ranks: Ranks | None) -> tuple[int, ...] | None:
    """The ranks of the bonds that a caller wants, none above those that are there."""
    if isinstance(ranks, Mapping):
        return _asked(name, layer, ranks[name]) if name in ranks else None
    if ranks is None:
        return None
    here = bond_ranks(layer)
    if isinstance(ranks, int):
        given: tuple[int, ...] = (ranks,) * len(here)
    else:
        given = tuple(ranks)
        given = given[1:-1] if len(given) == len(here) + 2 else given
    if len(given) != len(here) or any(n < 1 for n in given):
        raise RankError(
            f"ranks must be {len(here)} whole numbers of at least 1: {name or 'the layer'} was given {ranks!r}. It has "
            f"the ranks {layer.ranks}."
        )
    return tuple(map(min, given, here))
