"""Dropout and lasso on ranks, norms of dense weights from cores, balanced cores."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import KindError, RankError
from tensortrain.formats import format_names
from tensortrain.nn import COUNTERPARTS, FactorizedLayer
from tensortrain.nn.shaping.regularize import bonds
from tensortrain.testing import rel_error

MAKERS: dict[str, Callable[..., FactorizedLayer]] = {
    "linear tt": lambda **o: tt.nn.Linear(12, 20, in_modes=(2, 3, 2), out_modes=(5, 2, 2), rank=3, **o),
    "linear tt, one core": lambda **o: tt.nn.Linear(7, 5, in_modes=(7,), out_modes=(5,), rank=1, **o),
    "linear low_rank": lambda **o: tt.nn.Linear(12, 20, format="low_rank", rank=3, **o),
    "conv tt": lambda **o: tt.nn.Conv2d(4, 6, 3, padding=1, rank=3, **o),
    "conv tt, 1x1": lambda **o: tt.nn.Conv2d(4, 6, 1, rank=3, **o),
    "conv tt_naive": lambda **o: tt.nn.Conv2d(4, 6, 3, format="tt_naive", rank=3, **o),
    "conv tucker2": lambda **o: tt.nn.Conv2d(4, 6, 3, format="tucker2", rank=3, **o),
    "conv low_rank": lambda **o: tt.nn.Conv2d(4, 6, 3, format="low_rank", rank=3, **o),
    "conv groups": lambda **o: tt.nn.Conv2d(4, 6, 3, groups=2, rank=3, **o),
    "conv groups tucker2": lambda **o: tt.nn.Conv2d(4, 6, 3, groups=2, format="tucker2", rank=3, **o),
    "conv groups low_rank": lambda **o: tt.nn.Conv2d(4, 6, 3, groups=2, format="low_rank", rank=3, **o),
    "conv1d": lambda **o: tt.nn.Conv1d(4, 6, 5, rank=2, **o),
    "conv transposed": lambda **o: tt.nn.ConvTranspose2d(4, 6, 3, stride=2, rank=3, **o),
    "conv transposed, groups": lambda **o: tt.nn.ConvTranspose1d(4, 6, 3, groups=2, rank=2, **o),
    "embedding tt": lambda **o: tt.nn.Embedding(47, 12, in_modes=(4, 3, 5), out_modes=(2, 3, 2), rank=3, **o),
    "embedding, exact": lambda **o: tt.nn.Embedding(60, 12, in_modes=(4, 3, 5), out_modes=(2, 3, 2), rank=3, **o),
    "embedding, padding row": lambda **o: tt.nn.Embedding(47, 12, 46, rank=3, **o),
    "embedding low_rank": lambda **o: tt.nn.Embedding(47, 12, 2, format="low_rank", rank=3, **o),
    "bag": lambda **o: tt.nn.EmbeddingBag(47, 12, rank=3, **o),
}
every_layer = pytest.mark.parametrize("name", MAKERS)
with_ranks = pytest.mark.parametrize("name", [name for name in MAKERS if "one core" not in name])


def example(layer: FactorizedLayer) -> torch.Tensor:
    if isinstance(layer, tt.nn.Linear):
        return torch.randn(5, layer.in_features)
    if isinstance(layer, tt.nn.Embedding):
        return torch.randint(40, (7, 1) if isinstance(layer, tt.nn.EmbeddingBag) else (7,))
    return torch.randn(2, 4, *[6] * layer.n_axes)  # type: ignore[attr-defined]


# -- the norm of dense weights --------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_norm_and_gradient_are_those_of_the_dense_weight(name: str, dtype: torch.dtype, tol: float) -> None:
    layer = MAKERS[name](dtype=dtype)
    found, exact = tt.nn.dense_norm(layer), layer.weight.square().sum()
    assert found.shape == ()
    assert found.dtype == dtype
    assert rel_error(found.detach(), exact.detach()) <= tol
    cores = list(layer.cores)
    for mine, theirs in zip(torch.autograd.grad(found, cores), torch.autograd.grad(exact, cores), strict=True):
        assert rel_error(mine, theirs) <= 10 * tol


def test_norm_never_builds_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 10^16 entries."""
    layer = tt.nn.Linear(10**8, 10**8, in_modes=(10,) * 8, out_modes=(10,) * 8, rank=2, bias=False, init=None)
    with torch.no_grad():
        for core in layer.cores:
            core.fill_(1e-2)
    assert tt.nn.dense_norm(layer).item() == pytest.approx((2**7 * 1e-16) ** 2 * 1e16, rel=1e-12)


