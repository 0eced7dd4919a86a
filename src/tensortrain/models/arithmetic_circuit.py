"""Recurrent arithmetic circuits: recurrent networks whose only operation is the product."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.cores.scaling import split_pow2, work_dtype
from tensortrain.errors import DataError, KindError
from tensortrain.models.base import TensorModel, held
from tensortrain.models.checks import checked_dtype, checked_inputs, checked_labels, checked_sizes, whole
from tensortrain.models.separation import check_prime
from tensortrain.models.supervised import Supervised
from tensortrain.networks import register
from tensortrain.system.history import History

__all__ = ["RecurrentArithmeticCircuit"]

_SPREAD = 0.5  # of the first factors around 1


@register("recurrent-arithmetic-circuit", needs_arguments=True)
class RecurrentArithmeticCircuit(TensorModel):
    r"""``h_t^l = (W_I^l h_t^{l-1}) * (W_H^l h_{t-1}^l)`` with ``h_t^0`` the features of step t; ``y = w h_T^L``.

    One layer is a train with shared cores. Deeper circuits copy their inputs, and are no train: their memory, the
    rank between the first and the last half of the steps, grows with the number of steps.

    States are products of as many numbers as there are steps, or many more in deep layers: each sample's carry a power
    of two of their own, so that thousands of steps neither overflow nor vanish.

    Args:
        n_features: Features of a step.
        width: Size of every state.
        depth: Layers.
        n_outputs: Scores at the end; 1 gives ``(b,)``.
        generator, device, dtype: Of the first parameters.

    Shapes: x ``(b, T, n_features)``, of any T.

    Cost: O(depth width^2) multiplications a step and sample.

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
        n_features, width, depth, n_outputs = checked_sizes(
            n_features=n_features, width=width, depth=depth, n_outputs=n_outputs
        )
        self.n_features, self.width, self.depth, self.n_outputs = n_features, width, depth, n_outputs

        dtype = checked_dtype(dtype)

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device, dtype=work_dtype(dtype))
            return drawn if device is None else drawn.to(device)

        def rotation() -> nn.Parameter:
            return nn.Parameter(torch.linalg.qr(draw(width, width)).Q.to(dtype))

        # Factors near 1 and rotations: a product over many steps then keeps what the first of them brought.
        first = nn.Parameter((1 + _SPREAD * draw(width, n_features)).to(dtype))
        self.inputs = nn.ParameterList([first, *(rotation() for _ in range(depth - 1))])
        self.hidden = nn.ParameterList([rotation() for _ in range(depth)])
        self.starts = nn.ParameterList([nn.Parameter(torch.ones_like(first[:, 0])) for _ in range(depth)])
        self.output = nn.Parameter((draw(n_outputs, width) / math.sqrt(width)).to(dtype))

    @property
    def config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("n_features", "width", "depth", "n_outputs")}

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(b,)`` or ``(b, n_outputs)`` of sequences ``(b, T, n_features)``.

        Raises:
            DataError: ``x`` has another shape, no steps, no floating numbers, or NaN.
        """
        state, exponent = self._last_state(self._checked(x))
        scores = held(state @ self.output.T, exponent)
        return scores[:, 0] if self.n_outputs == 1 else scores

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        n_sweeps: int = 10,
        lr: float = 1e-2,
        batch_size: int = 128,
        grad_clip: float | None = 1.0,
        validation: tuple[Tensor, Tensor] | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn classes of sequences, in place, by cross entropy and Adam.

        The size of a state is a product over all steps and says nothing of the class. So the scores that are trained
        are those of states of size 1: each sample's are divided by a positive number, which leaves the largest one
        where it was.

        Args:
            x: ``(b, T, n_features)``.
            y: ``(b,)`` int64, from 0 to ``n_outputs - 1``.
            n_sweeps: Passes over the data.
            lr, batch_size: Of Adam.
            grad_clip: Largest norm of a gradient.
            validation, checkpoint, observer, generator: As for ``MPSClassifier.fit``.

        Returns:
            History: for every pass ``loss``, ``accuracy``, and those of ``validation``.

        Raises:
            DataError: There are no sequences, or they do not fit.
            KindError: The circuit has one output, and no classes to tell apart.
        """
        if self.n_outputs < 2:
            raise KindError(
                f"classes need a score each: n_outputs has {self.n_outputs}, expected 2 or more. Build the circuit "
                "with as many outputs as classes."
            )
        job = Supervised.of(
            _Directions(self),
            (x, y),
            self._labelled,
            n_sweeps=n_sweeps,
            validation=validation,
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        return job.by_steps(lr, batch_size, grad_clip=grad_clip)

    def _labelled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self._checked(x)
        return x, checked_labels(y, x.shape[0], self.n_outputs)

    def _checked(self, x: object) -> Tensor:
        return checked_inputs(
            x, ("b", "T", self.n_features), self.output.dtype, "Put the steps, one or more, along axis 1"
        )

    def _last_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's state ``(b, width)``, without the powers of two ``(b,)`` that are apart."""
        states = [start.expand(x.shape[0], -1) for start in self.starts]
        exponents = [torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)] * self.depth
        first = x @ self.inputs[0].T  # of all steps at once
        for step in first.unbind(1):
            factor, below = step, None
            for layer in range(self.depth):
                if below is not None:
                    factor = below @ self.inputs[layer].T
                    exponents[layer] = exponents[layer] + exponents[layer - 1]
                below, apart = split_pow2(factor * (states[layer] @ self.hidden[layer].T), 1)
                states[layer], exponents[layer] = below, exponents[layer] + apart
        return states[-1], exponents[-1]

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
        if (whole(n_steps) or 0) < 1:
            raise DataError(f"a grid must have steps: n_steps has {n_steps!r}, expected 1 or more. Pass a number.")
        check_prime(modulus)

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


class _Directions(nn.Module):
    """A circuit as it is trained: its scores of states of root mean square 1."""

    def __init__(self, model: RecurrentArithmeticCircuit) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        state, _ = self.model._last_state(x)
        size = state.square().mean(1, keepdim=True).sqrt()
        return state / size.clamp_min(torch.finfo(state.dtype).tiny) @ self.model.output.T


def _product(x: Tensor, matrix: Tensor, modulus: int) -> Tensor:
    """``x @ matrix.T`` of residues: a term at a time, since a sum of two products would leave int64."""
    total = torch.zeros(x.shape[0], matrix.shape[0], dtype=torch.int64)
    for k in range(matrix.shape[1]):
        total = (total + x[:, k, None] * matrix[:, k] % modulus) % modulus
    return total
