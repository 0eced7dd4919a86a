"""Decompositions weighted by the inputs: identities, exact cases, and never worse than without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.errors import NonFiniteError, ShapeError
from tensortrain.formats import ChainFormat, Weighting, WeightShape, get_format, output_error
from tensortrain.formats.whitening import DAMPING, KroneckerNorm, kronecker_factors, root_and_inverse
from tensortrain.testing import rel_error

FORMATS = ("tt", "tt_naive", "tucker2", "low_rank", "tucker", "kronecker")


def samples(n: int, count: int = 400, spread: float = 2.0) -> Tensor:
    """Correlated inputs ``(n, count)`` whose directions differ in size by ``10**spread``."""
    return torch.randn(n, n) @ (torch.logspace(0, -spread, n)[:, None] * torch.randn(n, count))


def damped(gram: Tensor) -> Tensor:
    """The second moment whose root is used: a share of the mean diagonal is added."""
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))


def energy(matrix: Tensor, gram: Tensor) -> float:
    return float(((matrix @ gram) * matrix).sum())


# -- roots and Kronecker factors ----------------------------------------------------------------------


def test_root_is_the_root_of_the_damped_moment() -> None:
    x = samples(12)
    gram = x @ x.T
    root, inverse = root_and_inverse(gram)
    assert rel_error(root @ root, damped(gram)) <= 1e-12
    assert rel_error(root @ inverse, torch.eye(12)) <= 1e-9
    assert rel_error(root, root.T) <= 1e-13
    diagonal, undone = root_and_inverse(gram.diagonal())
    assert rel_error(diagonal**2, damped(torch.diag(gram.diagonal())).diagonal()) <= 1e-13
    assert rel_error(diagonal * undone, torch.ones(12)) <= 1e-13


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.zeros(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))])
def test_roots_of_singular_moments_are_finite(gram: Tensor) -> None:
    root, inverse = root_and_inverse(gram.double())
    assert torch.isfinite(root).all()
    assert torch.isfinite(inverse).all()


@pytest.mark.parametrize("modes", [(6,), (2, 3), (3, 1, 4), (2, 3, 2, 2)])
def test_kronecker_factors_of_a_kronecker_product(modes: tuple[int, ...]) -> None:
    grams = []
    for n in modes:
        x = samples(n, 3 * n)
        grams.append(x @ x.T)
    whole, whole_diagonal = torch.eye(1), torch.ones(1)
    for gram in grams:
        whole, whole_diagonal = torch.kron(whole, gram), torch.kron(whole_diagonal, gram.diagonal())
    found = torch.eye(1)
    for factor in kronecker_factors(whole, modes):
        found = torch.kron(found, factor)
    assert rel_error(found, whole) <= 1e-12
    found = torch.ones(1)
    for factor in kronecker_factors(whole_diagonal, modes):
        assert factor.ndim == 1
        found = torch.kron(found, factor)
    assert rel_error(found, whole_diagonal) <= 1e-12


def test_kronecker_factors_keep_the_trace() -> None:
    x = samples(12)
    gram = x @ x.T
    traces = [float(factor.trace()) for factor in kronecker_factors(gram, (2, 3, 2))]
    assert math.prod(traces) == pytest.approx(float(gram.trace()), rel=1e-12)


# -- low rank: exact ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_predicted_loss_is_the_measured_loss(kind: str, rank: int) -> None:
    # SVD-LLM, arXiv:2403.07378: dropping singular values of W S costs exactly the sum of their squares.
    x, dense = samples(24, spread=1.0), torch.randn(16, 24)
    gram = x @ x.T
    gram = gram if kind == "full" else gram.diagonal()
    fmt, weight = get_format("low_rank"), WeightShape("linear", 16, 24)
    found = fmt.factorize(dense, weight, rank=rank, gram=gram).value
    (values,) = fmt.spectra(dense, found.spec, weighting=Weighting(gram))
    norm = damped(gram if kind == "full" else torch.diag(gram))
    lost = energy(dense - found.to_dense(), norm)
    assert float(values[rank:].square().sum()) / float(values.square().sum()) == pytest.approx(
        lost / energy(dense, norm), rel=1e-8
    )


def test_undamped_loss_on_the_samples_themselves() -> None:
    # White inputs: damping scales every direction alike, and the loss is that of ||(W - W') X||^2.
    basis = torch.linalg.qr(torch.randn(300, 24))[0].T
    dense, rank = torch.randn(16, 24), 5
    fmt, weight = get_format("low_rank"), WeightShape("linear", 16, 24)
    found = fmt.factorize(dense, weight, rank=rank, gram=basis @ basis.T)
    lost = ((dense - found.value.to_dense()) @ basis).square().sum()
    values = torch.linalg.svdvals(dense @ basis)
    assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)


def test_best_among_all_of_that_rank() -> None:
    x, dense = samples(12), torch.randn(8, 12)
    gram = x @ x.T
    found = get_format("low_rank").factorize(dense, WeightShape("linear", 8, 12), rank=3, gram=gram).value
    best = energy(dense - found.to_dense(), damped(gram))
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            cores = [core + size * core.norm() * torch.randn_like(core) / core.numel() ** 0.5 for core in found.cores]
            other = get_format("low_rank").to_dense(cores, found.spec)
            assert energy(dense - other, damped(gram)) >= best


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_outputs_can_be_weighted_too(kind: str) -> None:
    x, g, dense, rank = samples(24, spread=1.0), samples(16, spread=1.0), torch.randn(16, 24), 5
    gram, output_gram = x @ x.T, g @ g.T
    if kind == "diagonal":
        output_gram = output_gram.diagonal()
    fmt, weight = get_format("low_rank"), WeightShape("linear", 16, 24)
    found = fmt.factorize(dense, weight, rank=rank, gram=gram, output_gram=output_gram)
    (values,) = fmt.spectra(dense, found.value.spec, weighting=Weighting(gram, output_gram))
    outer = root_and_inverse(output_gram)[0]
    outer = torch.diag(outer) if kind == "diagonal" else outer
    lost = energy(outer @ (dense - found.value.to_dense()), damped(gram)) / energy(outer @ dense, damped(gram))
    assert float(values[rank:].square().sum() / values.square().sum()) == pytest.approx(lost, rel=1e-8)


# -- Kronecker whitening of trains --------------------------------------------------------------------


def test_exact_for_inputs_that_are_kronecker_products() -> None:
    modes, outs = (3, 4), (2, 5)
    parts = [samples(n, 5 * n, 1.0) for n in modes]
    grams = [x @ x.T for x in parts]
    gram = torch.kron(*grams)
    fmt, weight = get_format("tt"), WeightShape("linear", 10, 12)
    dense, rank = torch.randn(10, 12), 4
    found = fmt.factorize(dense, weight, rank=rank, gram=gram, out_modes=outs, in_modes=modes).value
    # Two cores: the best train is the truncated SVD of the paired matrix in the damped norm of each mode.
    roots = [root_and_inverse(factor)[0] for factor in kronecker_factors(gram, modes)]
    norm = torch.kron(roots[0] @ roots[0], roots[1] @ roots[1])
    whitened = (dense @ torch.kron(*roots)).reshape(*outs, *modes).permute(0, 2, 1, 3).reshape(6, 20)
    values = torch.linalg.svdvals(whitened)
    assert energy(dense - found.to_dense(), norm) == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)
    (spectrum,) = fmt.spectra(dense, found.spec, weighting=Weighting(gram))
    assert rel_error(spectrum, values) <= 1e-7


CASES: dict[str, tuple[str, WeightShape]] = {
    "tt linear": ("tt", WeightShape("linear", 16, 24)),
    "tt conv": ("tt", WeightShape("conv", 9, 6, (3, 2))),
    "tt embedding": ("tt", WeightShape("embedding", 8, 23)),
    "tt_naive": ("tt_naive", WeightShape("conv", 9, 6, (3, 2))),
    "tucker2": ("tucker2", WeightShape("conv", 9, 6, (3, 2))),
    "low_rank linear": ("low_rank", WeightShape("linear", 16, 24)),
    "low_rank conv": ("low_rank", WeightShape("conv", 9, 6, (3, 2))),
    "low_rank embedding": ("low_rank", WeightShape("embedding", 8, 23)),
    "tucker linear": ("tucker", WeightShape("linear", 16, 24)),
    "tucker conv": ("tucker", WeightShape("conv", 9, 6, (3, 2))),
    "ring linear": ("ring", WeightShape("linear", 16, 24)),
    "block_term embedding": ("block_term", WeightShape("embedding", 8, 23)),
    "btt linear": ("btt", WeightShape("linear", 16, 24)),
    "btt conv": ("btt", WeightShape("conv", 9, 6, (3, 2))),
    "btt embedding": ("btt", WeightShape("embedding", 8, 23)),
    "kronecker linear": ("kronecker", WeightShape("linear", 16, 24)),
    "kronecker conv": ("kronecker", WeightShape("conv", 9, 6, (3, 2))),
    "tt_separate linear": ("tt_separate", WeightShape("linear", 16, 24)),
}
every_case = pytest.mark.parametrize("name", CASES)


def as_matrix(dense: Tensor, weight: WeightShape) -> Tensor:
    """Outputs by inputs, inputs as the caller's second moment orders them."""
    return dense.T if weight.kind == "embedding" else dense.flatten(1)


