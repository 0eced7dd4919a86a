"""One statement of a circuit, and the matrices of the gates that have names.

A gate on several qubits reads its matrix with the first qubit as the most significant.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GATES", "Matrix", "Named", "Operation", "matrix_of"]

Matrix = NDArray[Any]  # real or complex, double


@dataclass(frozen=True)
class Operation:
    """A gate, a measurement, a reset or a barrier.

    Attributes:
        name: Of ``GATES``, or ``"measure"``, ``"reset"``, ``"barrier"``.
        qubits: On which it acts, the most significant first.
        params: Angles, radians.
        bit: Of a measurement: where its outcome goes.
    """

    name: str
    qubits: tuple[int, ...]
    params: tuple[float, ...] = ()
    bit: int | None = None

    @property
    def is_gate(self) -> bool:
        """Whether it is a unitary."""
        return self.name not in ("measure", "reset", "barrier")

    def on(self, qubits: tuple[int, ...]) -> Operation:
        """The same on other qubits: number q becomes ``qubits[q]``."""
        return replace(self, qubits=tuple(qubits[q] for q in self.qubits))


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Attributes:
        n_qubits, n_params: How many it takes.
        matrix: From the angles to the unitary.
    """

    n_qubits: int
    n_params: int
    matrix: Callable[..., Matrix]


def matrix_of(operation: Operation) -> Matrix:
    """The unitary of a gate."""
    return GATES[operation.name].matrix(*operation.params)


def _of(*rows: tuple[complex, ...]) -> Matrix:
    return np.array(rows, dtype=np.complex128)


def _u(theta: float, phi: float, lam: float) -> Matrix:
    c, s = math.cos(theta / 2), math.sin(theta / 2)
    return _of((c, -cmath.exp(1j * lam) * s), (cmath.exp(1j * phi) * s, cmath.exp(1j * (phi + lam)) * c))


def _p(angle: float) -> Matrix:
    return _of((1, 0), (0, cmath.exp(1j * angle)))


def _rx(angle: float) -> Matrix:
    c, s = math.cos(angle / 2), math.sin(angle / 2)
    return _of((c, -1j * s), (-1j * s, c))


def _ry(angle: float) -> Matrix:
    c, s = math.cos(angle / 2), math.sin(angle / 2)
    return _of((c, -s), (s, c))


def _rz(angle: float) -> Matrix:
    return _of((cmath.exp(-0.5j * angle), 0), (0, cmath.exp(0.5j * angle)))


def _controlled(gate: Matrix) -> Matrix:
    whole = np.eye(2 * len(gate), dtype=np.complex128)
    whole[len(gate) :, len(gate) :] = gate
    return whole


def _rotation_of_pairs(pauli: Matrix) -> Callable[[float], Matrix]:
    both = np.kron(pauli, pauli)
    return lambda angle: math.cos(angle / 2) * np.eye(4) - 1j * math.sin(angle / 2) * both


def _cu(theta: float, phi: float, lam: float, gamma: float) -> Matrix:
    return _controlled(cmath.exp(1j * gamma) * _u(theta, phi, lam))


_X, _Y, _Z = _of((0, 1), (1, 0)), _of((0, -1j), (1j, 0)), _of((1, 0), (0, -1))
_H = _of((1, 1), (1, -1)) / math.sqrt(2)
_SX = _of((1 + 1j, 1 - 1j), (1 - 1j, 1 + 1j)) / 2
_SWAP = _of((1, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 0, 0, 1))
_ISWAP = _of((1, 0, 0, 0), (0, 0, 1j, 0), (0, 1j, 0, 0), (0, 0, 0, 1))

_CONSTANT = {
    "id": np.eye(2, dtype=np.complex128),
    "x": _X,
    "y": _Y,
    "z": _Z,
    "h": _H,
    "s": _p(math.pi / 2),
    "sdg": _p(-math.pi / 2),
    "t": _p(math.pi / 4),
    "tdg": _p(-math.pi / 4),
    "sx": _SX,
    "sxdg": _SX.conj().T,
    "cx": _controlled(_X),
    "cy": _controlled(_Y),
    "cz": _controlled(_Z),
    "ch": _controlled(_H),
    "csx": _controlled(_SX),
    "swap": _SWAP,
    "iswap": _ISWAP,
    "ccx": _controlled(_controlled(_X)),
    "ccz": _controlled(_controlled(_Z)),
    "cswap": _controlled(_SWAP),
    "c3x": _controlled(_controlled(_controlled(_X))),
    "c4x": _controlled(_controlled(_controlled(_controlled(_X)))),
    "c3sqrtx": _controlled(_controlled(_controlled(_SX))),
}

_TURNED: dict[str, tuple[int, int, Callable[..., Matrix]]] = {
    "u0": (1, 1, lambda _: np.eye(2, dtype=np.complex128)),  # waits
    "rx": (1, 1, _rx),
    "ry": (1, 1, _ry),
    "rz": (1, 1, _rz),
    "p": (1, 1, _p),
    "u2": (1, 2, lambda phi, lam: _u(math.pi / 2, phi, lam)),
    "u": (1, 3, _u),
    "crx": (2, 1, lambda angle: _controlled(_rx(angle))),
    "cry": (2, 1, lambda angle: _controlled(_ry(angle))),
    "crz": (2, 1, lambda angle: _controlled(_rz(angle))),
    "cp": (2, 1, lambda angle: _controlled(_p(angle))),
    "cu3": (2, 3, lambda theta, phi, lam: _controlled(_u(theta, phi, lam))),
    "cu": (2, 4, _cu),
    "rxx": (2, 1, _rotation_of_pairs(_X)),
    "ryy": (2, 1, _rotation_of_pairs(_Y)),
    "rzz": (2, 1, _rotation_of_pairs(_Z)),
}


def _constant(matrix: Matrix) -> Named:
    return Named(len(matrix).bit_length() - 1, 0, lambda: matrix)


GATES: dict[str, Named] = {
    **{name: _constant(matrix) for name, matrix in _CONSTANT.items()},
    **{name: Named(*what) for name, what in _TURNED.items()},
}
# Other spellings; version 3 of OpenQASM writes the built-in ones with capitals.
GATES |= {
    other: GATES[name]
    for other, name in {
        "u1": "p",
        "phase": "p",
        "u3": "u",
        "U": "u",
        "CX": "cx",
        "cnot": "cx",
        "cu1": "cp",
        "cphase": "cp",
        "toffoli": "ccx",
    }.items()
}
