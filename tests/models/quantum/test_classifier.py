"""Unitary classifiers: probabilities by whole states, circuits that show them, noise by Kraus operators, digits."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from tensortrain.errors import DataError, KindError, RankError
from tensortrain.models.quantum import Circuit, Noise, UnitaryClassifier, from_qasm
from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.simulate import final_state
from tensortrain.testing import ModelSuite, check_refused

N = 5


def examples(dtype: torch.dtype = torch.float64, n: int = 9) -> Tensor:
    return torch.rand(n, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def outcomes(made: Circuit) -> Tensor:
    """Probabilities of the bits, from a state in which every reset takes a fresh qubit."""
    wires, n, gates, read = list(range(made.n_qubits)), made.n_qubits, [], {}
    for operation in made.operations:
        if operation.name == "reset":
            wires[operation.qubits[0]], n = n, n + 1
        elif operation.name == "measure":
            read[operation.bit] = wires[operation.qubits[0]]
        else:
            gates.append(operation.on(tuple(wires)))
    mass = final_state(gates, n).abs().square().reshape((2,) * n)
    kept = [read[bit] for bit in range(made.n_bits)]
    others = [q for q in range(n) if q not in kept]
    return mass.permute(*kept, *others).flatten(made.n_bits).sum(-1).flatten()


class UnitarySuite(ModelSuite):
    options: ClassVar[dict[str, object]] = {}

    def make(self, dtype: torch.dtype) -> UnitaryClassifier:
        return UnitaryClassifier(
            N, **{"n_classes": 2, **self.options}, generator=torch.Generator().manual_seed(0), dtype=dtype
        )

    def data(self, dtype: torch.dtype) -> Tensor:
        return examples(dtype)

    def exact(self, model: UnitaryClassifier, data: Tensor) -> Tensor:
        rows = []
        for x in data:
            shares = outcomes(model.to_circuit(x))
            size = len(shares)
            classes = [k * model.n_classes // size for k in range(size)]
            rows.append(
                torch.stack(
                    [sum(p for p, c in zip(shares, classes, strict=True) if c == k) for k in range(model.n_classes)]
                )
            )
        return torch.stack(rows).log()

    def learn(self, model: UnitaryClassifier, **options: object) -> object:
        labels = torch.arange(9) % model.n_classes
        generator = torch.Generator().manual_seed(5)
        return model.fit(examples(), labels, n_sweeps=3, batch_size=4, generator=generator, **options)

    def bad(self, model: UnitaryClassifier):
        x, y = examples(torch.float32), torch.arange(9) % model.n_classes
        yield DataError, model, (x * 300,)
        yield DataError, model, (x * torch.nan,)
        yield DataError, model, (x[:, 1:],)
        yield DataError, model, (x[0],)
        yield DataError, model, (x.round().long(),)
        yield DataError, model.to_circuit, (x[0, 1:],)
        yield DataError, model.fit, (x, y + 1)
        yield DataError, model.fit, (x[:0], y[:0])
        yield DataError, model.fit, (x, y), {"validation": (x, y[1:])}


class TestTree(UnitarySuite):
    pass


class TestWideTree(UnitarySuite):
    options: ClassVar[dict[str, object]] = {"n_classes": 3, "kind": "complex"}


class TestChain(UnitarySuite):
    options: ClassVar[dict[str, object]] = {"structure": "chain", "n_virtual": 2, "kind": "complex"}


class TestShortChain(UnitarySuite):
    options: ClassVar[dict[str, object]] = {"structure": "chain"}


@pytest.mark.parametrize("structure", ["tree", "chain"])
@pytest.mark.parametrize("n_features, n_virtual", [(1, 1), (1, 3), (2, 1), (3, 2), (4, 2)])
def test_small_sizes(n_features: int, n_virtual: int, structure: str) -> None:
    model = UnitaryClassifier(n_features, 2, n_virtual=n_virtual, structure=structure, dtype=torch.float64)
    x = torch.rand(3, n_features, dtype=torch.float64)
    for row, found in zip(x, model(x).exp(), strict=True):
        shares = outcomes(model.to_circuit(row)).reshape(2, -1).sum(1)
        torch.testing.assert_close(found.detach(), shares)
        made = model.to_circuit(row)
        assert (made.n_qubits, made.n_bits) == (model.n_qubits, n_virtual)


@pytest.mark.parametrize("structure", ["tree", "chain"])
def test_a_circuit_shows_the_classes(structure: str) -> None:
    model = UnitaryClassifier(4, 2, structure=structure, generator=torch.Generator().manual_seed(3))
    x = examples(torch.float32)[0, :4]
    made = model.to_circuit(x)
    assert made.n_qubits == (4 if structure == "tree" else 2)
    shown = from_qasm(made.to_qasm(3)).sample(10_000, generator=torch.Generator().manual_seed(0))
    expected = float(model(x[None]).exp()[0, 1].detach())
    assert abs(float(shown.double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / 10_000)


def test_other_dtypes() -> None:
    model = UnitaryClassifier(N, 2, kind="complex").to(torch.bfloat16)
    found = model(examples(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert bool(torch.isfinite(found).all())
    assert (model.to_circuit(examples()[0]).n_bits, model.double()(examples()).dtype) == (1, torch.float64)


def kraus(noise: Noise) -> list[Tensor]:
    fall, flip = noise.amplitude_damping, noise.dephasing
    keeps = torch.tensor([[1, 0], [0, math.sqrt(1 - fall)]], dtype=torch.complex128)
    falls = torch.tensor([[0, math.sqrt(fall)], [0, 0]], dtype=torch.complex128)
    sign = torch.diag(torch.tensor([1, -1], dtype=torch.complex128))
    return [math.sqrt(p) * s @ k for k in (keeps, falls) for p, s in ((1 - flip, torch.eye(2).to(sign)), (flip, sign))]


def test_noise_is_the_sum_of_its_kraus_operators() -> None:
    noise = Noise(0.2, 0.1)
    a = torch.randn(3, 8, 8, dtype=torch.complex128)
    rho = a @ a.mH
    expected = torch.zeros_like(rho)
    for operators in itertools.product(kraus(noise), repeat=3):
        whole = torch.kron(torch.kron(operators[0], operators[1]), operators[2])
        expected += whole @ rho @ whole.mH
    torch.testing.assert_close(noise.on(rho), expected)
    torch.testing.assert_close(Noise().on(rho), rho)
    assert float(Noise(1.0).on(rho)[0, 0, 0].real) == pytest.approx(float(rho[0].diagonal().sum().real))


def test_times_of_qubits() -> None:
    noise = Noise.of_times(1e-6, t1=5e-6, t2=7e-6)
    rho = torch.full((2, 2), 0.5, dtype=torch.float64)
    found = noise.on(rho)
    assert float(found[1, 1]) == pytest.approx(0.5 * math.exp(-1 / 5))
    assert float(found[0, 1]) == pytest.approx(0.5 * math.exp(-1 / 7))
    check_refused(RankError, lambda: Noise.of_times(1e-6, t1=1e-6, t2=3e-6))
    check_refused(RankError, lambda: Noise(1.2))
    check_refused(RankError, lambda: Noise(0, 0.7))


def test_digits_and_their_noise() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    kept = torch.nonzero((y == 3) | (y == 8))[:, 0]
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    x, y = x[order], (y[order] == 8).long()
    model = UnitaryClassifier(64, 2, n_virtual=2, generator=torch.Generator().manual_seed(0))
    history = model.fit(x[:280], y[:280], n_sweeps=12, validation=(x[280:], y[280:]))
    assert history.validation_accuracy[-1] >= 0.93
    likelihoods = [
        float(model(x, noise=Noise(p, p)).gather(1, y[:, None]).mean().detach()) for p in (0, 1e-3, 1e-2, 5e-2, 0.2)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(likelihoods))


def test_noise_may_be_there_while_it_learns() -> None:
    model = UnitaryClassifier(N, 2, noise=Noise(0.1, 0.05), generator=torch.Generator().manual_seed(0))
    quiet = UnitaryClassifier(N, 2, generator=torch.Generator().manual_seed(0))
    x = examples(torch.float32)
    assert not torch.equal(model(x), quiet(x))
    assert torch.equal(model(x), quiet(x, noise=Noise(0.1, 0.05)))
    assert torch.equal(model(x, noise=Noise()), quiet(x, noise=Noise()))
    assert UnitaryClassifier(**model.config).noise == model.noise
    model.fit(x, torch.arange(9) % 2, n_sweeps=1)
    assert not torch.equal(model.angles[0], quiet.angles[0])


def test_bad_sizes_are_refused() -> None:
    check_refused(RankError, lambda: UnitaryClassifier(4, 3, n_virtual=1))
    check_refused(RankError, lambda: UnitaryClassifier(0, 2))
    check_refused(KindError, lambda: UnitaryClassifier(4, 2, structure="ring"))
    check_refused(KindError, lambda: UnitaryClassifier(4, 2, kind="quaternion"))


def test_chains_take_few_qubits() -> None:
    model = UnitaryClassifier(30, 2, n_virtual=2, structure="chain")
    made = model.to_circuit(torch.rand(30))
    assert made.n_qubits == 3
    assert sum(operation == Operation("reset", (2,)) for operation in made.operations) == 27