def n_inputs(weight: WeightShape) -> int:
    return weight.in_features if weight.kind == "embedding" else weight.fan_in


@every_case
@pytest.mark.parametrize("kind", ["full", "diagonal", "few samples"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_never_worse_than_the_plain_decomposition(rank: int, kind: str, name: str) -> None:
    format, weight = CASES[name]
    fmt, n = get_format(format), n_inputs(weight)
    for seed in range(5):
        torch.manual_seed(seed)
        x = samples(n, 5 if kind == "few samples" else 400)
        gram = (x @ x.T).diagonal() if kind == "diagonal" else x @ x.T
        dense = torch.randn(weight.dense_shape)
        plain = fmt.factorize(dense, weight, rank=rank).value
        weighted = fmt.factorize(dense, weight, rank=rank, gram=gram)
        matrix = as_matrix(dense, weight)
        errors = [
            output_error(as_matrix(found.to_dense(), weight) - matrix, matrix, gram)
            for found in (weighted.value, plain)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)
        assert weighted.rel_error_bound == pytest.approx(errors[0], rel=1e-9)


@every_case
def test_never_worse_with_weighted_outputs(name: str) -> None:
    format, weight = CASES[name]
    fmt, n = get_format(format), n_inputs(weight)
    x, g = samples(n), samples(weight.out_features)
    gram, output_gram = (x @ x.T).float(), (g @ g.T).float()  # as a calibration in float32 leaves them
    dense = torch.randn(weight.dense_shape)
    matrix = as_matrix(dense, weight)
    root = root_and_inverse(output_gram.double(), damping=0.0)[0]
    for rank in (1, 4):
        weighted = fmt.factorize(dense, weight, rank=rank, gram=gram, output_gram=output_gram)
        plain = fmt.factorize(dense, weight, rank=rank)
        rebuilt = [as_matrix(found.value.to_dense(), weight) for found in (weighted, plain)]
        errors = [output_error(root @ (one - matrix), root @ matrix, gram.double()) for one in rebuilt]
        assert errors[0] <= errors[1] * (1 + 1e-6)
        assert weighted.rel_error_bound == pytest.approx(errors[0], rel=1e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.3, 0.05, 1e-3])
def test_the_tolerance_is_kept_in_the_norm_of_the_inputs(eps: float, dtype: torch.dtype, name: str) -> None:
    format, weight = CASES[name]
    fmt, n = get_format(format), n_inputs(weight)
    for seed in range(4):
        torch.manual_seed(seed)
        x = samples(n)
        dense = torch.randn(weight.dense_shape).to(dtype)
        found = fmt.factorize(dense, weight, eps=eps, gram=x @ x.T)
        matrix = as_matrix(dense, weight).double()
        rebuilt = fmt.to_dense([core.double() for core in found.value.cores], found.value.spec)
        error = float(((as_matrix(rebuilt, weight) - matrix) @ x).norm() / (matrix @ x).norm())
        assert error <= found.rel_error_bound * (1 + 1e-9) + 1e-13
        assert found.rel_error_bound <= eps


def test_few_directions_need_few_ranks() -> None:
    fmt, weight = get_format("low_rank"), WeightShape("linear", 16, 24)
    x = torch.randn(24, 2) @ torch.randn(2, 300) + 1e-3 * torch.randn(24, 300)
    dense = torch.randn(weight.dense_shape)
    assert fmt.factorize(dense, weight, eps=0.1, gram=x @ x.T).value.spec.ranks[1] <= 6  # two, but for damping
    assert fmt.factorize(dense, weight, eps=0.1).value.spec.ranks[1] > 12


@every_case
@pytest.mark.parametrize("with_outputs", [False, True])
def test_a_probe_tells_about_the_error_that_is_reached(
    with_outputs: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, weight = CASES[name]
    monkeypatch.setattr(ChainFormat, "refine_flops", 0.0)  # what least squares gains a probe leaves out
    fmt, n = get_format(format), n_inputs(weight)
    x, g = samples(n, spread=1.0), samples(weight.out_features, spread=1.0)
    output_gram = g @ g.T if with_outputs else None
    dense = torch.randn(weight.dense_shape)
    for rank in (2, 5):
        found = fmt.factorize(dense, weight, rank=rank, gram=x @ x.T, output_gram=output_gram)
        probed = fmt.probe(dense, found.value.spec, Weighting(x @ x.T, output_gram))
        assert probed == pytest.approx(found.rel_error_bound, rel=0.4)  # an estimate from a few random outputs


@every_case
def test_exact_stays_exact(name: str) -> None:
    format, weight = CASES[name]
    x, dense = samples(n_inputs(weight), spread=1.0), torch.randn(weight.dense_shape)
    found = get_format(format).factorize(dense, weight, gram=x @ x.T).value
    assert rel_error(found.to_dense(), dense) <= 1e-11


@every_case
def test_inputs_that_never_came_weigh_nothing(name: str) -> None:
    format, weight = CASES[name]
    n = n_inputs(weight)
    dense = torch.randn(weight.dense_shape)
    found = get_format(format).factorize(dense, weight, rank=2, gram=torch.zeros(n, n))
    assert torch.isfinite(found.value.to_dense()).all()
    assert found.rel_error_bound == 0


# -- convolutions: patches as F.unfold orders them ----------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": (1, 2)}], ids=str)
def test_the_error_is_that_of_the_layer_on_its_images(options: dict[str, Any], format: str) -> None:
    weight = WeightShape("conv", 8, 6, (3, 2))
    images = torch.randn(5, 6, 9, 9) * torch.logspace(0, -2, 6)[:, None, None]
    images = images.cumsum(dim=3)  # neighbours are alike, so positions in a patch are not interchangeable
    patches = F.unfold(images, (3, 2), **{"dilation": 1, "stride": 1, "padding": 0, **options})
    patches = patches.transpose(0, 1).flatten(1)
    gram = patches @ patches.T
    dense = torch.randn(weight.dense_shape)
    found = get_format(format).factorize(dense, weight, rank=3, gram=gram)
    exact = F.conv2d(images, dense, **options)
    lost = F.conv2d(images, found.value.to_dense() - dense, **options)
    assert found.rel_error_bound == pytest.approx(float(lost.norm() / exact.norm()), rel=1e-9)
    # With channels and positions mixed up, weighting would hardly help.
    plain = get_format(format).factorize(dense, weight, rank=3).value
    assert lost.norm() < 0.8 * F.conv2d(images, plain.to_dense() - dense, **options).norm()


def test_low_rank_of_a_kernel_is_the_best_for_its_patches() -> None:
    weight = WeightShape("conv", 8, 6, (3, 2))
    images = torch.randn(5, 6, 9, 9).cumsum(dim=3)
    patches = F.unfold(images, (3, 2)).transpose(0, 1).flatten(1)
    gram, dense = patches @ patches.T, torch.randn(weight.dense_shape)
    fmt = get_format("low_rank")
    found = fmt.factorize(dense, weight, rank=3, gram=gram).value
    (values,) = fmt.spectra(dense, found.spec, weighting=Weighting(gram))
    lost = energy((dense - found.to_dense()).flatten(1), damped(gram)) / energy(dense.flatten(1), damped(gram))
    assert float(values[3:].square().sum() / values.square().sum()) == pytest.approx(lost, rel=1e-8)


def test_groups_are_decomposed_without_the_second_moment() -> None:
    weight = WeightShape("conv", 8, 3, (3,), groups=2)
    dense = torch.randn(weight.dense_shape)
    fmt = get_format("low_rank")
    with_moment = fmt.factorize(dense, weight, rank=2, gram=torch.diag(torch.logspace(0, -3, 9))).value
    assert torch.equal(with_moment.to_dense(), fmt.factorize(dense, weight, rank=2).value.to_dense())


# -- what is refused ----------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(5,), (5, 5), (24, 16), (2, 24, 24)])
def test_a_moment_of_another_size_is_refused(shape: tuple[int, ...], name: str) -> None:
    format, weight = CASES[name]
    with pytest.raises(ShapeError, match=f"N = {n_inputs(weight)}"):
        get_format(format).factorize(torch.randn(weight.dense_shape), weight, rank=2, gram=torch.ones(shape))


@every_case
def test_a_moment_with_nan_is_refused(name: str) -> None:
    format, weight = CASES[name]
    gram = torch.eye(n_inputs(weight)).index_fill(0, torch.tensor(1), float("inf"))
    with pytest.raises(NonFiniteError, match="second moment"):
        get_format(format).factorize(torch.randn(weight.dense_shape), weight, rank=2, gram=gram)


@pytest.mark.parametrize("n_seen", [1, 3, 400])
def test_a_sketch_tells_errors_to_some_per_cent_where_few_samples_weigh_the_outputs(
    n_seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments of fewer gradients than outputs are singular, and in float32 a little worse than that."""
    x, g = samples(40).double(), torch.randn(300, n_seen).float()
    moment, matrix = (g @ g.T).double(), torch.randn(300, 40)
    moment = moment - 1e-6 * moment.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    monkeypatch.setattr("tensortrain.formats.whitening.root_and_inverse", None)  # a triangle has to do
    weighting = Weighting(x @ x.T / 400, moment)
    norm = KroneckerNorm.of(weighting, WeightShape("linear", 300, 40), (300,), (40,))
    difference = matrix * torch.rand(300, 40)
    assert norm.sketched_error(difference, matrix) == pytest.approx(norm.error(difference, matrix), rel=0.35)
    norm.sketched_error(0.5 * difference, matrix)
    assert sum(key == ("sketch", 300) for key in norm.weighting._derived) == 1
