"""Gates of a shallow circuit made better in turns: each becomes the best one beside all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.split import split
from tensortrain.models.quantum.gates import Matrix
from tensortrain.models.quantum.simulate import unitary_of
from tensortrain.models.quantum.staircase import Block
from tensortrain.models.quantum.synthesis import merged, of_unitary

__all__ = ["at_zeros", "polished", "turn", "zeros"]

_MOST_AMPLITUDES = 12  # qubits
_PULL = 1e-6  # to the gate that is there, which decides about inputs that never come
_LEAST_GAIN = 1e-9  # of the overlap, in one sweep


def polished(target: Gauged, blocks: Sequence[Block], n_sweeps: int, tol: float, cap: int) -> list[Block]:
    """Blocks in the order of time, changed so that what they prepare from zeros overlaps more with a state of norm 1.

    The overlap is ``sum_ij g_ij m_ij`` in each gate g, where m, the environment, is the rest of the diagram. The best
    unitary is the polar factor of its adjoint: the overlap then is the sum of m's singular values. A sweep goes back
    through the gates and forth again. Gates that are real, of states that are, stay rotations, which need two cx.

    Args:
        target: A state of norm 1; it is not changed.
        blocks: On one or two neighbouring sites each.
        n_sweeps: At most; it ends when one gains nothing.
        tol, cap: Of cuts on the way.

    Cost: O(n_sweeps g d r^3) flops for g gates.

    Source: Evenbly and Vidal, Phys. Rev. B 79, 144108 (2009).
    """
    is_real = not any(bool(core.imag.any()) for core in target.cores)
    gates = [_phased(unitary_of(block.operations, block.n_qubits), is_real) for block in blocks]
    kind = _Amplitudes if len(target.cores) <= _MOST_AMPLITUDES else partial(_Chain, tol=tol, cap=cap)
    made, best = kind(zeros(len(target.cores))), 0.0
    for block, gate in zip(blocks, gates, strict=True):
        made.turn(block.site, gate)
    for _ in range(n_sweeps):
        rest = kind(target)
        for k in reversed(range(len(gates))):
            made.turn(blocks[k].site, gates[k].mH, to_right=False)
            gates[k], _ = _best_gate(rest, made, blocks[k].site, gates[k])
            rest.turn(blocks[k].site, gates[k].mH, to_right=False)
        made, reached = kind(zeros(len(target.cores))), 0.0
        for k, gate in enumerate(gates):
            rest.turn(blocks[k].site, gate)
            gates[k], reached = _best_gate(rest, made, blocks[k].site, gate)
            made.turn(blocks[k].site, gates[k])
        if reached - best < _LEAST_GAIN:
            break
        best = reached
    return [
        replace(block, operations=tuple(merged(of_unitary(gate.numpy()))))
        for block, gate in zip(blocks, gates, strict=True)
    ]


def turn(state: Gauged, k: int, gate: Tensor, tol: float, cap: int | None, *, to_right: bool = True) -> None:
    """A gate ``(2, 2)`` or ``(4, 4)`` on sites from k on, of a state of norm 1."""
    n_sites = gate.shape[0].bit_length() - 1
    local = state.local(k, n_sites)
    size = local.shape
    done = torch.einsum("ij,rjs->ris", gate, local.reshape(size[0], -1, size[-1])).reshape(size)
    if n_sites == 1:
        state.put(k, [done], center=k)
        return
    found = split(done, tol=tol, max_rank=cap, to_right=to_right)
    state.put(k, [found.left, found.right], center=k + 1 if to_right else k)


def at_zeros(state: Gauged) -> float:
    """The modulus of the entry at zeros, of a state of norm 1."""
    cores = state.stored(torch.complex128)[0]
    row = cores[0][:, 0]
    for core in cores[1:]:
        row = row @ core[:, 0]
    return float(row.abs())


def zeros(order: int) -> Gauged:
    """All qubits in state 0."""
    core = torch.zeros(1, 2, 1, dtype=torch.complex128)
    core[0, 0, 0] = 1
    return Gauged.of([core.clone() for _ in range(order)])


class _Chain:
    """A state as a chain that is cut on the way."""

    def __init__(self, state: Gauged, *, tol: float, cap: int) -> None:
        self.state, self.tol, self.cap = Gauged(list(state.cores), state.center, state.exponent), tol, cap

    def turn(self, k: int, gate: Tensor, *, to_right: bool = True) -> None:
        turn(self.state, k, gate, self.tol, self.cap, to_right=to_right)

    def environment(self, made: _Chain, k: int, n_sites: int) -> Tensor:
        """``m`` with ``<self| g |made> = sum_ij g_ij m_ij`` for gates g on sites from k on."""
        mine, theirs = self.state.cores, made.state.cores
        left = right = mine[0].new_ones(1, 1)
        for a, b in zip(mine[:k], theirs[:k], strict=True):
            left = torch.einsum("rt,riu,tiv->uv", left, a.conj(), b)
        for a, b in zip(reversed(mine[k + n_sites :]), reversed(theirs[k + n_sites :]), strict=True):
            right = torch.einsum("riu,tiv,uv->rt", a.conj(), b, right)
        a, b = _joined(mine[k : k + n_sites]), _joined(theirs[k : k + n_sites])
        scale = math.ldexp(1.0, int(self.state.exponent + made.state.exponent))
        return torch.einsum("rt,riu,tjv,uv->ij", left, a.conj(), b, right) * scale


class _Amplitudes:
    """A state of few qubits: a gate takes no decomposition then."""

    def __init__(self, state: Gauged) -> None:
        found = state.stored(torch.complex128)[0][0]
        for core in state.stored(torch.complex128)[0][1:]:
            found = torch.tensordot(found, core, dims=1)
        self.psi = found.flatten()

    def turn(self, k: int, gate: Tensor, *, to_right: bool = True) -> None:
        self.psi = (gate @ self.psi.reshape(2**k, gate.shape[0], -1)).flatten()

    def environment(self, made: _Amplitudes, k: int, n_sites: int) -> Tensor:
        mine, theirs = (state.psi.reshape(2**k, 2**n_sites, -1) for state in (self, made))
        return torch.einsum("aib,ajb->ij", mine.conj(), theirs)


def _best_gate(rest: Any, made: Any, k: int, gate: Tensor) -> tuple[Tensor, float]:
    """The gate between two states that overlap most through it, or the one that is there, and the overlap."""
    environment = rest.environment(made, k, gate.shape[0].bit_length() - 1)
    is_real = not bool(gate.imag.any())
    pulled = environment + _PULL * gate.conj()
    u, _, vh = torch.linalg.svd(pulled.real if is_real else pulled)
    if is_real and float(torch.linalg.det(u @ vh)) < 0:  # a rotation: the least direction is turned round
        u = torch.cat((u[:, :-1], -u[:, -1:]), dim=1)
    better = (u @ vh).conj_physical().to(gate.dtype)
    reached, before = (float((one * environment).sum().abs()) for one in (better, gate))
    return (better, reached) if reached > before else (gate, before)


def _joined(cores: Sequence[Tensor]) -> Tensor:
    """One core for all the sites."""
    found = cores[0]
    for core in cores[1:]:
        found = torch.einsum("ris,sju->riju", found, core).flatten(1, 2)
    return found


def _phased(u: Matrix, is_real: bool) -> Tensor:
    """A gate as a tensor; a real one, but for its phase, without that phase."""
    if is_real:
        place = np.unravel_index(np.argmax(np.abs(u)), u.shape)
        turned = u * (abs(u[place]) / u[place])
        if np.abs(turned.imag).max() < 1e-10:
            u = turned.real.astype(np.complex128)
    return torch.from_numpy(u)
