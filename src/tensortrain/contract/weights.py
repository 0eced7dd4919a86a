"""Weights that the cores of a network make, several in one call: by the kernels, or recorded product by product."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensortrain.contract.grouped import can_group
from tensortrain.contract.products import MOST_LEGS, Legs, Product, Sizes, contraction, run
from tensortrain.system.native import library

__all__ = ["Wanted", "made_weights", "recipe_of"]

_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses see every operation


@dataclass(frozen=True)
class Wanted:
    """One weight.

    Args:
        cores: Numbers of the cores that make it.
        legs: In the order in which its entries shall lie.
        shape: As which it is wanted.
    """

    cores: tuple[int, ...]
    legs: Legs
    shape: tuple[int, ...]

    def products(self, network: tuple[Legs, ...], sizes: Sizes) -> tuple[Product, ...]:
        """The products that make it."""
        return contraction(tuple(network[k] for k in self.cores), self.legs, sizes)


def made_weights(
    network: tuple[Legs, ...], sizes: Sizes, wanted: tuple[Wanted, ...], cores: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The wanted weights, differentiably, with the strides that torch gives to tensors of their shapes.

    Args:
        network: Legs of every core, in the order in which its entries lie.
        sizes: Of the legs.
        wanted: What to make; each core is part of one weight.
        cores: In any shape of these legs.
    """
    recipe = recipe_of(network, sizes, wanted) if can_group() and all(map(_is_served, cores)) else None
    if recipe is not None:
        made: list[Tensor] | None = library().contract_cores(recipe, list(cores))  # type: ignore[union-attr]
        if made is not None:
            return tuple(made)
    known = dict(sizes)
    views = [core.reshape([known[leg] for leg in legs]) for core, legs in zip(cores, network, strict=True)]
    return tuple(_recorded(one, one.products(network, sizes), views) for one in wanted)


def _is_served(core: Tensor) -> bool:
    return type(core) in _PLAIN and core.is_cpu and core.dtype in (torch.float32, torch.float64)


def _recorded(one: Wanted, products: Sequence[Product], views: Sequence[Tensor]) -> Tensor:
    weight = run(products, [views[k] for k in one.cores]).reshape(one.shape).contiguous()
    # Along an axis of size one every stride is contiguous, and with some of them a kernel is taken for another layout.
    return weight.flatten().view(one.shape) if 1 in one.shape else weight


def recipe_of(network: tuple[Legs, ...], sizes: Sizes, wanted: tuple[Wanted, ...]) -> Any | None:
    """The products as the kernels take them; ``None`` where these are not built, or do not know such products."""
    kernels = library()
    return None if kernels is None else _recipe(kernels, network, sizes, wanted)


@lru_cache(maxsize=1024)
def _recipe(kernels: Any, network: tuple[Legs, ...], sizes: Sizes, wanted: tuple[Wanted, ...]) -> Any | None:
    if len(sizes) > MOST_LEGS:
        return None
    numbers = {leg: number for number, (leg, _) in enumerate(sizes)}
    tensors = [[numbers[leg] for leg in legs] for legs in network]
    steps: list[tuple[int, int]] = []
    results: list[int] = []
    for one in wanted:
        places = list(one.cores)  # of the operands of its products, by their numbers there
        products, last = one.products(network, sizes), [numbers[leg] for leg in one.legs]
        # What lies between has its bonds in front, and then its legs as the weight has them: it needs no sorting to be
        # multiplied by, and runs of the weight stay runs.
        order = {leg: last.index(leg) if leg in last else -1 for leg in range(len(sizes))}.__getitem__
        for product in products:
            pair = [places[k] for k in product.operands]
            made = [string.ascii_letters.index(letter) for letter in product.equation.split("->")[1]]
            if product is not products[-1]:
                made.sort(key=order)
            if not _is_plain([tensors[k] for k in pair], made):
                return None
            steps.append((pair[0], pair[1] if len(pair) > 1 else -1))
            places.append(len(tensors))
            tensors.append(made)
        results.append(places[-1])
    shapes = [list(one.shape) for one in wanted]
    return kernels.make_contraction([size for _, size in sizes], tensors, steps, results, shapes)


def _is_plain(operands: Sequence[Sequence[int]], made: Sequence[int]) -> bool:
    """Whether every leg is in two or three of the tensors of a product, and once in each."""
    tensors = [*operands, made]
    legs = [leg for tensor in tensors for leg in tensor]
    return all(len(set(tensor)) == len(tensor) for tensor in tensors) and all(legs.count(leg) > 1 for leg in legs)
