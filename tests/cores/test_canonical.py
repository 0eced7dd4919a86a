"""A working copy of a train: its center moves, and what it stands for stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensortrain.cores.algebra import contract
from tensortrain.cores.canonical import Gauged
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.unfold import as_left, as_right
from tensortrain.testing import rel_error

RANKS = (1, 3, 4, 3, 1)
MODES = (3, 4, 2, 5)
BATCHES = [(), (2,)]
DTYPES = [torch.float64, torch.complex128]


def make(generator, dtype=torch.float64, batch=()) -> list[Tensor]:
    sizes = zip(RANKS[:-1], MODES, RANKS[1:], strict=True)
    return [torch.randn(*batch, *size, dtype=dtype, generator=generator) for size in sizes]


def whole(x: Gauged) -> Tensor:
    return times_pow2(contract(x.cores), x.exponent)


def assert_gauged(x: Gauged) -> None:
    for k, core in enumerate(x.cores):
        matrix = as_left(core) if k < x.center else as_right(core).mH
        if k != x.center:
            eye = torch.eye(matrix.shape[-1], dtype=core.dtype)
            assert float((matrix.mH @ matrix - eye).abs().max()) <= 1e-14
    sizes = x.cores[x.center].abs().amax((-3, -2, -1))
    assert bool(((sizes >= 0.5) & (sizes < 1)).all())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_center_moves_and_the_tensor_stays(dtype, batch, generator):
    cores = make(generator, dtype, batch)
    x = Gauged.of(cores)
    for center in (0, 2, 3, 1, 0):
        x.move(center)
        assert x.center == center
        assert_gauged(x)
        assert rel_error(whole(x), contract(cores)) <= 1e-14


@pytest.mark.parametrize("n_sites", [1, 2, 3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_local_tensor_goes_out_and_in(dtype, batch, n_sites, generator):
    cores = make(generator, dtype, batch)
    x = Gauged.of(cores, center=3)
    for k in range(len(cores) - n_sites + 1):
        local = x.local(k, n_sites)
        assert k <= x.center < k + n_sites
        assert local.shape == (*batch, RANKS[k], *MODES[k : k + n_sites], RANKS[k + n_sites])
        norms = torch.linalg.vector_norm(local.flatten(len(batch)), dim=-1)
        exact = torch.linalg.vector_norm(contract(cores).flatten(len(batch)), dim=-1)
        assert rel_error(times_pow2(norms, x.exponent), exact) <= 1e-14
        x.put(k, x.cores[k : k + n_sites], x.center)
    assert rel_error(whole(x), contract(cores)) <= 1e-14


def test_a_new_core_takes_the_place_of_the_old_one(generator):
    cores = make(generator)
    x = Gauged.of(cores)
    local = x.local(2)
    x.put(2, [-3 * local], center=2)
    assert_gauged(x)
    assert rel_error(whole(x), -3 * contract(cores)) <= 1e-14
    x.put(2, [local], 2, exponent=torch.zeros_like(x.exponent))
    assert rel_error(whole(x) * torch.linalg.vector_norm(contract(cores)), contract(cores) * local.norm()) <= 1e-14


def test_known_orthogonality_saves_the_work(generator):
    x = Gauged.of(make(generator), center=2)
    again = Gauged.of(x.cores, span=(2, 2), center=2)
    assert all(torch.equal(a, b) for a, b in zip(again.cores, x.cores, strict=True))


def test_two_thousand_cores_neither_overflow_nor_vanish(generator):
    def core(k: int) -> Tensor:
        ends = (1 if k == 0 else 2, 2, 1 if k == 1999 else 2)
        return torch.randn(*ends, dtype=torch.float64, generator=generator) * (1e3 if k < 1000 else 1e-3)

    cores = [core(k) for k in range(2000)]
    x = Gauged.of(cores)
    start = x.exponent.item(), float(x.cores[0].norm())
    for center in (1999, 0):
        x.move(center)
        assert torch.isfinite(x.cores[center]).all()
        assert abs(x.exponent.item() + x.cores[center].norm().log2().item() - start[0]) <= 2
    assert rel_error(x.cores[0].norm() * 2.0 ** (x.exponent.item() - start[0]), torch.tensor(start[1])) <= 1e-11


def test_what_is_stored_has_the_power_of_two_in_it(generator):
    cores = make(generator)
    x = Gauged.of(cores, center=1)
    stored, span = x.stored(torch.float32)
    assert span == (1, 1)
    assert {core.dtype for core in stored} == {torch.float32}
    assert rel_error(contract(stored), contract(cores)) <= 1e-6
    x.exponent = x.exponent + 400  # more than one core in single precision can hold
    stored, span = x.stored(torch.float32)
    assert span == (0, 3)
    assert all(torch.isfinite(core).all() for core in stored)


def test_order_one(generator):
    core = torch.randn(1, 4, 1, dtype=torch.float64, generator=generator)
    x = Gauged.of([core])
    x.move(0)
    assert rel_error(times_pow2(x.local(0), x.exponent), core) == 0.0


def test_derivatives_pass_through_a_move(generator):
    cores = [core.requires_grad_() for core in make(generator)]

    def moved(*cores: Tensor) -> Tensor:
        x = Gauged.of(cores)
        x.move(3)
        return whole(x)

    assert torch.autograd.gradcheck(moved, cores)
