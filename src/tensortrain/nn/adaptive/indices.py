"""The rank indices of a layer: how large each one is, and the layer with more of them or fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tensortrain.cores.canonical import symmetric
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import KindError
from tensortrain.formats import Bond, FactorSpec
from tensortrain.nn.adaptive.star import hub_of, turned_star
from tensortrain.nn.base import FactorizedLayer
from tensortrain.nn.cores import PLAIN_LISTS, Cores
from tensortrain.nn.shaping.regularize import bonds
from tensortrain.nn.shaping.stand_ins import check_has_factorized, distinct_layers, transforms_of

__all__ = [
    "CLEARLY",
    "bond_ranks",
    "bonds",
    "check_can_resize",
    "concentrate_",
    "core_size",
    "from_train",
    "is_train",
    "layers_with_bonds",
    "present",
    "scores",
    "set_cores_",
    "sharing",
    "slice_squares",
    "spec_with",
    "take_indices",
    "to_train",
    "turned",
]

CLEARLY = 1e-2  # a rank index whose size is below this share of the largest one of its bond is taken for dead


def layers_with_bonds(model: nn.Module, what: str) -> list[tuple[str, FactorizedLayer]]:
    """The factorized layers that have ranks, by name, those that share all their cores only once.

    Raises:
        KindError: There is none, or the format of one does not tell where its ranks are.
    """
    check_has_factorized(model, what)
    distinct = {id(layer) for layer in distinct_layers(model)}
    found = [(name, one) for name, one in model.named_modules() if id(one) in distinct]
    return [(name, layer) for name, layer in found if bonds(layer.spec)]


def bond_ranks(layer: FactorizedLayer) -> tuple[int, ...]:
    """How many indices each bond has."""
    shapes = layer.spec.core_shapes
    return tuple(shapes[core][axis] for (core, axis), *_ in bonds(layer.spec))


def slice_squares(core: Tensor, axis: int) -> Tensor:
    """Sum of squares of the slice at every index of an axis, differentiable."""
    wide = core.to(torch.promote_types(core.dtype, torch.float32))
    squares = wide.real.square() + wide.imag.square() if wide.is_complex() else wide.square()
    return squares.movedim(axis, 0).flatten(1).sum(dim=1)


def scores(cores: Sequence[Tensor], bond: Bond) -> Tensor:
    """Size of every index of a bond: the product of the norms of its slices, which no rescaling of cores changes."""
    norms = torch.stack([slice_squares(cores[core], axis).sqrt() for core, axis in bond])
    return norms.prod(dim=0)


def present(cores: Sequence[Tensor], bond: Bond) -> Tensor:
    """Which indices of a bond are there: those above a hundredth of the largest one; at least one."""
    size = scores(cores, bond)
    alive = size > CLEARLY * size.max()
    return alive if bool(alive.any()) else torch.arange(len(size), device=size.device) == 0


def take_indices(cores: Sequence[Tensor], bond: Bond, kept: Tensor) -> list[Tensor]:
    """The cores with some indices of one bond only."""
    found = list(cores)
    for core, axis in bond:
        found[core] = found[core].index_select(axis, kept)
    return found


def spec_with(spec: FactorSpec, sizes: Sequence[int]) -> FactorSpec:
    """The spec whose bonds have these sizes."""
    ends = (len(spec.ranks) - len(sizes)) // 2  # a chain's ranks have a one at both ends
    ones = spec.ranks[:ends]
    return replace(spec, ranks=(*ones, *(int(n) for n in sizes), *ones))


def core_size(sizes: Sequence[int], spec: FactorSpec) -> int:
    """Entries of all cores with bonds of these sizes."""
    return sum(math.prod(shape) for shape in spec_with(spec, sizes).core_shapes)


@torch.no_grad()
def set_cores_(model: nn.Module, layer: FactorizedLayer, spec: FactorSpec, cores: Sequence[Tensor]) -> None:
    """Give a layer, and whoever shares its cores, new cores of another size."""
    pairs = zip(cores, layer.core_list(), strict=True)
    fresh = Cores(nn.Parameter(core.contiguous(), requires_grad=was.requires_grad) for core, was in pairs)
    for one in sharing(model, layer):
        one.take_spec(spec)
        one.cores = fresh
        one.clear_cache()


def sharing(model: nn.Module, layer: FactorizedLayer) -> list[FactorizedLayer]:
    """The layer, and then all others with the same cores."""
    own = [id(core) for core in layer.cores.parameters()]
    same = [
        one
        for one in model.modules()
        if isinstance(one, FactorizedLayer)
        and one is not layer
        and [id(core) for core in one.cores.parameters()] == own
    ]
    return [layer, *same]


def is_train(layer: FactorizedLayer) -> bool:
    """Whether the cores of a layer are one chain, which can be turned and rounded."""
    return layer.format.chain(layer.spec.one_group()) is not None and layer.spec.weight.groups == 1


def to_train(layer: FactorizedLayer, spec: FactorSpec, cores: Sequence[Tensor]) -> list[Tensor]:
    """Stored cores of a layer as a train ``(r, n, s)``, in a dtype that LAPACK knows."""
    chain = layer.format.to_chain(list(cores), spec)
    return [core.flatten(1, 2).to(compute_dtype(core.dtype)) for core in chain]


def from_train(
    layer: FactorizedLayer, spec: FactorSpec, train: Sequence[Tensor]
) -> tuple[FactorSpec, tuple[Tensor, ...]]:
    """A train of other ranks as a layer stores it, and the spec that says so."""
    spec = spec_with(spec, [core.shape[-1] for core in train[:-1]])
    chain = layer.format.chain(spec)
    assert chain is not None
    dtype = layer.core_list()[0].dtype
    cores = [core.reshape(shape).to(dtype) for core, shape in zip(train, chain.core_shapes, strict=True)]
    return spec, layer.format.from_chain(cores, spec)


@torch.no_grad()
def concentrate_(model: nn.Module, layer: FactorizedLayer) -> None:
    """Turn the rank indices of a train, in place, to singular directions: what it does not need is small from then on.

    The weight stays the same. Cores that hang on one core, as in Tucker formats, are turned likewise; others have
    no such freedom, or none that is worth it. Left alone are layers that share some of their cores, but not all, with
    another one, and those whose cores something stands in for.
    """
    is_plain = type(layer.cores) in PLAIN_LISTS and not transforms_of(layer)
    if not is_plain or _shares_some(model, layer):
        return
    for core, value in zip(layer.core_list(), turned(layer), strict=True):
        core.copy_(value)


def turned(layer: FactorizedLayer) -> Sequence[Tensor]:
    """The cores, of the same sizes, with singular directions as rank indices; where these are fixed, as they are."""
    cores, found = list(layer.core_list()), bonds(layer.spec)
    if not is_train(layer):
        hub = hub_of(found)
        return cores if hub is None else _balanced(turned_star([core.detach() for core in cores], found, hub))
    train = to_train(layer, layer.spec, cores)
    padded = [torch.zeros_like(core) for core in train]
    for core, value in zip(padded, symmetric(train), strict=True):
        core[: value.shape[0], :, : value.shape[2]] = value
    return from_train(layer, layer.spec, padded)[1]


def _balanced(cores: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cores of one norm: where all of it lay in one core, the steps of an optimizer would be small beside it."""
    norms = torch.stack([torch.linalg.vector_norm(core.to(compute_dtype(core.dtype))) for core in cores])
    if not bool((norms > 0).all()):
        return cores
    mean = norms.log().mean().exp()
    return [
        core * (mean / norm).to(core.real.dtype if core.is_complex() else core.dtype)
        for core, norm in zip(cores, norms, strict=True)
    ]


def _shares_some(model: nn.Module, layer: FactorizedLayer) -> bool:
    """Whether another layer has some of the cores, but not all."""
    own, same = {id(core) for core in layer.cores.parameters()}, sharing(model, layer)
    others = (one for one in model.modules() if isinstance(one, FactorizedLayer) and one not in same)
    return any(own & {id(core) for core in one.cores.parameters()} for one in others)


def check_can_resize(model: nn.Module, name: str, layer: FactorizedLayer) -> None:
    """Raise ``KindError`` where the cores are not plain parameters of this layer and of those that share all."""
    if _shares_some(model, layer):
        raise KindError(
            f"ranks can be changed where layers share all their cores or none: {name or 'the layer'} shares some. Give "
            "it cores of its own."
        )
    if type(layer.cores) not in PLAIN_LISTS:
        raise KindError(
            f"ranks can be changed where cores are plain parameters: {name or 'the layer'} holds "
            f"{type(layer.cores).__name__}. Take the constraint off first (make a new layer from layer.to_dense())."
        )
