"""Any unitary, or isometry, as rotations about y and z and cx."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from tensortrain.models.quantum.gates import Matrix, Operation, matrix_of
from tensortrain.models.quantum.two_qubits import one_qubit, spared, two_qubits

__all__ = ["merged", "of_isometry", "of_unitary", "qubits_of"]

_NONE = 1e-13
_FLIPS = [
    np.kron(p, q)
    for p, q in itertools.product((np.eye(2), np.eye(2)[::-1], np.diag([1, -1]), np.array([[0, -1], [1, 0]])), repeat=2)
][1:]


def of_isometry(columns: Matrix, n_inputs: int) -> list[Operation]:
    """Gates that take ``|a> |0..0>`` to a column, for every number ``a`` of the first qubits that has one.

    Args:
        columns: ``(2**n, r)`` orthonormal, ``r <= 2**n_inputs``.
        n_inputs: Qubits, the first ones, that ``a`` is written on; the others are in state 0 before.

    Returns:
        list: On qubits ``0 .. n - 1``, qubit 0 the most significant, in the order of time; ``rz``, ``ry``, ``cx``.
    """
    n_qubits = qubits_of(len(columns))
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

    Cost: at most 3, 21, 105 cx for 2, 3, 4 qubits, about 4^n / 2; with a zero among them 2, 15, 77.

    Source: Shende, Bullock and Markov, IEEE Trans. CAD 25(6), 2006 (quantum Shannon decomposition).
    """
    n_qubits = qubits_of(len(u))
    if n_qubits == 1:
        return one_qubit(u)
    parts = _parts(u, n_zeros, 0)
    n_left = sum(isinstance(part, _Pair) for part in parts)
    diagonal, found = np.ones(4), []
    for part in parts:
        if isinstance(part, Operation):
            found.append(part)
            continue
        # All that stands between two pairs commutes with a diagonal on them, which the next pair takes along.
        n_left -= 1
        pair, diagonal = part.u * diagonal, np.ones(4)
        if n_left and not part.n_zeros:
            pair, diagonal = spared(pair)
        found += [gate.on((n_qubits - 2, n_qubits - 1)) for gate in two_qubits(pair, part.n_zeros)]
    return found


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
            matrix = matrix_of(operation)
            waiting[q] = matrix @ waiting[q] if q in waiting else matrix
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
    places = np.arange(rank) << n_zeros
    rest = np.setdiff1d(np.arange(size), places)
    whole = np.zeros((size, size), dtype=np.complex128)
    whole[:, places], whole[:, rest] = columns, np.linalg.qr(columns, mode="complete")[0][:, rank:]
    if len(rest) and not np.iscomplexobj(columns) and np.linalg.det(whole).real < 0:
        whole[:, rest[-1]] *= -1  # two qubits need one cx less then
    if (size, rank, n_zeros) != (4, 2, 1):
        return whole
    found = [whole]
    for flip in _FLIPS:  # such as copies of a bit, for which one cx will do
        other = flip @ columns
        if np.abs(columns.conj().T @ other).max() < _NONE:
            found.append(np.stack((columns, other), axis=-1).reshape(size, size).astype(whole.dtype))
    counts = [sum(gate.name == "cx" for gate in two_qubits(u, n_zeros)) for u in found] if len(found) > 1 else [0]
    return found[int(np.argmin(counts))]


@dataclass(frozen=True)
class _Pair:
    """A unitary on the last two qubits; the first ``n_zeros`` of them are in state 0 before."""

    u: Matrix
    n_zeros: int


def _parts(u: Matrix, n_zeros: int, top: int) -> list[Operation | _Pair]:
    """A unitary on the qubits from ``top`` on, as rotations, cx, and unitaries on the last two."""
    if len(u) == 4:
        return [_Pair(u, n_zeros)]
    half = len(u) // 2
    left, angles, right = scipy.linalg.cossin(u, p=half, q=half, separate=True)
    first = _parts(right[0], n_zeros - 1, top + 1) if n_zeros else _two_cases(right[0], right[1], top)
    return [*first, *_turns("ry", 2 * angles, top), *_two_cases(left[0], left[1], top)]


def _two_cases(u0: Matrix, u1: Matrix, top: int) -> list[Operation | _Pair]:
    """``u0`` or ``u1`` on the qubits behind ``top``, by its state: ``(1 x v) (d + d^H) (1 x w)``."""
    if np.abs(u0 - u1).max() < _NONE:
        return _parts(u0, 0, top + 1)
    triangle, v = scipy.linalg.schur(u0 @ u1.conj().T, output="complex")  # of a normal matrix: diagonal
    phases = np.angle(np.diag(triangle)) / 2
    w = np.exp(1j * phases)[:, None] * (v.conj().T @ u1)
    return [*_parts(w, 0, top + 1), *_turns("rz", -2 * phases, top), *_parts(v, 0, top + 1)]


def _turns(name: str, angles: Matrix, top: int) -> list[Operation]:
    """Rotations of qubit ``top`` by an angle for every state of the qubits behind it."""
    if np.abs(angles).max() < _NONE:
        return []
    signs, controls = _gray(len(angles))
    operations = []
    for angle, control in zip(signs @ angles, controls, strict=True):
        operations += [Operation(name, (top,), (float(angle),)), Operation("cx", (top + control, top))]
    return operations


@functools.cache
def _gray(size: int) -> tuple[Matrix, list[int]]:
    """By a Gray code: from angles for every state to those between cx, and the distances of the cx's controls."""
    codes = np.arange(size) ^ (np.arange(size) >> 1)
    both = codes[:, None] & np.arange(size)
    ones = np.stack([(both >> k) & 1 for k in range(qubits_of(size))]).sum(0)
    changed = [int(code ^ after).bit_length() for code, after in zip(codes, np.roll(codes, -1), strict=True)]
    return (-1.0) ** ones / size, [qubits_of(size) + 1 - place for place in changed]


def qubits_of(n: int) -> int:
    """Qubits that hold n states."""
    return (n - 1).bit_length()
