"""From data to a quantum circuit: a Born machine learns bars and stripes and becomes gates; a classifier meets noise.

The first part prints what circuits of the learnt state cost and what they sample, and how far few layers reach. The
second trains unitary trees on two digits and follows them under noise. With ``--figure`` both curves are drawn:

    python examples/quantum_circuit.py --figure quantum.png
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import tensortrain as tt


def bars_and_stripes(size: int) -> Tensor:
    """All images ``(n, size * size)`` in which every row is of one color, or every column."""
    lines = torch.cartesian_prod(*[torch.arange(2)] * size)
    rows, columns = (lines.unsqueeze(k).expand(-1, size, size).flatten(1) for k in (2, 1))
    return torch.cat((rows, columns)).unique(dim=0)


def learnt_state(images: Tensor, seed: int) -> tt.TensorTrain:
    generator = torch.Generator().manual_seed(seed)
    model = tt.models.BornMachine(images.shape[1], bond_dim=2, dtype=torch.float64, generator=generator)
    history = model.fit(images, n_sweeps=30, max_bond=16, generator=generator)
    print(f"Born machine: nll {history.nll[-1]:.4f}, best possible {torch.tensor(len(images)).log():.4f}")
    return model.state


def circuits_of(state: tt.TensorTrain, images: Tensor, n_layers: list[int]) -> list[float]:
    known = {tuple(image) for image in images.tolist()}
    for kind in ("staircase", "holographic"):
        made = tt.quantum.circuit(state, kind=kind)
        shots = made.sample(2000)
        valid = sum(tuple(shot) in known for shot in shots.tolist()) / 2000
        print(
            f"{kind:12} {made.n_qubits:3} qubits {made.n_cnots:6} cx, depth {made.depth:6}, {valid:.1%} valid samples"
        )
    reached = []
    for n in n_layers:
        made = tt.quantum.circuit(state, n_layers=n)
        reached.append(made.fidelity)
        cost = f"{made.n_qubits:3} qubits {made.n_cnots:6} cx, depth {made.depth:6}"
        print(f"{n:3} layers   {cost}, overlap {made.fidelity:.3f}")
    return reached


def two_digits(first: int, second: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    kept = torch.nonzero((y == first) | (y == second))[:, 0]
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    return x[kept].float() / 16, (y[kept] == second).long()


def under_noise(n_virtual: int, noises: list[float], seed: int) -> list[float]:
    """Accuracies on digits that were not seen."""
    x, y = two_digits(3, 8, seed)
    n = 4 * len(x) // 5
    generator = torch.Generator().manual_seed(seed)
    model = tt.quantum.UnitaryClassifier(64, 2, n_virtual=n_virtual, generator=generator)
    model.fit(x[:n], y[:n], n_sweeps=15, generator=generator)
    found = []
    for p in noises:
        with torch.no_grad():
            scores = model(x[n:], noise=tt.quantum.Noise(amplitude_damping=p, dephasing=p))
        found.append(float((scores.argmax(1) == y[n:]).float().mean()))
    shown = ", ".join(f"{p:g}: {accuracy:.3f}" for p, accuracy in zip(noises, found, strict=True))
    print(f"tree of {n_virtual}-qubit registers, accuracy at noise {shown}")
    return found


def draw(
    path: str, n_layers: list[int], reached: list[float], noises: list[float], curves: dict[str, list[float]]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(n_layers, reached, "o-")
    left.set(xlabel="layers of two-qubit gates", ylabel="overlap with the state", ylim=(0, 1))
    for name, accuracies in curves.items():
        right.plot(noises, accuracies, "o-", label=name)
    right.set_xscale("symlog", linthresh=1e-3)
    right.set(xlabel="damping and dephasing a step", ylabel="accuracy, 3 against 8")
    right.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=3, help="of the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file to draw to")
    options = parser.parse_args()

    images = bars_and_stripes(options.size)
    n_layers, noises = [0, 1, 2, 4, 8], [0.0, 1e-3, 1e-2, 3e-2, 1e-1]
    reached = circuits_of(learnt_state(images, options.seed), images, n_layers)
    curves = {f"{v}-qubit registers": under_noise(v, noises, options.seed) for v in (1, 2)}
    if options.figure:
        draw(options.figure, n_layers, reached, noises, curves)


if __name__ == "__main__":
    main()
