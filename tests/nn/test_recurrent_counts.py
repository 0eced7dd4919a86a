"""Parameter counts of the published recurrent networks, and of torch's."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import tensortrain as tt

FOUR = (4, 4, 4, 4)
UCF11 = (57600, 256, {"in_modes": (8, 20, 20, 18), "out_modes": FOUR})
HOLLYWOOD2 = (70200, 256, {"in_modes": (10, 18, 13, 30), "out_modes": FOUR})
FACES = (57600, 256, {"in_modes": (4, 20, 20, 36), "out_modes": FOUR})


@pytest.mark.parametrize(
    "task,kind,n_cores",
    [
        (UCF11, tt.nn.GRU, 3232),
        (UCF11, tt.nn.LSTM, 3360),
        (HOLLYWOOD2, tt.nn.GRU, 2944),
        (HOLLYWOOD2, tt.nn.LSTM, 3104),
        (FACES, tt.nn.GRU, 3328),
        (FACES, tt.nn.LSTM, 3392),
    ],
)
def test_counts_of_the_video_networks(task: Any, kind: Any, n_cores: int) -> None:
    inputs, hidden, modes = task
    layer = kind(inputs, hidden, rank=(1, 4, 4, 4, 1), **modes, device="meta")
    assert layer.n_core_params == layer.l0.ih.spec.n_params == n_cores
    gates = layer.l0.n_gates * hidden
    assert layer.n_params == n_cores + gates * hidden + 2 * gates  # the dense hidden map is by far the larger part


@pytest.mark.parametrize(
    "inputs,hidden,kind,n_dense",
    [
        (57600, 256, tt.nn.GRU, 44_236_800),
        (57600, 256, tt.nn.LSTM, 58_982_400),
        (70200, 256, tt.nn.GRU, 53_913_600),
        (70200, 256, tt.nn.LSTM, 71_884_800),
        (57600, 225, tt.nn.GRU, 38_880_000),
        (57600, 225, tt.nn.LSTM, 51_840_000),
    ],
)
def test_dense_counts_of_the_video_networks(inputs: int, hidden: int, kind: Any, n_dense: int) -> None:
    assert kind(inputs, hidden, rank=1, device="meta").l0.ih.spec.weight.n_params == n_dense


@pytest.mark.parametrize("n_gates,unstacked", [(3, 8928), (4, 11904)])
def test_stacking_against_one_train_per_gate(n_gates: int, unstacked: int) -> None:
    inputs, hidden, modes = UCF11
    assert (
        n_gates * tt.nn.Linear(inputs, hidden, False, rank=(1, 4, 4, 4, 1), **modes, device="meta").n_params
        == unstacked
    )


@pytest.mark.parametrize(
    "rank,input_map,hidden_map,total",
    [(3, 528, 624, 4224), (5, 1200, 1360, 5632), (7, 2128, 2352, 7552), (9, 3312, 3600, 9984), (11, 4752, 5104, 12928)],
)
def test_counts_of_the_music_network(rank: int, input_map: int, hidden_map: int, total: int) -> None:
    # The paper's modes (4,4,4,4) -> (8,4,4,12) and (8,4,4,4) -> (8,4,4,12) multiply the last mode by the gates;
    # read backwards they multiply the first.
    ranks = (1, rank, rank, rank, 1)
    layer = tt.nn.GRU(256, 512, compress="both", rank=ranks, in_modes=FOUR, out_modes=(4, 4, 4, 8), device="meta")
    assert (layer.l0.ih.spec.n_params, layer.l0.hh.spec.n_params) == (input_map, hidden_map)
    assert layer.n_core_params == input_map + hidden_map
    assert layer.n_params == total
    assert layer.compression == 1_182_720 / total
    assert round(layer.compression) == {3: 280, 5: 210, 7: 157, 9: 118, 11: 91}[rank]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind,more",
    [("RNN", {}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 7})],
)
def test_compression_is_against_torchs_count(kind: str, more: dict[str, Any], bias: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "bias": bias, **more}
    dense = getattr(nn, kind)(24, 16, **options)
    layer = getattr(tt.nn, kind)(24, 16, rank=2, compress="both", **options)
    assert layer.n_params == sum(p.numel() for p in layer.parameters())
    assert layer.compression == pytest.approx(sum(p.numel() for p in dense.parameters()) / layer.n_params, rel=1e-12)


@pytest.mark.parametrize("more", [{}, {"kdim": 10, "vdim": 24}, {"bias": False, "add_bias_kv": True}])
def test_compression_of_attention(more: dict[str, Any]) -> None:
    dense, layer = nn.MultiheadAttention(64, 4, **more), tt.nn.MultiheadAttention(64, 4, rank=2, **more)
    assert layer.compression == pytest.approx(sum(p.numel() for p in dense.parameters()) / layer.n_params, rel=1e-12)


def test_modes_of_all_maps() -> None:
    layer = tt.nn.LSTM(30, 16, 2, bidirectional=True, compress="both", rank=2, in_modes=(2, 3, 5), out_modes=(4, 2, 2))
    for name, cell in layer.cells().items():
        assert cell.ih.in_modes == ((2, 3, 5) if name.startswith("l0") else (8, 2, 2))  # two directions below
        assert cell.hh.in_modes == (4, 2, 2)
        assert cell.ih.out_modes == cell.hh.out_modes == (16, 2, 2)


def test_prints_modes_ranks_and_counts() -> None:
    layer = tt.nn.GRU(24, 16, 2, True, dropout=0.5, bidirectional=True, rank=2, in_modes=(4, 6), out_modes=(4, 4))
    text = repr(layer)
    for part in ("GRU(", "24, 16, num_layers=2", "dropout=0.5", "bidirectional=True", "(l1_reverse): GRUCell("):
        assert part in text
    assert "format=tt, in_modes=(4, 6), out_modes=(12, 4), ranks=(1,2,1)" in text
    assert f"params={layer.n_params:,}" in text
    plan = layer.plan(8, seq_len=10)
    assert [(one.name, one.rows, one.calls) for one in plan.maps][:2] == [("l0.ih", 80, 1), ("l0.hh", 8, 10)]
    assert plan["l0.hh"].flops == 2 * 80 * 16 * 48
    assert "24 -> 48 as (4, 6) -> (12, 4)" in str(plan)
    assert "l1_reverse.hh: 10 x 8 rows" in str(plan)
