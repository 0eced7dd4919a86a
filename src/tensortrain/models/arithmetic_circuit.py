"""Recurrent arithmetic circuits: recurrent networks whose only operation is the product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import DataError
from tensortrain.models.base import TensorModel, check_sizes
from tensortrain.networks import register

__all__ = ["RecurrentArithmeticCircuit"]


@register("recurrent-arithmetic-circuit", needs_arguments=True)
class RecurrentArithmeticCircuit(TensorModel):
    r"""``h_t^l = (W_I^l h_t^{l-1}) * (W_H^l h_{t-1}^l)`` with ``h_t^0`` the features of step t; ``y = w h_T^L``.

    One layer is a train with shared cores. Deeper circuits copy their inputs, and are no train: their memory, the
    rank between the first and the last half of the steps, grows with the number of steps.

    Args:
        n_features: Features of a step.
        width: Size of every state.
        depth: Layers.
        n_outputs: Scores at the end; 1 gives ``(b,)``.
        generator, device, dtype: Of the first parameters.

    Shapes: x ``(b, T, n_features)``, of any T.

    Source: Levine, Sharir, Ziv, Shashua, arXiv:1710.09431.

    Example:
        >>> model = RecurrentArithmeticCircuit(3, 2, 2)
        >>> model(torch.rand(5, 6, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        n_features: int,
        width: int,
        depth: int = 1,
        *,
        n_outputs: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_features=n_features, width=width, depth=depth, n_outputs=n_outputs)
        self.n_features, self.width, self.depth, self.n_outputs = n_features, width, depth, n_outputs

        def draw(*shape: int) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, device=device, dtype=dtype or torch.get_default_dtype())
            return nn.Parameter(drawn / math.sqrt(shape[1]))

        self.inputs = nn.ParameterList([draw(width, n_features if layer == 0 else width) for layer in range(depth)])
        self.hidden = nn.ParameterList([draw(width, width) for _ in range(depth)])
        self.starts = nn.ParameterList([nn.Parameter(torch.ones_like(draw(width, 1)[:, 0])) for _ in range(depth)])
        self.output = draw(n_outputs, width)

    @property
    def config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("n_features", "width", "depth", "n_outputs")}

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(b,)`` or ``(b, n_outputs)`` of sequences ``(b, T, n_features)``.

        Raises:
            DataError: ``x`` has another shape, or no steps.
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.n_features or x.shape[1] == 0:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"inputs must be sequences of {self.n_features} features: x has {found}, expected (b, T, "
                f"{self.n_features}) with a step or more. Put the steps along axis 1."
            )
        states = [start.expand(x.shape[0], -1) for start in self.starts]
        for step in x.unbind(1):
            below = step
            for layer in range(self.depth):
                states[layer] = (below @ self.inputs[layer].T) * (states[layer] @ self.hidden[layer].T)
                below = states[layer]
        scores = states[-1] @ self.output.T
        return scores[:, 0] if self.n_outputs == 1 else scores

    def grid_tensor(
        self, n_steps: int, modulus: int = 2**31 - 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Values on all sequences of ``n_features`` templates, for a circuit of random residues, exactly.

        Floating point would hide the ranks: products of Gaussians spread singular values over a dozen decades. The
        parameters are drawn anew, uniformly modulo a prime, for a circuit of the same sizes; templates are the unit
        vectors.

        Args:
            n_steps: T.
            modulus: A prime below 2**31.
            generator: Of the residues.

        Returns:
            Tensor: ``(M,) * T`` int64.

        Cost: O(depth M^T T width^2).
        """
        if n_steps < 1 or not 2 <= modulus < 2**31:
            raise DataError(
                f"a grid must have steps and a prime below 2**31: n_steps has {n_steps} and modulus {modulus}."
            )

        def draw(like: Tensor) -> Tensor:
            return torch.randint(modulus, like.shape, generator=generator, device="cpu")

        inputs, hidden = [draw(w) for w in self.inputs], [draw(w) for w in self.hidden]
        starts, output = [draw(start) for start in self.starts], draw(self.output[0])
        m = self.n_features
        index = torch.arange(m**n_steps)
        states = [start.expand(len(index), -1) for start in starts]
        for t in range(n_steps):
            digit = index // m ** (n_steps - 1 - t) % m
            below = inputs[0].T[digit]
            for layer in range(self.depth):
                here = below if layer == 0 else _product(below, inputs[layer], modulus)
                states[layer] = here * _product(states[layer], hidden[layer], modulus) % modulus
                below = states[layer]
        return _product(states[-1], output[None], modulus)[:, 0].reshape([m] * n_steps)


def _product(x: Tensor, matrix: Tensor, modulus: int) -> Tensor:
    """``x @ matrix.T`` of residues: a term at a time, since a sum of two products would leave int64."""
    total = torch.zeros(x.shape[0], matrix.shape[0], dtype=torch.int64)
    for k in range(matrix.shape[1]):
        total = (total + x[:, k, None] * matrix[:, k] % modulus) % modulus
    return total
