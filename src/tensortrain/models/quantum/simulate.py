"""What a circuit does, followed exactly: states of all qubits, and shots of circuits that measure on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tensortrain.errors import KindError, ShapeError
from tensortrain.models.quantum.gates import Matrix, Operation, matrix_of

__all__ = ["MOST_QUBITS", "applied", "deferred", "drawn", "final_state", "shots", "unitary_of"]

MOST_QUBITS = 26  # a state of as many takes a gibibyte


def final_state(operations: Iterable[Operation], n_qubits: int) -> Tensor:
    """The state ``(2**n_qubits,)`` that gates make of zeros, complex128."""
    check_size(n_qubits)
    state = torch.zeros(1, 2**n_qubits, dtype=torch.complex128)
    state[0, 0] = 1
    return applied(operations, state)[0]


def applied(operations: Iterable[Operation], states: Tensor) -> Tensor:
    """Gates on every state of a batch ``(b, 2**n)``."""
    n_qubits = states.shape[-1].bit_length() - 1
    for operation in operations:
        if operation.name != "barrier":
            states = _applied(operation, states, n_qubits)
    return states


def unitary_of(operations: Iterable[Operation], n_qubits: int) -> Matrix:
    """The matrix ``(2**n, 2**n)`` of gates."""
    rows = applied(operations, torch.eye(2**n_qubits, dtype=torch.complex128))
    return np.ascontiguousarray(rows.T.numpy())


def deferred(operations: Sequence[Operation], n_qubits: int) -> tuple[list[Operation], int, dict[int, int]]:
    """Gates alone, on a fresh qubit after every reset, so that what was measured stays where it is.

    Returns:
        ``(gates, n, places)``: on ``n`` qubits, and for every bit the qubit that holds its outcome.

    Raises:
        KindError: A qubit is used after its measurement without a reset, or reset without a measurement.
    """
    wires = list(range(n_qubits))
    measured: set[int] = set()
    touched: set[int] = set()
    n, gates, places = n_qubits, [], {}
    for operation in operations:
        here = [wires[q] for q in operation.qubits]
        if operation.name == "measure":
            assert operation.bit is not None
            places[operation.bit] = here[0]
            measured.add(here[0])
        elif operation.name == "reset":
            if here[0] in measured:
                wires[operation.qubits[0]] = n
                n += 1
            elif here[0] in touched:
                raise _no_state("a qubit is reset that was not measured")
        elif operation.is_gate:
            if measured.intersection(here):
                raise _no_state("a qubit goes on after its measurement without a reset")
            touched.update(here)
            gates.append(operation.on(tuple(wires)))
    if places:
        return _only_measured(gates, places, touched)
    return gates, n, places


def shots(
    operations: Sequence[Operation], n_qubits: int, n_bits: int, n: int, generator: torch.Generator | None
) -> Tensor:
    """Outcomes ``(n, n_bits)`` int64 of runs that measure and reset on the way, all runs at once.

    Cost: O(n 2^n_qubits) for each operation, in time and memory; with more runs than states, gates between
        measurements are multiplied first, at O(4^n_qubits) each.
    """
    check_size(n_qubits + max(n - 1, 0).bit_length(), f"{n} shots of {n_qubits}")
    states = torch.zeros(n, 2**n_qubits, dtype=torch.complex128)
    states[:, 0] = 1
    bits = torch.zeros(n, n_bits, dtype=torch.int64)
    for is_gate, group in itertools.groupby(operations, lambda operation: operation.is_gate):
        if is_gate and n > 2**n_qubits:
            rows = applied(group, torch.eye(2**n_qubits, dtype=torch.complex128))
            states = states @ rows
        elif is_gate:
            states = applied(group, states)
        for operation in () if is_gate else group:
            if operation.name == "barrier":
                continue
            states, outcome = _looked(states, operation.qubits[0], generator)
            if operation.name == "measure":
                bits[:, operation.bit] = outcome
            else:
                states = _flipped(states, operation.qubits[0], outcome)
    return bits


def drawn(state: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Outcomes ``(n, n_qubits)`` int64 of measuring all qubits of a state."""
    n_qubits = len(state).bit_length() - 1
    upto = state.abs().square().cumsum(0)
    draws = torch.rand(n, generator=generator, dtype=torch.float64) * upto[-1]
    found = torch.searchsorted(upto, draws, right=True).clamp_max(len(state) - 1)
    return (found[:, None] >> torch.arange(n_qubits - 1, -1, -1)) & 1


