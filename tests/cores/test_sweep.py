"""The sweep driver, proved by a two-site DMRG and a two-site fit of a density that bring their local update alone."""

import math
import signal
from itertools import pairwise
from pathlib import Path

import fresh
import pytest
import torch

from tensortrain.cores.algebra import contract
from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments, Overlap, Sandwich, Together, value_parts
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.sketch import Plain
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.errors import CheckpointError, DTypeError, NonFiniteError, RankError, ShapeError

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
    cores = [torch.randn(r, 2, s, generator=generator, dtype=torch.float64) for r, s in pairwise(ranks)]
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


# -- two-site fit of a density: all bars and stripes, as |psi|^2 ---------------------------------------


def bars_and_stripes(side):
    """Every picture of full rows or full columns, ``(2^(side + 1) - 2, side^2)``."""
    bits = (torch.arange(2**side)[:, None] >> torch.arange(side)) & 1
    rows = bits[:, :, None].expand(-1, -1, side).flatten(1)
    return torch.cat((rows, bits[:, None, :].expand(-1, side, -1).flatten(1))).unique(dim=0)


def uphill(local, at, k, n_steps=5, rate=0.1):
    """Steps along the gradient of the mean log likelihood; what is normalised locally is so as a whole."""
    local = local / local.norm()
    for _ in range(n_steps):
        psi, exponent = at.parts(local)
        pull, _ = at.adjoint_parts(1 / psi.conj(), -exponent)
        local = local + rate * (pull / len(psi) - local)
        local = local / local.norm()
    return local


