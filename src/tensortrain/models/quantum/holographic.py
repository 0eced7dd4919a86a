"""The staircase on as few qubits as one bond and one site take: measured sites give their qubits back."""

from __future__ import annotations

from collections.abc import Sequence

from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.staircase import Block

__all__ = ["holographic"]


def holographic(blocks: Sequence[Block]) -> tuple[list[Operation], int]:
    """Operations that measure site k into bit k, and the number of qubits; one is reset where it is needed again.

    Source: Schoen et al., Phys. Rev. Lett. 95, 110503 (2005); Huggins et al., arXiv:1803.11537.
    """
    n_qubits = max(block.n_qubits for block in blocks)
    clean, used = list(range(n_qubits)), list[int]()
    bond: list[int] = []
    operations = []
    for block in blocks:
        here = list(bond)
        while len(here) < block.n_qubits:
            if clean:
                here.append(clean.pop(0))
            else:
                here.append(used.pop(0))
                operations.append(Operation("reset", (here[-1],)))
        operations += [operation.on(tuple(here)) for operation in block.operations]
        sites = here if block.is_last else here[:1]
        operations += [Operation("measure", (q,), (), block.site + k) for k, q in enumerate(sites)]
        used, bond = [*used, *sites], here[len(sites) :]
    return operations, n_qubits
