"""Circuits as OpenQASM text, versions 2 and 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensortrain.models.quantum.gates import Operation, matrix_of
from tensortrain.models.quantum.synthesis import merged, of_unitary

__all__ = ["written"]

# What the standard gate files of both versions have; every other gate is decomposed.
_OF_ONE = ("id", "x", "y", "z", "h", "s", "sdg", "t", "tdg", "rx", "ry", "rz")
_STANDARD = frozenset((*_OF_ONE, "cx", "cy", "cz", "ch", "crz", "ccx"))


def written(operations: Sequence[Operation], n_qubits: int, n_bits: int, version: int) -> str:
    """A program, one statement a line: register ``q`` of qubits, and ``c`` of bits where there are any."""
    head = (
        ["OPENQASM 2.0;", 'include "qelib1.inc";', f"qreg q[{n_qubits}];"]
        if version == 2
        else ["OPENQASM 3.0;", 'include "stdgates.inc";', f"qubit[{n_qubits}] q;"]
    )
    if n_bits:
        head.append(f"creg c[{n_bits}];" if version == 2 else f"bit[{n_bits}] c;")
    return "\n".join([*head, *(line for operation in operations for line in _lines(operation, version)), ""])


def _lines(operation: Operation, version: int) -> Iterator[str]:
    where = ", ".join(f"q[{q}]" for q in operation.qubits)
    if operation.name == "measure":
        bit = f"c[{operation.bit}]"
        yield f"measure {where} -> {bit};" if version == 2 else f"{bit} = measure {where};"
    elif operation.is_gate and operation.name not in _STANDARD:
        for part in merged(of_unitary(matrix_of(operation))):
            yield from _lines(part.on(operation.qubits), version)
    else:
        angles = f"({', '.join(_number(angle) for angle in operation.params)})" if operation.params else ""
        yield f"{operation.name}{angles} {where};"


def _number(value: float) -> str:
    """All digits, with the point that version 2 asks for."""
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    return text if "." in mantissa else f"{mantissa}.0{e}{exponent}"
