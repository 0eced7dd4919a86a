"""Embeddings are torch's with the same table: every id, all gradients, padding, norms, frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import KindError, ShapeError
from tensortrain.testing import IMPLEMENTATIONS, assert_agrees, assert_gradcheck, dense_parts, rel_error

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tt, modes chosen": (50, 12, {"rank": 3}),
    "tt, exact modes": (60, 24, {"in_modes": (3, 4, 5), "out_modes": (2, 3, 4), "rank": 3}),
    "tt, padded up": (53, 24, {"in_modes": (3, 4, 5), "out_modes": (4, 3, 2), "rank": 3}),
    "tt, one core": (7, 5, {"in_modes": (8,), "out_modes": (5,)}),
    "tt, two cores": (35, 6, {"in_modes": (5, 7), "out_modes": (6, 1), "rank": 4}),
    "tt, six cores": (700, 64, {"in_modes": (3,) * 6, "out_modes": (2,) * 6, "rank": 3}),
    "tt, modes of size 1": (12, 6, {"in_modes": (1, 4, 1, 3), "out_modes": (3, 1, 1, 2), "rank": 3}),
    "tt, rank 1": (50, 12, {"rank": 1}),
    "tt, rank above the feasible": (50, 12, {"rank": 10**6}),
    "tt, ranks as given": (60, 24, {"in_modes": (3, 4, 5), "out_modes": (2, 3, 4), "rank": (1, 50, 60, 1)}),
    "tt, primes": (47, 13, {"rank": 3}),
    "tt, BERT's vocabulary": (30522, 8, {"rank": 2}),
    "tt, GPT-2's vocabulary": (50257, 8, {"rank": 2}),
    "low_rank": (50, 12, {"format": "low_rank", "rank": 3}),
    "low_rank, primes": (47, 13, {"format": "low_rank", "rank": 10**6}),
    "low_rank, rank as given": (10, 4, {"format": "low_rank", "rank": (1, 30, 1)}),
}


def make(name: str, **options: Any) -> tt.nn.Embedding:
    vocabulary, width, more = CASES[name]
    return tt.nn.Embedding(vocabulary, width, **{**more, **options})


def lookup(ids: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(ids, table)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_dense(name: str, dtype: torch.dtype, implementation: str) -> None:
    layer = make(name, implementation=implementation, dtype=dtype)
    ids = torch.randint(layer.num_embeddings, (3, 17))
    ids[0, :2] = torch.tensor([0, layer.num_embeddings - 1])
    ids[1] = ids[0]  # repeated ids add up their gradients
    assert_agrees(layer, ids, lookup)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, padded up", "tt, six cores", "tt, GPT-2's vocabulary", "low_rank"])
def test_every_id(name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation).requires_grad_(False)
    ids = torch.randperm(layer.num_embeddings)
    assert rel_error(layer(ids), layer.weight[ids]) <= 1e-12
    assert math.prod(layer.in_modes) >= layer.num_embeddings


INPUTS = {
    "empty": lambda: torch.zeros(0, dtype=torch.int64),
    "empty batch": lambda: torch.zeros(0, 5, dtype=torch.int64),
    "one id": lambda: torch.tensor(7),
    "batch of one": lambda: torch.tensor([7]),
    "four axes": lambda: torch.randint(50, (2, 1, 3, 2)),
    "transposed": lambda: torch.randint(50, (4, 3)).T,
    "all the same": lambda: torch.full((6,), 49),
    "int32": lambda: torch.randint(50, (4,), dtype=torch.int32),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, modes chosen", "low_rank"])
@pytest.mark.parametrize("kind", INPUTS)
def test_any_shape_of_ids(kind: str, name: str, implementation: str) -> None:
    assert_agrees(make(name, implementation=implementation), INPUTS[kind](), lookup)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, padded up", "tt, modes of size 1", "low_rank, rank as given"])
def test_gradcheck(name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation)
    assert_gradcheck(layer, torch.tensor([[0, 3, 3], [9, 1, 3]]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, modes chosen", "low_rank"])
@pytest.mark.parametrize("padding_idx", [0, 4, -1])
def test_the_padding_row_is_zero_and_gets_no_gradient(padding_idx: int, name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation, padding_idx=padding_idx)
    row = padding_idx % 50
    assert layer.padding_idx == row == layer.to_dense().padding_idx

    def masked(ids: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        kept = torch.ones(50, 1)
        kept[row] = 0
        return F.embedding(ids, table * kept, padding_idx=row)

    ids = torch.tensor([[row, 3, row], [7, 3, 49]])
    assert_agrees(layer, ids, masked)
    assert layer(ids)[0, 0].abs().max() == 0
    assert layer.weight[row].abs().max() == 0
    assert layer.to_dense().weight[row].abs().max() == 0
    layer(torch.tensor([row, row])).sum().backward()
    assert all(core.grad is not None and core.grad.abs().max() == 0 for core in layer.cores)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, modes chosen", "low_rank"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0])
def test_max_norm(norm_type: float, name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation, max_norm=1.0, norm_type=norm_type)
    assert layer.to_dense().max_norm == 1.0
    # At the median norm some rows are scaled and some are not.
    layer.max_norm = limit = float(layer.to_dense().weight.detach().norm(p=norm_type, dim=1).median())
    ids = torch.randperm(50)[:30]
    cores = [core.detach().clone() for core in layer.cores]
    found = layer(ids)
    assert rel_error(found, layer.to_dense()(ids)) <= 1e-12
    assert all(torch.equal(core, before) for core, before in zip(layer.cores, cores, strict=True))

    def scaled(ids: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        rows = F.embedding(ids, table)
        norms = rows.norm(p=norm_type, dim=-1, keepdim=True)
        return torch.where(norms > limit, rows * (limit / (norms + 1e-7)), rows)

    assert_agrees(layer, ids, scaled)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tt, modes chosen", "low_rank"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_scale_grad_by_freq(padding_idx: int | None, name: str, implementation: str) -> None:
    layer = make(name, implementation=implementation, scale_grad_by_freq=True, padding_idx=padding_idx)
    ids = torch.tensor([[0, 3, 3, 7], [3, 7, 49, 1]])
    cores, table, _ = dense_parts(layer)
    if padding_idx is not None:
        table = table.index_fill(0, torch.tensor(padding_idx), 0.0)
    exact = F.embedding(ids, table, padding_idx, None, 2.0, True)
    found = layer(ids)
    assert rel_error(found, exact) <= 1e-12
    upstream = torch.randn(found.shape)
    mine = torch.autograd.grad(found, list(layer.cores), upstream)
    theirs = torch.autograd.grad(exact, cores, upstream)
    for a, b in zip(mine, theirs, strict=True):
        assert rel_error(a, b) <= 1e-12


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["tt", "low_rank"])
def test_autocast_gives_the_dtype_of_torch(format: str, implementation: str, training: bool) -> None:
    layer = tt.nn.Embedding(50, 12, format=format, rank=3, implementation=implementation, dtype=torch.float32)
    dense = layer.to_dense()
    ids = torch.randint(50, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        found, exact = layer(ids), dense(ids)
    assert found.dtype == exact.dtype == torch.float32
    assert rel_error(found, exact) <= 0.02  # products of cores are lowered to bfloat16, 0.4 % each


@pytest.mark.parametrize("format", ["tt", "low_rank"])
@pytest.mark.parametrize("vocabulary", [50, 47, 64])
def test_from_dense_and_back(vocabulary: int, format: str) -> None:
    dense = nn.Embedding(vocabulary, 12, padding_idx=2, max_norm=3.0, norm_type=1.0, scale_grad_by_freq=True)
    layer = tt.nn.Embedding.from_dense(dense, format=format)
    assert math.prod(layer.in_modes) >= vocabulary
    assert repr(layer.to_dense()) == repr(dense)
    assert rel_error(layer.to_dense().weight, dense.weight) <= 1e-13
    ids = torch.arange(vocabulary)
    assert rel_error(layer(ids), dense(ids)) <= 1e-12


def test_from_pretrained() -> None:
    table = torch.randn(53, 12)
    theirs = nn.Embedding.from_pretrained(table, padding_idx=2, max_norm=3.0, norm_type=1.0, scale_grad_by_freq=True)
    layer = tt.nn.Embedding.from_pretrained(
        table, padding_idx=2, max_norm=3.0, norm_type=1.0, scale_grad_by_freq=True, format="low_rank"
    )
    assert repr(layer.to_dense()) == repr(theirs)
    assert not any(p.requires_grad for p in layer.parameters())
    ids = torch.tensor([k for k in range(53) if k != 2])  # torch gives a pretrained padding row as it is
    assert rel_error(layer(ids), theirs(ids)) <= 1e-12
    small = tt.nn.Embedding.from_pretrained(table, freeze=False, rank=2)
    assert all(p.requires_grad for p in small.parameters())
    assert small.ranks == (1, 2, 2, 1)
    with pytest.raises(KindError, match="floating-point tensor"):
        tt.nn.Embedding.from_pretrained(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="num_embeddings, embedding_dim"):
        tt.nn.Embedding.from_pretrained(torch.randn(5))


def test_gradients_are_dense() -> None:
    with pytest.raises(ShapeError, match="sparse=True"):
        tt.nn.Embedding(53, 12, sparse=True)
    with pytest.raises(ShapeError, match="sparse=True"):
        tt.nn.Embedding.from_pretrained(torch.randn(53, 12), sparse=True)
    layer = tt.nn.Embedding.from_dense(nn.Embedding(53, 12, sparse=True))
    layer(torch.tensor([1, 2])).sum().backward()
    assert layer.sparse is False
    assert all(core.grad is not None and core.grad.layout == torch.strided for core in layer.cores)


def test_frequencies_in_a_compiled_layer() -> None:
    layer = tt.nn.Embedding(53, 12, padding_idx=3, scale_grad_by_freq=True, rank=3, implementation="factorized")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    ids = torch.tensor([[0, 3, 3, 7], [3, 7, 49, 1]])
    ours = torch.autograd.grad(compiled(ids).square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(layer(ids).square().sum(), list(layer.parameters()))
    assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_token_counts_weight_the_decomposition() -> None:
    dense = nn.Embedding(60, 16)
    counts = 1.0 / torch.arange(1, 61) ** 2  # Zipf: a few tokens make up most of the text
    weighted = tt.nn.Embedding.from_dense(dense, rank=2, input_gram=counts)
    plain = tt.nn.Embedding.from_dense(dense, rank=2)

    def error(layer: tt.nn.Embedding) -> float:
        lost = (layer.weight - dense.weight).square().sum(dim=1)
        return float((counts * lost).sum().detach())

    assert error(weighted) < 0.9 * error(plain)
