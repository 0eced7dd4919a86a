"""Any unitary, or isometry, as rotations about y and z and cx."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.linalg

from tensortrain.models.quantum.gates import Matrix, Operation, matrix_of
from tensortrain.models.quantum.two_qubits import one_qubit, two_qubits

__all__ = ["merged", "of_isometry", "of_unitary"]

_NONE = 1e-13


def of_isometry(columns: Matrix, n_inputs: int) -> list[Operation]:
    """Gates that take ``|a> |0..0>`` to a column, for every number ``a`` of the first qubits that has one.

    Args:
        columns: ``(2**n, r)`` orthonormal, ``r <= 2**n_inputs``.
        n_inputs: Qubits, the first ones, that ``a`` is written on; the others are in state 0 before.

    Returns:
        list: On qubits ``0 .. n - 1``, qubit 0 the most significant, in the order of time; ``rz``, ``ry``, ``cx``.
    """
    n_qubits = len(columns).bit_length() - 1
    n_zeros = n_qubits - n_inputs
    whole = _completed(columns, n_zeros)
    # Zeros go to the front: there a split into halves finds that one half never meets a state.
    order = [*range(n_inputs, n_qubits), *range(n_inputs)]
    axes = [*order, *(n_qubits + q for q in order)]
    turned = whole.reshape((2,) * (2 * n_qubits)).transpose(axes).reshape(whole.shape)
    gates = (operation.on(tuple(order)) for operation in of_unitary(turned, n_zeros))
    return merged(gates, zeros=range(n_inputs, n_qubits))


def of_unitary(u: Matrix, n_zeros: int = 0) -> list[Operation]:
    """Gates of a unitary, up to its phase; the first ``n_zeros`` qubits are in state 0 before.

    Cost: at most 3, 24, 120 cx for 2, 3, 4 qubits, about (9/16) 4^n; with a zero among them 2, 17, 88.

    Source: Shende, Bullock and Markov, IEEE Trans. CAD 25(6), 2006 (quantum Shannon decomposition).
    """
    n_qubits = len(u).bit_length() - 1
    if n_qubits == 1:
        return one_qubit(u)
    if n_qubits == 2:
        return two_qubits(u, n_zeros)
    half = len(u) // 2
    left, angles, right = scipy.linalg.cossin(u, p=half, q=half, separate=True)
    first = _shifted(of_unitary(right[0], n_zeros - 1)) if n_zeros else _two_cases(*right)
    turn = _turns("ry", 2 * np.asarray(angles), n_qubits)
    return merged([*first, *turn, *_two_cases(*left)])


def merged(operations: Iterable[Operation], zeros: Iterable[int] = ()) -> list[Operation]:
    """The same with neighbouring one-qubit gates made one, as ``rz``, ``ry``, ``rz``, and pairs of equal cx gone.

    Args:
        operations: Gates alone.
        zeros: Qubits in state 0 before: a turn about z, or a cx that they control, does nothing to them.
    """
    zeros = frozenset(zeros)
    kept: list[Operation | None] = []
    ends: dict[int, list[int]] = {}  # of every qubit: where in kept its operations stand
    waiting: dict[int, Matrix] = {}

    def put(operation: Operation) -> None:
        for q in operation.qubits:
            ends.setdefault(q, []).append(len(kept))
        kept.append(operation)

    def flush(q: int) -> None:
        for turn in one_qubit(waiting.pop(q), q) if q in waiting else ():
            if not (is_zero(q) and turn.name == "rz"):
                put(turn)

    def is_zero(q: int) -> bool:
        return q in zeros and not ends.get(q)

    for operation in operations:
        if operation.is_gate and len(operation.qubits) == 1:
            q = operation.qubits[0]
            waiting[q] = matrix_of(operation) @ waiting.get(q, np.eye(2))
            continue
        for q in operation.qubits:
            flush(q)
        if operation.name == "cx" and is_zero(operation.qubits[0]):
            continue
        last = {ends[q][-1] if ends.get(q) else -1 for q in operation.qubits}
        if operation.name == "cx" and len(last) == 1 and (at := last.pop()) >= 0 and kept[at] == operation:
            kept[at] = None
            for q in operation.qubits:
                ends[q].pop()
        else:
            put(operation)
    for q in list(waiting):
        flush(q)
    return [operation for operation in kept if operation is not None]


def _completed(columns: Matrix, n_zeros: int) -> Matrix:
    """A unitary with the columns where their inputs stand and an orthonormal rest; real ones become a rotation."""
    size, rank = columns.shape
    q = np.linalg.qr(columns, mode="complete")[0][:, rank:]
    places = np.arange(rank) << n_zeros
    rest = np.setdiff1d(np.arange(size), places)
    whole = np.zeros((size, size), dtype=np.complex128)
    whole[:, places], whole[:, rest] = columns, q
    if len(rest) and not np.iscomplexobj(columns) and np.linalg.det(whole).real < 0:
        whole[:, rest[-1]] *= -1  # two qubits need one cx less then
    return whole


def _two_cases(u0: Matrix, u1: Matrix) -> list[Operation]:
    """``u0`` or ``u1`` on all qubits but the first, by the state of the first: ``(1 x v) (d + d^H) (1 x w)``."""
    n_qubits = len(u0).bit_length()
    if np.abs(u0 - u1).max() < _NONE:
        return _shifted(of_unitary(u0))
    triangle, v = scipy.linalg.schur(u0 @ u1.conj().T, output="complex")  # of a normal matrix: diagonal
    phases = np.angle(np.diag(triangle)) / 2
    w = np.exp(1j * phases)[:, None] * (v.conj().T @ u1)
    return [*_shifted(of_unitary(w)), *_turns("rz", -2 * phases, n_qubits), *_shifted(of_unitary(v))]


def _turns(name: str, angles: Matrix, n_qubits: int) -> list[Operation]:
    """Rotations of qubit 0 by an angle for every state of the others, by a Gray code."""
    if np.abs(angles).max() < _NONE:
        return []
    size = len(angles)
    codes = [j ^ (j >> 1) for j in range(size)]
    signs = np.array([[(-1) ** (i & code).bit_count() for i in range(size)] for code in codes])
    operations = []
    for j, angle in enumerate(signs @ angles / size):
        changed = (codes[j] ^ codes[(j + 1) % size]).bit_length()  # counted from the least significant qubit
        operations += [Operation(name, (0,), (float(angle),)), Operation("cx", (n_qubits - changed, 0))]
    return operations


def _shifted(operations: Sequence[Operation]) -> list[Operation]:
    """On the qubits behind the first."""
    return [Operation(o.name, tuple(q + 1 for q in o.qubits), o.params) for o in operations]
