"""Unitaries on one and two qubits as rotations and as few cx as they need: none, one, two or three."""

from __future__ import annotations

import cmath
import functools
import itertools
import math

import numpy as np

from tensortrain.models.quantum.gates import Matrix, Operation, matrix_of

__all__ = ["one_qubit", "spared", "two_qubits", "two_qubits_prepared"]

_NONE = 1e-13  # angles below are left out
_MAGIC = np.array([[1, 0, 0, 1j], [0, 1j, 1, 0], [0, 1j, -1, 0], [1, 0, 0, -1j]]) / math.sqrt(2)
_X, _Y, _Z = (matrix_of(Operation(name, (0,))) for name in "xyz")
# exp(i(a XX + b YY + c ZZ)) is diagonal in the magic basis; the columns hold the signs of a, b and c there.
_SIGNS = np.stack([np.diag(_MAGIC.conj().T @ np.kron(p, p) @ _MAGIC).real for p in (_X, _Y, _Z)], axis=1)
_PAULIS = (_X, _Y, _Z)
_HADAMARD = matrix_of(Operation("h", (0,)))


def one_qubit(u: Matrix, qubit: int = 0) -> list[Operation]:
    """``rz``, ``ry``, ``rz`` that make ``u`` up to its phase; those that do nothing are left out."""
    special = u / cmath.sqrt(u[0, 0] * u[1, 1] - u[0, 1] * u[1, 0])
    theta = 2 * math.atan2(abs(special[1, 0]), abs(special[1, 1]))
    total = 2 * cmath.phase(special[1, 1]) if abs(special[1, 1]) > _NONE else 0.0
    difference = 2 * cmath.phase(special[1, 0]) if abs(special[1, 0]) > _NONE else 0.0
    after, before = (total + difference) / 2, (total - difference) / 2
    if theta < _NONE:
        turns = [("rz", total)]
    else:
        turns = [("rz", before), ("ry", theta), ("rz", after)]
    turns = [(name, math.remainder(angle, 2 * math.pi)) for name, angle in turns]
    return [Operation(name, (qubit,), (angle,)) for name, angle in turns if abs(angle) > _NONE]


def two_qubits(u: Matrix, n_zeros: int = 0) -> list[Operation]:
    """A unitary on qubits 0 and 1, up to its phase.

    Args:
        u: ``(4, 4)``.
        n_zeros: How many of the qubits are in state 0 before. With one, two cx always do, with both, one.

    Source: Kraus and Cirac 2001 (the form); Vatan and Williams, Phys. Rev. A 69, 032315 (2004) (three cx); Shende,
        Bullock and Markov 2006 (two cx up to a diagonal).
    """
    if n_zeros == 2:
        return two_qubits_prepared(u[:, 0])
    whole = _canonical(u)
    if n_zeros == 0:
        return whole
    # exp(i phi ZZ) turns a qubit beside a zero about z alone: phi is chosen to spare a cx.
    phi = _sparing(u)
    less = _canonical(u * np.exp(1j * phi * np.array([1, -1, -1, 1])))
    if _count(less) < _count(whole):
        return [*(Operation("rz", (q,), (2 * phi,)) for q in (0, 1)), *less]
    return whole


def spared(u: Matrix) -> tuple[Matrix, Matrix]:
    """``(v, d)`` with ``u = diag(d) v``, where ``v`` needs two cx at most if that can be had."""
    nothing = u, np.ones(4)
    if _count(_canonical(u)) < 3:
        return nothing
    turn = np.exp(1j * _sparing(u.T) * np.array([1, -1, -1, 1]))
    v = turn[:, None] * u
    return (v, turn.conj()) if _count(_canonical(v)) < 3 else nothing


def two_qubits_prepared(state: Matrix) -> list[Operation]:
    """What takes two qubits from 00 to a state ``(4,)``, up to its phase."""
    u, s, vh = np.linalg.svd(state.reshape(2, 2))
    turn = [Operation("ry", (0,), (2 * math.atan2(s[1], s[0]),))]
    cross = [Operation("cx", (0, 1))] if s[1] > _NONE else []
    return [*turn, *cross, *one_qubit(u, 0), *one_qubit(vh.T, 1)]


def _sparing(u: Matrix) -> float:
    """The angle for which ``u exp(i phi ZZ)`` needs two cx: the trace of its invariant is real then."""
    special = u / np.linalg.det(u) ** 0.25
    yy, zz = np.kron(_Y, _Y), np.kron(_Z, _Z)
    at_zero = np.trace(special @ yy @ special.T @ yy)
    slope = np.trace(special @ yy @ zz @ special.T @ yy)
    return 0.5 * math.atan2(-at_zero.imag, slope.real)


def _canonical(u: Matrix) -> list[Operation]:
    """``u = (k0 x k1) exp(i(a XX + b YY + c ZZ)) (l0 x l1)`` as gates."""
    before, angles, after = _decomposed(u)
    middle = _middle(*angles)
    return [*_local(before), *middle, *_local(after)]


def _count(operations: list[Operation]) -> int:
    return sum(operation.name == "cx" for operation in operations)


