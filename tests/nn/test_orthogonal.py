"""Orthogonal trains: counts, constraints that hold, weights that are kept, gradients, manners of a module."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tensortrain as tt
from tensortrain.errors import DTypeError, KindError, RankError, ShapeError
from tensortrain.nn.shaping.constraints import Frame, Rotations, nearest_rotation
from tensortrain.nn.shaping.orthogonal import OrthogonalCores
from tensortrain.testing import assert_gradcheck, rel_error

KINDS = ("slice", "left", "spectral")
every_kind = pytest.mark.parametrize("kind", KINDS)


def small(kind: str, **options: Any) -> tt.nn.Linear:
    given = {"in_modes": (3, 2, 2, 5), "out_modes": (2, 3, 4, 1), "rank": (1, 3, 3, 3, 1), **options}
    return tt.nn.orthogonal(tt.nn.Linear(60, 24, **given), kind)


def off_identity(q: Tensor) -> float:
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


def slices(core: Tensor) -> Tensor:
    return core.detach().movedim(-4, -2)


def drift(layer: tt.nn.FactorizedLayer) -> float:
    """How far the constrained unfoldings are from orthonormal."""
    found = 0.0
    for k, (core, one) in enumerate(zip(layer.cores, layer.cores.maps(), strict=True)):
        core = core.detach()
        if isinstance(one, Rotations):
            found = max(found, off_identity(slices(core)))
        elif isinstance(one, Frame):
            matrix = one.to_matrix(core)
            if layer.cores.kind == "spectral" and k == layer.cores.n_left - 1:
                matrix = matrix / matrix.norm(dim=-2)
            found = max(found, off_identity(matrix))
    return found


# -- counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, plain, constrained", [(4, 2944, 1704), (8, 9856, 5392), (32, 134656, 69184)])
def test_published_counts_of_rotations(rank: int, plain: int, constrained: int) -> None:
    """The input map of a GRU, modes (10,18,13,30) x (4,4,4,4) with the first output mode times three."""
    layer = tt.nn.Linear(
        70200, 768, bias=False, in_modes=(10, 18, 13, 30), out_modes=(12, 4, 4, 4), rank=rank, dtype=torch.float32
    )
    before = _saved_bytes(layer)
    assert layer.n_params == plain
    tt.nn.orthogonal(layer)
    assert layer.n_params == constrained
    assert layer.compression == 70200 * 768 / constrained
    assert sum(value.numel() for value in layer.state_dict().values()) == constrained
    assert before - _saved_bytes(layer) > 0.95 * 4 * (plain - constrained) - 2048  # names and headers take some


def _saved_bytes(layer: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    return len(file.getvalue())


@pytest.mark.parametrize("rank, plain, constrained", [(4, 2176, 2146), (8, 8448, 8340)])
def test_published_counts_of_frames(rank: int, plain: int, constrained: int) -> None:
    layer = tt.nn.Linear(1024, 1024, bias=False, in_modes=(4, 8, 8, 4), out_modes=(4, 8, 8, 4), rank=rank)
    assert layer.n_params == plain
    assert tt.nn.orthogonal(layer, "left").n_params == constrained


def test_spectral_count() -> None:
    layer = tt.nn.orthogonal(tt.nn.Linear(30, 24, in_modes=(5, 6), out_modes=(4, 6), rank=3), "spectral")
    frames = [(4, 3), (18, 3), (15, 3), (6, 3)]  # rows and columns of the unfoldings
    assert layer.n_params == sum(n * r - r * (r + 1) // 2 for n, r in frames) + 3 + 24


# -- the constraints -----------------------------------------------------------------------------------


def test_slices_are_rotations() -> None:
    layer = small("slice")
    for core in list(layer.cores)[1:-1]:
        assert off_identity(slices(core)) <= 1e-13
        assert torch.allclose(torch.linalg.det(slices(core)), torch.ones(()))


@every_kind
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_cores_are_orthonormal_whatever_the_numbers(kind: str, dtype: torch.dtype, tol: float) -> None:
    layer = small(kind, dtype=dtype)
    assert drift(layer) <= tol
    for scale in (1e-3, 1.0, 30.0):  # the Cayley transform loses digits in proportion to its argument
        with torch.no_grad():
            for parameter in layer.cores.parameters():
                parameter.copy_(scale * torch.randn_like(parameter))
        assert drift(layer) <= tol


@every_kind
def test_a_thousand_steps_do_not_drift(kind: str) -> None:
    modes = ((2, 6), (2, 4)) if kind == "spectral" else ((2, 3, 2), (2, 2, 2))
    layer = tt.nn.Linear(12, 8, in_modes=modes[0], out_modes=modes[1], rank=3, dtype=torch.float32)
    tt.nn.orthogonal(layer, kind)
    x, y = torch.randn(8, 12, dtype=torch.float32), torch.randn(8, 8, dtype=torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    start = F.mse_loss(layer(x), y).item()
    for _ in range(1000):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
    assert drift(layer) <= 1e-5
    assert loss.item() < 0.5 * start


@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_the_spectral_norm_is_the_largest_of_the_singular_values(max_norm: float | None) -> None:
    layer = tt.nn.Linear(60, 24, in_modes=(3, 4, 5), out_modes=(4, 3, 2), rank=6)
    tt.nn.orthogonal(layer, "spectral", rank=5, max_norm=max_norm)
    norm = torch.linalg.matrix_norm(layer.weight, 2).item()
    middle = layer.cores.maps()[2]
    assert norm == pytest.approx(0.9 * middle.scale.item() if max_norm is None else 0.999 * max_norm, rel=1e-12)
    for factor in (1.0, -2.0, 100.0):
        with torch.no_grad():
            layer.cores.free(2)[1].mul_(factor)
        s = middle.scale * torch.sigmoid(layer.cores.free(2)[1])
        values = torch.linalg.svdvals(layer.weight.detach())[:5]
        assert rel_error(values, s.detach().sort(descending=True).values) <= 1e-12
        assert values[0] <= middle.scale * (1 + 1e-12)


# -- weights that are kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "ins, outs", [((3, 4, 5), (4, 3, 2)), ((1, 7, 13), (11, 1, 5)), ((60,), (24,)), ((2,) * 7, (2, 1) * 3 + (3,))]
)
def test_left_keeps_the_weight(ins: tuple[int, ...], outs: tuple[int, ...], dtype: torch.dtype, tol: float) -> None:
    dense = nn.Linear(math.prod(ins), math.prod(outs), dtype=dtype)
    for layer in (
        tt.nn.Linear.from_dense(dense, in_modes=ins, out_modes=outs),
        tt.nn.Linear.from_dense(dense, in_modes=ins, out_modes=outs, rank=4),
    ):
        weight = layer.weight.detach().clone()
        tt.nn.orthogonal(layer, "left")
        assert rel_error(layer.weight.detach(), weight) <= tol
        assert drift(layer) <= tol


@pytest.mark.parametrize("kind", ["slice", "left"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(kind: str, groups: int) -> None:
    modes = (2, 4 // groups)
    layer = tt.nn.Conv2d(8, 8, 3, padding=1, groups=groups, rank=2, in_modes=modes, out_modes=modes)
    weight, power = layer.weight.detach().clone(), [w.square().sum() for w in layer.weight.chunk(groups)]
    tt.nn.orthogonal(layer, kind)
    assert drift(layer) <= 1e-13
    if kind == "left":
        assert rel_error(layer.weight.detach(), weight) <= 1e-12
    for found, before in zip(layer.weight.chunk(groups), power, strict=True):
        assert torch.allclose(found.square().sum(), before)
    x = torch.randn(2, 8, 5, 4)
    assert rel_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1, groups=groups)) <= 1e-12
    layer.implementation = "factorized"
    assert rel_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1, groups=groups)) <= 1e-12


def test_embedding() -> None:
    layer = tt.nn.Embedding(50, 12, rank=3, in_modes=(3, 3, 6), out_modes=(2, 3, 2), padding_idx=1)
    table = layer.weight.detach().clone()
    tt.nn.orthogonal(layer, "left")
    ids = torch.tensor([[3, 1], [49, 3]])
    assert rel_error(layer(ids).detach(), table[ids]) <= 1e-12
    tt.nn.orthogonal(layer, "slice")
    assert rel_error(layer(ids), layer.weight[ids]) <= 1e-12
    assert drift(layer) <= 1e-13


def test_trained_slices_go_to_the_nearest_rotations() -> None:
    layer = tt.nn.Linear(60, 24, in_modes=(3, 2, 2, 5), out_modes=(2, 3, 4, 1), rank=(1, 3, 3, 3, 1))
    given = [core.detach().clone() for core in layer.cores]
    power = layer.weight.square().sum().item()
    tt.nn.orthogonal(layer)
    for before, after in zip(given[1:-1], list(layer.cores)[1:-1], strict=True):
        found = (slices(before) - slices(after)).flatten(-2).norm(dim=-1)
        for _ in range(20):
            other = nearest_rotation(slices(after) + 0.3 * torch.randn(slices(after).shape))
            assert (found <= (slices(before) - other).flatten(-2).norm(dim=-1) + 1e-12).all()
    assert layer.weight.square().sum().item() == pytest.approx(power, rel=1e-12)


def test_rotations_are_kept_as_they_are() -> None:
    layer = small("slice")
    before = [core.detach().clone() for core in layer.cores]
    tt.nn.orthogonal(layer)
    for found, core in zip(layer.cores, before, strict=True):
        assert rel_error(found.detach(), core) <= 1e-11
    assert len(layer._forward_pre_hooks) == 1


@pytest.mark.parametrize("modes", [((3, 4, 5), (4, 3, 2)), ((60,), (24,)), ((7, 1, 5), (1, 13, 2)), ((1,), (5,))])
def test_spectral_keeps_the_weight_at_full_rank(modes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    ins, outs = modes
    if len(ins) != len(outs):
        return
    dense = nn.Linear(math.prod(ins), math.prod(outs))
    layer = tt.nn.Linear.from_dense(dense, in_modes=ins, out_modes=outs)
    tt.nn.orthogonal(layer, "spectral", rank="full")
    assert rel_error(layer.weight.detach(), dense.weight) <= 1e-12
    x = torch.randn(3, math.prod(ins))
    assert rel_error(layer(x), dense(x)) <= 1e-12


def test_spectral_of_a_weight_of_lower_rank() -> None:
    """Ranks follow from the request, so that a checkpoint of any weight fits."""
    dense = nn.Linear(30, 24, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(24, 2) @ torch.randn(2, 30))
    layer = tt.nn.Linear.from_dense(dense, format="low_rank", rank=2)
    tt.nn.orthogonal(layer, "spectral", rank=4)
    assert layer.ranks == (1, 4, 1)
    assert rel_error(layer.weight.detach(), dense.weight) <= 1e-12
    assert drift(layer) <= 1e-13


def test_spectral_truncates_best() -> None:
    dense = nn.Linear(30, 24, bias=False)
    layer = tt.nn.Linear.from_dense(dense, format="low_rank")
    tt.nn.orthogonal(layer, "spectral", rank=5)
    tail = torch.linalg.svdvals(dense.weight)[5:].norm()
    assert (layer.weight - dense.weight).norm().item() == pytest.approx(tail.item(), rel=1e-10)


# -- gradients -----------------------------------------------------------------------------------------


@every_kind
def test_gradcheck(kind: str) -> None:
    layer = tt.nn.Linear(12, 8, in_modes=(2, 3, 2), out_modes=(2, 2, 2), rank=2)
    assert_gradcheck(tt.nn.orthogonal(layer, kind), torch.randn(3, 12))


@every_kind
@pytest.mark.parametrize("implementation", ["factorized", "dense", "auto"])
def test_forward_and_gradients_are_those_of_the_weight(kind: str, implementation: str) -> None:
    layer = small(kind, implementation=implementation)
    for x in (torch.randn(4, 60), torch.randn(0, 60), torch.randn(60, 2, 3).permute(1, 2, 0)):
        x.requires_grad_()
        upstream = torch.randn(*x.shape[:-1], 24)
        inputs = [x, *layer.parameters()]
        found = torch.autograd.grad(layer(x), inputs, upstream)
        exact = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), inputs, upstream)
        for mine, theirs in zip(found, exact, strict=True):
            assert rel_error(mine, theirs) <= 1e-11 if x.numel() else torch.equal(mine, theirs)


@pytest.mark.parametrize("d", [4, 8, 16])
@pytest.mark.parametrize("init", ["match", 0.5])
def test_gradients_neither_vanish_nor_explode_along_the_chain(d: int, init: Any) -> None:
    """Of interior cores always; of all when the ends are of unit size too, which at rank 4 is ``init=4 ** -0.5``."""
    layer = tt.nn.Linear(
        2**d, 2**d, bias=False, in_modes=(2,) * d, out_modes=(2,) * d, rank=(1, *[4] * (d - 1), 1), init=init
    )
    layer.implementation = "factorized"
    tt.nn.orthogonal(layer)
    cores = [core.detach().requires_grad_() for core in layer.cores]
    y = tt.nn.functional.tt_linear(torch.randn(4, 2**d), cores)
    norms = [g.norm().item() for g in torch.autograd.grad(y, cores, torch.randn_like(y))]
    inner = norms if init == 0.5 else norms[1:-1]
    assert max(inner) <= 3 * min(inner)


@pytest.mark.parametrize("d", [4, 8, 16])
def test_entries_and_their_derivatives_are_bounded_by_the_ends(d: int) -> None:
    """``|W(i, j)| <= ||g_1|| ||g_d||`` whatever d; Gaussian cores without a correction grow with d."""
    layer = tt.nn.Linear(2**d, 2**d, bias=False, in_modes=(2,) * d, out_modes=(2,) * d, rank=(1, *[4] * (d - 1), 1))
    gaussian = [torch.randn(core.shape) for core in layer.cores]
    tt.nn.orthogonal(layer)
    entry = [torch.randint(2, (2,)).tolist() for _ in range(d)]

    def picked(cores: Any) -> tuple[float, list[float]]:
        chain = [core.detach().requires_grad_() for core in cores]
        value = torch.linalg.multi_dot([core[:, i, j, :] for core, (i, j) in zip(chain, entry, strict=True)])
        return abs(value.item()), [g.norm().item() for g in torch.autograd.grad(value.sum(), chain)]

    first, last = layer.cores[0].detach(), layer.cores[-1].detach()
    bound = first[:, entry[0][0], entry[0][1]].norm() * last[:, entry[-1][0], entry[-1][1]].norm()
    value, norms = picked(layer.cores)
    assert value <= bound * (1 + 1e-12)
    assert all(norm == pytest.approx(bound.item(), rel=1e-10) for norm in norms[1:-1])
    _, wild = picked(gaussian)
    assert max(wild) >= 2 ** (d - 4)


def test_unit_singular_values_carry_a_recurrence() -> None:
    """A square full-rank map with s near 1 keeps the size of a state for 100 steps; rotated slices alone do not."""
    start = nn.Linear(16, 16, bias=False)
    nn.init.orthogonal_(start.weight)
    layer = tt.nn.Linear.from_dense(start, in_modes=(4, 4), out_modes=(4, 4))
    tt.nn.orthogonal(layer, "spectral", rank="full", max_norm=1.0)
    jacobian = torch.linalg.matrix_power(layer.weight, 100)
    assert 0.1 <= torch.linalg.svdvals(jacobian)[-1] <= torch.linalg.svdvals(jacobian)[0] <= 1.0
    rotated = tt.nn.Linear(16, 16, bias=False, in_modes=(2, 2, 4), out_modes=(2, 2, 4), rank=(1, 3, 3, 1), init=0.5)
    weight = tt.nn.orthogonal(rotated).weight
    assert torch.linalg.svdvals(weight)[0] > 1.1  # not bounded by 1: slices are orthogonal, sums of them are not


# -- maps ----------------------------------------------------------------------------------------------


def test_cayley_round_trip() -> None:
    rotations = nearest_rotation(torch.randn(50, 6, 6))
    one = Rotations(6)
    core = rotations.reshape(5, 10, 6, 6).movedim(-2, -4)
    assert rel_error(one(one.right_inverse(core)), core) <= 1e-9
    numbers = torch.randn(5, 10, 15)
    assert rel_error(one.right_inverse(one(numbers)), numbers) <= 1e-11


@pytest.mark.parametrize("matrix", [torch.diag(torch.tensor([-1.0, -1.0, 1.0])), torch.zeros(3, 3), -torch.eye(3)])
def test_half_turns_zeros_and_reflections_come_out_as_near_rotations(matrix: Tensor) -> None:
    one = Rotations(3)
    core = matrix.double().reshape(3, 1, 1, 3)
    numbers = one.right_inverse(core)
    assert torch.isfinite(numbers).all()
    assert off_identity(slices(one(numbers))) <= 1e-12
    if torch.linalg.det(matrix) > 0.5:
        assert (one(numbers) - core).norm() <= 0.02


@pytest.mark.parametrize("side", ["left", "right"])
def test_frames_span_what_they_were_given(side: str) -> None:
    one = Frame((3, 2, 4, 5) if side == "left" else (5, 4, 2, 3), side)
    for core in (torch.randn(one.shape), one.from_matrix(torch.eye(24, 5))):
        matrix = one.to_matrix(core)
        frame = one.to_matrix(one(one.right_inverse(core)))
        assert off_identity(frame) <= 1e-13
        assert rel_error(frame @ (frame.mT @ matrix), matrix) <= 1e-12


# -- manners of a module -------------------------------------------------------------------------------


@every_kind
def test_forward_follows_the_numbers(kind: str) -> None:
    """After an optimizer step, in train and in eval mode, with and without gradients, twice."""
    layer = small(kind)
    x = torch.randn(5, 60)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.no_grad():
        layer.eval()(x)
    seen = []
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        exact = F.linear(x, layer.format.to_dense([c.detach() for c in layer.cores], layer.spec), layer.bias)
        for mode in (True, False):
            layer.train(mode)
            assert rel_error(layer(x), exact) <= 1e-12
            with torch.no_grad():
                assert rel_error(layer(x), exact) <= 1e-12
                assert rel_error(layer(x), exact) <= 1e-12
        seen.append(exact)
    assert rel_error(seen[0], seen[1]) > 1e-6


@every_kind
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_pass_makes_each_core_once(kind: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small(kind)
    calls = []
    for one in layer.cores.maps():
        if one is not None:
            monkeypatch.setattr(one, "_core", lambda *free, make=one._core: (calls.append(1), make(*free))[1])
    n = sum(one is not None for one in layer.cores.maps())
    x = torch.randn(5, 60)
    with torch.set_grad_enabled(grad):
        if grad:
            layer.plan(5)  # looks at the first core
        calls.clear()
        layer(x)
        assert len(calls) == n
        layer(x)
        assert len(calls) == (2 * n if grad else n)  # without gradients cores and prepared weights are kept
    calls.clear()
    with parametrize.cached():  # a recurrent net may share them over all steps
        for _ in range(3):
            layer(x)
    assert len(calls) in ((n,) if grad else (n, 0))


def test_a_failed_forward_leaves_nothing_behind() -> None:
    layer = small("slice")
    with pytest.raises(ShapeError):
        layer(torch.randn(3, 7))
    assert layer.stand_ins is None


@every_kind
def test_state_dict_into_a_fresh_layer(kind: str) -> None:
    layer, fresh = small(kind), small(kind)
    x = torch.randn(5, 60)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        fresh(x)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), layer(x))
    with torch.no_grad():
        assert torch.equal(fresh(x), layer(x))


@every_kind
def test_copies_are_independent(kind: str) -> None:
    layer = small(kind)
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 60)
    before = layer(x).detach()
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(layer(x), before)
    assert rel_error(twin(x), F.linear(x, twin.weight, twin.bias)) <= 1e-12


@every_kind
def test_reset_draws_a_weight_of_the_right_size(kind: str) -> None:
    layer = small(kind)
    before = layer.weight.detach().clone()
    layer.reset_parameters(init=0.25)
    after = layer.weight.detach()
    assert rel_error(after, before) > 0.1
    assert after.square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-6)
    assert drift(layer) <= 1e-13
    generator = torch.Generator().manual_seed(3)
    layer.reset_parameters(generator=generator)
    first = layer.weight.detach().clone()
    layer.reset_parameters(generator=generator.manual_seed(3))
    assert torch.equal(layer.weight, first)


@every_kind
def test_dtype_changes_and_autocast(kind: str) -> None:
    layer = small(kind).float()
    x = torch.randn(5, 60, dtype=torch.float32)
    exact = F.linear(x, layer.weight, layer.bias)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert rel_error(found, exact) <= 0.03
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert rel_error(half(x.bfloat16()), exact) <= 0.1


@every_kind
def test_frozen_layers_stay_frozen(kind: str) -> None:
    layer = tt.nn.Linear(60, 24, in_modes=(3, 2, 2, 5), out_modes=(2, 3, 4, 1), rank=(1, 3, 3, 3, 1))
    layer.requires_grad_(False)
    tt.nn.orthogonal(layer, kind)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer(torch.randn(2, 60)).requires_grad


@every_kind
def test_back_to_a_dense_layer(kind: str) -> None:
    layer = small(kind)
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert dense.weight.requires_grad
    x = torch.randn(5, 60)
    assert rel_error(dense(x), layer(x)) <= 1e-12
    assert "dense" in str(layer.plan(4))


@every_kind
def test_compiled(kind: str) -> None:
    layer = small(kind, implementation="factorized")
    x = torch.randn(5, 60)
    compiled = torch.compile(layer, backend="eager")
    assert rel_error(compiled(x), layer(x)) <= 1e-12


def test_from_one_kind_to_another() -> None:
    layer = small("slice")
    weight = layer.weight.detach().clone()
    tt.nn.orthogonal(layer, "left")
    assert rel_error(layer.weight.detach(), weight) <= 1e-12
    tt.nn.orthogonal(layer, "spectral", rank="full")
    assert rel_error(layer.weight.detach(), weight) <= 1e-12
    tt.nn.orthogonal(layer, "left")
    assert rel_error(layer.weight.detach(), weight) <= 1e-12
    assert layer.cores.kind == "left"


# -- errors --------------------------------------------------------------------------------------------


def cube(n: int, rank: Any = 3, **options: Any) -> tt.nn.Linear:
    return tt.nn.Linear(n**3, n**3, in_modes=(n,) * 3, out_modes=(n,) * 3, rank=rank, **options)


NO_TRAIN = "stored as those of a train"


@pytest.mark.parametrize(
    "make, kind, options, error, words",
    [
        (lambda: tt.nn.Linear(64, 64, in_modes=(8, 8), out_modes=(8, 8)), "slice", {}, RankError, "two inner ranks"),
        (lambda: cube(4, (1, 3, 4, 1)), "slice", {}, RankError, "all equal"),
        (lambda: cube(2, (1, 9, 9, 1)), "left", {}, RankError, "core 0 has 4 x 9"),
        (lambda: tt.nn.Linear(64, 64, format="low_rank"), "slice", {}, KindError, NO_TRAIN),
        (lambda: tt.nn.Conv2d(4, 4, 3, format="tucker2"), "left", {}, KindError, NO_TRAIN),
        (lambda: tt.nn.Conv2d(4, 4, 3), "spectral", {}, KindError, "needs a Linear"),
        (lambda: nn.Linear(4, 4), "slice", {}, KindError, "found Linear"),
        (lambda: cube(2), "both", {}, ShapeError, "'both'"),
        (lambda: cube(2), "left", {"rank": 3}, ShapeError, "belong to kind='spectral'"),
        (lambda: cube(2), "spectral", {"max_norm": 0.0}, ShapeError, "positive"),
        (lambda: cube(2), "spectral", {"rank": 0}, RankError, "0"),
        (lambda: cube(2, dtype=torch.complex64), "left", {}, DTypeError, "complex64"),
    ],
)
def test_refusals_change_nothing(make: Any, kind: Any, options: Any, error: type, words: str) -> None:
    layer = make()
    names = set(layer.state_dict())
    with pytest.raises(error, match=words):
        tt.nn.orthogonal(layer, kind, **options)
    assert set(layer.state_dict()) == names
    assert not isinstance(getattr(layer, "cores", None), OrthogonalCores)
