"""Gates of unitaries and isometries: they multiply to the matrix, with no more cx than promised."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from tensortrain.models.quantum.gates import GATES, Matrix, Operation, matrix_of
from tensortrain.models.quantum.simulate import unitary_of
from tensortrain.models.quantum.synthesis import merged, of_isometry, of_unitary

TOL = 1e-12


def unitary(n_qubits: int, seed: int = 0) -> Matrix:
    return scipy.stats.unitary_group.rvs(2**n_qubits, random_state=seed)


def rotation(n_qubits: int, seed: int = 0) -> Matrix:
    return scipy.stats.special_ortho_group.rvs(2**n_qubits, random_state=seed)


def distance(operations: list[Operation], u: Matrix, columns: slice = slice(None)) -> float:
    """Between what gates do and a matrix, up to a phase, on some inputs."""
    n_qubits = len(u).bit_length() - 1
    assert {operation.name for operation in operations} <= {"rz", "ry", "cx"}
    made, meant = unitary_of(operations, n_qubits)[:, columns], u[:, columns]
    phase = np.vdot(meant, made)
    return float(np.abs(made * phase.conj() / abs(phase) - meant).max())


def n_cx(operations: list[Operation]) -> int:
    return sum(operation.name == "cx" for operation in operations)


@pytest.mark.parametrize("n_qubits, most", [(1, 0), (2, 3), (3, 21), (4, 105)])
def test_any_unitary(n_qubits: int, most: int) -> None:
    for seed in range(5):
        u = unitary(n_qubits, seed)
        operations = merged(of_unitary(u))
        assert distance(operations, u) < TOL
        assert n_cx(operations) <= most


def test_rotations_of_two_qubits_take_two_cx() -> None:
    for seed in range(20):
        u = rotation(2, seed)
        operations = merged(of_unitary(u.astype(complex)))
        assert distance(operations, u) < TOL
        assert n_cx(operations) <= 2


@pytest.mark.parametrize("n_qubits, n_zeros, most", [(2, 1, 2), (2, 2, 1), (3, 1, 15), (3, 3, 14), (4, 1, 77)])
def test_qubits_at_zero_spare_cx(n_qubits: int, n_zeros: int, most: int) -> None:
    for seed in range(5):
        u = unitary(n_qubits, seed)
        operations = merged(of_unitary(u, n_zeros))
        assert distance(operations, u, slice(2 ** (n_qubits - n_zeros))) < TOL
        assert n_cx(operations) <= most


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_gate_is_a_unitary_and_comes_apart(name: str) -> None:
    angles = tuple(0.3 + k for k in range(GATES[name].n_params))
    u = matrix_of(Operation(name, tuple(range(GATES[name].n_qubits)), angles))
    np.testing.assert_allclose(u @ u.conj().T, np.eye(len(u)), atol=1e-14)
    assert distance(merged(of_unitary(u)), u) < TOL


@pytest.mark.parametrize(
    "name, most", [("cx", 1), ("cz", 1), ("ch", 1), ("cy", 1), ("iswap", 2), ("crz", 2), ("id", 0)]
)
def test_known_gates_take_as_few_cx_as_they_can(name: str, most: int) -> None:
    angles = (0.7,) * GATES[name].n_params
    u = matrix_of(Operation(name, (0, 1), angles))
    assert n_cx(merged(of_unitary(u))) == most


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-14])
def test_nearly_nothing_is_still_exact(size: float) -> None:
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(2, 4, 4))
        skew = size * (noise[0] - noise[0].T + 1j * (noise[1] + noise[1].T))
        for u in (scipy.linalg.expm(skew), GATES["swap"].matrix() @ scipy.linalg.expm(skew)):
            assert distance(merged(of_unitary(u)), u) < 1e-11  # what is below 1e-12 is left out


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("n_qubits, n_inputs, rank", [(1, 0, 1), (2, 1, 2), (2, 1, 1), (3, 2, 3), (3, 0, 1), (4, 2, 4)])
def test_isometries(n_qubits: int, n_inputs: int, rank: int, is_complex: bool) -> None:
    columns = (unitary if is_complex else rotation)(n_qubits)[:, :rank]
    whole = np.zeros((2**n_qubits, 2**n_qubits), dtype=complex)
    whole[:, np.arange(rank) << (n_qubits - n_inputs)] = columns
    operations = of_isometry(columns, n_inputs)
    inputs = np.arange(rank) << (n_qubits - n_inputs)
    made = unitary_of(operations, n_qubits)[:, inputs]
    phase = np.vdot(columns, made)
    assert abs(made * phase.conj() / abs(phase) - columns).max() < TOL


def test_neighbours_become_one_and_pairs_go() -> None:
    cx, turn = Operation("cx", (0, 1)), Operation("rz", (0,), (0.3,))
    assert merged([cx, Operation("h", (1,)), Operation("h", (1,)), cx]) == []
    assert merged([turn, turn]) == [Operation("rz", (0,), (0.6,))]
    assert merged([cx, turn, cx])[1:] == [turn, cx]
    assert merged([turn, cx, Operation("cx", (1, 0))], zeros=(0, 1)) == []