def density(update=uphill, dtype=torch.float64, **options):
    x = bars_and_stripes(3)
    generator = torch.Generator().manual_seed(1)
    shapes = [(1 if k == 0 else 2, 2, 1 if k == 8 else 2) for k in range(9)]
    state = Gauged.of([torch.rand(shape, generator=generator, dtype=dtype) for shape in shapes])
    env = Environments(Data.of_values(x, [2] * 9, dtype), state.cores)

    def figures(state):
        psi, exponent = env.at(0).parts(state.local(0) / state.local(0).norm())
        return {"nll": -2 * float((psi.abs().log() + exponent.double() * math.log(2)).mean())}

    return state, sweep(state, env, update, schedule=[Cuts(1e-3, 16)] * 5, figures=figures, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_a_density_is_learnt_to_its_entropy(dtype):
    state, history = density(dtype=dtype)
    assert -1e-12 < history.nll[-1] - math.log(14) < 1e-6  # below it is a bug
    probability = contract(state.cores).abs().square()
    probability = probability / probability.sum()
    on_pictures = probability[tuple(bars_and_stripes(3).T)]
    assert float((on_pictures - 1 / 14).abs().max()) < 1e-5
    assert max(history.ranks[-1]) <= 16


# -- killed and resumed --------------------------------------------------------------------------------

RUNS = {"dmrg": (dmrg, lowest_by_lanczos), "density": (density, uphill)}


class Killed(Exception):
    pass


def failing_after(update, n_calls, fail):
    left = [n_calls]

    def fails(local, at, k):
        left[0] -= 1
        if left[0] < 0:
            fail()
        return update(local, at, k)

    return fails


def same_bits(a, b):
    assert a[1] == b[1]
    assert all(torch.equal(x, y) for x, y in zip(a[0].cores, b[0].cores, strict=True))
    assert torch.equal(a[0].exponent, b[0].exponent)


def kill():
    raise Killed


@pytest.mark.parametrize("name", RUNS)
def test_an_exception_in_the_middle_is_resumed_to_equal_bits(name, tmp_path):
    run, update = RUNS[name]
    path = tmp_path / "state"
    with pytest.raises(Killed):
        run(failing_after(update, 33, kill), checkpoint=path, checkpoint_every_s=0)
    resumed = run(failing_after(update, 10_000, kill), checkpoint=path)
    same_bits(resumed, run())
    same_bits(run(failing_after(update, 0, kill), checkpoint=path), resumed)  # which is done


@pytest.mark.parametrize("name", RUNS)
def test_an_observer_that_raises_leaves_a_file_to_go_on_from(name, tmp_path):
    run, _ = RUNS[name]
    path = tmp_path / "state"
    seen = []

    def observer(history):
        seen.append(len(history))
        if len(history) == 2:
            raise Killed

    with pytest.raises(Killed):
        run(observer=observer, checkpoint=path)
    resumed = run(observer=observer, checkpoint=path)
    assert seen == list(range(1, len(resumed[1]) + 1))
    same_bits(resumed, run())


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_to_equal_bits(tmp_path):
    program = (
        "import os, signal, sys, torch; sys.path.insert(0, sys.argv[1]); import test_sweep as t\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.density(t.failing_after(t.uphill, 45, die), checkpoint=sys.argv[2], checkpoint_every_s=0)"
    )
    path = tmp_path / "state"
    killed = fresh.run(program, str(Path(__file__).parent), str(path), str(torch.get_num_threads()))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert path.exists()
    same_bits(density(failing_after(uphill, 5 * 16 - 45, kill), checkpoint=path), density())


# -- what else an algorithm may need -------------------------------------------------------------------


def chain(modes, rank, dtype, generator):
    ranks = [1, *[rank] * (len(modes) - 1), 1]
    shapes = [(r, n, s) for r, n, s in zip(ranks, modes, ranks[1:], strict=False)]
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def dense_of(at, shape):
    """The map as a matrix: axes in front are columns."""
    n = int(torch.tensor(shape).prod())
    eye = torch.eye(n, dtype=at.left.dtype).reshape(n, *shape)
    return at(eye).reshape(n, -1).T


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("n_sites", [1, 2])
def test_every_place_of_every_sweep_can_be_the_last_one_seen(order, n_sites, tmp_path, generator):
    modes = (3, 2, 4, 2, 3)[:order]
    start, target = (chain(modes, rank, torch.float64, generator) for rank in (2, 3))

    def run(update, **options):
        state = Gauged.of(start)
        env = Environments(Overlap(Plain(target)), state.cores)
        draws = torch.Generator().manual_seed(5)

        def enrich(local, k, to_right):
            r, s = local.shape[0], local.shape[-1]
            shape = (r, modes[k], 1) if to_right else (1, modes[k + n_sites - 1], s)
            return torch.randn(shape, generator=draws, dtype=local.dtype)

        options = {"enrich": enrich, "generator": draws, "n_sites": n_sites, **options}
        return state, sweep(state, env, update, schedule=[Cuts(1e-2, 3)] * 2, **options)

    def fit(local, at, k):
        return at.adjoint()

    whole = run(fit)
    n_calls = 2 * 2 * (order - min(n_sites, order) + 1)
    for n in range(1, n_calls):
        path = tmp_path / str(n)
        with pytest.raises(Killed):
            run(failing_after(fit, n, kill), checkpoint=path, checkpoint_every_s=0)
        same_bits(run(failing_after(fit, n_calls - n, kill), checkpoint=path), whole)
    found = times_pow2(contract(whole[0].cores), whole[0].exponent)
    if n_sites == 2:
        assert float((found - contract(target)).norm()) <= 0.03 * float(contract(target).norm())


def test_a_longer_schedule_goes_on_where_the_shorter_one_ended(tmp_path, generator):
    start, target = (chain((3, 4, 3), rank, torch.float64, generator) for rank in (2, 3))

    def run(n, **options):
        state = Gauged.of(start)
        env = Environments(Overlap(Plain(target)), state.cores)
        return state, sweep(state, env, lambda local, at, k: at.adjoint(), schedule=[Cuts()] * n, **options)

    run(1, checkpoint=tmp_path / "state")
    same_bits(run(3, checkpoint=tmp_path / "state"), run(3))


def test_a_file_of_another_run_is_refused(tmp_path, generator):
    path = tmp_path / "state"
    for k, rank in enumerate((2, 3)):
        state = Gauged.of(chain((3, 4, 3), rank, torch.float64, generator))
        env = Environments(Overlap(Plain(state.cores[:])), state.cores)
        if k == 0:
            sweep(state, env, lambda local, at, k: local, schedule=[Cuts()], checkpoint=path)
            continue
        with pytest.raises(CheckpointError, match="must be of the same run"):
            sweep(state, env, lambda local, at, k: local, schedule=[Cuts()], checkpoint=path)


def test_a_start_that_differs_by_a_power_of_two_is_another_one(tmp_path, generator):
    cores = chain((3, 4, 3), 2, torch.float64, generator)
    for factor in (1, 2):
        state = Gauged.of([factor * cores[0], *cores[1:]])
        env = Environments(Overlap(Plain(cores)), state.cores)
        if factor == 1:
            sweep(state, env, lambda local, at, k: local, schedule=[Cuts()], checkpoint=tmp_path / "state")
            continue
        with pytest.raises(CheckpointError, match="other scale"):
            sweep(state, env, lambda local, at, k: local, schedule=[Cuts()], checkpoint=tmp_path / "state")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_complex_run_goes_on_to_equal_bits_and_knows_its_phases(dtype, tmp_path, generator):
    start, target = (chain((3, 4, 3), rank, dtype, generator) for rank in (2, 3))

    def run(n, cores, **options):
        state = Gauged.of(cores)
        env = Environments(Overlap(Plain(target)), state.cores)
        step = lambda local, at, k: (local + at.adjoint()) / 2  # noqa: E731
        return state, sweep(state, env, step, schedule=[Cuts()] * n, **options)

    run(1, start, checkpoint=tmp_path / "state")
    with pytest.raises(CheckpointError, match="starting weights"):
        run(3, [core.conj() for core in start], checkpoint=tmp_path / "state")
    same_bits(run(3, start, checkpoint=tmp_path / "state"), run(3, start))


@pytest.mark.parametrize("n_sites", [1, 2])
def test_a_time_step_goes_back_between_sites(n_sites, generator):
    """The projector-splitting integrator; at full ranks its only error is that of the splitting."""
    n, step, n_steps = 6, 0.02, 5
    state = Gauged.of(chain([2] * n, 8, torch.complex128, generator))
    state.put(0, [state.local(0) / state.local(0).norm()], 0, torch.zeros_like(state.exponent))
    h = [core.to(torch.complex128) for core in heisenberg(n)]
    env = Environments(Sandwich(h), state.cores)
    before = times_pow2(contract(state.cores), state.exponent).flatten()

    def evolved(sign):
        def update(local, at, k):
            return (torch.matrix_exp(sign * 0.5j * step * dense_of(at, local.shape)) @ local.flatten()).reshape(
                local.shape
            )

        return update

    sweep(state, env, evolved(-1), back=evolved(1), n_sites=n_sites, schedule=[Cuts()] * n_steps)
    after = times_pow2(contract(state.cores), state.exponent).flatten()
    full = dense_of(Environments(Sandwich(h), state.cores).at(0, n), [1, *[2] * n, 1])
    exact = torch.matrix_exp(-1j * step * n_steps * full) @ before
    assert abs(float(after.norm()) - 1) < 1e-12
    energies = [(x.conj() @ full @ x).real for x in (before, after)]
    assert abs(float(energies[0] - energies[1])) < 1e-12
    assert float((after - exact).norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_a_linear_system_is_solved_with_enrichment_from_rank_one(dtype, generator):
    modes = (3, 4, 3, 4)
    merged = chain([n * n for n in modes], 2, dtype, generator)
    a = [0.1 * core.unflatten(-2, (n, n)) for core, n in zip(merged, modes, strict=True)]
    for core, n in zip(a, modes, strict=True):
        core[0, :, :, 0] += torch.eye(n)
    x = chain(modes, 3, dtype, generator)
    b = [torch.einsum("rijs,tju->rtisu", m, c).flatten(-2).flatten(0, 1) for m, c in zip(a, x, strict=True)]
    state = Gauged.of(chain(modes, 1, dtype, generator))
    both = Together(Environments(Sandwich(a), state.cores), Environments(Overlap(Plain(b)), state.cores))

    def update(local, at, k):
        operator, right = at
        return torch.linalg.solve(dense_of(operator, local.shape), right.adjoint().flatten()).reshape(local.shape)

    def enrich(local, k, to_right):
        shape = (*local.shape[:2], 2) if to_right else (2, *local.shape[1:])
        return torch.randn(shape, dtype=dtype, generator=generator)

    sweep(state, both, update, n_sites=1, schedule=[Cuts(1e-12)] * 4, enrich=enrich, generator=generator)
    found = times_pow2(contract(state.cores), state.exponent)
    assert float((found - contract(x)).norm()) < 1e-9 * float(contract(x).norm())


def test_labels_move_along_as_several_eigenvectors(generator):
    n, n_states = 8, 3
    state = Gauged.of(chain([2] * n, 2, torch.float64, generator))
    state.n_labels = 1
    state.cores[0] = torch.randn(n_states, *state.cores[0].shape, dtype=torch.float64, generator=generator)
    env = Environments(Sandwich(heisenberg(n)), state.cores)
    energies = []

    def update(local, at, k):
        values, vectors = torch.linalg.eigh(dense_of(at, local.shape[1:]))
        energies.append(values[:n_states])
        return vectors[:, :n_states].T.reshape(local.shape)

    sweep(state, env, update, schedule=[Cuts(1e-12, 32)] * 4)
    full = dense_of(Environments(Sandwich(heisenberg(n)), [torch.ones(1, 2, 1)] * n).at(0, n), [1, *[2] * n, 1])
    assert float((energies[-1] - torch.linalg.eigvalsh(full)[:n_states]).abs().max()) < 1e-8
    assert state.cores[0].shape[0] == n_states
    state.move(n - 1)  # the labels come along
    together = torch.stack([contract([*state.cores[:-1], one]).flatten() for one in state.cores[-1]])
    together = times_pow2(together, state.exponent)
    assert float((together @ together.T - torch.eye(n_states)).abs().max()) < 1e-8


def test_a_batch_without_members_is_swept():
    cores = [torch.zeros(0, *shape, dtype=torch.float64) for shape in ((1, 2, 2), (2, 3, 2), (2, 2, 1))]
    state = Gauged.of(cores)
    history = sweep(
        state, Environments(Overlap(Plain(cores)), cores), lambda local, at, k: at.adjoint(), schedule=[Cuts(1e-3)]
    )
    assert history.largest_cut == [0.0]
    assert value_parts([cores, cores])[0].shape == (0,)


def fit_of(target, state, path, *, schedule=None, stop=None):
    env = Environments(Overlap(Plain(target)), state.cores)
    kept = {"checkpoint": path, "checkpoint_every_s": 0, "inputs": target}
    return sweep(state, env, lambda local, at, k: at.adjoint(), schedule=schedule or [Cuts()], stop=stop, **kept)


def test_a_file_of_another_target_or_of_other_cuts_is_refused(tmp_path, generator):
    a, b, start = (chain([3, 2, 3], 2, torch.float64, generator) for _ in range(3))
    fit_of(a, Gauged.of(start), tmp_path / "run", schedule=[Cuts(), Cuts(1e-3)], stop=lambda history: "enough")
    with pytest.raises(CheckpointError):
        fit_of(b, Gauged.of(start), tmp_path / "run")
    with pytest.raises(CheckpointError, match="cuts"):
        fit_of(a, Gauged.of(start), tmp_path / "run", schedule=[Cuts(1e-2), Cuts(1e-3)])


@pytest.mark.parametrize(
    "update, error",
    [
        (lambda local: local * math.nan, NonFiniteError),
        (lambda local: local.float(), DTypeError),
        (lambda local: local[..., :1, :], ShapeError),
    ],
)
def test_what_an_update_must_not_give_leaves_state_and_file_as_they_were(update, error, tmp_path, generator):
    cores = chain([3, 2, 3], 2, torch.float64, generator)
    state, path = Gauged.of(cores), tmp_path / "run"
    env, seen = Environments(Overlap(Plain(cores)), state.cores), []

    def spoilt(local, at, k):
        seen.append(path.read_bytes() if path.exists() else b"")
        return update(local) if len(seen) == 3 else local

    with pytest.raises(error, match="core"):
        sweep(state, env, spoilt, schedule=[Cuts()], checkpoint=path, checkpoint_every_s=0)
    assert path.read_bytes() == seen[-1]
    assert all(torch.isfinite(core).all() and core.dtype == torch.float64 for core in state.cores)


@pytest.mark.parametrize("options", [{"n_sites": 3}, {"n_sites": 0}, {"schedule": []}])
def test_impossible_sweeps_are_refused(options, generator):
    cores = chain([3, 2, 3], 2, torch.float64, generator)
    env = Environments(Overlap(Plain(cores)), cores)
    with pytest.raises(RankError):
        sweep(Gauged.of(cores), env, lambda local, at, k: local, **{"schedule": [Cuts()], **options})


@pytest.mark.parametrize("options", [{"tol": -1.0}, {"tol": math.nan}, {"max_rank": 0}])
def test_impossible_cuts_are_refused(options):
    with pytest.raises(RankError):
        Cuts(**options)