def test_norms_add_up_and_shared_layers_count_once() -> None:
    shared = MAKERS["linear tt"]()
    model = nn.ModuleList([shared, nn.Sequential(shared, nn.Linear(20, 3)), MAKERS["conv groups"]()])
    exact = shared.weight.square().sum() + model[2].weight.square().sum()  # type: ignore[operator, union-attr]
    assert rel_error(tt.nn.dense_norm(model).detach(), exact.detach()) <= 1e-12


def test_norm_of_complex_and_low_precision_cores() -> None:
    layer = tt.nn.Linear(12, 20, rank=3, dtype=torch.complex128)
    assert rel_error(tt.nn.dense_norm(layer).detach(), layer.weight.detach().abs().square().sum()) <= 1e-12
    half = MAKERS["linear tt"](dtype=torch.bfloat16)
    found = tt.nn.dense_norm(half)
    assert found.dtype == torch.float32
    wide = copy.deepcopy(half).double()
    assert rel_error(found.detach(), wide.weight.detach().square().sum()) <= 1e-6


@pytest.mark.parametrize("kind", ["slice", "left", "spectral"])
def test_norm_of_orthogonal_layers(kind: str) -> None:
    layer = tt.nn.orthogonal(tt.nn.Linear(60, 24, in_modes=(3, 4, 5), out_modes=(2, 3, 4), rank=3), kind)
    assert rel_error(tt.nn.dense_norm(layer).detach(), layer.weight.detach().square().sum()) <= 1e-12
    tt.nn.dense_norm(layer).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.cores.parameters())


@pytest.mark.parametrize("penalty", [tt.nn.dense_norm, tt.nn.rank_lasso])
def test_penalties_of_a_dense_model_are_zero(penalty: Callable[[nn.Module], torch.Tensor]) -> None:
    for model in (nn.Linear(3, 3), nn.ReLU()):
        assert penalty(model).item() == 0
        assert penalty(model).shape == ()


# -- lasso ---------------------------------------------------------------------------------------------


def test_lasso_is_the_sum_over_rank_indices() -> None:
    layer = MAKERS["linear tt"]()
    exact = 0.0
    cores = [core.detach() for core in layer.cores]
    for left, right in itertools.pairwise(cores):
        for r in range(left.shape[3]):
            exact += math.hypot(left[..., r].norm(), right[r].norm())
    assert tt.nn.rank_lasso(layer).item() == pytest.approx(exact, rel=1e-12)


@with_ranks
def test_lasso_sees_every_rank_index_alone(name: str) -> None:
    """To zero one index of one bond lowers the penalty by that group's norm, and the weight no longer needs it."""
    layer = MAKERS[name]()
    before = tt.nn.rank_lasso(layer).item()
    assert before > 0
    lowered = 0.0
    for bond in bonds(layer.spec):
        (k, axis), (other, other_axis) = bond
        slices = layer.cores[k].detach().select(axis, 0), layer.cores[other].detach().select(other_axis, 0)
        group = math.sqrt(sum(part.square().sum() for part in slices))
        lowered += group
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            changed.cores[k].select(axis, 0).zero_()
        first = changed.weight.detach()
        with torch.no_grad():
            changed.cores[other].select(other_axis, 0).zero_()
        assert torch.equal(changed.weight, first)  # both slices carry the same index
        if len(bonds(layer.spec)) == 1:
            assert before - tt.nn.rank_lasso(changed).item() == pytest.approx(group, rel=1e-12)
    assert lowered < before * (1 + 1e-12)


def test_lasso_gradient() -> None:
    layer = MAKERS["conv groups"]()

    def call(*cores: torch.Tensor) -> torch.Tensor:
        layer.stand_ins = list(cores)
        return tt.nn.rank_lasso(layer)

    assert torch.autograd.gradcheck(call, [core.detach().clone().requires_grad_() for core in layer.cores])
    layer.stand_ins = None
    with torch.no_grad():
        layer.cores[0].zero_()
        layer.cores[1].zero_()
    tt.nn.rank_lasso(layer).backward()
    assert all(torch.isfinite(core.grad).all() for core in layer.cores)


def test_lasso_drives_ranks_to_zero() -> None:
    """A map of rank 2 fitted at rank 6: the penalty leaves two indices and the fit; without it all six stay."""
    target = torch.randn(12, 2) @ torch.randn(2, 10)
    left = {}
    for weight in (0.0, 2.0):
        torch.manual_seed(1)
        layer = tt.nn.Linear(10, 12, bias=False, format="low_rank", rank=6)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for step in range(800):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 800)
            optimizer.zero_grad()
            loss = (layer.weight - target).square().sum() + weight * tt.nn.rank_lasso(layer)
            loss.backward()
            optimizer.step()
        sizes = layer.cores[0].detach().norm(dim=1) * layer.cores[1].detach().norm(dim=0)
        left[weight] = int((sizes > 1e-3 * sizes.max()).sum())
        assert rel_error(layer.weight.detach(), target) <= 0.03  # the penalty shrinks what stays by 2 %
    assert left == {0.0: 6, 2.0: 2}


