"""The path of ranks: monotone, feasible, rightly counted, and the best there is where that can be checked."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tensortrain.formats import ChainFormat, FactorSpec, RankPoint, WeightShape, even_path, get_format, rank_path
from tensortrain.testing import rel_error

CASES: dict[str, tuple[str, WeightShape, dict[str, Any]]] = {
    "two cores": ("tt", WeightShape("linear", 12, 20), {"out_modes": (3, 4), "in_modes": (4, 5)}),
    "three cores": ("tt", WeightShape("linear", 24, 30), {"out_modes": (2, 3, 4), "in_modes": (5, 3, 2)}),
    "four cores": ("tt", WeightShape("linear", 16, 16), {"out_modes": (2,) * 4, "in_modes": (2,) * 4}),
    "one core": ("tt", WeightShape("linear", 6, 6), {"out_modes": (6,), "in_modes": (6,)}),
    "a mode of size 1": ("tt", WeightShape("linear", 16, 16), {"out_modes": (4, 1, 4), "in_modes": (4, 1, 4)}),
    "modes of size 1 in a row": (
        "tt",
        WeightShape("linear", 16, 16),
        {"out_modes": (4, 1, 1, 4), "in_modes": (4, 1, 1, 4)},
    ),
    "modes of size 1 at the ends": (
        "tt",
        WeightShape("linear", 16, 16),
        {"out_modes": (1, 4, 4, 1), "in_modes": (1, 4, 4, 1)},
    ),
    "tt conv": ("tt", WeightShape("conv", 12, 8, (3, 3)), {}),
    "tt embedding": ("tt", WeightShape("embedding", 8, 50), {}),
    "tt_naive": ("tt_naive", WeightShape("conv", 8, 6, (3, 3)), {}),
    "tt_naive, flat kernel": ("tt_naive", WeightShape("conv", 8, 6, (3, 1)), {}),
    "tt_naive, 1x1 kernel": ("tt_naive", WeightShape("conv", 8, 6, (1, 1)), {}),
    "tucker2": ("tucker2", WeightShape("conv", 8, 6, (3, 3)), {}),
    "low_rank": ("low_rank", WeightShape("linear", 16, 40), {}),
    "low_rank conv": ("low_rank", WeightShape("conv", 16, 6, (3, 3)), {}),
}
every_case = pytest.mark.parametrize("name", CASES)


def setting(name: str, seed: int = 0) -> tuple[FactorSpec, Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    format, weight, modes = CASES[name]
    fmt = get_format(format)
    spec = fmt.spec(weight, rank=1, **modes)
    shape = weight.dense_shape
    rows, columns = torch.logspace(0, -2, shape[0]), torch.logspace(0, -2, math.prod(shape[1:]))
    dense = (rows[:, None] * torch.randn(shape[0], math.prod(shape[1:])) * columns).reshape(shape)
    return spec, dense, fmt.spectra(dense, spec)


def inner(point: RankPoint) -> tuple[int, ...]:
    return get_format(point.spec.format).inner_ranks(point.spec)


@every_case
@pytest.mark.parametrize("growth", [0.0, 0.08, 0.5])
def test_monotone_from_all_ones_to_exact(growth: float, name: str) -> None:
    spec, _, spectra = setting(name)
    path = rank_path(spec, spectra, growth=growth)
    assert set(inner(path[0])) <= {1}
    for before, after in itertools.pairwise(path):
        assert after.n_params > before.n_params
        assert after.rel_error < before.rel_error
        assert all(a <= b for a, b in zip(inner(before), inner(after), strict=True))
        assert after.spec.out_modes == spec.out_modes
        assert after.spec.in_modes == spec.in_modes
    assert path[-1].rel_error <= 1e-7


@every_case
def test_ranks_are_feasible_and_counted(name: str) -> None:
    spec, _, spectra = setting(name)
    fmt = get_format(spec.format)
    caps = fmt.rank_caps(spec)
    for point in rank_path(spec, spectra):
        shapes = point.spec.core_shapes
        assert point.n_params == point.spec.n_params == sum(math.prod(shape) for shape in shapes)
        assert all(r <= cap for r, cap in zip(point.spec.ranks, caps, strict=True))
        if isinstance(fmt, ChainFormat):
            for r, i, j, s in fmt.chain(point.spec).core_shapes:
                assert r <= i * j * s
                assert s <= i * j * r


@every_case
def test_the_predicted_error_is_a_bound(name: str) -> None:
    spec, dense, spectra = setting(name)
    fmt = get_format(spec.format)
    for point in rank_path(spec, spectra, growth=0.5):
        found = fmt.factorize(
            dense, spec.weight, rank=point.spec.ranks, out_modes=spec.out_modes, in_modes=spec.in_modes
        ).value
        error = rel_error(found.to_dense(), dense)
        assert error <= point.rel_error * (1 + 1e-9) + 1e-7
        assert found.spec.n_params <= point.n_params


@pytest.mark.parametrize("name", ["two cores", "a mode of size 1", "modes of size 1 in a row", "low_rank"])
@pytest.mark.parametrize("seed", range(3))
def test_with_one_bond_every_point_is_the_best_there_is(seed: int, name: str) -> None:
    spec, dense, spectra = setting(name, seed)
    fmt = get_format(spec.format)
    path = rank_path(spec, spectra, growth=0.0)
    full = max(fmt.rank_caps(spec))
    assert [max(inner(point)) for point in path] == list(range(1, full + 1))
    for rank, point in enumerate(path, start=1):
        best = float(spectra[0][rank:].norm() / spectra[0].norm())
        assert point.rel_error == pytest.approx(best, rel=1e-6, abs=1e-7)
        found = fmt.factorize(
            dense, spec.weight, rank=point.spec.ranks, out_modes=spec.out_modes, in_modes=spec.in_modes
        ).value
        assert rel_error(found.to_dense(), dense) == pytest.approx(best, rel=1e-6, abs=1e-7)


def test_two_ranks_against_brute_force() -> None:
    # Of all pairs of ranks with no more parameters, none is predicted to be better by more than a little.
    spec, _, spectra = setting("tucker2")
    fmt = get_format("tucker2")
    tails = [torch.cat([s.square().flip(0).cumsum(0).flip(0), torch.zeros(1)]) / s.square().sum() for s in spectra]
    caps = fmt.rank_caps(spec)
    every = []
    for r_in in range(1, caps[0] + 1):
        for r_out in range(1, caps[1] + 1):
            n_params = fmt.spec(spec.weight, rank=(r_in, r_out)).n_params
            every.append((n_params, math.sqrt(float(tails[0][r_in] + tails[1][r_out]))))
    for point in rank_path(spec, spectra, growth=0.0):
        best = min(error for n_params, error in every if n_params <= point.n_params)
        assert best <= point.rel_error * (1 + 1e-9)
        assert point.rel_error <= 1.25 * best + 1e-7


@every_case
def test_the_path_stops_at_the_parameters_allowed(name: str) -> None:
    spec, _, spectra = setting(name)
    whole = rank_path(spec, spectra)
    middle = whole[len(whole) // 2].n_params
    part = rank_path(spec, spectra, max_params=middle)
    assert part == whole[: len(part)]
    assert part[-1].n_params == middle
    assert rank_path(spec, spectra, max_params=whole[0].n_params - 1) == []


@every_case
def test_larger_steps_give_shorter_paths_over_the_same_range(name: str) -> None:
    spec, _, spectra = setting(name)
    fine, coarse = rank_path(spec, spectra, growth=0.0), rank_path(spec, spectra, growth=0.5)
    assert len(coarse) <= len(fine)
    assert coarse[0] == fine[0]
    assert coarse[-1].spec.ranks == fine[-1].spec.ranks


@pytest.mark.parametrize("growth", [0.0, 0.08, 0.5])
def test_a_rank_waits_for_its_neighbours(growth: float) -> None:
    # Spectra of no tensor: all the gain is at the first bond, which the second one must not outgrow by far.
    spec = get_format("tt").spec(WeightShape("linear", 64, 64), rank=1, out_modes=(8, 2, 4), in_modes=(8, 2, 4))
    spectra = [torch.ones(64), torch.tensor([1.0, *[1e-3] * 15])]
    path = rank_path(spec, spectra, growth=growth)
    for point in path:
        for r, i, j, s in point.spec.core_shapes:
            assert r <= i * j * s
            assert s <= i * j * r
    assert path[-1].spec.ranks == (1, 64, 16, 1)


def test_no_rank_is_bought_that_brings_nothing() -> None:
    fmt, weight = get_format("low_rank"), WeightShape("linear", 16, 20)
    dense = torch.randn(16, 3) @ torch.randn(3, 20)
    spec = fmt.spec(weight, rank=1)
    path = rank_path(spec, [torch.linalg.svdvals(dense).where(torch.arange(16) < 3, 0.0)], growth=0.0)
    assert [point.spec.ranks[1] for point in path] == [1, 2, 3]
    zero = rank_path(spec, fmt.spectra(torch.zeros(16, 20), spec))
    assert [(point.spec.ranks[1], point.rel_error) for point in zero] == [(1, 0.0)]


def test_even_ranks_grow_together_up_to_what_the_shape_allows() -> None:
    fmt, weight = get_format("tt"), WeightShape("linear", 64, 64)
    spec = fmt.spec(weight, rank=1, out_modes=(4, 4, 4), in_modes=(4, 4, 4))
    spectra = fmt.spectra(torch.randn(64, 64), spec)
    path = even_path(spec, spectra, growth=0.0)
    assert [point.spec.ranks for point in path] == [(1, r, r, 1) for r in range(1, 17)]
    assert path[-1].rel_error == pytest.approx(0.0, abs=1e-7)
    errors = [point.rel_error for point in path]
    assert errors == sorted(errors, reverse=True)
    assert even_path(spec, spectra, max_params=path[3].n_params, growth=0.0) == path[:4]
