"""Contractions as lists of products of two operands, in an order found by opt_einsum."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from tensortrain.system.tracing import constant_when_traced

__all__ = ["MOST_LEGS", "Legs", "Order", "Product", "Sizes", "contraction", "contraction_flops", "run", "run_steps"]

Legs = tuple[str, ...]
Sizes = tuple[tuple[str, int], ...]
Order = Literal["auto", "forward", "backward"]

MOST_LEGS = len(string.ascii_letters)  # as many as an einsum has letters


@dataclass(frozen=True)
class Product:
    """One product of a contraction.

    Args:
        operands: Numbers of its operands; the inputs of the contraction come first, then results in order.
        result: Number of its result.
        equation: As ``torch.einsum`` takes it.
        batch, m, k, n: ``batch`` products of ``m x k`` by ``k x n``.
        numel: Entries of the operands and of the result.
        result_numel: Entries of the result.
        sources: Inputs of the contraction that it depends on.
    """

    operands: tuple[int, ...]
    result: int
    equation: str
    batch: int
    m: int
    k: int
    n: int
    numel: int
    result_numel: int
    sources: frozenset[int]

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


@constant_when_traced
def contraction(
    inputs: tuple[Legs, ...], output: Legs, sizes: Sizes, order: Order = "auto", sizes_for_path: Sizes | None = None
) -> tuple[Product, ...]:
    """Products that contract ``inputs`` to one tensor with the legs ``output``.

    Args:
        order: ``"auto"`` is the order of fewest flops, as far as opt_einsum finds it; ``"forward"`` and
            ``"backward"`` let the first input absorb the others one by one.
        sizes_for_path: Sizes to find the order for, where they differ from those to be counted.

    Example:
        >>> sizes = (("b", 1), ("j", 9), ("r", 2), ("i", 9))
        >>> steps = contraction((("b", "j"), ("j", "r"), ("i", "r")), ("b", "i"), sizes)
        >>> [(step.m, step.k, step.n) for step in steps]
        [(1, 9, 2), (9, 2, 1)]
    """
    return _contraction(inputs, output, sizes, order, sizes_for_path)


@lru_cache(maxsize=8192)
def _contraction(
    inputs: tuple[Legs, ...], output: Legs, sizes: Sizes, order: Order, sizes_for_path: Sizes | None
) -> tuple[Product, ...]:
    letters = {leg: letter for (leg, _), letter in zip(sizes, string.ascii_letters, strict=False)}
    path = _path(inputs, output, dict(sizes_for_path or sizes), letters, order)
    known = dict(sizes)
    stack: list[tuple[int, Legs, frozenset[int]]] = [(k, legs, frozenset({k})) for k, legs in enumerate(inputs)]
    steps: list[Product] = []
    for n_left, entry in zip(range(len(path) - 1, -1, -1), path, strict=True):
        taken = [stack[position] for position in entry]
        stack = [operand for position, operand in enumerate(stack) if position not in entry]
        while taken:
            pair, taken = taken[:2], taken[2:]
            needed = {leg for _, legs, _ in (*stack, *taken) for leg in legs}.union(output)
            last = n_left == 0 and not taken
            step, legs = _product(pair, output if last else None, needed, len(inputs) + len(steps), known, letters)
            steps.append(step)
            merged = (step.result, legs, step.sources)
            if not taken:
                stack.append(merged)
                break
            taken = [merged, *taken]
    return tuple(steps)


def _path(
    inputs: tuple[Legs, ...], output: Legs, sizes: dict[str, int], letters: dict[str, str], order: Order
) -> list[tuple[int, ...]]:
    n = len(inputs)
    if n == 1:
        return [(0,)]
    if order != "auto":  # the first input is at the front only before the first step, later at the end
        rest = range(1, n) if order == "forward" else range(n - 1, 0, -1)
        left, path = list(range(n)), list[tuple[int, ...]]()
        for k in rest:
            path.append((left.index(0), left.index(k)))
            left = [m for m in left if m not in (0, k)] + [0]
        return path
    from opt_einsum import contract_path

    equation = ",".join("".join(letters[leg] for leg in legs) for legs in inputs)
    equation += "->" + "".join(letters[leg] for leg in output)
    shapes = [tuple(sizes[leg] for leg in legs) for legs in inputs]
    return contract_path(equation, *shapes, shapes=True, optimize="auto")[0]


def _product(
    pair: Sequence[tuple[int, Legs, frozenset[int]]],
    output: Legs | None,
    needed: set[str],
    result: int,
    sizes: dict[str, int],
    letters: dict[str, str],
) -> tuple[Product, Legs]:
    """The product of one or two operands, and the legs of its result (shared ones first unless given)."""
    left, right = pair[0][1], pair[-1][1] if len(pair) > 1 else ()
    shared = [leg for leg in left if leg in right]
    batch, summed = [leg for leg in shared if leg in needed], [leg for leg in shared if leg not in needed]
    m, n = [leg for leg in left if leg not in shared], [leg for leg in right if leg not in shared]
    legs = output if output is not None else tuple(leg for leg in (*batch, *m, *n) if leg in needed)

    def size(some: Sequence[str]) -> int:
        return prod(sizes[leg] for leg in some)

    equation = ",".join("".join(letters[leg] for leg in operand[1]) for operand in pair)
    return (
        Product(
            operands=tuple(operand[0] for operand in pair),
            result=result,
            equation=equation + "->" + "".join(letters[leg] for leg in legs),
            batch=size(batch),
            m=size(m),
            k=size(summed),
            n=size(n),
            numel=size(left) + (size(right) if len(pair) > 1 else 0) + size(legs),
            result_numel=size(legs),
            sources=frozenset().union(*(operand[2] for operand in pair)),
        ),
        legs,
    )


def contraction_flops(steps: Sequence[Product]) -> int:
    """Floating-point operations, two per multiply-add."""
    return sum(step.flops for step in steps)


def run(steps: Sequence[Product], operands: Sequence[Tensor]) -> Tensor:
    """Carry out a contraction."""
    values = dict(enumerate(operands))
    run_steps(steps, values)
    return values[steps[-1].result]


def run_steps(steps: Sequence[Product], values: dict[int, Tensor]) -> None:
    """Replace operands by their products, step by step."""
    for step in steps:
        values[step.result] = torch.einsum(step.equation, *(values.pop(k) for k in step.operands))
