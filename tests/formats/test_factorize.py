"""Dense to cores: exact when asked, within the tolerance promised, best at given ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tensortrain.contract import chain_to_dense
from tensortrain.errors import TTError
from tensortrain.formats import Factorization, Format, WeightShape, balance_chain, get_format
from tensortrain.testing import FormatSuite, rel_error, wide
from tensortrain.testing.formats import WEIGHTS

CASES = {
    "tt linear": ("tt", WeightShape("linear", 24, 30)),
    "tt conv": ("tt", WeightShape("conv", 12, 8, (3, 3))),
    "tt 1x1 conv": ("tt", WeightShape("conv", 12, 8, (1, 1))),
    "tt embedding": ("tt", WeightShape("embedding", 12, 53)),
    "tt groups": ("tt", WeightShape("conv", 12, 8, (3, 3), groups=3)),
    "tt_naive": ("tt_naive", WeightShape("conv", 12, 8, (3, 2))),
    "tt_naive groups": ("tt_naive", WeightShape("conv", 12, 8, (3,), groups=2)),
    "tucker2": ("tucker2", WeightShape("conv", 12, 8, (3, 3))),
    "tucker2 1x1": ("tucker2", WeightShape("conv", 12, 8, (1,))),
    "tucker2 groups": ("tucker2", WeightShape("conv", 12, 8, (3, 3, 2), groups=2)),
    "low_rank linear": ("low_rank", WeightShape("linear", 24, 30)),
    "low_rank conv": ("low_rank", WeightShape("conv", 12, 8, (3, 3))),
    "low_rank embedding": ("low_rank", WeightShape("embedding", 12, 53)),
    "low_rank groups": ("low_rank", WeightShape("conv", 12, 8, (3, 3), groups=3)),
    "tucker linear": ("tucker", WeightShape("linear", 24, 30)),
    "tucker conv": ("tucker", WeightShape("conv", 12, 8, (3, 3))),
    "tucker embedding": ("tucker", WeightShape("embedding", 12, 53)),
    "tucker groups": ("tucker", WeightShape("conv", 12, 8, (3,), groups=2)),
    "ring linear": ("ring", WeightShape("linear", 24, 30)),
    "ring conv": ("ring", WeightShape("conv", 12, 8, (3, 3))),
    "ring embedding": ("ring", WeightShape("embedding", 12, 53)),
    "ring groups": ("ring", WeightShape("conv", 12, 8, (1, 3), groups=3)),
    "block_term linear": ("block_term", WeightShape("linear", 24, 30)),
    "block_term conv": ("block_term", WeightShape("conv", 12, 8, (3, 3))),
    "block_term groups": ("block_term", WeightShape("conv", 12, 8, (3,), groups=2)),
    "btt linear": ("btt", WeightShape("linear", 24, 30)),
    "btt conv": ("btt", WeightShape("conv", 12, 8, (3, 3))),
    "btt embedding": ("btt", WeightShape("embedding", 12, 53)),
    "btt groups": ("btt", WeightShape("conv", 12, 8, (3, 3), groups=3)),
    "kronecker linear": ("kronecker", WeightShape("linear", 24, 30)),
    "kronecker conv": ("kronecker", WeightShape("conv", 12, 8, (3, 3))),
    "kronecker embedding": ("kronecker", WeightShape("embedding", 12, 53)),
    "kronecker groups": ("kronecker", WeightShape("conv", 12, 8, (3, 3), groups=3)),
    "tt_separate linear": ("tt_separate", WeightShape("linear", 24, 30)),
    "tt_separate conv": ("tt_separate", WeightShape("conv", 12, 8, (3, 3))),
    "tt_separate embedding": ("tt_separate", WeightShape("embedding", 12, 53)),
    "tt_separate groups": ("tt_separate", WeightShape("conv", 12, 8, (3, 3), groups=3)),
    "block_term embedding": ("block_term", WeightShape("embedding", 6, 11)),
    # Small: every rank up to the largest is tried, by alternating least squares.
    "cp linear": ("cp", WeightShape("linear", 4, 6)),
    "cp conv": ("cp", WeightShape("conv", 2, 3, (3,))),
}


class TestFormats(FormatSuite):
    @pytest.fixture(autouse=True, params=CASES)
    def _set_case(self, request: pytest.FixtureRequest) -> None:
        self.name, self.weight = CASES[request.param]
        self.recovers_ranks = self.name not in ("ring", "block_term")

    def make(self) -> tuple[Format, WeightShape]:
        return get_format(self.name), self.weight


def decaying(shape: tuple[int, ...]) -> Tensor:
    return WEIGHTS["decaying"](shape).to(torch.get_default_dtype())


def measured(found: Factorization, dense: Tensor) -> float:
    return rel_error(get_format(found.spec.format).to_dense([wide(core) for core in found.cores], found.spec), dense)


@pytest.mark.parametrize("format", ["tt", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_holds_for_the_smallest_weights(dtype: torch.dtype, format: str) -> None:
    # Few entries round at random: a bound that is met on average only would fail here.
    for shape in ((1, 1), (2, 3), (4, 4), (1, 5), (6, 2)):
        weight = WeightShape("linear", *shape)
        for _ in range(60):
            dense = torch.randn(shape).to(dtype)
            found = get_format(format).factorize(dense, weight)
            assert measured(found.value, dense) <= found.rel_error_bound


def test_one_group_of_zeros() -> None:
    weight = WeightShape("conv", 12, 8, (3, 3), groups=2)
    dense = torch.cat([torch.zeros(6, 8, 3, 3), torch.randn(6, 8, 3, 3)])
    for format in ("tt", "tt_naive", "tucker2", "low_rank"):
        found = get_format(format).factorize(dense, weight, eps=0.3)
        assert measured(found.value, dense) <= found.rel_error_bound <= 0.3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("format", ["tt", "low_rank"])
def test_complex(format: str, dtype: torch.dtype) -> None:
    weight = WeightShape("linear", 24, 30)
    dense = torch.randn(24, 30, dtype=dtype)
    for eps in (None, 0.3):
        found = get_format(format).factorize(dense, weight, eps=eps)
        assert all(core.dtype == dtype for core in found.value.cores)
        assert measured(found.value, dense) <= found.rel_error_bound <= (eps or 1e-5)


def test_a_kernel_that_is_complex_is_refused_by_tucker2() -> None:
    weight = WeightShape("conv", 4, 4, (3,))
    with pytest.raises(TTError, match="complex"):
        get_format("tucker2").factorize(torch.randn(4, 4, 3, dtype=torch.complex128), weight, rank=2)


# -- at given ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["low_rank linear", "low_rank conv", "low_rank embedding"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_low_rank_is_the_truncated_svd(rank: int, name: str) -> None:
    format, weight = CASES[name]
    dense = decaying(weight.dense_shape)
    found = get_format(format).factorize(dense, weight, rank=rank)
    values = torch.linalg.svdvals(dense if weight.kind == "embedding" else dense.flatten(1))
    best = float(values[rank:].norm() / values.norm())
    assert found.value.spec.ranks == (1, rank, 1)
    assert measured(found.value, dense) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_train_is_within_the_quasi_optimal_factor(rank: int) -> None:
    format, weight = CASES["tt linear"]
    dense = decaying(weight.dense_shape)
    options: dict[str, Any] = {"out_modes": (2, 3, 4), "in_modes": (5, 3, 2)}
    fmt = get_format(format)
    found = fmt.factorize(dense, weight, rank=rank, **options)
    tails = [float(s[rank:].norm()) for s in fmt.spectra(dense, found.value.spec)]
    error = measured(found.value, dense) * float(dense.norm())
    assert max(tails) * (1 - 1e-9) <= error <= math.hypot(*tails) * (1 + 1e-9)


def test_tucker2_recovers_its_own_ranks() -> None:
    fmt, weight = get_format("tucker2"), WeightShape("conv", 12, 8, (3, 3))
    spec = fmt.spec(weight, rank=(3, 5))
    dense = fmt.to_dense([torch.randn(shape) for shape in spec.core_shapes], spec)
    found = fmt.factorize(dense, weight, eps=1e-5)
    assert found.value.spec.ranks == (3, 5)
    assert measured(found.value, dense) <= 1e-12


def test_tucker2_improves_on_the_hosvd() -> None:
    fmt, weight = get_format("tucker2"), WeightShape("conv", 12, 8, (3, 3))
    dense = torch.randn(weight.dense_shape)
    spectra = fmt.spectra(dense, fmt.spec(weight, rank=1))
    for rank in ((2, 3), (5, 5), (8, 2)):
        found = fmt.factorize(dense, weight, rank=rank)
        tails = [float(s[r:].norm()) for s, r in zip(spectra, rank, strict=True)]
        error = measured(found.value, dense) * float(dense.norm())
        assert max(tails) * (1 - 1e-9) <= error <= math.hypot(*tails)


def test_groups_share_the_largest_ranks() -> None:
    weight = WeightShape("conv", 12, 8, (3, 3), groups=2)
    thin, full = torch.randn(6, 1) @ torch.randn(1, 72), torch.randn(6, 72)
    dense = torch.cat([thin, full]).reshape(weight.dense_shape)
    found = get_format("low_rank").factorize(dense, weight, eps=1e-6)
    assert found.value.spec.ranks == (1, 6, 1)
    assert measured(found.value, dense) <= 1e-6


# -- the scale of the cores ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_balancing_changes_no_bit_of_the_product(dtype: torch.dtype) -> None:
    chain = [torch.randn(1, 3, 4, 5), 1e3 * torch.randn(5, 2, 3, 4), 1e-4 * torch.randn(4, 2, 2, 1)]
    chain = [core.to(dtype) for core in chain]
    balanced = balance_chain(chain)
    for before, after in zip(chain, balanced, strict=True):
        gauges = (after.abs().double() / before.abs().double()).log2()
        assert torch.equal(gauges, gauges.round())  # powers of two change no digit
    for left, right in itertools.pairwise(balanced):
        sizes = left.flatten(0, 2).norm(dim=0).double() / right.flatten(1).norm(dim=1).double()
        assert sizes.log2().abs().max() <= 2
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact, found = (chain_to_dense([core.to(wide) for core in cores]) for cores in (chain, balanced))
    assert rel_error(found, exact) <= 1e-14


def test_balancing_leaves_zeros_alone() -> None:
    chain = [torch.zeros(1, 2, 2, 3), torch.randn(3, 2, 2, 1)]
    assert all(map(torch.equal, balance_chain(chain), chain))


# -- what is refused ----------------------------------------------------------------------------------


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(TTError, match=r"\(4, 5\).*\(5, 4\)"):
        get_format("tt").factorize(torch.randn(4, 5), WeightShape("linear", 5, 4))
