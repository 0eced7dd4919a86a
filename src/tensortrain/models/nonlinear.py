"""Networks whose cores are a train's, with an activation after each of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import outer
from tensortrain.errors import ShapeError
from tensortrain.models.base import TensorModel
from tensortrain.models.checks import chain_ranks, check_choice, checked_dtype, checked_inputs, whole
from tensortrain.networks import register

__all__ = ["ACTIVATIONS", "NonlinearTT"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "identity": lambda x: x,
}
_GAINS = {"relu": math.sqrt(2.0), "gelu": math.sqrt(2.0), "tanh": 1.0, "identity": 1.0}
_NOISE = 0.3  # of first cores, beside slices that leave a state as it is


@register("nonlinear-tt", needs_arguments=True)
class NonlinearTT(TensorModel):
    r"""``y = G_d(x_d, f(G_{d-1}(x_{d-1}, .. f(G_1(x_1)))))``: a train that is read core by core, with ``f`` between.

    Two readings of it:

    - ``"chunks"``: the input is cut into vectors ``x_k``, and ``h_k = f(sum_{a,i} h_{k-1}[a] x_k[i] G_k[a, i, :])``:
      a recurrent network with a product of state and input, and other cores at every step. A 1 is appended to every
      ``x_k`` and ``h_{k-1}``, so that sums of lower degree and a bias are among the products.
    - ``"modes"``: the input is reshaped to a tensor, and core k contracts its mode k and the rank that the core before
      left: ``T_k = f(sum_{a,i} T_{k-1}[a, i, ..] G_k[a, i, :] + b_k)``, of shape ``(r_k, i_{k+1}, .., i_d)``.

    The last core has no activation. ``activation="identity"`` is the linear network: no constants either; in chunks it
    is linear in every ``x_k``, by modes it is a linear map whose weight is a train. With any other activation the
    algebra of trains is lost: no rounding, no exact norm.

    Args:
        in_modes: Sizes of the chunks, whose sum is the number of inputs, or of the modes, whose product is.
        out_features: The last rank.
        rank: Ranks between cores, one for all or ``len(in_modes) - 1`` of them.
        activation: ``"relu"``, ``"tanh"``, ``"gelu"`` or ``"identity"``.
        reading: ``"chunks"`` or ``"modes"``.
        residual: Where the ranks on both sides of a core are equal, what comes in is added to what goes out (by modes:
            its mean along the mode).
        generator, device, dtype: Of the first parameters.

    Shapes: ``cores`` are ``(r_{k-1}, i_k, r_k)``, with constants ``(r_{k-1} + 1, i_k + 1, r_k)`` (the first one
    ``(1, i_1 + 1, r_1)``); ``biases``, by modes, ``(r_k,)``.

    Cost: ``2 b sum r_{k-1} i_k r_k`` flops in chunks; by modes each term is taken ``i_{k+1} .. i_d`` times.

    Source: the network of the deck's slide on expressive power; generalized products: arXiv:1901.10801.

    Example:
        >>> model = NonlinearTT((7, 7, 7, 7), 10, rank=6)
        >>> model(torch.rand(5, 28)).shape
        torch.Size([5, 10])
        >>> NonlinearTT((4, 7, 4, 7), 10, rank=6, reading="modes")(torch.rand(5, 784)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_modes: Sequence[int],
        out_features: int,
        *,
        rank: int | Sequence[int],
        activation: str = "relu",
        reading: Literal["chunks", "modes"] | str = "chunks",
        residual: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice(activation, tuple(ACTIVATIONS), "activation")
        check_choice(reading, ("chunks", "modes"), "reading")
        self.in_modes, self.out_features = _checked_sizes(in_modes, out_features)
        dtype = checked_dtype(dtype)
        self.activation, self.reading, self.residual = activation, reading, bool(residual)
        self.in_features = (sum if reading == "chunks" else math.prod)(self.in_modes)
        self.has_constants = activation != "identity"
        order = len(self.in_modes)
        number = whole(rank)
        inner = rank if number is None else [number] * (order - 1)
        ranks = (*chain_ranks(inner, [1] * order, "rank")[:-1], self.out_features)
        made = [
            self._first_core(k, r, s, torch.empty(0, device=device, dtype=dtype), generator)
            for k, (r, s) in enumerate(itertools.pairwise(ranks))
        ]
        self.cores = nn.ParameterList([nn.Parameter(core) for core in made])
        has_biases = reading == "modes" and self.has_constants
        self.biases = nn.ParameterList([nn.Parameter(core.new_zeros(core.shape[-1])) for core in made if has_biases])

    @property
    def config(self) -> dict[str, Any]:
        return {
            "in_modes": list(self.in_modes),
            "out_features": self.out_features,
            "rank": list(self.ranks[1:-1]),
            "activation": self.activation,
            "reading": self.reading,
            "residual": self.residual,
        }

    @property
    def ranks(self) -> tuple[int, ...]:
        """A 1, the ranks between cores, and ``out_features``."""
        return (1, *(core.shape[-1] for core in self.cores))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(b, out_features)`` of inputs ``(b, in_features)``.

        Raises:
            DataError: ``x`` has another shape or dtype, or NaN.
        """
        way = "Flatten images with x.flatten(1)"
        x = checked_inputs(x, ("b", self.in_features), self.cores[0].dtype, way)
        return self._by_chunks(x) if self.reading == "chunks" else self._by_modes(x)

    def _by_chunks(self, x: Tensor) -> Tensor:
        state = x.new_ones(x.shape[0], 1)
        for k, (chunk, core) in enumerate(zip(x.split(self.in_modes, dim=1), self.cores, strict=True)):
            known, seen = state, chunk
            if self.has_constants:
                known, seen = _with_one(state) if k else state, _with_one(chunk)
            state = self._activated(k, outer(known, seen) @ core.flatten(0, 1), state)
        return state

    def _by_modes(self, x: Tensor) -> Tensor:
        state = x.unsqueeze(1)  # b r rest
        for k, (n, core) in enumerate(zip(self.in_modes, self.cores, strict=True)):
            opened = state.unflatten(2, (n, -1))  # b r i rest
            found = core.flatten(0, 1).T @ opened.flatten(1, 2)  # b s rest
            if self.has_constants:
                found = found + self.biases[k].unsqueeze(-1)
            state = self._activated(k, found, opened.mean(2) if self._passes_by(k) else state)
        return state[:, :, 0]

    def _activated(self, k: int, found: Tensor, before: Tensor) -> Tensor:
        if k == len(self.cores) - 1:
            return found
        out = ACTIVATIONS[self.activation](found)
        return out + before if self._passes_by(k) else out

    def _passes_by(self, k: int) -> bool:
        return self.residual and 0 < k < len(self.cores) - 1 and self.ranks[k] == self.ranks[k + 1]

    def _first_core(self, k: int, r: int, s: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Variance of inputs and states of size 1 kept; in chunks with constants the state passes, and noise on it."""
        n, is_last = self.in_modes[k], k == len(self.in_modes) - 1
        gain = 1.0 if is_last else _GAINS[self.activation]
        with_ones = self.reading == "chunks" and self.has_constants
        shape = (r + (1 if with_ones and k else 0), n + (1 if with_ones else 0), s)
        core = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        core = core * (gain / math.sqrt(r * n))
        if with_ones and k and not is_last:
            core = _NOISE * core
            if not self.residual or r != s:  # else it passes already
                core[:r, -1] += torch.eye(r, s, dtype=like.dtype, device=like.device)
        return core

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, max_rank={max(self.ranks)}, "
            f"activation={self.activation!r}, reading={self.reading!r}"
        )


def _with_one(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 1), value=1.0)


def _checked_sizes(in_modes: Sequence[int], out_features: int) -> tuple[tuple[int, ...], int]:
    sizes = [whole(n) or 0 for n in in_modes] if isinstance(in_modes, Sequence) else []
    size = whole(out_features) or 0
    if not sizes or min(*sizes, size) < 1:
        raise ShapeError(
            f"sizes must be whole numbers of 1 or more: in_modes has {in_modes}, out_features {out_features}. Pass one "
            "size for each chunk or mode."
        )
    return tuple(sizes), size
