"""A tied head multiplies by the very table of its embedding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import KindError, ShapeError
from tensortrain.testing import IMPLEMENTATIONS, rel_error

CASES: dict[str, dict[str, Any]] = {
    "tt, padded up": {"in_modes": (3, 4, 5), "out_modes": (3, 2, 2)},
    "tt, padding row": {"padding_idx": 3},
    "tt, hot rows": {"hot_rows": 4},
    "tt, hot rows, padding row": {"hot_rows": 4, "padding_idx": -1},
    "low_rank": {"format": "low_rank"},
    "low_rank, hot rows, padding row": {"format": "low_rank", "hot_rows": 4, "padding_idx": 0},
}


def make(name: str, **options: Any) -> tt.nn.Embedding:
    layer = tt.nn.Embedding(53, 12, **{"rank": 3, **CASES[name], **options})
    if layer.hot_rows:
        layer.populate_hot_rows_(ids=torch.tensor([9, 9, 52, 1]))  # one row stays unused
        with torch.no_grad():
            layer.hot_weight.add_(1.0)
    return layer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name: str, bias: bool, implementation: str) -> None:
    embedding = make(name, implementation=implementation)
    head = tt.nn.tied_head(embedding, bias=bias)
    if bias:
        nn.init.normal_(head.bias)
    h = torch.randn(2, 5, 12).transpose(0, 1).requires_grad_()
    exact = nn.functional.linear(h, embedding.weight, head.bias)
    with torch.no_grad():
        for found in (head(h), head(h)):
            assert rel_error(found, exact) <= 1e-12
    found = head(h)
    assert found.shape == (5, 2, 53)
    assert rel_error(found, exact) <= 1e-12
    upstream = torch.randn_like(exact)
    sources = [h, *head.parameters()]
    ours = torch.autograd.grad(found, sources, upstream)
    theirs = torch.autograd.grad(exact, sources, upstream)
    assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))
    for shape in ((12,), (0, 12), (1, 12), (3, 0, 12)):
        assert head(torch.randn(shape)).shape == (*shape[:-1], 53)


def test_single_precision_and_autocast() -> None:
    head = tt.nn.tied_head(make("tt, padding row", dtype=torch.float32, implementation="factorized"), bias=True)
    h = torch.randn(7, 12, dtype=torch.float32)
    exact = h.double() @ head.weight.double().T
    assert rel_error(head(h), exact) <= 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(h)
    assert found.dtype == torch.bfloat16
    assert rel_error(found, exact) <= 0.03  # a few roundings of 0.4 % each


class LanguageModel(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = tt.nn.tied_head(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_parameters_are_shared_and_stay_so(tmp_path: Any) -> None:
    model = LanguageModel(tt.nn.Embedding(53, 12, rank=3))
    assert sum(p.numel() for p in model.parameters()) == model.embedding.n_params
    ids = torch.randint(53, (4, 6))
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(ids).square().mean().backward()
    optimizer.step()
    assert rel_error(other(ids), other.embedding.weight[ids] @ other.embedding.weight.T) <= 1e-12
    assert rel_error(other(ids), model(ids)) > 1e-3
    narrow = copy.deepcopy(model).float()
    assert narrow(ids).dtype == torch.float32
    tt.save_pretrained(model, tmp_path)
    again = tt.load_pretrained(tmp_path, model=LanguageModel(nn.Embedding(53, 12)))
    assert torch.equal(again(ids), model(ids))
    assert sum(p.numel() for p in again.parameters()) == model.embedding.n_params


def test_stays_tied_through_compression_and_back() -> None:
    model = LanguageModel(nn.Embedding(300, 12))
    with torch.no_grad():
        model.embedding.weight.copy_(torch.randn(300, 2) @ torch.randn(2, 12))
    ids = torch.randint(300, (4, 6))
    assert rel_error(model(ids), model.embedding.weight[ids] @ model.embedding.weight.T) <= 1e-12
    small = tt.compress(model, budget=0.4).model
    assert isinstance(small.embedding, tt.nn.Embedding)
    assert small.head.embedding is small.embedding
    assert rel_error(small(ids), small.embedding.weight[ids] @ small.embedding.weight.T) <= 1e-12
    dense = tt.to_dense_(copy.deepcopy(small))
    assert dense.head.embedding is dense.embedding
    assert rel_error(dense(ids), small(ids)) <= 1e-12


def test_the_plan_is_chosen_by_predicted_time() -> None:
    big = tt.nn.tied_head(tt.nn.Embedding(50257, 768, rank=4, dtype=torch.float32))
    assert not big.plan(1).uses_dense
    assert big.plan(1).predicted_s < big.plan(1).dense_s
    assert (big.plan(1).chain.in_features, big.out_features) == (768, 50257)
    assert tt.nn.tied_head(make("low_rank")).plan(8).uses_dense  # a tiny table
    assert not tt.nn.tied_head(make("low_rank", implementation="factorized")).plan(8).uses_dense
    with torch.no_grad():
        assert big(torch.randn(2, 768, dtype=torch.float32)).shape == (2, 50257)
    assert big.embedding.resident_cache_bytes < 50257 * 768  # no dense table was built


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@pytest.mark.parametrize("name", ["tt, hot rows, padding row", "low_rank"])
def test_compiles_and_exports(name: str, implementation: str) -> None:
    head = tt.nn.tied_head(make(name, implementation=implementation), bias=True)
    h = torch.randn(3, 5, 12)
    torch._dynamo.reset()
    assert rel_error(torch.compile(head, fullgraph=True, backend="eager")(h), head(h)) <= 1e-12
    program = torch.export.export(head.eval(), (h,))
    assert rel_error(program.module()(h), head(h)) <= 1e-12


def test_messages() -> None:
    with pytest.raises(KindError, match="shares the table of an embedding"):
        tt.nn.tied_head(nn.Linear(3, 4))
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., 12\)"):
        tt.nn.tied_head(make("low_rank"))(torch.randn(3, 11))
    with pytest.raises(KindError, match="found a dense table"):
        tt.nn.tied_head(nn.Embedding(5, 3)).plan()
