"""Second moments as one value: checks, order, norms; and a spec that goes to a layer whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import DTypeError, KindError, NonFiniteError, ShapeError
from tensortrain.formats import PLAIN, Fit, Weighting, WeightShape, energy, get_format, output_error
from tensortrain.testing import rel_error

LINEAR = WeightShape("linear", 6, 8)
CONV = WeightShape("conv", 4, 3, (3, 2))


def moment(n: int) -> torch.Tensor:
    x = torch.randn(n, 4 * n)
    return x @ x.T


def test_outputs_are_weighed_only_beside_inputs() -> None:
    difference, matrix = torch.randn(6, 8), torch.randn(6, 8)
    assert PLAIN.is_plain
    assert Weighting(outputs=moment(6)).is_plain
    plain = float(difference.norm() / matrix.norm())
    for weighting in (PLAIN, Weighting(outputs=moment(6))):
        assert weighting.rel_error(difference, matrix) == pytest.approx(plain, rel=1e-14)
        assert weighting.energy(matrix) == pytest.approx(float(matrix.square().sum()), rel=1e-14)
        assert weighting.checked(LINEAR).is_plain


@pytest.mark.parametrize("diagonal", [False, True])
def test_energy_is_the_mean_square_of_the_outputs(diagonal: bool) -> None:
    h, f, w = moment(8), moment(6), torch.randn(6, 8)
    h, f = (h.diagonal(), f.diagonal()) if diagonal else (h, f)
    full_h, full_f = (torch.diag(h), torch.diag(f)) if diagonal else (h, f)
    exact = float((full_f @ w @ full_h @ w.T).trace())
    assert Weighting(h, f).energy(w) == energy(w, h, f) == pytest.approx(exact, rel=1e-13)
    assert Weighting(h, f).rel_error(0.3 * w, w) == output_error(0.3 * w, w, h, f) == pytest.approx(0.3, rel=1e-13)


def test_moments_follow_the_order_and_the_padding_of_the_matrix() -> None:
    """The error of a kernel is the same whether its patches are ordered by channel or by position."""
    h, f, kernel = moment(18), moment(4), torch.randn(CONV.dense_shape)
    by_position = kernel.permute(0, 2, 3, 1).flatten(1)
    ordered = Weighting(h, f).of_matrix(CONV, 4, 18)
    assert ordered.energy(by_position) == pytest.approx(Weighting(h, f).energy(kernel.flatten(1)), rel=1e-13)
    padded = Weighting(moment(8), moment(6)).of_matrix(LINEAR, 9, 10)
    assert padded.inputs is not None
    assert padded.outputs is not None
    assert padded.inputs.shape == (10, 10)
    assert padded.outputs.shape == (9, 9)
    assert not padded.inputs[8:].any()


@pytest.mark.parametrize(
    ("weighting", "error", "words"),
    [
        (Weighting(torch.eye(7)), ShapeError, "input second moment.*N = 8"),
        (Weighting(torch.eye(8), torch.eye(5)), ShapeError, "output second moment.*N = 6"),
        (Weighting(torch.full((8,), torch.nan)), NonFiniteError, "input second moment"),
        (Weighting(torch.eye(8), torch.full((6,), torch.inf)), NonFiniteError, "output second moment"),
    ],
)
def test_moments_that_do_not_fit(weighting: Weighting, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        weighting.checked(LINEAR)


def test_complex_weights_are_not_weighed() -> None:
    spec = get_format("tt").spec(LINEAR, rank=2)
    with pytest.raises(DTypeError, match="second moment"):
        get_format("tt").fit(torch.randn(6, 8, dtype=torch.complex128), spec, weighting=Weighting(torch.eye(8)))


@pytest.mark.parametrize("format", ["tt", "low_rank", "tucker", "btt"])
def test_a_spec_goes_through_whole(format: str) -> None:
    """The fit of a spec is what the same words ask for, and a layer takes it over."""
    dense = nn.Linear(12, 20)
    fmt, shape = get_format(format), WeightShape("linear", 20, 12)
    spec = fmt.spec(shape, rank=2)
    found = fmt.fit(dense.weight.detach(), spec, weighting=Weighting(moment(12), moment(20)))
    assert isinstance(found, Fit)
    assert found.spec == spec
    assert found.ranks == spec.ranks
    plain = fmt.fit(dense.weight.detach(), spec)
    assert plain.rel_error == fmt.factorize(dense.weight.detach(), shape, rank=2).rel_error_bound
    layer = tt.nn.Linear.from_spec(dense, spec)
    by_words = tt.nn.Linear.from_dense(dense, format=format, rank=2)
    assert layer.spec == by_words.spec == spec
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, by_words.cores, strict=True))
    assert layer.config()["rank"] == list(spec.ranks)


def test_the_ranks_of_a_spec_are_caps() -> None:
    dense = nn.Conv2d(8, 8, 3)
    spec = get_format("tt").spec(WeightShape("conv", 8, 8, (3, 3)), rank="full")
    exact = tt.nn.Conv2d.from_spec(dense, spec)
    close = tt.nn.Conv2d.from_spec(dense, spec, eps=0.4)
    assert rel_error(exact.weight, dense.weight) <= 1e-12
    assert rel_error(close.weight, dense.weight) <= 0.4
    assert close.spec.n_params < exact.spec.n_params


def test_a_layer_of_another_kind_is_refused() -> None:
    spec = get_format("tt").spec(LINEAR, rank=2)
    with pytest.raises(KindError, match="from_dense takes"):
        tt.nn.Linear.from_spec(nn.Conv2d(3, 3, 3), spec)


def test_products_with_the_moment_follow_the_weight() -> None:
    weighting = Weighting(torch.eye(3).double() * 2)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    view = weight.detach().flatten(1)
    torch.testing.assert_close(weighting.times_inputs(view), 2 * weight.detach().double())
    assert weighting.energy_of_weight(view) == pytest.approx(weighting.energy(view))
    with torch.no_grad():
        weight.add_(1.0)
    torch.testing.assert_close(weighting.times_inputs(weight.detach().flatten(1)), 2 * weight.detach().double())
    other = torch.randn(4, 3)
    torch.testing.assert_close(weighting.times_inputs(other), 2 * other.double())
    with torch.inference_mode():
        made = torch.randn(4, 3)
        torch.testing.assert_close(weighting.times_inputs(made), 2 * made.double())


def test_moments_on_the_device_of_the_weight_stay_the_same_object() -> None:
    weighting = Weighting(torch.eye(3).double(), torch.eye(4).double())
    assert weighting.beside(torch.randn(4, 3)) is weighting
    assert weighting.checked(WeightShape("linear", 4, 3)) is weighting


def test_a_nearly_exact_low_rank_fit_tells_its_error() -> None:
    x, weight = torch.randn(700, 600), torch.randn(20, 3) @ torch.randn(3, 600)
    weight = weight + 1e-6 * torch.randn_like(weight)
    weighting = Weighting((x.T @ x / 700).double())
    shape = WeightShape("linear", 20, 600)
    spec = get_format("low_rank").spec(shape, rank=3)
    found = get_format("low_rank").fit(weight, spec, weighting=weighting)
    kept = get_format("low_rank").to_dense([core.double() for core in found.cores], found.spec)
    exact = weighting.rel_error(weight.double() - kept, weight.double())
    assert found.rel_error == pytest.approx(exact, rel=0.01)
