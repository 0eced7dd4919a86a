"""A train as a staircase of isometries, one for each site, on the few qubits that hold a bond and a site.

In right-orthogonal form a core is an isometry from the bond to its left to the site and the bond to its right. Bonds
are numbers on ``ceil(log2 r)`` qubits. The last sites, whose qubits the bond fills, share one isometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.models.quantum.gates import Matrix, Operation
from tensortrain.models.quantum.simulate import unitary_of
from tensortrain.models.quantum.synthesis import of_isometry, qubits_of

__all__ = ["Block", "blocks_of", "cores_of_blocks", "staircase"]


@dataclass(frozen=True)
class Block:
    """The gates that write one site, or the last ones.

    Attributes:
        site: The first of the sites.
        n_inputs: Qubits of the bond that comes in; they are the first ones.
        n_qubits: Of the block; those behind the inputs are in state 0 before. The first one is the site after it.
        operations: On qubits ``0 .. n_qubits - 1``.
        is_last: Whether all of its qubits are sites.
    """

    site: int
    n_inputs: int
    n_qubits: int
    operations: tuple[Operation, ...]
    is_last: bool


def blocks_of(cores: Sequence[Tensor]) -> list[Block]:
    """The blocks of a chain ``(r, 2, s)`` of norm 1, float64 or complex128, without ranks that are not needed."""
    ready = [core.numpy() for core in Gauged.of(cores, center=0).cores]
    order, found, n_inputs = len(ready), [], 0
    for k, core in enumerate(ready):
        n_outputs = qubits_of(core.shape[-1])
        is_last = n_outputs == order - 1 - k
        tensor = core
        for later in ready[k + 1 :] if is_last else ():
            tensor = np.tensordot(tensor, later, axes=1)
        n_qubits = n_outputs + 1
        columns = _isometry(tensor.reshape(len(core), 2, -1), n_outputs)
        found.append(Block(k, n_inputs, n_qubits, tuple(of_isometry(columns, n_inputs)), is_last))
        if is_last:
            break
        n_inputs = n_outputs
    return found


def staircase(blocks: Sequence[Block]) -> list[Operation]:
    """Site k on qubit k: a block acts on the qubits from its site on."""
    return [
        operation.on(tuple(range(block.site, block.site + block.n_qubits)))
        for block in blocks
        for operation in block.operations
    ]


def cores_of_blocks(blocks: Sequence[Block]) -> list[Tensor]:
    """The chain that the gates prepare, from the gates themselves."""
    cores = []
    for block in blocks:
        whole = torch.from_numpy(unitary_of(block.operations, block.n_qubits))
        rows = whole[:, :: 2 ** (block.n_qubits - block.n_inputs)].T  # a, s b
        cores.append(rows.reshape(len(rows), 2, -1))
    size = cores[-1].shape[-1]
    while size > 1:
        cores.append(torch.eye(size, dtype=torch.complex128).reshape(size, 2, size // 2))
        size //= 2
    return cores


def _isometry(core: Matrix, n_outputs: int) -> Matrix:
    """``(2 * 2**n_outputs, r)`` from ``(r, 2, s)``, orthonormal to rounding; bonds are filled up with zeros."""
    filled = np.pad(core, ((0, 0), (0, 0), (0, 2**n_outputs - core.shape[-1])))
    u, _, vh = np.linalg.svd(filled.reshape(len(core), -1).T, full_matrices=False)
    return u @ vh
