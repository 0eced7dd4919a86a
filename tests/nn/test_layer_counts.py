"""Published parameter counts and compression factors come out of the layers' own counters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensortrain as tt

VGG = {"in_modes": (2, 7, 8, 8, 7, 4), "out_modes": (4,) * 6}


@pytest.mark.parametrize("rank, n_params, factor", [(4, 2016, 50_972), (2, 528, 194_622), (1, 144, 713_614)])
def test_vgg_fc6(rank: int, n_params: int, factor: int) -> None:
    # arXiv:1509.06569, table 2: 25088 x 4096.
    layer = tt.nn.Linear(25088, 4096, bias=False, rank=rank, **VGG, device="meta")
    assert layer.n_params == n_params == sum(p.numel() for p in layer.parameters())
    assert int(layer.compression) == factor  # published without the fraction


def test_vgg_two_tensorized_layers() -> None:
    fc6 = tt.nn.Linear(25088, 4096, bias=False, rank=4, **VGG, device="meta")
    fc7 = tt.nn.Linear(4096, 4096, bias=False, rank=4, in_modes=(4,) * 6, out_modes=(4,) * 6, device="meta")
    assert fc7.n_params == 1152
    assert int((25088 * 4096 + 4096 * 4096) / (fc6.n_params + fc7.n_params)) == 37_732


@pytest.mark.parametrize("rank, n_params, factor", [(1, 29_184, 3_521), (5, 145_920, 704), (50, 1_459_200, 70)])
def test_vgg_low_rank(rank: int, n_params: int, factor: int) -> None:
    layer = tt.nn.Linear(25088, 4096, bias=False, format="low_rank", rank=rank, device="meta")
    assert layer.n_params == n_params
    assert int(layer.compression) == factor


@pytest.mark.parametrize(
    "modes, counts",
    [
        ((32, 32), (2048, 4096, 6144, 8192, 16384, 32768)),
        ((4, 8, 8, 4), (160, 576, 1248, 2176, 8448, 33280)),
        ((4,) * 5, (80, 256, 528, 896, 3328, 12800)),
        ((2, 2, 8, 8, 2, 2), (144, 560, 1248, 2208, 8768, 34944)),
        ((2,) * 10, (40, 144, 312, 544, 2112, 8320)),
    ],
)
def test_mnist_1024_by_1024(modes: tuple[int, ...], counts: tuple[int, ...]) -> None:
    # Published with equal ranks throughout, also above what the modes allow: a tuple is taken as given.
    for rank, n_params in zip((1, 2, 3, 4, 8, 16), counts, strict=True):
        ranks = (1, *[rank] * (len(modes) - 1), 1)
        layer = tt.nn.Linear(1024, 1024, False, in_modes=modes, out_modes=modes, rank=ranks, device="meta")
        assert layer.ranks == ranks
        assert layer.n_params == n_params == sum(core.numel() for core in layer.cores)


@pytest.mark.parametrize(
    "n_in, n_out, in_modes, out_modes, rank, n_params",
    [
        (1024, 3125, (4,) * 5, (5,) * 5, 8, 4160),
        (3072, 262_144, (4, 4, 4, 4, 4, 3), (8,) * 6, 3, 1320),
        (262_144, 4096, (8,) * 6, (4,) * 6, 3, 1344),
    ],
)
def test_cifar_layers(
    n_in: int, n_out: int, in_modes: tuple[int, ...], out_modes: tuple[int, ...], rank: int, n_params: int
) -> None:
    layer = tt.nn.Linear(n_in, n_out, False, in_modes=in_modes, out_modes=out_modes, rank=rank, device="meta")
    assert layer.n_params == n_params


# arXiv:1611.03214: 64 = 4x4x4 and 128 = 4x8x4 channels; the first convolution and the last layer stay dense.
CHANNEL_MODES = {64: (4, 4, 4), 128: (4, 8, 4)}
CHANNELS = ((64, 64), (64, 128), (128, 128), (128, 128), (128, 128))
FC_MODES = {8192: (8, 8, 8, 16), 1536: (4, 6, 8, 8), 512: (4, 4, 4, 8)}
SECOND_FC_IN = (4, 6, 8, 8)


def convolutions(ranks: list[tuple[int, ...]] | None) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, bias=False, device="meta"), nn.BatchNorm2d(64, device="meta")]
    for k, (c, s) in enumerate(CHANNELS):
        if ranks is None:
            layers.append(nn.Conv2d(c, s, 3, bias=False, device="meta"))
        else:
            modes = {"in_modes": CHANNEL_MODES[c], "out_modes": CHANNEL_MODES[s]}
            layers.append(tt.nn.Conv2d(c, s, 3, bias=False, **modes, rank=(1, *ranks[k]), device="meta"))
        layers.append(nn.BatchNorm2d(s, device="meta"))
    return layers


def fully_connected(ranks: tuple[int, int] | None) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for k, (n_in, n_out) in enumerate(((8192, 1536), (1536, 512))):
        if ranks is None:
            layers.append(nn.Linear(n_in, n_out, bias=False, device="meta"))
        else:
            modes = {"in_modes": FC_MODES[n_in], "out_modes": FC_MODES[n_out]}
            full = (1, *[ranks[k]] * 3, 1)
            layers.append(tt.nn.Linear(n_in, n_out, False, **modes, rank=full, device="meta"))
        layers.append(nn.BatchNorm1d(n_out, device="meta"))
    return [*layers, nn.Linear(512, 10, device="meta")]


def count(layers: list[nn.Module]) -> int:
    """Weights, scale and shift of batch norms, biases where there are any."""
    total = 0
    for layer in layers:
        own = sum(p.numel() for p in layer.parameters())
        if hasattr(layer, "n_params"):
            assert layer.n_params == own
        total += own
    return total


def test_conv_network_3_23() -> None:
    head: list[nn.Module] = [nn.Linear(128, 10, bias=False, device="meta")]
    ranks = [(22, 20, 20, 1), (27, 22, 22, 1), (23, 23, 23, 1), (23, 23, 23, 1), (23, 23, 23, 1)]
    dense, small = count(convolutions(None) + head), count(convolutions(ranks) + head)
    assert (dense, small) == (555_968 + 1280, 171_238 + 1280)
    assert round(dense / small, 2) == 3.23


@pytest.mark.parametrize("fc_ranks, factor, total", [((40, 30), 41.65, 334_554), ((20, 20), 82.87, None)])
def test_conv_fc_network(fc_ranks: tuple[int, int], factor: float, total: int | None) -> None:
    dense = count(convolutions(None) + fully_connected(None))
    small = count(convolutions([(16, 16, 16, 1)] * 5) + fully_connected(fc_ranks))
    assert dense == 13_934_538
    assert total is None or small == total
    assert round(dense / small, 2) == factor


def test_conv_fc_network_by_parts() -> None:
    layers = convolutions([(16, 16, 16, 1)] * 5) + fully_connected((40, 30))
    tt_convs = sum(layer.n_params for layer in layers if isinstance(layer, tt.nn.Conv2d))
    tt_linears = [layer.n_params for layer in layers if isinstance(layer, tt.nn.Linear)]
    assert 3 * 9 * 64 + tt_convs == 85_648
    assert tt_linears == [185_600, 52_800]


def test_conv_tt_fc_network_21_01() -> None:
    small = count(convolutions(None) + fully_connected((25, 20)))
    assert round(13_934_538 / small, 2) == 21.01


@pytest.mark.parametrize(
    "vocabulary, in_modes, out_modes, n_params, factor",
    [
        (25_000, (25, 30, 40), (4, 8, 8), 68_160, 93),
        (25_000, (10, 10, 15, 20), (4, 4, 4, 4), 27_520, 232),
        (25_000, (5, 5, 5, 5, 6, 8), (2, 2, 2, 2, 4, 4), 14_496, 441),
        (17_200, (24, 25, 30), (4, 8, 8), 56_576, 78),
        (17_200, (10, 10, 12, 15), (4, 4, 4, 4), 24_128, 182),
        (17_200, (4, 5, 5, 5, 6, 6), (2, 2, 2, 2, 4, 4), 14_336, 307),
    ],
)
def test_embeddings(
    vocabulary: int, in_modes: tuple[int, ...], out_modes: tuple[int, ...], n_params: int, factor: int
) -> None:
    # arXiv:1901.10787, table 2; ranks of 16 throughout, above the feasible at the ends of the last shapes.
    ranks = (1, *[16] * (len(in_modes) - 1), 1)
    layer = tt.nn.Embedding(vocabulary, 256, in_modes=in_modes, out_modes=out_modes, rank=ranks, device="meta")
    assert layer.n_params == n_params == sum(core.numel() for core in layer.cores)
    assert abs(layer.compression - factor) < 1  # the table cuts some fractions off and rounds others


def test_counts_of_tucker2_and_low_rank_convolutions() -> None:
    # arXiv:1903.09973: C R_in + R_in R_out k^2 + R_out S, and R (C k^2 + S).
    tucker = tt.nn.Conv2d(64, 128, 3, format="tucker2", rank=(20, 30), bias=False, device="meta")
    assert tucker.n_params == 64 * 20 + 20 * 30 * 9 + 30 * 128
    low_rank = tt.nn.Conv2d(64, 128, 3, format="low_rank", rank=10, bias=False, device="meta")
    assert low_rank.n_params == 10 * (64 * 9 + 128)
    naive = tt.nn.Conv2d(64, 128, 3, format="tt_naive", rank=(1, 3, 9, 20, 1), bias=False, device="meta")
    assert naive.n_params == 3 * 3 + 3 * 3 * 9 + 9 * 64 * 20 + 20 * 128


def test_bias_and_groups_are_counted() -> None:
    with_bias = tt.nn.Linear(12, 20, rank=2, device="meta")
    assert with_bias.n_params == with_bias.spec.n_params + 20
    assert with_bias.compression == (240 + 20) / (with_bias.spec.n_params + 20)
    grouped = tt.nn.Conv2d(8, 12, 3, groups=4, format="low_rank", rank=2, device="meta")
    assert grouped.n_params == 4 * 2 * (2 * 9 + 3) + 12 == sum(p.numel() for p in grouped.parameters())
    assert grouped.compression == (12 * 2 * 9 + 12) / grouped.n_params


def test_an_int_is_clipped_and_a_tuple_is_not() -> None:
    modes = {"in_modes": (2,) * 4, "out_modes": (2,) * 4}
    assert tt.nn.Linear(16, 16, rank=100, **modes, device="meta").ranks == (1, 4, 16, 4, 1)
    assert tt.nn.Linear(16, 16, rank=(100, 100, 100), **modes, device="meta").ranks == (1, 100, 100, 100, 1)
    assert tt.nn.Linear(16, 16, rank="full", **modes, device="meta").ranks == (1, 4, 16, 4, 1)
    share = tt.nn.Linear(16, 16, False, rank=0.5, **modes, device="meta")
    assert share.spec.n_params <= 128
    assert tt.nn.Conv2d(6, 9, 3, format="tucker2", rank=100, device="meta").ranks == (6, 9)


@pytest.mark.parametrize("format", ["tt", "low_rank", "cp", "ring", "tucker", "kronecker", "tt_separate"])
def test_same_is_about_as_many_parameters_as_dense(format: str) -> None:
    for layer in (
        tt.nn.Linear(512, 768, bias=False, format=format, rank="same", device="meta"),
        tt.nn.Conv2d(32, 48, 3, bias=False, format=format, rank="same", device="meta"),
        tt.nn.Embedding(1000, 64, format=format, rank="same", device="meta"),
    ):
        assert layer.compression == pytest.approx(1.0, abs=0.02)


def test_nothing_is_allocated_on_meta() -> None:
    layer = tt.nn.Linear(25088, 4096, rank=4, **VGG, device="meta")
    assert all(core.is_meta for core in layer.cores)
    assert layer(torch.empty(3, 25088, device="meta")).shape == (3, 4096)
