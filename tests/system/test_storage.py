"""What shares memory is counted once, by whatever way it came to share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression import count_params, find_layers
from tensortrain.system.storage import count_bytes, count_numbers, overlaps

TABLE = torch.arange(60.0)
CASES: dict[str, tuple[list[Tensor], int]] = {
    "nothing": ([], 0),
    "apart": ([torch.zeros(3), torch.zeros(4)], 7),
    "the same object": ([TABLE, TABLE], 60),
    "two views of all": ([TABLE.view(6, 10), TABLE.view(10, 6).T], 60),
    "overlapping rows": ([TABLE[:40], TABLE[30:]], 60),
    "rows side by side": ([TABLE[:20], TABLE[20:50]], 50),
    "columns": ([TABLE.view(6, 10)[:, :4], TABLE.view(6, 10)[:, 4:]], 60),
    "overlapping columns": ([TABLE.view(6, 10)[:, :4], TABLE.view(6, 10)[:, 3:5]], 30),
    "every other one": ([TABLE[::2], TABLE[1::2], TABLE[::3]], 60),
    "expanded": ([torch.zeros(1, 5).expand(7, 5)], 5),
    "empty": ([torch.zeros(0, 5), torch.zeros(3)], 3),
    "no data": ([torch.zeros(3, 4, device="meta"), torch.zeros(2, device="meta")], 14),
    "lazy": ([nn.parameter.UninitializedParameter(), torch.zeros(2)], 2),
    "sparse": ([torch.eye(4).to_sparse()], 16),
    "halves of numbers": ([TABLE[:10], TABLE[:10].view(torch.int16)], 20),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_counted_once(case: str) -> None:
    tensors, expected = CASES[case]
    assert count_numbers(tensors) == expected
    assert count_numbers(tensors[::-1]) == expected


def test_bytes_are_counted_once() -> None:
    half = torch.zeros(10, dtype=torch.float16)
    assert count_bytes([TABLE.view(6, 10), TABLE[3:9], half]) == 60 * TABLE.element_size() + 20


def test_pairs_that_share_are_told() -> None:
    table = TABLE.view(6, 10)
    named = [("a", table[:, :4]), ("b", table[:, 4:]), ("c", table[5]), ("d", torch.zeros(3))]
    assert set(overlaps(named)) == {("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")}


def tied_by_data() -> nn.ModuleDict:
    model = nn.ModuleDict({"e": nn.Embedding(20, 8), "h": nn.Linear(8, 20, bias=False), "o": nn.Linear(8, 8)})
    model["h"].weight.data = model["e"].weight.data
    return model


def part_of_a_table() -> nn.ModuleDict:
    model = nn.ModuleDict({"e": nn.Embedding(20, 8), "h": nn.Linear(8, 20, bias=False), "o": nn.Linear(8, 8)})
    table = torch.randn(24, 8)
    model["e"].weight.data, model["h"].weight.data = table[:20], table[4:]
    return model


@pytest.mark.parametrize("build, shared", [(tied_by_data, 160), (part_of_a_table, 192)])
def test_layers_that_share_memory_are_tied(build, shared: int) -> None:
    model = build()
    assert count_params(model) == shared + 72
    found, left = find_layers(model)
    assert [layer.name for layer in found] == ["o"]
    assert [layer.reason for layer in left] == [f"its weight is tied: it shares memory with {k}.weight" for k in "he"]


def test_ties_on_the_meta_device_are_seen() -> None:
    with torch.device("meta"):
        model = tied_by_data()
    assert count_params(model) == 160 + 72


def test_views_of_one_vector_that_do_not_overlap_are_no_ties() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert len(find_layers(model)[0]) == 2
    model.register_parameter("flat", nn.Parameter(vector))
    assert find_layers(model)[0] == []
    assert count_params(model) == 144
