"""OpenQASM: what we write we read again, and qiskit reads it too; what is not known is refused by line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import tensortrain as tt
from tensortrain.errors import DataError
from tensortrain.models.quantum import Circuit, circuit, from_qasm
from tensortrain.models.quantum.gates import GATES, Operation

VERSIONS = (2, 3)
HEADS = {2: 'OPENQASM 2.0;\ninclude "qelib1.inc";\n', 3: 'OPENQASM 3.0;\ninclude "stdgates.inc";\n'}


def random(order: int, rank: int, dtype: torch.dtype = torch.complex128) -> tt.TensorTrain:
    return tt.randn((2,) * order, rank, dtype=dtype, generator=torch.Generator().manual_seed(order + rank))


def overlap(a: object, b: object) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(abs(np.vdot(a, b)) / np.linalg.norm(a) / np.linalg.norm(b))


def in_qiskit(text: str, version: int):
    """The circuit as qiskit reads it."""
    pytest.importorskip("qiskit")
    pytest.importorskip("qiskit_qasm3_import")
    from qiskit import qasm2, qasm3

    return (qasm2 if version == 2 else qasm3).loads(text)


def state_in_qiskit(text: str, version: int) -> np.ndarray:
    """With qubit 0 as the most significant."""
    found = in_qiskit(text, version)
    from qiskit.quantum_info import Statevector

    return Statevector(found).reverse_qargs().data


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["staircase", "holographic"])
def test_what_is_written_is_read(kind: str, version: int) -> None:
    made = circuit(random(6, 3), kind=kind)
    text = made.to_qasm(version)
    assert text.startswith(HEADS[version])
    again = from_qasm(text)
    assert (again.n_qubits, again.n_bits, again.operations) == (made.n_qubits, made.n_bits, made.operations)
    assert again.to_qasm(version) == text
    assert again.fidelity is None


def test_numbers_are_those_of_version_2() -> None:
    text = Circuit(1, (Operation("rz", (0,), (1e-7,)), Operation("rz", (0,), (3,)))).to_qasm(2)
    assert "rz(1.0e-07)" in text
    assert "rz(3.0)" in text
    assert all(re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", number) for number in re.findall(r"\((.*?)\)", text))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(GATES))
def test_gates_that_a_version_lacks_are_written_by_those_it_has(name: str, version: int) -> None:
    gate = Operation(
        name, tuple(range(GATES[name].n_qubits))[::-1], tuple(0.4 + k for k in range(GATES[name].n_params))
    )
    n_qubits = max(3, GATES[name].n_qubits)
    start = tuple(Operation("ry", (q,), (0.5 + q,)) for q in range(n_qubits))
    made = Circuit(n_qubits, (*start, gate))
    text = made.to_qasm(version)
    assert overlap(from_qasm(text).statevector(), made.statevector()) == pytest.approx(1, abs=1e-12)
    if name in ("cswap", "swap", "ch", "ccx", "ryy", "cu", "sx"):
        assert overlap(state_in_qiskit(text, version), made.statevector()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order, rank, dtype", [(1, 1, torch.float64), (5, 3, torch.float64), (6, 4, torch.complex128)])
def test_qiskit_prepares_the_train(order: int, rank: int, dtype: torch.dtype, version: int) -> None:
    x = random(order, rank, dtype)
    made = circuit(x)
    found = state_in_qiskit(made.to_qasm(version), version)
    assert overlap(found, x.to_dense().flatten()) == pytest.approx(1, abs=1e-12)
    assert in_qiskit(made.to_qasm(version), version).depth() == made.depth
    assert in_qiskit(made.to_qasm(version), version).count_ops().get("cx", 0) == made.n_cnots
    layers = circuit(x, n_layers=2)
    assert overlap(state_in_qiskit(layers.to_qasm(version), version), layers.statevector()) == pytest.approx(
        1, abs=1e-12
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["staircase", "holographic"])
def test_qiskit_samples_the_same(kind: str, version: int) -> None:
    pytest.importorskip("qiskit")
    from qiskit.providers.basic_provider import BasicSimulator

    x = random(3, 2)
    law = x.to_dense().flatten().abs().square()
    law = law / law.sum()
    found = in_qiskit(circuit(x, kind=kind).to_qasm(version, measure=True), version)
    counts = BasicSimulator().run(found, shots=4000, seed_simulator=1).result().get_counts()
    seen = torch.zeros(8, dtype=torch.float64)
    for bits, count in counts.items():
        seen[int(bits[::-1], 2)] = count  # qiskit prints bit 0 last
    assert float(((seen - 4000 * law).square() / (4000 * law)).sum()) < 24.3  # p = 0.001 at 7 degrees of freedom


@pytest.mark.parametrize("version", VERSIONS)
def test_what_qiskit_writes_is_read(version: int) -> None:
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit, qasm2, qasm3
    from qiskit.quantum_info import Statevector

    made = QuantumCircuit(3)
    made.h(0)
    made.cu(0.1, 0.2, 0.3, 0.4, 0, 2)
    made.rzz(0.3, 0, 1)
    made.u(0.1, 0.2, 0.3, 1)
    made.ccx(0, 1, 2)
    made.rxx(0.7, 2, 0)
    text = (qasm2 if version == 2 else qasm3).dumps(made)
    assert overlap(from_qasm(text).statevector(), Statevector(made).reverse_qargs().data) == pytest.approx(1, abs=1e-12)


def test_expressions_registers_and_definitions() -> None:
    text = """OPENQASM 2.0; // a comment; with a semicolon
    include "qelib1.inc";
    /* two
       lines */ qreg a[1]; qreg b[2]; creg c[3];
    gate turn(x, y) p, q { ry(x / 2 + y) p; barrier p, q; cx p, q; u1(-(x ^ 2)) q; }
    gate both(x) p, q { turn(x, sin(pi/6)) p, q; turn(x, 0) q, p; }
    both(2 * pi / 3) b[1], a[0];
    h b; cx a[0], b;
    measure a -> c[0];"""
    found = from_qasm(text)
    x = 2 * np.pi / 3
    expected = [
        Operation("ry", (2,), (x / 2 + np.sin(np.pi / 6),)),
        Operation("cx", (2, 0)),
        Operation("u1", (0,), (-(x**2),)),
        Operation("ry", (0,), (x / 2,)),
        Operation("cx", (0, 2)),
        Operation("u1", (2,), (-(x**2),)),
        Operation("h", (1,)),
        Operation("h", (2,)),
        Operation("cx", (0, 1)),
        Operation("cx", (0, 2)),
        Operation("measure", (0,), (), 0),
    ]
    assert [(o.name, o.qubits, o.bit) for o in found.operations] == [(o.name, o.qubits, o.bit) for o in expected]
    for mine, theirs in zip(found.operations, expected, strict=True):
        assert mine.params == pytest.approx(theirs.params)


def test_phases_of_all_are_left_out() -> None:
    text = "OPENQASM 3.0; gate mine(x) a { gphase(x / 2); rz(x) a; } qubit[2] q; gphase(pi / 4); mine(0.5) q[1];"
    assert from_qasm(text).operations == (Operation("rz", (1,), (0.5,)),)


def test_version_3_words() -> None:
    text = "OPENQASM 3; qubit q; qubit[2] r; bit[2] c; U(π, 0, tau / 2) q; CX q, r[1]; c = measure r; reset q; barrier;"
    found = from_qasm(text)
    assert [o.name for o in found.operations] == ["U", "CX", "measure", "measure", "reset", "barrier"]
    assert found.sample(3).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("qreg q[2];\nfoo q[0];", "line 2.*no gate 'foo'"),
        ("qreg q[2];\n\nh q[2];", "line 3.*outside its register"),
        ("qreg q[2]; h p[0];", "none of the declared qubits"),
        ("qreg q[2]; rz q[0];", "0 angles"),
        ("qreg q[2]; cx q[0], q[0];", "2 different qubits"),
        ("qreg q[2]; rz(1/0) q[0];", "no number"),
        ("qreg q[2]; rz(__import__('os')) q[0];", "no number"),
        ("qreg q[2]; creg c[1]; if (c == 1) x q[0];", "not known"),
        ("qubit[2] q; ctrl @ x q[0], q[1];", "not known"),
        ("qubit[2] q; for int i in [0:1] { x q[i]; }", "line 1"),
        ("qreg q[2]; creg c[1]; measure q -> c;", "2 qubits meet 1 bits"),
        ("qreg q[2]; qreg r[3]; cx q, r;", "one number"),
        ("qreg q[2]; qreg q[3];", "declared already"),
        ("OPENQASM 4.0; qreg q[2];", "version"),
        ("gate g a { g a; } qreg q[1]; g q[0];", "calls itself"),
        ("qreg q[1]; h q[0]", "no end"),
        ("", "must have qubits"),
        ("h;", "line 1"),
    ],
)
def test_what_is_not_known_is_refused(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_qasm(text)
    with pytest.raises(DataError, match="must be text"):
        from_qasm(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["rccx q[0],q[1],q[2]", "c3x q[0],q[1],q[2],q[3]", "rc3x q[0],q[1],q[2],q[3]"])
def test_gates_of_the_standard_file_turn_bits_where_all_controls_are_on(gate: str) -> None:
    """Up to phases they are controlled nots; those are looked at by undoing them with themselves."""
    *controls, target = [int(k) for k in re.findall(r"\d", gate.split(" ")[1])]
    for n_on in range(len(controls) + 1):
        ready = "".join(f"x q[{k}];" for k in controls[:n_on])
        state = from_qasm(f"OPENQASM 2.0; opaque idle a; qreg q[4]; {ready} {gate};").statevector()
        on = [*controls[:n_on], *([target] if n_on == len(controls) else [])]
        assert float(state[sum(1 << (3 - k) for k in on)].abs()) == pytest.approx(1, abs=1e-12)
    again = from_qasm(from_qasm(f"qreg q[4]; h q; rz(0.3) q[1]; {gate};").to_qasm(3)).statevector()
    once = from_qasm(f"qreg q[4]; h q; rz(0.3) q[1]; {gate};").statevector()
    assert float((again.conj() * once).sum().abs()) == pytest.approx(1, abs=1e-10)


def test_bits_are_declared_with_what_is_measured_into_them() -> None:
    circuit = from_qasm("\ufeffOPENQASM 3.0; qubit[2] q; x q[1]; bit[2] c = measure q;")
    assert circuit.n_bits == 2
    assert circuit.sample(3).tolist() == [[0, 1]] * 3
