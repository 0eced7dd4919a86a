"""The table of a model's layers, with known answers."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, assert_unchanged, mlp, snapshot
from torch import nn

import tensortrain as tt
from tensortrain.compression.report.measure import count_flops
from tensortrain.compression.survey.inspect import inspect
from tensortrain.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


def with_singular_values(layer: nn.Module, values: list[float]) -> nn.Module:
    """Give a layer's weight, as a matrix, these singular values and no others."""
    matrix = layer.weight.detach().flatten(1)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = torch.zeros(u.shape[1])
    spectrum[: len(values)] = torch.tensor(values)
    with torch.no_grad():
        layer.weight.copy_(((u * spectrum) @ v).reshape(layer.weight.shape))
    return layer


def test_ranks_hold_their_share_of_the_energy() -> None:
    # Squares 81, 9.61, 9, 0.25: the first two hold 90.7 %, the first three 99.7 %.
    (row,) = inspect(with_singular_values(nn.Linear(20, 30), [9.0, 3.1, 3.0, 0.5]))
    assert (row.full_rank, row.rank_90, row.rank_99) == (20, 2, 3)
    assert row.gain_99 == pytest.approx(600 / (3 * 50))


def test_rows_name_what_there_is() -> None:
    model = nn.ModuleDict({"body": ConvNet(16), "embed": nn.Embedding(40, 8), "norm": nn.LayerNorm(8)})
    table = inspect(model)
    assert [(row.name, row.kind, row.shape) for row in table] == [
        ("body.conv1", "Conv2d", (16, 3, 3, 3)),
        ("body.conv2", "Conv2d", (32, 16, 3, 3)),
        ("body.head", "Linear", (10, 512)),
        ("embed", "Embedding", (40, 8)),
    ]
    assert [row.full_rank for row in table] == [16, 32, 10, 8]
    assert [row.params for row in table] == [432, 4640, 5130, 320]
    total = sum(p.numel() for p in model.parameters())
    assert table.params == total
    assert table.rows[1].share == pytest.approx(4640 / total)
    assert all(row.flops is None for row in table)
    assert len(table) == 4


@pytest.mark.parametrize(
    "build, x, flops",
    [
        (lambda: mlp(12, 8, 4), torch.randn(5, 12), {"0": 2 * 12 * 8, "2": 2 * 8 * 4}),
        (lambda: mlp(12, 8), torch.randn(5, 7, 12), {"0": 7 * 2 * 12 * 8}),
        (lambda: ConvNet(4), torch.randn(5, 3, 8, 8), {"conv1": 2 * 64 * 108, "conv2": 2 * 16 * 288, "head": 2 * 1280}),
        (lambda: TwoHeads(8), torch.randn(5, 8), {"first": 2 * 2 * 64, "blocks.0": 2 * 64, "head": 2 * 32}),
        (lambda: nn.Conv1d(2, 6, 3, stride=2), torch.randn(5, 2, 11), {"": 2 * 5 * 36}),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), torch.randn(5, 4, 6, 6), {"": 2 * 16 * 8 * 18}),
    ],
)
def test_flops_per_example(build, x, flops) -> None:
    model = build()
    x = x.double()
    table = inspect(model, x)
    assert {row.name: row.flops for row in table} == flops
    assert sum(flops.values()) * 5 == count_flops(model, x)


def test_rows_that_come_in_another_shape_count_per_example() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):  # b t c
            y = self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.head(y.mean(dim=1))

    model, x = Patches(), torch.randn(5, 7, 6)
    assert [row.flops for row in inspect(model, x)] == [7 * 2 * 36, 2 * 12]
    assert count_flops(model, x) == 5 * (7 * 72 + 24)


def test_lookups_cost_no_flops() -> None:
    table = inspect(Tagger(20, 8, 3), {"input_ids": torch.randint(0, 20, (2, 6))})
    assert {row.name: row.flops for row in table} == {"embed": 0, "hidden": 6 * 2 * 128, "head": 6 * 2 * 48}


def test_it_prints() -> None:
    model = nn.Sequential(with_singular_values(nn.Linear(20, 30), [9.0, 3.1, 3.0, 0.5]), nn.Bilinear(30, 30, 3))
    head, _, row, total, left = str(inspect(model, None)).splitlines()
    assert head.split() == ["layer", "kind", "shape", "params", "share", "flops", "rank", "90", "%", "99", "%", "gain"]
    assert row.split() == ["0", "Linear", "30x20", "630", "18.9%", "20", "2", "3", "4.0x"]
    assert total == "3,333 parameters, 630 in these layers"
    assert left.startswith("left alone: 1 (Bilinear, 2,703 parameters): no plan reaches its weight (3, 30, 30)")


def test_it_is_plain_data() -> None:
    table = tt.inspect(mlp(12, 8), torch.randn(3, 12))
    data = json.loads(json.dumps(table.to_dict()))
    assert data["params"] == 104
    assert data["layers"][0]["name"] == "0"
    assert data["layers"][0]["flops"] == 192


def test_awkward_models() -> None:
    assert len(inspect(nn.ReLU())) == 0
    assert str(inspect(nn.ReLU())).endswith("0 parameters, 0 in these layers")
    zero = nn.Linear(6, 4)
    nn.init.zeros_(zero.weight)
    (row,) = inspect(zero)
    assert row.rank_99 == 1
    broken = mlp(6, 6)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    before = snapshot(broken)
    with pytest.raises(NonFiniteError, match="layer '0' holds NaN"):
        inspect(broken, torch.randn(2, 6))
    assert_unchanged(broken, before)
