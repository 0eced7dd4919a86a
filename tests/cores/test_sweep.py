"""The sweep driver, proved by a two-site DMRG and a two-site fit of a density that bring their local update alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensortrain.cores.algebra import contract
from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments, Overlap, Sandwich, Together
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.sketch import Plain
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.errors import CheckpointError

# -- two-site DMRG of the Heisenberg chain -------------------------------------------------------------

N_SPINS, ENERGY = 14, -6.0267246619  # exact diagonalization


def heisenberg(n):
    """sum S.S of neighbours, as cores ``(r, i, j, s)``: wait, S+, S-, Sz, done."""
    up = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    sz, eye = torch.diag(torch.tensor([0.5, -0.5], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
    core = torch.zeros(5, 2, 2, 5, dtype=torch.float64)
    core[0, :, :, 0] = core[4, :, :, 4] = eye
    for k, (first, second) in enumerate(((up, up.T / 2), (up.T, up / 2), (sz, sz)), start=1):
        core[0, :, :, k], core[k, :, :, 4] = first, second
    return [core[:1], *[core] * (n - 2), core[..., 4:]]


def lowest_by_lanczos(local, at, k, n_vectors=4):
    """The lowest vector of the Krylov space of a local tensor."""
    basis, products = [local / local.norm()], []
    for _ in range(n_vectors):
        products.append(at(basis[-1]))
        rest = products[-1]
        for _ in range(2):
            for v in basis:
                rest = rest - (v.conj() * rest).sum() * v
        if float(rest.norm()) < 1e-10:
            break
        basis.append(rest / rest.norm())
    v, w = (torch.stack(each).flatten(1) for each in (basis[: len(products)], products))
    _, vectors = torch.linalg.eigh(v.conj() @ w.T)
    lowest = (vectors[:, 0] @ v).reshape(local.shape)
    return lowest / lowest.norm()


def dmrg(update=lowest_by_lanczos, n=N_SPINS, **options):
    generator = torch.Generator().manual_seed(0)
    ranks = [1, *[2] * (n - 1), 1]
    cores = [torch.randn(r, 2, s, generator=generator, dtype=torch.float64) for r, s in zip(ranks, ranks[1:])]
    state = Gauged.of(cores)
    env = Environments(Sandwich(heisenberg(n)), state.cores)

    def figures(state):
        local = state.local(0) / state.local(0).norm()
        return {"energy": float((local.conj() * env.apply(0, local)).sum())}

    def settled(history):
        return "eps" if len(history) > 1 and abs(history.energy[-2] - history.energy[-1]) < 1e-11 else None

    schedule = [Cuts(1e-8, 16), *[Cuts(1e-10, 64)] * 9]
    return state, sweep(state, env, update, schedule=schedule, figures=figures, stop=settled, **options)


def test_dmrg_finds_the_ground_state_of_the_heisenberg_chain():
    state, history = dmrg()
    assert abs(history.energy[-1] - ENERGY) < 1e-9
    assert history.stop == "eps"
    assert max(history.ranks[0]) <= 16
    assert max(history.ranks[-1]) <= 64
    assert state.center == 0
