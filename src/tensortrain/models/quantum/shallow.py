"""Layers of two-qubit gates that nearly prepare a train: each undoes what is left of its entanglement at rank two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.split import split
from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.polish import at_zeros, polished, turn, zeros
from tensortrain.models.quantum.simulate import unitary_of
from tensortrain.models.quantum.staircase import Block, blocks_of, staircase

__all__ = ["shallow"]

_TOL = 1e-9  # of cuts while entanglement is undone; it decides about gates alone
_LEAST_CAP = 64  # on ranks there, or twice those of the train
_EXACT = 1e-14  # of cuts of what the gates prepare


def shallow(cores: Sequence[Tensor], n_layers: int, n_sweeps: int = 0) -> tuple[list[Operation], list[Tensor]]:
    """Operations of some layers, and the chain that they prepare.

    A layer is the exact circuit of what the state is at rank two; its inverse is applied, and the next layer begins
    with what came out. Time runs the other way: the last layer comes first. A layer that would not help is left out.
    With ``n_sweeps`` all gates so far are polished before the next layer.

    Cost: O(n_layers d r^3) flops with the ranks on the way; those of the circuit may double with each layer.

    Source: Ran, Phys. Rev. A 101, 032310 (2020).
    """
    target = Gauged.of([core.to(torch.complex128) for core in cores])
    cap = max(_LEAST_CAP, 2 * max(core.shape[-1] for core in cores))
    blocks: list[Block] = []  # in the order of time
    state = _copy(target)
    best = at_zeros(state)
    for _ in range(n_layers):
        layer = blocks_of(_of_rank_two(state))
        _undo(state, layer, cap)
        reached = at_zeros(state)
        if reached <= best * (1 + 1e-12):
            break
        blocks, best = [*layer, *blocks], reached
        if n_sweeps:
            blocks = polished(target, blocks, n_sweeps, _TOL, cap)
            state = _copy(target)
            _undo(state, blocks, cap)
            best = at_zeros(state)
    made = zeros(len(cores))  # bonds of at most 2**n_layers
    for block in blocks:
        turn(made, block.site, _gate(block), _EXACT, None)
    return staircase(blocks), list(made.stored(torch.complex128)[0])


def _copy(state: Gauged) -> Gauged:
    return Gauged(list(state.cores), state.center, state.exponent)


def _of_rank_two(state: Gauged) -> list[Tensor]:
    """The chain cut to ranks of two, of norm 1."""
    cut = _copy(state)
    for k in range(len(cut.cores) - 1):
        cut.move(k)
        found = split(cut.local(k, 2), max_rank=2, tol=_TOL)
        cut.put(k, [found.left, found.right], center=k + 1)
    cores = list(cut.cores)
    cores[cut.center] = cores[cut.center] / torch.linalg.vector_norm(cores[cut.center])
    return cores


def _undo(state: Gauged, blocks: Sequence[Block], cap: int) -> None:
    """The inverse of blocks, on a state of norm 1."""
    for block in reversed(blocks):
        turn(state, block.site, _gate(block).mH, _TOL, cap, to_right=False)


def _gate(block: Block) -> Tensor:
    return torch.from_numpy(unitary_of(block.operations, block.n_qubits))
