"""Circuits of trains: exact states, qubits and cx as promised, samples, layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.errors import DataError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.models.quantum import Circuit, circuit, from_qasm
from tensortrain.testing import check_refused

KINDS = ("staircase", "holographic")


def random(order: int, rank: int, dtype: torch.dtype = torch.float64) -> tt.TensorTrain:
    return tt.randn((2,) * order, rank, dtype=dtype, generator=torch.Generator().manual_seed(order + rank))


def amplitudes(x: tt.TensorTrain) -> Tensor:
    dense = x.to_dense().flatten().to(torch.complex128)
    return dense / torch.linalg.vector_norm(dense)


def check_same_state(found: Tensor, expected: Tensor, tol: float = 1e-12) -> None:
    assert found.dtype == torch.complex128
    phase = torch.vdot(expected, found)
    assert float(torch.linalg.vector_norm(found / (phase / phase.abs()) - expected)) < tol


def ghz(order: int) -> tt.TensorTrain:
    return tt.TensorTrain.from_dense(_ones_at(order, [0, 2**order - 1]))


def w_state(order: int) -> tt.TensorTrain:
    return tt.TensorTrain.from_dense(_ones_at(order, [2**k for k in range(order)]))


def parity(order: int) -> tt.TensorTrain:
    return tt.TensorTrain.from_dense(_ones_at(order, [k for k in range(2**order) if k.bit_count() % 2 == 0]))


def _ones_at(order: int, places: list[int]) -> Tensor:
    dense = torch.zeros(2**order, dtype=torch.float64)
    dense[places] = 1
    return dense.reshape((2,) * order)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("order, rank", [(1, 1), (2, 1), (2, 2), (3, 2), (5, 3), (8, 2), (8, 3), (8, 5), (8, 8)])
def test_the_state_is_the_train(order: int, rank: int, dtype: torch.dtype, kind: str) -> None:
    x = random(order, rank, dtype)
    made = circuit(x, kind=kind)
    check_same_state(made.statevector(), amplitudes(x))
    assert made.fidelity == pytest.approx(1, abs=1e-12)
    most = 1 + (max(x.ranks) - 1).bit_length()
    assert made.n_qubits <= (order if kind == "staircase" else most)
    assert made.n_gates == sum(operation.name in ("rz", "ry", "cx") for operation in made.operations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = random(5, 2, torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    wide = x.to(torch.complex128)
    check_same_state(circuit(x).statevector(), amplitudes(wide), 0.2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("make", [ghz, w_state, parity])
def test_states_of_rank_two_take_two_cx_a_site(make) -> None:
    for order in (2, 3, 6, 10):
        x = make(order)
        made = circuit(x)
        check_same_state(made.statevector(), amplitudes(x))
        assert made.n_cnots <= 2 * order
        assert made.depth <= 10 * order
        assert circuit(x, kind="holographic").n_qubits == 2


def test_copies_and_sums_of_bits_take_one_cx_a_site() -> None:
    assert circuit(ghz(10)).n_cnots == 9
    assert circuit(parity(10)).n_cnots == 9
    assert circuit(ghz(10)).depth <= 60


def test_products_take_no_cx() -> None:
    x = random(6, 1, torch.complex128)
    assert circuit(x).n_cnots == 0
    assert circuit(x).depth <= 3
    assert circuit(x, kind="holographic").n_qubits == 1


def test_ranks_that_are_not_needed_cost_nothing() -> None:
    x = random(6, 2)
    assert circuit(x + x - 0.5 * x).n_cnots == circuit(x).n_cnots
    zeros = tt.TensorTrain([torch.ones(1, 2, 4), torch.zeros(4, 2, 4), torch.ones(4, 2, 1)]) + tt.ones((2, 2, 2))
    assert circuit(zeros).n_cnots == 0


def test_long_trains() -> None:
    x = random(60, 4)
    for kind in KINDS:
        made = circuit(x * 1e200, kind=kind)
        assert made.fidelity == pytest.approx(1, abs=1e-11)
        assert made.sample(5).shape == (5, 60)
    with pytest.raises(ShapeError, match="60 qubits"):
        from_qasm(circuit(x).to_qasm()).statevector()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_train(kind: str) -> None:
    x = random(4, 3, torch.complex128)
    law = amplitudes(x).abs().square()
    made = circuit(x, kind=kind)
    for known in (made, from_qasm(made.to_qasm(3)), from_qasm(made.to_qasm(2, measure=True))):
        found = known.sample(20_000, generator=torch.Generator().manual_seed(0))
        assert found.dtype == torch.int64
        counts = torch.bincount((found * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16)
        chi_square = float(((counts - 20_000 * law).square() / (20_000 * law)).sum())
        assert chi_square < 37.7  # p = 0.001 at 15 degrees of freedom
        assert known.sample(0).shape == (0, 4)
        again = known.sample(20_000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(found, again)


def test_images_of_bars_and_stripes() -> None:
    dense = torch.zeros((2,) * 16, dtype=torch.float64)
    lines = torch.cartesian_prod(*[torch.arange(2)] * 4)
    for images in (lines[:, :, None].expand(16, 4, 4), lines[:, None].expand(16, 4, 4)):
        dense[tuple(images.flatten(1).T)] = 1
    made = circuit(tt.TensorTrain.from_dense(dense), kind="holographic")
    assert made.n_qubits == 5
    for known in (made, from_qasm(made.to_qasm())):  # of the train, and shot by shot
        found = known.sample(10_000, generator=torch.Generator().manual_seed(0))
        assert bool((dense[tuple(found.T)] == 1).all())
        counts = torch.bincount((found << torch.arange(16)).sum(1), minlength=2**16)
        counts = counts[counts > 0].double()
        assert len(counts) == 30
        assert float(((counts - 10_000 / 30).square() / (10_000 / 30)).sum()) < 58.3  # p = 0.001 at 29


def test_zeros_never_come() -> None:
    x = parity(7)
    for kind in KINDS:
        made = circuit(x, kind=kind)
        for known in (made, from_qasm(made.to_qasm())):
            assert bool((known.sample(2000).sum(1) % 2 == 0).all())


def test_layers_reach_further() -> None:
    x = random(8, 6, torch.complex128)
    expected = amplitudes(x)
    found = [circuit(x, n_layers=n) for n in range(6)]
    assert found[0].n_gates == 0
    for made in found:
        assert made.fidelity == pytest.approx(float(torch.vdot(expected, made.statevector()).abs()), abs=1e-12)
        for operation in made.operations:
            assert len(operation.qubits) == 1 or abs(operation.qubits[0] - operation.qubits[1]) == 1
    fidelities = [made.fidelity for made in found]
    assert all(later >= earlier for earlier, later in itertools.pairwise(fidelities))
    assert fidelities[1] > fidelities[0] + 0.1
    assert fidelities[5] > fidelities[1] + 0.02
    assert found[5].n_cnots <= 5 * 3 * 8
    assert found[5].n_cnots < circuit(x).n_cnots


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_polished_layers_reach_further_still(dtype: torch.dtype) -> None:
    x = random(7, 6, dtype)
    expected = amplitudes(x)
    plain = [circuit(x, n_layers=n) for n in range(4)]
    found = [circuit(x, n_layers=n, n_sweeps=5) for n in range(4)]
    for made, before in zip(found[1:], plain[1:], strict=True):
        assert made.fidelity == pytest.approx(float(torch.vdot(expected, made.statevector()).abs()), abs=1e-12)
        assert made.fidelity >= before.fidelity
        for operation in made.operations:
            assert len(operation.qubits) == 1 or abs(operation.qubits[0] - operation.qubits[1]) == 1
    fidelities = [made.fidelity for made in found]
    assert all(later >= earlier for earlier, later in itertools.pairwise(fidelities))
    assert fidelities[3] > plain[3].fidelity + 0.01
    assert circuit(x, n_layers=3, n_sweeps=20).fidelity > fidelities[3]


def test_chains_and_amplitudes_are_polished_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(6, 4, torch.complex128)
    by_amplitudes = circuit(x, n_layers=2, n_sweeps=3)
    monkeypatch.setattr("tensortrain.models.quantum.polish._MOST_AMPLITUDES", 0)
    assert circuit(x, n_layers=2, n_sweeps=3).fidelity == pytest.approx(by_amplitudes.fidelity, abs=1e-6)


def test_long_trains_are_polished() -> None:
    x = random(16, 4)
    assert circuit(x, n_layers=2, n_sweeps=2).fidelity > circuit(x, n_layers=2).fidelity + 0.02


def test_one_layer_is_exact_at_rank_two() -> None:
    for order in (1, 2, 7):
        x = random(order, 2)
        made = circuit(x, n_layers=3)
        assert made.fidelity == pytest.approx(1, abs=1e-12)
        assert made.n_cnots == circuit(x, n_layers=1).n_cnots
        check_same_state(made.statevector(), amplitudes(x), 1e-7)


def test_depth_counts_what_waits() -> None:
    made = from_qasm("qreg q[3]; creg c[2]; h q[0]; h q[1]; cx q[0], q[1]; measure q[1] -> c[0]; reset q[1]; h q[2];")
    assert (made.n_gates, made.n_cnots, made.depth) == (4, 1, 4)
    assert from_qasm("qreg q[2]; h q[0]; barrier q; h q[1];").depth == 2
    assert from_qasm("qreg q[2];").depth == 0


def test_a_final_state_needs_all_qubits_measured_or_none() -> None:
    kept = from_qasm("qreg q[2]; creg c[1]; h q[0]; cx q[0], q[1]; measure q[0] -> c[0];")
    with pytest.raises(KindError, match="others are not"):
        kept.statevector()
    assert kept.sample(3).shape == (3, 1)
    with pytest.raises(KindError, match="without a reset"):
        from_qasm("qreg q[1]; creg c[1]; measure q[0] -> c[0]; h q[0];").statevector()
    with pytest.raises(KindError, match="not measured"):
        from_qasm("qreg q[1]; h q[0]; reset q[0];").statevector()
    crossed = from_qasm("qreg q[2]; creg c[2]; x q[0]; measure q[0] -> c[1]; measure q[1] -> c[0];")
    assert crossed.sample(2).tolist() == [[0, 1]] * 2
    assert crossed.statevector().abs().tolist() == [0, 1, 0, 0]


def test_resets_and_bits_that_are_written_again() -> None:
    again = "qreg q[1]; creg c[2]; x q[0]; measure q[0] -> c[0]; reset q[0]; measure q[0] -> c[1];"
    assert from_qasm(again).sample(4).tolist() == [[1, 0]] * 4
    coin = from_qasm("qreg q[1]; creg c[2]; h q[0]; measure q[0] -> c[0]; measure q[0] -> c[1];").sample(200)
    assert torch.equal(coin[:, 0], coin[:, 1])
    assert 60 < int(coin[:, 0].sum()) < 140


def test_bad_input_is_refused() -> None:
    x = random(3, 2)
    check_refused(KindError, circuit, x.to_dense())
    check_refused(KindError, lambda: circuit(x, kind="tree"))
    check_refused(KindError, lambda: circuit(x, kind="holographic", n_layers=2))
    check_refused(RankError, lambda: circuit(x, n_layers=-1))
    check_refused(RankError, lambda: circuit(x, n_layers=1, n_sweeps=-1))
    check_refused(RankError, lambda: circuit(x, n_sweeps=2))
    check_refused(ShapeError, circuit, tt.ones((2, 3)))
    check_refused(ShapeError, circuit, tt.TensorTrain([torch.ones(5, 1, 2, 1)]))
    check_refused(DataError, circuit, tt.zeros((2, 2)))
    check_refused(NonFiniteError, circuit, tt.ones((2, 2)) * float("nan"))
    check_refused(KindError, circuit(x).to_qasm, 1)
    check_refused(DataError, circuit(x).sample, -1)


def test_a_print_is_short() -> None:
    assert repr(circuit(ghz(3))).startswith("Circuit(n_qubits=3, n_bits=0, n_gates=")
    assert isinstance(circuit(ghz(3)), Circuit)
