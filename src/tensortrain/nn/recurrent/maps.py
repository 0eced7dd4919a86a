"""The linear maps of recurrent layers: all gates in one weight, factorized or dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.errors import ShapeError
from tensortrain.formats import Rank, WeightShape, get_format, suggest_modes
from tensortrain.nn.base import Implementation, Init
from tensortrain.nn.composite import Map, is_plain, is_watched, linear_of, weight_of
from tensortrain.nn.linear import Linear
from tensortrain.system.tracing import is_traced

__all__ = ["Apply", "Compress", "MapOptions", "blocks_of", "dense_at", "refill", "repeated", "reset_map"]

Compress = Literal["input", "hidden", "both", "none"]
Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MapOptions:
    """Keyword arguments that all recurrent layers and cells share; see ``tensortrain.nn.GRU``."""

    format: str = "tt"
    rank: Rank = 4
    compress: Compress = "input"
    in_modes: Sequence[int] | None = None
    out_modes: Sequence[int] | None = None
    init: Init = "match"
    implementation: Implementation = "auto"
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.compress not in get_args(Compress):
            raise ShapeError(f"compress must be one of {get_args(Compress)}: found {self.compress!r}. Pass 'input'.")

    def for_layer(self, index: int, n_directions: int, proj_size: int) -> MapOptions:
        """The options of a layer above the first: its inputs are the outputs of the layer below."""
        if index == 0:
            return self
        if self.out_modes is None or proj_size:
            return replace(self, in_modes=None)
        return replace(self, in_modes=(n_directions * self.out_modes[0], *self.out_modes[1:]))

    def input_map(self, in_features: int, n_gates: int, hidden_size: int, bias: bool) -> Map:
        """The map from inputs to all gates."""
        return self._map(in_features, n_gates, hidden_size, bias, self.in_modes, self.compress in ("input", "both"))

    def hidden_map(self, in_features: int, n_gates: int, hidden_size: int, bias: bool) -> Map:
        """The map from the hidden state (or its projection) to all gates."""
        modes = self.out_modes if in_features == hidden_size else None
        return self._map(in_features, n_gates, hidden_size, bias, modes, self.compress in ("hidden", "both"))

    def _map(
        self,
        in_features: int,
        n_gates: int,
        hidden_size: int,
        bias: bool,
        in_modes: Sequence[int] | None,
        factorize: bool,
    ) -> Map:
        if not factorize:
            return nn.Linear(in_features, n_gates * hidden_size, bias, device=self.device, dtype=self.dtype)
        # The format chooses the modes for one gate; the gates then multiply the first output mode, so that
        # they are contiguous blocks of the output and share all cores but the first.
        gate = WeightShape("linear", hidden_size, in_features)
        fmt = get_format(self.format)
        one = fmt.spec(gate, rank=1, out_modes=self.out_modes, in_modes=in_modes)
        if self.out_modes is None and math.prod(one.out_modes) != hidden_size:  # padding would shift all gates but one
            exact = suggest_modes(hidden_size, len(one.out_modes))[::-1]
            one = fmt.spec(gate, rank=1, out_modes=exact, in_modes=one.in_modes)
        return Linear(
            in_features,
            n_gates * hidden_size,
            bias,
            format=self.format,
            rank=self.rank,
            in_modes=one.in_modes,
            out_modes=(n_gates * one.out_modes[0], *one.out_modes[1:]),
            init=None,
            implementation=self.implementation,
            device=self.device,
            dtype=self.dtype,
        )


def reset_map(one: Map, hidden_size: int, init: Init, generator: torch.Generator | None = None) -> None:
    """Draw a map as torch's recurrent layers do, U(+-1/sqrt(hidden_size)); ``init`` is for the cores."""
    bound = 1 / math.sqrt(hidden_size)
    if isinstance(one, Linear):
        one.reset_parameters(bound / math.sqrt(3) if init == "match" else init, generator)
    with torch.no_grad():
        plain = [one.bias] if isinstance(one, Linear) else [one.weight, one.bias]
        for parameter in plain:
            if parameter is not None:
                parameter.uniform_(-bound, bound, generator=generator)


def refill(
    one: Map, weight: Tensor, bias: Tensor | None, *, rank: Rank | None, eps: float | None, gram: Tensor | None = None
) -> Map:
    """A map laid out like this one, with the values of a dense weight."""
    dense = linear_of(weight, bias)
    if not isinstance(one, Linear):
        return dense
    return Linear.from_dense(
        dense,
        format=one.spec.format,
        rank=rank,
        eps=eps,
        in_modes=one.in_modes,
        out_modes=one.out_modes,
        input_gram=gram,
        implementation=one.implementation,
    )


def dense_at(one: Map, rows: int, *, kept: bool) -> bool:
    """Whether a map multiplies by its dense weight at so many rows.

    Args:
        kept: The weight is made once for many calls, so that its making does not count.
    """
    if not isinstance(one, Linear):
        return is_plain(one)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not kept):
        return one.plan(max(1, rows)).uses_dense


def repeated(one: Map, rows: int, sizes: Sequence[int]) -> tuple[Apply, ...]:
    """A map made ready to be applied at every time step, cut into blocks of outputs of these sizes.

    Dense weights are built, and cores merged, here and not at every step. A block of a dense map costs its
    share; a block of a factorized map costs as much as the whole map. The module itself is called while a program
    is traced, where hooks are on it, and where it is a layer with a forward of its own.
    """
    if is_traced() or is_watched(one):
        return blocks_of(one, sizes)
    if dense_at(one, rows, kept=True):
        biases = [None] * len(sizes) if one.bias is None else one.bias.split(list(sizes))
        weights = weight_of(one).split(list(sizes))
        return tuple(partial(F.linear, weight=w, bias=b) for w, b in zip(weights, biases, strict=True))
    return blocks_of(_prepared(one, rows), sizes)


def _prepared(one: Map, rows: int) -> Apply:
    if not isinstance(one, Linear) or one.ordered is not None or one.format.chain(one.spec) is None:
        return one
    with torch.no_grad():  # the plan for weights that are kept, whether or not gradients are wanted
        plan = one.plan(max(1, rows))
    weights = plan.prepare(one.format.to_chain(one.core_list(), one.spec))
    return lambda x: plan.execute(x, (), weights, one.bias)


def blocks_of(apply: Apply, sizes: Sequence[int]) -> tuple[Apply, ...]:
    """One function per block of outputs of these sizes; each runs the whole map."""
    if len(sizes) == 1:
        return (apply,)

    def block(x: Tensor, k: int) -> Tensor:
        return apply(x).split(list(sizes), dim=-1)[k]

    return tuple(partial(block, k=k) for k in range(len(sizes)))
