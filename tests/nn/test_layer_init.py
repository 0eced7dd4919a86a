"""Fresh layers have the weights' spread that was asked for, whatever the order and the ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.formats import FactorSpec, WeightShape, get_format


def spread(layer: Any) -> float:
    return float(layer.weight.detach().std())


@pytest.mark.parametrize("init", ["match", "glorot", "he", 0.37])
@pytest.mark.parametrize("rank", [1, 2, 8, 64])
@pytest.mark.parametrize("order", [2, 3, 4, 5, 6])
def test_linear(order: int, rank: int, init: str | float) -> None:
    modes = {2: (16, 16), 3: (8, 8, 8), 4: (4, 4, 4, 4), 5: (4, 4, 4, 4, 2), 6: (3, 3, 3, 3, 3, 3)}[order]
    n = math.prod(modes)
    layer = tt.nn.Linear(n, n, in_modes=modes, out_modes=modes, rank=(rank,) * (order - 1), init=init)
    target = {"match": 1 / math.sqrt(3 * n), "glorot": math.sqrt(2 / (2 * n)), "he": math.sqrt(2 / n)}
    assert spread(layer) == pytest.approx(target.get(init, init), rel=0.05)  # type: ignore[call-overload]


def test_match_is_the_spread_of_torch() -> None:
    pairs: list[tuple[Any, Any]] = [
        (tt.nn.Linear(300, 200, rank=10), nn.Linear(300, 200)),
        (tt.nn.Linear(300, 200, format="low_rank", rank=10), nn.Linear(300, 200)),
        (tt.nn.Embedding(1000, 64, rank=10), nn.Embedding(1000, 64)),
        (tt.nn.Embedding(1000, 64, format="low_rank", rank=10), nn.Embedding(1000, 64)),
    ]
    for format in ("tt", "tt_naive", "tucker2", "low_rank"):
        factorized = tt.nn.Conv2d(64, 96, 3, groups=2, format=format, rank=6)
        pairs.append((factorized, nn.Conv2d(64, 96, 3, groups=2)))
    for layer, dense in pairs:
        assert spread(layer) == pytest.approx(float(dense.weight.detach().std()), rel=0.05)
        if layer.spec.weight.kind != "embedding":
            bound = float(dense.bias.detach().abs().max())
            assert 0.8 * bound < float(layer.bias.detach().abs().max()) <= 1.05 * bound


def test_glorot_of_an_embedding_and_of_a_convolution() -> None:
    embedding = tt.nn.Embedding(1000, 64, rank=8, init="glorot")
    assert spread(embedding) == pytest.approx(math.sqrt(2 / 1064), rel=0.05)
    convolution = tt.nn.Conv2d(32, 64, 3, rank=8, init="glorot")
    assert spread(convolution) == pytest.approx(math.sqrt(2 / (9 * 32 + 9 * 64)), rel=0.05)


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 0.01), (torch.bfloat16, 0.03), (torch.complex64, 0.01)])
def test_other_dtypes(dtype: torch.dtype, rel: float) -> None:
    layer = tt.nn.Linear(64, 64, rank=4, init=0.5, dtype=dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    dense = layer.format.to_dense([core.detach().to(wide) for core in layer.cores], layer.spec)
    assert math.sqrt(float(dense.abs().square().mean())) == pytest.approx(0.5, rel=rel)


def test_a_generator_decides_and_reset_draws_anew() -> None:
    layer = tt.nn.Linear(12, 20, rank=3)

    def drawn(seed: int) -> list[torch.Tensor]:
        layer.reset_parameters(generator=torch.Generator().manual_seed(seed))
        return [p.detach().clone() for p in layer.parameters()]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_none_leaves_the_cores_to_the_caller() -> None:
    before = torch.random.get_rng_state()
    tt.nn.Linear(12, 20, rank=3, init=None)
    assert torch.equal(torch.random.get_rng_state(), before)


# The formula alone, before a draw is scaled to its target.

SPECS = {
    "tt, order 2": ("tt", WeightShape("linear", 16, 16), (4, 4), (4, 4), (1, 3, 1)),
    "tt, order 3": ("tt", WeightShape("linear", 8, 8), (2, 2, 2), (2, 2, 2), (1, 3, 5, 1)),
    "tt, order 4": ("tt", WeightShape("linear", 16, 16), (2,) * 4, (2,) * 4, (1, 2, 4, 2, 1)),
    "tt, convolution": ("tt", WeightShape("conv", 4, 4, (3, 3)), (2, 2), (2, 2), (1, 3, 4, 1)),
    "tt_naive": ("tt_naive", WeightShape("conv", 4, 4, (3, 3)), (4,), (4,), (1, 3, 4, 2, 1)),
    "tucker2": ("tucker2", WeightShape("conv", 4, 4, (3, 3)), (4,), (4,), (3, 2)),
    "low_rank": ("low_rank", WeightShape("linear", 8, 8), (8,), (8,), (1, 3, 1)),
}
N_DRAWS = 20_000


def mean_square(spec: FactorSpec, std: float) -> float:
    """Mean square of the dense entries over many draws of cores with this spread."""
    draws = [std * torch.randn(N_DRAWS, *shape) for shape in spec.core_shapes]
    dense = torch.vmap(lambda *cores: get_format(spec.format).to_dense(cores, spec))(*draws)
    return float(dense.square().mean())


@pytest.mark.parametrize("name", SPECS)
def test_formula_against_monte_carlo(name: str) -> None:
    spec = FactorSpec(*SPECS[name])
    std = get_format(spec.format).init_std(spec, 0.7)
    # 20,000 draws of a heavy-tailed product: worst deviation seen below 2 %.
    assert mean_square(spec, std) == pytest.approx(0.49, rel=0.05)


def test_the_printed_root_is_not_the_one() -> None:
    # The formula as printed takes the root 4d - 2; a TT-matrix of d cores needs the root 2d.
    weight, ranks = WeightShape("embedding", 256, 25_000), (1, 16, 16, 1)
    spec = FactorSpec("tt", weight, (4, 8, 8), (25, 30, 40), ranks)
    variance = 2 / (25_000 + 256)
    right = get_format("tt").init_std(spec, math.sqrt(variance))
    printed = (variance / math.prod(ranks)) ** (1 / (4 * 3 - 2))
    assert right == pytest.approx(0.0822, rel=1e-3)
    assert printed == pytest.approx(0.223, rel=1e-2)
    excess = printed**6 * math.prod(ranks) / variance
    assert excess == pytest.approx(402, rel=0.01)
    small = FactorSpec("tt", WeightShape("linear", 8, 8), (2, 2, 2), (2, 2, 2), ranks)
    assert mean_square(small, printed) / variance == pytest.approx(402, rel=0.1)