# -- dropout -------------------------------------------------------------------------------------------


@with_ranks
def test_dropout_while_training_only(name: str) -> None:
    layer = MAKERS[name](implementation="factorized")
    x = example(layer)
    exact, names = layer(x).detach(), set(layer.state_dict())
    handle = tt.nn.tensor_dropout(layer, 0.5)
    outputs = [layer(x).detach() for _ in range(8)]
    assert max(rel_error(y, exact) for y in outputs) > 0.1
    assert set(layer.state_dict()) == names
    with torch.no_grad():  # what is kept without gradients must not be what was dropped
        assert max(rel_error(layer(x), exact) for _ in range(8)) > 0.1
        layer.eval()
        assert rel_error(layer(x), exact) <= 1e-12
    assert rel_error(layer(x), exact) <= 1e-12
    assert rel_error(layer.train().weight.detach(), layer.eval().weight.detach()) == 0  # no forward, no dropout
    layer.train()
    handle.remove()
    handle.remove()
    assert rel_error(layer(x), exact) <= 1e-12
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@pytest.mark.parametrize("name", ["linear tt", "conv groups", "conv tucker2", "embedding low_rank"])
def test_dropout_keeps_the_expectation(name: str, implementation: str) -> None:
    """Over all masks of a rank-2 layer, each with its probability: exact, no sampling."""
    layer = {
        "linear tt": lambda: tt.nn.Linear(8, 8, in_modes=(2, 2, 2), out_modes=(2, 2, 2), rank=2),
        "conv groups": lambda: tt.nn.Conv2d(4, 4, 3, groups=2, rank=2),
        "conv tucker2": lambda: tt.nn.Conv2d(4, 6, 3, format="tucker2", rank=2),
        "embedding low_rank": lambda: tt.nn.Embedding(47, 12, format="low_rank", rank=2),
    }[name]()
    layer.implementation = implementation
    x, p = example(layer), 0.3
    exact = layer(x).detach()
    found, total = torch.zeros_like(exact), 0.0
    sizes = [layer.spec.core_shapes[k][axis] for (k, axis), *_ in bonds(layer.spec)]
    sizes = [size for size in sizes if size > 1]
    for mask in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        draws = [torch.tensor(part) for part in _cut(mask, sizes)]
        with pytest.MonkeyPatch.context() as patch, tt.nn.tensor_dropout(layer, p):
            patch.setattr(torch, "rand", lambda *size, draws=draws, **options: draws.pop(0))
            y = layer(x).detach()
        chance = math.prod(1 - p if kept else p for kept in mask)
        found, total = found + chance * y, total + chance
    assert total == pytest.approx(1.0)
    assert rel_error(found, exact) <= 1e-12


