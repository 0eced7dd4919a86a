"""Classifiers that a quantum computer can run: trees and chains of unitaries, of which one register is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tensortrain.cores.scaling import work_dtype
from tensortrain.errors import DataError, RankError
from tensortrain.models.base import TensorModel
from tensortrain.models.checks import check_choice, checked_dtype, checked_labels, checked_sizes
from tensortrain.models.features import FeatureMap
from tensortrain.models.quantum.channels import Noise
from tensortrain.models.quantum.circuit import Circuit
from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.synthesis import merged, of_unitary, qubits_of
from tensortrain.models.supervised import Supervised
from tensortrain.networks import register
from tensortrain.system.history import History

__all__ = ["UnitaryClassifier"]

_FIRST_ANGLES = 0.5  # standard deviation


@register("unitary-classifier", needs_arguments=True)
class UnitaryClassifier(TensorModel):
    r"""Probabilities of classes, as a register shows them that unitaries have gathered from all features.

    A feature becomes a qubit, cos(pi x / 2) and sin(pi x / 2). In a ``"tree"`` a unitary takes two registers of
    ``n_virtual`` qubits, and one goes on; in a ``"chain"`` it takes a register and the next feature. What is left at
    the end is measured. States are followed exactly, as density matrices, so that noise is followed exactly too.

    Args:
        n_features: Numbers that an example has, in [0, 1].
        n_classes: Classes; the outcomes of the last register are shared out among them in order.
        n_virtual: Qubits of a register; by default as few as tell the classes apart.
        structure: ``"tree"``: registers are filled up with qubits at 0 to a power of two. ``"chain"``: qubits are reset
            and used again, so that ``n_virtual + 1`` of them do.
        kind: ``"real"`` (rotations) or ``"complex"``.
        noise: Acts on the qubits of a register when it is made, and after every unitary; also while it learns.
        generator, device, dtype: Of the first parameters.

    Shapes: ``angles`` are ``(nodes, p)``, one parameter for every level of a tree; p is ``m (m - 1) / 2`` for rotations
    of ``m = 4**n_virtual`` states (a chain: ``2**(n_virtual + 1)``), or ``m**2``.

    Cost: O(b n_features 64^n_virtual) flops for a tree, O(b n_features 8^n_virtual) for a chain.

    Source: Huggins et al., Quantum Sci. Technol. 4, 2019, arXiv:1803.11537.

    Example:
        >>> model = tensortrain.quantum.UnitaryClassifier(16, 2)
        >>> model(torch.rand(5, 16)).exp().sum(1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000], grad_fn=<SumBackward1>)
    """

    def __init__(
        self,
        n_features: int,
        n_classes: int = 2,
        *,
        n_virtual: int | None = None,
        structure: Literal["tree", "chain"] | str = "tree",
        kind: Literal["real", "complex"] | str = "real",
        noise: Noise | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_features, n_classes = checked_sizes(n_features=n_features, n_classes=n_classes)
        (n_virtual,) = checked_sizes(n_virtual=max(1, qubits_of(n_classes)) if n_virtual is None else n_virtual)
        if 2**n_virtual < n_classes:
            raise RankError(
                f"a register must tell the classes apart: n_virtual has {n_virtual} for {n_classes} classes, expected "
                f"{qubits_of(n_classes)} or more. Leave it out."
            )
        check_choice(structure, ("tree", "chain"), "structure")
        check_choice(kind, ("real", "complex"), "kind")
        self.n_features, self.n_classes, self.n_virtual = n_features, n_classes, n_virtual
        self.structure, self.kind = structure, kind
        self.noise = noise if noise is None or isinstance(noise, Noise) else Noise(*noise)
        self.features = FeatureMap("trig")
        self.angles = nn.ParameterList()
        size = 2 ** (2 * n_virtual if structure == "tree" else n_virtual + 1)
        n_angles = size * (size - 1) // 2 if kind == "real" else size**2
        dtype = checked_dtype(dtype)
        for n_nodes in self._nodes():
            first = torch.randn(n_nodes, n_angles, generator=generator, device=device, dtype=dtype)
            self.angles.append(nn.Parameter(_FIRST_ANGLES * first))

    @property
    def config(self) -> dict[str, Any]:
        return {
            "n_features": self.n_features,
            "n_classes": self.n_classes,
            "n_virtual": self.n_virtual,
            "structure": self.structure,
            "kind": self.kind,
            "noise": None if self.noise is None else [self.noise.amplitude_damping, self.noise.dephasing],
        }

    @property
    def n_qubits(self) -> int:
        """That a circuit of it needs."""
        return self.n_virtual + 1 if self.structure == "chain" else self._n_wires

    def forward(self, x: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Logarithms of the probabilities of the classes.

        Args:
            x: ``(b, n_features)`` in [0, 1].
            noise: In place of the model's own.

        Returns:
            Tensor: ``(b, n_classes)``; they sum to one behind ``exp``, and serve as logits.

        Raises:
            DataError: ``x`` has another shape, NaN, or numbers outside [0, 1].
        """
        self._check(x)
        dtype = work_dtype(self.angles[0].dtype)
        noise = self.noise if noise is None else noise
        qubits = self._qubits(x.to(dtype))
        rho = self._by_tree(qubits, noise) if self.structure == "tree" else self._by_chain(qubits, noise)
        outcomes = rho.diagonal(dim1=-2, dim2=-1)
        outcomes = outcomes.real if outcomes.is_complex() else outcomes
        shares = torch.zeros_like(outcomes[:, : self.n_classes])
        shares = shares.index_add(1, self._classes().to(x.device), outcomes)
        return shares.clamp_min(torch.finfo(dtype).tiny).log().to(self.angles[0].dtype)

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        n_sweeps: int = 20,
        lr: float = 0.03,
        batch_size: int = 64,
        validation: tuple[Tensor, Tensor] | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn from examples, in place, by Adam on the cross entropy; noise of the model is there while it learns.

        Args:
            x: ``(b, n_features)`` in [0, 1].
            y: ``(b,)`` int64.
            n_sweeps: Passes over the data.
            lr, batch_size: Of Adam.
            validation: Examples and labels to watch.
            checkpoint: File with which the same call on the same starting model goes on after a kill, to equal bits.
            observer: Called with the history after every pass; what it raises passes through.
            generator: Decides the order of batches.

        Returns:
            History: for every pass ``loss`` and ``accuracy``, and those of ``validation``.

        Raises:
            DataError: There are no examples, or they do not fit.
        """
        job = Supervised.of(
            self,
            (x, y),
            self._labelled,
            n_sweeps=n_sweeps,
            validation=validation,
            checkpoint=checkpoint,
            observer=observer,
            generator=generator,
        )
        return job.by_steps(lr, batch_size)

    @torch.no_grad()
    def to_circuit(self, x: Tensor) -> Circuit:
        """The circuit that classifies one example: its bits are the outcomes of the last register.

        Args:
            x: ``(n_features,)`` in [0, 1].

        Returns:
            Circuit: ``n_virtual`` bits; outcome o, the first bit the most significant, means class
            ``o * n_classes // 2**n_virtual``.
        """
        self._check(x[None])
        angles = (math.pi * x.double()).tolist() + [0.0] * (self._n_wires - self.n_features)
        n_virtual = self.n_virtual
        gates: list[Operation] = []
        if self.structure == "tree":
            gates += [Operation("ry", (q,), (angle,)) for q, angle in enumerate(angles)]
            registers = [tuple(range(k, k + n_virtual)) for k in range(0, self._n_wires, n_virtual)]
            for level in self._unitaries(torch.float64):
                pairs = zip(level, registers[::2], registers[1::2], strict=True)
                gates += [gate for u, a, b in pairs for gate in _gates(u, (*a, *b))]
                registers = registers[::2]
        else:
            gates += [Operation("ry", (q,), (angle,)) for q, angle in enumerate(angles[:n_virtual])]
            (unitaries,) = self._unitaries(torch.float64)
            for k, (u, angle) in enumerate(zip(unitaries, angles[n_virtual:], strict=True)):
                fresh = [Operation("reset", (n_virtual,))] if k else []
                gates += [*fresh, Operation("ry", (n_virtual,), (angle,)), *_gates(u, tuple(range(n_virtual + 1)))]
        read = [Operation("measure", (q,), (), q) for q in range(n_virtual)]
        return Circuit(self.n_qubits, (*gates, *read), n_virtual)

    @property
    def _n_wires(self) -> int:
        """Qubits of the inputs, with those that fill up."""
        if self.structure == "chain":
            return max(self.n_features, self.n_virtual + 1)
        n_registers = max(2, 2 ** qubits_of(-(-self.n_features // self.n_virtual)))
        return n_registers * self.n_virtual

    def _nodes(self) -> Iterator[int]:
        """Unitaries of every level."""
        if self.structure == "chain":
            yield self._n_wires - self.n_virtual
            return
        n_nodes = self._n_wires // self.n_virtual
        while n_nodes > 1:
            n_nodes //= 2
            yield n_nodes

    def _unitaries(self, dtype: torch.dtype) -> list[Tensor]:
        """``(nodes, m, m)`` of every level."""
        return [_exponential(angles.to(dtype), self.kind == "complex") for angles in self.angles]

    def _qubits(self, x: Tensor) -> Tensor:
        """Density matrices ``(b, n_wires, 2, 2)``."""
        filled = nn.functional.pad(x, (0, self._n_wires - self.n_features))
        vectors = self.features(filled).transpose(0, 1)
        return vectors.unsqueeze(-1) * vectors.unsqueeze(-2)

    def _by_tree(self, qubits: Tensor, noise: Noise | None) -> Tensor:
        rho = qubits[:, :: self.n_virtual]
        for k in range(1, self.n_virtual):
            rho = _product(rho, qubits[:, k :: self.n_virtual])
        rho = rho if noise is None else noise.on(rho)
        for unitaries in self._unitaries(qubits.dtype):
            rho = _reduced(unitaries, _product(rho[:, ::2], rho[:, 1::2]), self.n_virtual)
            rho = rho if noise is None else noise.on(rho)
        return rho[:, 0]

    def _by_chain(self, qubits: Tensor, noise: Noise | None) -> Tensor:
        qubits = qubits if noise is None else noise.on(qubits)
        rho = qubits[:, 0]
        for k in range(1, self.n_virtual):
            rho = _product(rho, qubits[:, k])
        (unitaries,) = self._unitaries(qubits.dtype)
        for u, fresh in zip(unitaries, qubits[:, self.n_virtual :].unbind(1), strict=True):
            rho = _reduced(u, _product(rho, fresh), 1)
            rho = rho if noise is None else noise.on(rho)
        return rho

    def _classes(self) -> Tensor:
        """The class ``(2**n_virtual,)`` of every outcome."""
        size = 2**self.n_virtual
        return torch.arange(size) * self.n_classes // size

    def _labelled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        return x, checked_labels(y, x.shape[0], self.n_classes)

    def _check(self, x: object) -> None:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.n_features or not x.is_floating_point():
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"examples must have {self.n_features} features: x has {found}, expected floating numbers (b, "
                f"{self.n_features}). Flatten images with x.flatten(1)."
            )
        self.features.check(x)

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return (
            f"n_features={self.n_features}, n_classes={self.n_classes}, n_virtual={self.n_virtual}, "
            f"structure={self.structure!r}, kind={self.kind!r}"
        )


def _exponential(angles: Tensor, is_complex: bool) -> Tensor:
    """Unitaries ``(nodes, m, m)`` of angles ``(nodes, p)``: of the part below the diagonal, above it, and on it."""
    size = math.isqrt(angles.shape[1]) if is_complex else (1 + math.isqrt(1 + 8 * angles.shape[1])) // 2
    rows, columns = torch.tril_indices(size, size, -1, device=angles.device)
    n_below = rows.shape[0]
    flat = angles.new_zeros(angles.shape[0], size, size)
    real = flat.index_put((_row_numbers(angles), rows, columns), angles[:, :n_below])
    skew = real - real.mT
    if not is_complex:
        return torch.linalg.matrix_exp(skew)
    imag = flat.index_put((_row_numbers(angles), rows, columns), angles[:, n_below : 2 * n_below])
    imag = imag + imag.mT + torch.diag_embed(angles[:, 2 * n_below :])
    return torch.linalg.matrix_exp(torch.complex(skew, imag))


def _row_numbers(angles: Tensor) -> Tensor:
    """Row numbers ``(nodes, 1)``."""
    return torch.arange(angles.shape[0], device=angles.device)[:, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker products of matrices along the last two axes."""
    both = a[..., :, None, :, None] * b[..., None, :, None, :]
    return both.flatten(-4, -3).flatten(-2, -1)


def _reduced(u: Tensor, rho: Tensor, n_gone: int) -> Tensor:
    """``u rho u^H`` with the last qubits traced out."""
    turned = u @ rho.to(u.dtype)
    gone = 2**n_gone
    left = turned.unflatten(-2, (-1, gone)).flatten(-2)  # .. i, k m
    right = u.conj().unflatten(-2, (-1, gone)).flatten(-2)
    return left @ right.mT


def _gates(u: Tensor, qubits: tuple[int, ...]) -> list[Operation]:
    matrix = np.asarray(u.cpu().numpy(), dtype=np.complex128)
    return [operation.on(qubits) for operation in merged(of_unitary(matrix))]
