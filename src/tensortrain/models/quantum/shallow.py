"""Layers of two-qubit gates that nearly prepare a train: each undoes what is left of its entanglement at rank two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.split import split
from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.simulate import unitary_of
from tensortrain.models.quantum.staircase import Block, blocks_of, staircase

__all__ = ["shallow"]

_TOL = 1e-9  # of cuts while entanglement is undone; it decides about gates alone
_LEAST_CAP = 64  # on ranks there, or twice those of the train
_EXACT = 1e-14  # of cuts of what the gates prepare


def shallow(cores: Sequence[Tensor], n_layers: int) -> tuple[list[Operation], list[Tensor]]:
    """Operations of some layers, and the chain that they prepare.

    A layer is the exact circuit of what the state is at rank two; its inverse is applied, and the next layer begins
    with what came out. Time runs the other way: the last layer comes first. A layer that would not help is left out.

    Cost: O(n_layers d r^3) flops with the ranks on the way; those of the circuit may double with each layer.

    Source: Ran, Phys. Rev. A 101, 032310 (2020).
    """
    state = Gauged.of([core.to(torch.complex128) for core in cores])
    layers: list[list[Block]] = []
    cap = max(_LEAST_CAP, 2 * max(core.shape[-1] for core in cores))
    best = _at_zeros(state)
    for _ in range(n_layers):
        blocks = blocks_of(_of_rank_two(state))
        _apply(state, blocks, _TOL, cap, inverse=True)
        reached = _at_zeros(state)
        if reached <= best * (1 + 1e-12):
            break
        layers.append(blocks)
        best = reached
    made = Gauged.of(_zeros(len(cores)))  # bonds of at most 2**n_layers
    operations = []
    for blocks in reversed(layers):
        _apply(made, blocks, _EXACT, None, inverse=False)
        operations += staircase(blocks)
    return operations, _placed(made)


def _of_rank_two(state: Gauged) -> list[Tensor]:
    """The chain cut to ranks of two, of norm 1."""
    cut = Gauged(list(state.cores), state.center, state.exponent)
    for k in range(len(cut.cores) - 1):
        cut.move(k)
        found = split(cut.local(k, 2), max_rank=2, tol=_TOL)
        cut.put(k, [found.left, found.right], center=k + 1)
    cores = list(cut.cores)
    cores[cut.center] = cores[cut.center] / torch.linalg.vector_norm(cores[cut.center])
    return cores


def _apply(state: Gauged, blocks: Sequence[Block], tol: float, cap: int | None, *, inverse: bool) -> None:
    """A staircase of gates on one or two qubits, or its inverse, on a state of norm 1."""
    for block in reversed(blocks) if inverse else blocks:
        gate = torch.from_numpy(unitary_of(block.operations, block.n_qubits))
        gate = gate.mH if inverse else gate
        k, n_sites = block.site, block.n_qubits
        local = state.local(k, n_sites)
        size = local.shape
        done = torch.einsum("ij,rjs->ris", gate, local.reshape(size[0], -1, size[-1])).reshape(size)
        if n_sites == 1:
            state.put(k, [done], center=k)
            continue
        found = split(done, tol=tol, max_rank=cap, to_right=not inverse)
        state.put(k, [found.left, found.right], center=k if inverse else k + 1)


def _placed(state: Gauged) -> list[Tensor]:
    return list(state.stored(torch.complex128)[0])


def _at_zeros(state: Gauged) -> float:
    """The modulus of the entry at zeros, of a state of norm 1."""
    cores = _placed(state)
    row = cores[0][:, 0]
    for core in cores[1:]:
        row = row @ core[:, 0]
    return float(row.abs())


def _zeros(order: int) -> list[Tensor]:
    core = torch.zeros(1, 2, 1, dtype=torch.complex128)
    core[0, 0, 0] = 1
    return [core.clone() for _ in range(order)]
