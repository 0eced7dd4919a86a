"""Circuits: what they count, what they prepare, and what comes out of measuring them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensortrain.cores import sampling
from tensortrain.errors import KindError
from tensortrain.models.checks import checked_count
from tensortrain.models.quantum import qasm
from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.simulate import deferred, drawn, final_state, shots
from tensortrain.tensor import TensorTrain

__all__ = ["Circuit"]

_LOG_SHOTS = 22  # log2 of the amplitudes that are followed at once


@dataclass(frozen=True, repr=False)
class Circuit:
    """Operations in the order of time, on qubits of which number 0 is the most significant. Frozen.

    Attributes:
        n_qubits: Qubits.
        operations: Gates, measurements, resets.
        n_bits: Classical bits.
        fidelity: The overlap ``|<train|circuit>|`` with the train it was made for; None where there is none.
        state: The train that it prepares, where it is known: of a circuit that measures on the way, what it would be
            with a qubit of its own for every site.

    Example:
        >>> ghz = tensortrain.quantum.from_qasm("qreg q[2]; h q[0]; cx q[0], q[1];")
        >>> ghz.depth, ghz.n_cnots, ghz.statevector().abs().square()
        (2, 1, tensor([0.5000, 0.0000, 0.0000, 0.5000], dtype=torch.float64))
    """

    n_qubits: int
    operations: tuple[Operation, ...]
    n_bits: int = 0
    fidelity: float | None = None
    state: TensorTrain | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        names = ("n_qubits", "n_bits", "n_gates", "n_cnots", "depth", "fidelity")
        return f"Circuit({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    @property
    def n_gates(self) -> int:
        """Gates, on one qubit or more."""
        return sum(operation.is_gate for operation in self.operations)

    @property
    def n_cnots(self) -> int:
        """The ``cx`` among them."""
        return sum(operation.name == "cx" for operation in self.operations)

    @property
    def depth(self) -> int:
        """Steps that it takes where operations on different qubits run at the same time."""
        ends = [0] * (self.n_qubits + self.n_bits)
        for operation in self.operations:
            bit = [] if operation.bit is None else [self.n_qubits + operation.bit]
            places = [*operation.qubits, *bit]
            end = max(ends[place] for place in places) + (operation.name != "barrier")
            for place in places:
                ends[place] = end
        return max(ends, default=0)

    def to_qasm(self, version: int = 2, *, measure: bool = False) -> str:
        """The circuit as a program.

        Args:
            version: Of OpenQASM, 2 or 3.
            measure: Measure qubit k into bit k at the end, of a circuit that measures nothing itself.

        Returns:
            str: Angles have all their digits. The global phase is not in it.

        Raises:
            KindError: There is no such version.
        """
        if version not in (2, 3):
            raise KindError(f"a program must have a version: version has {version!r}, expected 2 or 3. Pass one.")
        operations, n_bits = self.operations, self.n_bits
        if measure and not self._measures:
            operations = (*operations, *(Operation("measure", (q,), (), q) for q in range(self.n_qubits)))
            n_bits = self.n_qubits
        return qasm.written(operations, self.n_qubits, n_bits, version)

    def statevector(self) -> Tensor:
        """The state at the end, ``(2**n,)`` complex128, up to its global phase.

        ``n`` is the number of qubits. Of a circuit that measures it is the number of bits, bit 0 the most significant:
        the state of the circuit that gives every bit a qubit of its own and measures nothing.

        Raises:
            KindError: There is no such state: some qubits are measured and others are not, or go on without a reset.
            ShapeError: It does not fit into memory.

        Cost: O(n_gates 2^n) flops.
        """
        gates, n, places = deferred(self.operations, self.n_qubits)
        state = final_state(gates, n)
        if not places:
            return state
        return state.reshape((2,) * n).permute([places[bit] for bit in sorted(places)]).flatten()

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Outcomes of independent runs.

        Args:
            n: How many.
            generator: Of the random numbers, on the CPU.

        Returns:
            Tensor: ``(n, n_bits)`` int64, or ``(n, n_qubits)`` where the circuit measures nothing: all are measured
            then. Column k is bit k, or qubit k.

        Raises:
            ShapeError: There are too many qubits to follow, and what they prepare is not known as a train.

        Cost: O(n d r^2) flops from a train of rank r; without one O(n_gates 2^n_qubits), times n where measurements
            come before the end.
        """
        n = checked_count(n)
        if self.state is not None:
            return sampling.sample(self.state.cores, n, law="born", generator=generator)
        if not self._measures:
            return drawn(final_state(self.operations, self.n_qubits), n, generator)
        if self._measures_all_at_the_end:
            gates, n_wires, places = deferred(self.operations, self.n_qubits)
            found = drawn(final_state(gates, n_wires), n, generator)
            return found[:, [places[bit] for bit in range(self.n_bits)]]
        at_once = 2 ** max(0, _LOG_SHOTS - self.n_qubits)
        parts = [min(at_once, n - start) for start in range(0, n, at_once)]
        runs = [shots(self.operations, self.n_qubits, self.n_bits, part, generator) for part in parts]
        return torch.cat([torch.zeros(0, self.n_bits, dtype=torch.int64), *runs])

    @property
    def _measures(self) -> bool:
        return any(operation.name == "measure" for operation in self.operations)

    @property
    def _measures_all_at_the_end(self) -> bool:
        """Whether every bit is written once, by a qubit that rests from then on, and every qubit is measured."""
        measured: set[int] = set()
        bits: set[int | None] = set()
        for operation in self.operations:
            if operation.name == "reset" or measured.intersection(operation.qubits):
                return False
            if operation.name == "measure":
                measured.update(operation.qubits)
                bits.add(operation.bit)
        return len(measured) == self.n_qubits and len(bits) == self.n_bits == self.n_qubits