def _cut(mask: tuple[float, ...], sizes: list[int]) -> list[tuple[float, ...]]:
    ends = list(itertools.accumulate(sizes))
    return [mask[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def test_dropout_uses_one_mask_for_forward_and_gradient() -> None:
    layer = tt.nn.Linear(12, 20, format="low_rank", rank=8, bias=False)
    tt.nn.tensor_dropout(layer, 0.5)
    y = layer(torch.randn(3, 12))
    y.square().sum().backward()
    dropped = layer.cores[0].grad.norm(dim=1) == 0
    assert 0 < dropped.sum() < 8
    assert torch.equal(dropped, layer.cores[1].grad.norm(dim=0) == 0)


@pytest.mark.parametrize("kind", ["slice", "left", "spectral"])
@pytest.mark.parametrize("dropout_first", [True, False])
def test_dropout_of_orthogonal_layers(kind: str, dropout_first: bool) -> None:
    layer = tt.nn.Linear(60, 24, in_modes=(3, 4, 5), out_modes=(2, 3, 4), rank=3)
    if dropout_first:
        tt.nn.tensor_dropout(layer, 0.5)
    tt.nn.orthogonal(layer, kind)
    if not dropout_first:
        tt.nn.tensor_dropout(layer, 0.5)
    x = torch.randn(4, 60)
    exact = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    assert max(rel_error(layer(x).detach(), exact) for _ in range(8)) > 0.1
    assert rel_error(layer.eval()(x), exact) <= 1e-12


def test_dropout_reaches_every_layer_of_a_model_and_copies() -> None:
    model = nn.Sequential(tt.nn.Linear(12, 12, rank=4), nn.ReLU(), tt.nn.Linear(12, 12, format="low_rank", rank=4))
    handle = tt.nn.tensor_dropout(model, 0.5)
    assert all(model[k]._forward_pre_hooks for k in (0, 2))
    x = torch.randn(4, 12)
    twin = copy.deepcopy(model)
    assert rel_error(twin(x), twin(x)) > 1e-3
    handle.remove()
    assert torch.equal(model(x), model(x))


def test_layers_of_rank_one_are_left_alone() -> None:
    layer = tt.nn.Linear(12, 20, rank=1)
    x = torch.randn(3, 12)
    exact = layer(x)
    with tt.nn.tensor_dropout(layer, 0.9):
        assert torch.equal(layer(x), exact)


def test_compiled_dropout() -> None:
    layer = tt.nn.Linear(12, 20, format="low_rank", rank=8, implementation="factorized")
    x = torch.randn(3, 12)
    exact = layer(x).detach()
    tt.nn.tensor_dropout(layer, 0.5)
    compiled = torch.compile(layer, backend="eager")
    assert max(rel_error(compiled(x).detach(), exact) for _ in range(6)) > 0.1
    assert rel_error(compiled.eval()(x), exact) <= 1e-12


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_impossible_probabilities(p: float) -> None:
    with pytest.raises(RankError, match=r"\[0, 1\)"):
        tt.nn.tensor_dropout(MAKERS["linear tt"](), p)


def test_dropout_of_a_dense_model_is_refused() -> None:
    with pytest.raises(KindError, match="found none in Linear"):
        tt.nn.tensor_dropout(nn.Linear(3, 3), 0.1)


def test_every_layer_and_format_is_covered_here() -> None:
    """A new one has to be added to the list above."""
    made = [make() for make in MAKERS.values()]
    missing = set(COUNTERPARTS.values()) - {type(layer) for layer in made}
    missing -= {tt.nn.Conv3d, tt.nn.ConvTranspose3d}
    assert not missing
    assert {layer.spec.format for layer in made} <= set(format_names())


# -- balance -------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_balance_equalises_norms_and_keeps_the_weight(name: str, dtype: torch.dtype, tol: float) -> None:
    layer = MAKERS[name](dtype=dtype)
    with torch.no_grad():
        for k, core in enumerate(layer.cores):
            core.mul_(10.0 ** (k - 1))
    before, kept = layer.weight.detach().clone(), list(layer.cores)
    assert tt.nn.balance_(layer) is layer
    assert rel_error(layer.weight.detach(), before) <= tol
    assert all(mine is theirs for mine, theirs in zip(layer.cores, kept, strict=True))
    for g in range(layer.spec.weight.groups):
        cores = [core[g] if layer.spec.weight.groups > 1 else core for core in layer.cores]
        norms = [core.detach().norm().item() for core in cores]
        assert max(norms) <= min(norms) * (1 + 10 * tol)


def test_balance_leaves_alone_what_it_cannot_scale() -> None:
    zero, rotated = MAKERS["linear tt"](), MAKERS["linear tt"]()
    with torch.no_grad():
        zero.cores[1].zero_()
    one = tt.nn.Linear(12, 20, format="low_rank", rank=3)
    other = tt.nn.Linear(12, 20, format="low_rank", rank=3)
    other.cores[0] = one.cores[0]  # shared in part
    tt.nn.orthogonal(rotated)
    model = nn.ModuleList([zero, rotated, one, other, nn.Linear(2, 2)])
    before = copy.deepcopy(model.state_dict())
    tt.nn.balance_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_balance_of_long_chains_neither_overflows_nor_vanishes() -> None:
    """The first 40 norms multiply to 10^400, all 80 to one."""
    ones = (1,) * 80
    layer = tt.nn.Linear(1, 1, in_modes=ones, out_modes=ones, rank=1, bias=False, init=None)
    with torch.no_grad():
        for k, core in enumerate(layer.cores):
            core.fill_(1e10 if k < 40 else 1e-10)
    tt.nn.balance_(layer)
    assert all(core.item() == pytest.approx(1.0, rel=1e-12) for core in layer.cores)


@pytest.mark.parametrize("fmt", ["tt", "low_rank"])
def test_kept_weights_follow_balance(fmt: str) -> None:
    layer = tt.nn.Linear(12, 20, format=fmt, rank=3)
    x = torch.randn(3, 12)
    with torch.no_grad():
        before = layer(x)
        layer.cores[0].mul_(100.0)
        tt.nn.balance_(layer)
        assert rel_error(layer(x) - layer.bias, 100.0 * (before - layer.bias)) <= 1e-12