def _local(u: Matrix) -> list[Operation]:
    """A product of two unitaries, each on its qubit."""
    paired = u.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3)  # i j (of qubit 0), k l (of qubit 1)
    row, column = np.unravel_index(np.argmax(np.abs(paired.reshape(4, 4))), (4, 4))
    left, right = paired.reshape(4, 4)[:, column].reshape(2, 2), paired.reshape(4, 4)[row].reshape(2, 2)
    return [*one_qubit(left / np.linalg.norm(left) * math.sqrt(2), 0), *one_qubit(_unit(right), 1)]


def _unit(u: Matrix) -> Matrix:
    return u / np.linalg.norm(u) * math.sqrt(2)


def _decomposed(u: Matrix) -> tuple[Matrix, tuple[float, float, float], Matrix]:
    """``(before, (a, b, c), after)``, with angles in (-pi/4, pi/4], the zeros among them in the middle, then last."""
    special = _MAGIC.conj().T @ (u / np.linalg.det(u) ** 0.25) @ _MAGIC
    basis = _real_basis(special.T @ special)
    phases = np.angle(np.diag(basis.T @ special.T @ special @ basis)) / 2
    if np.prod(np.exp(1j * phases)).real < 0:  # the square roots must have determinant 1
        phases[0] += math.pi
    left = (special @ basis * np.exp(-1j * phases)).real
    before, after = _MAGIC @ basis.T @ _MAGIC.conj().T, _MAGIC @ left @ _MAGIC.conj().T
    angles = _SIGNS.T @ phases / 4
    for k, pauli in enumerate(_PAULIS):  # exp(i pi/2 XX) is local
        n_turns = math.ceil((angles[k] - math.pi / 4 - 1e-12) / (math.pi / 2))
        angles[k] -= n_turns * math.pi / 2
        if n_turns % 2:
            after = after @ np.kron(pauli, pauli)
    return _ordered(before, angles, after)


def _ordered(before: Matrix, angles: Matrix, after: Matrix) -> tuple[Matrix, tuple[float, float, float], Matrix]:
    """Axes renamed, so that the largest angle is about XX and the smallest about YY."""
    order = np.argsort(-np.abs(angles))[[0, 2, 1]]
    frame = _frame(tuple(int(k) for k in order))
    both = np.kron(frame, frame)
    a, b, c = (float(angles[k]) for k in order)
    return both @ before, (a, b, c), after @ both.conj().T


@functools.cache
def _frame(order: tuple[int, ...]) -> Matrix:
    """A unitary that turns axis ``order[0]`` to x, ``order[1]`` to y and ``order[2]`` to z, up to signs."""
    quarter = [(np.eye(2) + 1j * pauli) / math.sqrt(2) for pauli in _PAULIS]
    for turns in itertools.product([None, 0, 1, 2], repeat=2):
        frame = np.eye(2, dtype=np.complex128)
        for k in turns:
            frame = frame if k is None else quarter[k] @ frame
        turned = [frame @ _PAULIS[k] @ frame.conj().T for k in order]
        if all(abs(np.trace(p @ q)) > 1.9 for p, q in zip(turned, _PAULIS, strict=True)):
            return frame
    raise AssertionError(order)


def _real_basis(symmetric: Matrix) -> Matrix:
    """A rotation that diagonalises a unitary equal to its transpose: its two parts commute."""
    found, least = np.eye(4), math.inf
    for turn in (0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8):  # one combination without chance coincidences
        basis = np.linalg.eigh(math.cos(turn) * symmetric.real + math.sin(turn) * symmetric.imag)[1]
        rest = basis.T @ symmetric @ basis
        size = float(np.abs(rest - np.diag(np.diag(rest))).max())
        if size < least:
            found, least = basis, size
        if least < 1e-14:
            break
    if np.linalg.det(found) < 0:
        found = found * np.array([-1, 1, 1, 1])
    return found


def _middle(a: float, b: float, c: float) -> list[Operation]:
    """``exp(i(a XX + b YY + c ZZ))`` up to its phase; ``|a| >= |c| >= |b|``."""
    none = 1e-12
    if abs(a) < none:
        return []
    if abs(c) < none and abs(abs(a) - math.pi / 4) < none:
        # cx is exp(i pi/4 ZX) and quarter turns of its two qubits.
        turn = [Operation("h", (0,))]
        inner = [
            Operation("rz", (0,), (-math.pi / 2,)),
            Operation("rx", (1,), (-math.pi / 2,)),
            Operation("cx", (0, 1)),
        ]
        flip = [] if a > 0 else [Operation("x", (0,)), Operation("x", (1,))]
        return [*turn, *inner, *turn, *flip]
    if abs(b) < none:
        turns = [Operation("rx", (0,), (-2 * a,)), Operation("rz", (1,), (-2 * c,))]
        return [Operation("cx", (0, 1)), *turns, Operation("cx", (0, 1))]
    quarter = math.pi / 2
    return [
        Operation("rz", (1,), (-quarter,)),
        Operation("cx", (1, 0)),
        Operation("rz", (0,), (quarter - 2 * c,)),
        Operation("ry", (1,), (2 * a - quarter,)),
        Operation("cx", (0, 1)),
        Operation("ry", (1,), (quarter - 2 * b,)),
        Operation("cx", (1, 0)),
        Operation("rz", (0,), (quarter,)),
    ]