def check_size(n_qubits: int, what: str | None = None) -> None:
    """Refuse states that no memory holds.

    Raises:
        ShapeError: There are too many qubits.
    """
    if n_qubits > MOST_QUBITS:
        raise ShapeError(
            f"a state of all qubits must fit into memory: there are {what or n_qubits} qubits, expected at most "
            f"{MOST_QUBITS} in all. Sample fewer at once, or a circuit that tensortrain.quantum.circuit made."
        )


def _applied(operation: Operation, states: Tensor, n_qubits: int) -> Tensor:
    if operation.name == "cx":
        control, target = operation.qubits
        return _crossed(states, control, target, n_qubits)
    matrix = torch.from_numpy(matrix_of(operation))
    qubits = operation.qubits
    if len(qubits) == 1:
        return (matrix @ states.reshape(-1, 2, 2 ** (n_qubits - qubits[0] - 1))).reshape(states.shape)
    axes = [1 + q for q in qubits]
    apart = states.reshape(-1, *(2,) * n_qubits).movedim(axes, tuple(range(-len(axes), 0)))
    done = (apart.flatten(-len(axes)) @ matrix.T).reshape(apart.shape)
    return done.movedim(tuple(range(-len(axes), 0)), axes).reshape(states.shape)


def _crossed(states: Tensor, control: int, target: int, n_qubits: int) -> Tensor:
    low, high = sorted((control, target))
    apart = states.reshape(-1, 2, 2 ** (high - low - 1), 2, 2 ** (n_qubits - high - 1)).clone()
    if control < target:
        apart[:, 1] = apart[:, 1].flip(2)
    else:
        apart[:, :, :, 1] = apart[:, :, :, 1].flip(1)
    return apart.reshape(states.shape)


def _looked(states: Tensor, qubit: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One qubit of every state measured: what is left of the states, and the outcomes."""
    apart = states.reshape(len(states), 2**qubit, 2, -1)
    mass = apart.abs().square().sum((1, 3))
    draws = torch.rand(len(states), generator=generator, dtype=torch.float64)
    outcome = (draws * mass.sum(1) >= mass[:, 0]).long()
    kept = torch.nn.functional.one_hot(outcome, 2)[:, None, :, None]
    norm = mass.gather(1, outcome[:, None]).sqrt()[..., None, None]
    return (apart * kept / norm).reshape(states.shape), outcome


def _flipped(states: Tensor, qubit: int, outcome: Tensor) -> Tensor:
    """Qubits that were found in 1 put to 0."""
    apart = states.reshape(len(states), 2**qubit, 2, -1)
    return torch.where(outcome[:, None, None, None] == 1, apart.flip(2), apart).reshape(states.shape)


def _only_measured(
    gates: list[Operation], places: dict[int, int], touched: set[int]
) -> tuple[list[Operation], int, dict[int, int]]:
    """Without the qubits on which nothing happens."""
    kept = sorted(touched | set(places.values()))
    if len(kept) > len(places):
        raise _no_state("some qubits are measured and others are not")
    names = {wire: k for k, wire in enumerate(kept)}
    renamed = [Operation(g.name, tuple(names[q] for q in g.qubits), g.params) for g in gates]
    return renamed, len(kept), {bit: names[wire] for bit, wire in places.items()}


def _no_state(found: str) -> KindError:
    return KindError(
        f"a circuit must have one final state: {found}, expected measurements whose qubits rest or are reset. "
        "Use sample."
    )
