"""Tensor networks as models beside their peers: samples, training steps, gradients of likelihoods.

One thread, processor time, contestants in turns, medians. A peer's forms all run, and the fastest stands for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.models import BornMachine, MPSClassifier
from tensortrain.system.provenance import provenance

_FORMS = [(stack, unbind, inline) for stack in (True, False) for unbind in (True, False) for inline in (True, False)]
Contestants = dict[str, Callable[[], Any]]


def in_turns(contestants: Contestants, rounds: int) -> dict[str, float]:
    """Median processor seconds of a call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()  # what only the first call does
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def samples(rounds: int) -> dict[str, Any]:
    """Samples of a Born machine of 50 sites and bond 8, beside quimb's."""
    import quimb.tensor as qtn

    model = BornMachine(50, bond_dim=8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for core in model.cores:
            core.copy_(torch.randn(core.shape, generator=torch.Generator().manual_seed(1), dtype=core.dtype))
    arrays = [core.permute(0, 2, 1).numpy() for core in model.state.cores]
    arrays = [arrays[0][0], *arrays[1:-1], arrays[-1][:, 0]]
    state = qtn.MatrixProductState(arrays, shape="lrp")
    peer = iter(state.sample(10**9, seed=0))
    contestants: Contestants = {f"ours, {n} at once": (lambda n=n: model.sample(n)) for n in (20, 1000)}  # type: ignore[misc]
    contestants["quimb, 20 in turn"] = lambda: [next(peer) for _ in range(20)]
    found = in_turns(contestants, rounds)
    each = {"ours, 20 at once": 20, "ours, 1000 at once": 1000, "quimb, 20 in turn": 20}
    micros = {name: seconds / each[name] * 1e6 for name, seconds in found.items()}
    return {
        "microseconds_per_sample": micros,
        "times_quimb": {n: micros["quimb, 20 in turn"] / micros[f"ours, {n} at once"] for n in (20, 1000)},
    }


def training_step(rounds: int) -> dict[str, Any]:
    """Forward, cross entropy and gradients of a classifier: 784 sites, bond 10, 64 examples, ten classes, float32."""
    x, y = torch.rand(64, 784), torch.randint(0, 10, (64,))
    model = MPSClassifier(784, 10, bond_dim=10, feature_map="linear", generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()

    contestants: Contestants = {"ours": ours} | _krowch_steps(x, y)
    found = in_turns(contestants, rounds)
    best = min(value for name, value in found.items() if name != "ours")
    return {
        "milliseconds": {name: value * 1e3 for name, value in found.items()},
        "times_tensorkrowch": best / found["ours"],
    }


def _krowch_steps(x: Tensor, y: Tensor) -> Contestants:
    """The peer's layer in all its forms."""
    import tensorkrowch as tk

    vectors = torch.stack((1 - x, x), dim=1).transpose(1, 2)  # b sites 2
    steps: Contestants = {}
    for stack, unbind, inline in _FORMS:
        layer = tk.models.MPSLayer(n_features=785, in_dim=2, out_dim=10, bond_dim=10, init_method="randn_eye", std=1e-9)
        layer.auto_stack, layer.auto_unbind = stack, unbind
        try:
            layer.trace(vectors, inline_input=inline, inline_mats=False)

            def step(layer: Any = layer, inline: bool = inline) -> None:
                layer.zero_grad(set_to_none=True)
                scores = layer(vectors, inline_input=inline, inline_mats=False)
                nn.functional.cross_entropy(scores, y).backward()

            step()
        except Exception as error:  # a form that the peer does not take
            print(f"tensorkrowch stack={stack} unbind={unbind} inline={inline}: {type(error).__name__}: {error}")
            continue
        steps[f"tensorkrowch stack={stack} unbind={unbind} inline={inline}"] = step
    return steps


def likelihood(rounds: int) -> dict[str, Any]:
    """The gradient of a Born machine's likelihood, 1,000 x 784 bits, bond 30, beside its matrix products alone."""
    x = torch.randint(0, 2, (1000, 784))
    model = BornMachine(784, bond_dim=30, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    matrices, state = [torch.randn(30, 30) for _ in range(784)], torch.randn(1000, 30)

    def ours() -> None:
        model.zero_grad(set_to_none=True)
        model.nll(x).backward()

    def products() -> None:
        for matrix in matrices:
            _ = state @ matrix
            _ = state @ matrix.T
            _ = state.T @ state

    found = in_turns({"ours": ours, "products alone": products}, rounds)
    milliseconds = {name: value * 1e3 for name, value in found.items()}
    return {"milliseconds": milliseconds, "times_products": found["ours"] / found["products alone"]}


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "samples": samples,
    "training step": training_step,
    "likelihood": likelihood,
}


def main() -> None:
    """Run the cases and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    record = {name: CASES[name](options.rounds) for name in options.case or CASES}
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"provenance": provenance(), "cases": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
