"""Weighted low rank without roots, against the roots; and what is looked at once for many formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensortrain.formats import PLAIN, ChainFormat, FactorSpec, Weighting, WeightShape, get_format
from tensortrain.formats.chain import _rough_spectra
from tensortrain.formats.weighted_rank import WeightedMatrix
from tensortrain.formats.whitening import kronecker_factors, root_and_inverse
from tensortrain.tensor import unfolding_spectra
from tensortrain.testing import rel_error

WEIGHTS = {
    "wide": WeightShape("linear", 14, 33),
    "tall": WeightShape("linear", 37, 12),
    "wide kernel": WeightShape("conv", 7, 5, (3, 2)),
    "tall kernel": WeightShape("conv", 41, 3, (2, 2)),
    "signal": WeightShape("conv", 9, 4, (5,)),
    "table": WeightShape("embedding", 6, 29),
    "square table": WeightShape("embedding", 11, 11),
}


def moment(n: int, rows: int) -> Tensor:
    x = torch.randn(rows, n) * torch.rand(n)
    return x.T @ x / rows


def weightings(weight: WeightShape) -> list[Weighting]:
    n, m = weight.fan_in, weight.out_features
    return [
        Weighting(moment(n, 3)),
        Weighting(moment(n, 2 * n), moment(m, 2)),
        Weighting(torch.rand(n), torch.rand(m)),
        Weighting(moment(n, n), torch.rand(m)),
        Weighting(moment(n, n) - 0.5 * torch.eye(n) * float(moment(n, n).diagonal().mean())),  # rounded to indefinite
    ]


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_it_is_the_truncation_between_roots(name: str) -> None:
    weight, fmt = WEIGHTS[name], get_format("low_rank")
    dense, spec = torch.randn(weight.dense_shape), fmt.spec(weight, rank=3)
    for weighting in weightings(weight)[:4]:
        found = fmt.fit(dense, spec, weighting=weighting)
        by_roots = ChainFormat.factorize_group(fmt, dense, spec, eps=None, weighting=weighting)  # type: ignore[arg-type]
        assert rel_error(found.to_dense(), by_roots.to_dense()) <= 1e-9
        assert found.rel_error == pytest.approx(by_roots.rel_error, rel=1e-10)
        assert found.spec.ranks == by_roots.spec.ranks
        values = fmt.spectra(dense, spec, weighting=weighting)[0]
        expected = ChainFormat.spectra(fmt, dense, spec, weighting=weighting)[0]  # type: ignore[arg-type]
        assert rel_error(values / values.norm(), expected / expected.norm()) <= 1e-7


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_a_moment_that_is_not_positive_is_taken_by_its_root(name: str) -> None:
    weight = WEIGHTS[name]
    dense = torch.randn(weight.dense_shape)
    for weighting in (weightings(weight)[4], Weighting(torch.eye(weight.fan_in), -torch.eye(weight.out_features))):
        outputs, inputs = WeightedMatrix.of(dense, weight, weighting).truncated(4)
        assert torch.isfinite(outputs @ inputs).all()


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_what_one_rank_found_serves_another_and_a_copy_of_the_weight(name: str, monkeypatch) -> None:
    weight, fmt = WEIGHTS[name], get_format("low_rank")
    one, three, grams = fmt.spec(weight, rank=1), fmt.spec(weight, rank=3), []
    find = WeightedMatrix._gram
    monkeypatch.setattr(WeightedMatrix, "_gram", lambda self: grams.append(1) or find(self))
    for given in weightings(weight)[:4]:
        dense, weighting = torch.randn(weight.dense_shape), given.checked(weight)
        values = fmt.spectra(dense, one, weighting=weighting)[0]
        wanted = [fmt.fit(dense, spec, weighting=weighting) for spec in (one, three)]
        weighting.keep_directions()
        grams.clear()
        kept = fmt.spectra(dense, one, weighting=weighting)[0]
        weighting.forget_shapes()
        found = [fmt.fit(some, spec, weighting=weighting) for some, spec in ((dense, one), (dense.clone(), three))]
        assert len(grams) == 1
        dense.mul_(2)  # it is another one now
        assert float(fmt.spectra(dense, one, weighting=weighting)[0][0]) == pytest.approx(2 * float(kept[0]))
        assert len(grams) == 2
        assert rel_error(kept, values) <= 1e-7
        for some, other in zip(found, wanted, strict=True):
            assert rel_error(some.to_dense(), other.to_dense()) <= 1e-9
            assert some.rel_error == pytest.approx(other.rel_error, rel=1e-10)


def test_nothing_is_kept_where_nothing_is_weighed() -> None:
    PLAIN.keep_directions()
    assert not PLAIN.keeps_directions
    assert [PLAIN.found_of(torch.ones(2), "a", lambda n=n: n) for n in (1, 2)] == [1, 2]


def test_full_rank_is_exact_and_zero_stays_zero() -> None:
    weight, fmt = WEIGHTS["wide"], get_format("low_rank")
    weighting = weightings(weight)[1]
    dense = torch.randn(weight.dense_shape)
    assert rel_error(fmt.fit(dense, fmt.spec(weight, rank=14), weighting=weighting).to_dense(), dense) <= 1e-10
    zero = fmt.fit(torch.zeros_like(dense), fmt.spec(weight, rank=2), weighting=weighting)
    assert zero.rel_error == 0
    assert not zero.to_dense().any()


@pytest.mark.parametrize("shape", [(20, 700), (700, 600)])
def test_large_float32_weights_keep_six_digits(shape: tuple[int, int]) -> None:
    weight, fmt = WeightShape("linear", *shape), get_format("low_rank")
    dense, weighting = torch.randn(shape), Weighting(moment(shape[1], 800), moment(shape[0], 40))
    spec = fmt.spec(weight, rank=10)
    exact, found = fmt.fit(dense, spec, weighting=weighting), fmt.fit(dense.float(), spec, weighting=weighting)
    assert found.rel_error == pytest.approx(exact.rel_error, rel=1e-5)
    change = (found.to_dense().double() - dense, exact.to_dense() - dense)
    assert weighting.rel_error(change[0], dense) == pytest.approx(weighting.rel_error(change[1], dense), rel=1e-5)


@pytest.mark.parametrize("modes", [((32, 40), (25, 30)), ((1, 1280), (30, 25)), ((8, 1, 160), (25, 2, 15))])
def test_spectra_of_large_float32_weights_are_those_of_float64_where_they_count(modes) -> None:
    outs, ins = modes
    fmt, weight = get_format("tt"), WeightShape("linear", 1280, 750)
    dense, spec = torch.randn(1280, 750), fmt.spec(weight, rank=2, out_modes=outs, in_modes=ins)
    for rough, fine in zip(fmt.spectra(dense.float(), spec), fmt.spectra(dense, spec), strict=True):
        assert rough.dtype == torch.float64
        assert rel_error(rough, fine) <= 1e-5


def test_rough_spectra_take_any_scale() -> None:
    x = torch.randn(6, 1, 7, 5)
    for scale in (1e-30, 1.0, 1e30):
        for rough, fine in zip(_rough_spectra((x * scale).float()), unfolding_spectra(x * scale), strict=True):
            assert rel_error(rough / scale, fine / scale) <= 1e-5
    assert not torch.cat(_rough_spectra(torch.zeros(3, 4, 2))).any()


@pytest.mark.parametrize("name", ["tt", "low_rank", "tt_naive", "tt_separate", "tucker2", "kronecker", "cp", "tucker"])
def test_parameters_are_counted_as_they_are_stored(name: str) -> None:
    fmt = get_format(name)
    for weight in (
        WeightShape("linear", 24, 36),
        WeightShape("conv", 12, 8, (3, 3)),
        WeightShape("conv", 12, 4, (3, 3), groups=3),
        WeightShape("conv", 12, 8, (1, 1)),
        WeightShape("embedding", 12, 50),
    ):
        if weight.kind not in fmt.kinds:
            continue
        spec = fmt.spec(weight, rank=1)
        count, n_ranks = fmt.param_counter(spec), len(fmt.inner_ranks(spec))
        for inner in ([1] * n_ranks, [k + 2 for k in range(n_ranks)], [5 - k % 3 for k in range(n_ranks)]):
            counted: FactorSpec = fmt.with_inner(spec, inner)
            assert count(inner) == counted.n_params


@pytest.mark.parametrize("diagonal", [False, True])
def test_partial_traces_of_patches_need_no_order(diagonal: bool) -> None:
    weight, modes = WeightShape("conv", 6, 12, (3, 2)), (6, 3, 4)
    gram = moment(weight.fan_in, 100)
    gram = gram.diagonal().clone() if diagonal else gram
    spec = get_format("tt").spec(weight, rank=2, out_modes=(2, 3), in_modes=(3, 4))
    norm = get_format("tt")._norm(spec, Weighting(gram))  # type: ignore[attr-defined]
    ordered = Weighting(gram).of_matrix(weight, 6, weight.fan_in).inputs
    assert ordered is not None
    for (root, inverse), factor in zip(norm.in_roots, kronecker_factors(ordered, modes), strict=True):
        expected, _ = root_and_inverse(factor)
        square = root.square() if diagonal else root @ root.T
        assert rel_error(square, expected.square() if diagonal else expected @ expected) <= 1e-12
        one = root * inverse if diagonal else root @ inverse
        assert rel_error(one, torch.ones_like(one) if diagonal else torch.eye(len(one))) <= 1e-12


def test_moments_are_checked_and_ordered_once() -> None:
    weight = WeightShape("conv", 6, 4, (3, 3))
    weighting = Weighting(moment(36, 50).float(), moment(6, 10))
    checked = weighting.checked(weight)
    assert weighting.checked(weight) is checked
    assert checked.checked(weight) is checked
    assert checked.inputs is not None
    assert checked.inputs.dtype == torch.float64
    assert weighting.of_matrix(weight, 6, 36) is weighting.of_matrix(weight, 6, 36)
    assert weighting.of_channels(weight)[0] is weighting.of_channels(weight)[0]


def test_a_probe_of_tucker2_is_near_the_fit() -> None:
    weight, fmt = WeightShape("conv", 24, 20, (3, 3)), get_format("tucker2")
    falling = torch.arange(1, 25.0) ** -1
    dense = (torch.linalg.qr(torch.randn(24, 24))[0] * falling) @ torch.randn(24, 180)
    dense = dense.reshape(weight.dense_shape)
    for weighting in (Weighting(moment(180, 400), moment(24, 60)), Weighting(torch.rand(180), torch.rand(24))):
        for rank in ((4, 5), (12, 12)):
            spec = fmt.spec(weight, rank=rank)
            fitted = fmt.fit(dense, spec, weighting=weighting).rel_error
            assert 0.9 * fitted <= fmt.probe(dense, spec, weighting) <= 1.35 * fitted


@pytest.mark.parametrize("shape", [(30, 50), (70, 40)])
@pytest.mark.parametrize("weighs_outputs", [False, True])
def test_inputs_of_few_directions_need_no_more_ranks(shape: tuple[int, int], weighs_outputs: bool) -> None:
    """Exact at their number, wide and tall; where something is to come elsewhere, all directions count."""
    torch.manual_seed(0)
    m, n = shape
    weight, basis = torch.randn(m, n, dtype=torch.float64), torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64)).Q.T
    x = torch.randn(200, 6, dtype=torch.float64) @ basis
    x[:, :] += 0.1 * basis[0]
    outputs = torch.cov(torch.randn(m, 3 * m, dtype=torch.float64)) if weighs_outputs else None
    linear = WeightShape("linear", m, n)
    few = WeightedMatrix.of(weight, linear, Weighting(x.T @ x / 200, outputs, basis=basis))
    assert bool((few.singular_values()[6:] == 0).all())
    assert float(few.singular_values()[5]) > 0
    a, b = few.truncated(6)
    torch.testing.assert_close(x @ (a @ b).T, x @ weight.T, rtol=1e-6, atol=1e-6)
    assert few.rel_error(a, b) < 1e-6
    more = WeightedMatrix.of(weight, linear, Weighting(x.T @ x / 200, outputs, basis=basis, outside=1e-3))
    assert bool((more.singular_values() > 0).all())
    least = min(m, n)
    usual = WeightedMatrix.of(weight, linear, Weighting(x.T @ x / 200, outputs)).singular_values()
    assert bool((more.singular_values()[6:least] < usual[6:least]).all())


def test_a_direction_that_was_not_met_but_can_come_is_kept_at_full_rank() -> None:
    """One of the six has no weight in the moment: damping inside of the basis keeps it exact all the same."""
    torch.manual_seed(1)
    weight, basis = torch.randn(20, 32, dtype=torch.float64), torch.linalg.qr(torch.randn(32, 6).double()).Q.T
    x = torch.randn(100, 5, dtype=torch.float64) @ basis[:5]
    matrix = WeightedMatrix.of(weight, WeightShape("linear", 20, 32), Weighting(x.T @ x / 100, basis=basis))
    a, b = matrix.truncated(6)
    torch.testing.assert_close(basis @ (a @ b).T, basis @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["wide", "tall", "wide kernel", "table"])
def test_matrices_of_asked_errors_are_the_truncations_of_their_ranks(name: str) -> None:
    weight = WEIGHTS[name]
    dense = torch.randn(weight.dense_shape)
    for weighting in weightings(weight)[1:4]:
        matrix = WeightedMatrix.of(dense, weight, weighting)
        found = matrix.at_errors((0.2, 0.5, 0.51))
        errors = [matrix.rel_error(*pair) for pair in found]
        assert errors == sorted(errors, reverse=True)
        assert len({len(inputs) for _, inputs in found}) == len(found)  # of ranks that come out alike one
        for outputs, inputs in found:
            wanted = matrix.truncated(len(inputs))
            assert rel_error(outputs @ inputs, wanted[0] @ wanted[1]) <= 1e-9
    assert WeightedMatrix.of(torch.zeros_like(dense), weight, weighting).at_errors((0.2,)) is not None
    assert WeightedMatrix.of(dense, weight, weighting).at_errors((0.0,)) == []
