"""The row of ``padding_idx`` is what it was given, to the bit; only its gradient is zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import ShapeError

IDS = torch.tensor([[7, 3], [49, 7]])
HOW = {
    "exact": {},
    "rank": {"rank": 2},
    "eps": {"eps": 0.3},
    "low rank": {"rank": 2, "format": "low_rank"},
    "core by core": {"rank": 2, "implementation": "factorized"},
    "kept": {"rank": 2, "implementation": "dense"},
    "hot rows": {"rank": 2, "hot_rows": 4, "counts": torch.arange(50)},
}
every_way = pytest.mark.parametrize("how", HOW)


def table_of(dtype: torch.dtype | None = None) -> Tensor:
    table = torch.randn(50, 12, dtype=dtype)
    table[7] *= 100  # as it may be that nobody looks at
    return table


def dense_layer(**options: Any) -> nn.Embedding:
    return nn.Embedding.from_pretrained(table_of(), freeze=False, padding_idx=7, **options)


@every_way
def test_it_is_kept(how: str) -> None:
    dense = dense_layer()
    layer = tt.nn.Embedding.from_dense(dense, **HOW[how])
    row = dense.weight[7].detach()
    for found in (layer(IDS)[0, 0], layer(IDS)[1, 1], layer.weight[7], layer.to_dense().weight[7]):
        assert torch.equal(found, row)
    again = tt.nn.Embedding.from_dense(layer.to_dense())
    assert torch.equal(again.weight[7], row)
    assert layer.n_params == sum(p.numel() for p in layer.parameters())


@every_way
def test_it_gets_no_gradient_and_stays(how: str) -> None:
    dense = dense_layer()
    layer = tt.nn.Embedding.from_dense(dense, **HOW[how])
    layer(torch.tensor([7, 7])).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in layer.parameters())
    layer(IDS).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    assert torch.equal(layer(IDS)[0, 0], dense.weight[7])


def test_it_does_not_weigh_on_the_other_rows() -> None:
    dense = dense_layer()
    without = copy.deepcopy(dense)
    with torch.no_grad():
        without.weight[7] = 0
    layer, other = (tt.nn.Embedding.from_dense(one, rank=2) for one in (dense, without))
    others = torch.arange(50) != 7
    torch.testing.assert_close(layer.weight[others], other.weight[others])
    assert other.padding_row is None


def test_norms_are_limited_as_in_torch() -> None:
    dense = dense_layer(max_norm=1.0)
    layer = tt.nn.Embedding.from_dense(dense)
    torch.testing.assert_close(layer(IDS), dense(IDS))


def test_frequencies_leave_rows_as_they_are() -> None:
    dense = dense_layer(scale_grad_by_freq=True)
    layer = tt.nn.Embedding.from_dense(dense, rank=2)
    plain = tt.nn.Embedding.from_dense(dense_like(dense), rank=2)
    assert torch.equal(layer(IDS), plain(IDS))


def dense_like(dense: nn.Embedding) -> nn.Embedding:
    return nn.Embedding.from_pretrained(dense.weight.detach(), freeze=False, padding_idx=7)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_leave_it_out(mode: Any) -> None:
    dense = nn.EmbeddingBag.from_pretrained(table_of(), padding_idx=7, mode=mode)
    layer = tt.nn.EmbeddingBag.from_dense(dense)
    torch.testing.assert_close(layer(IDS), dense(IDS))
    assert torch.equal(layer.to_dense().weight[7], dense.weight[7])


@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
def test_tied_logits(implementation: Any) -> None:
    layer = tt.nn.Embedding.from_dense(dense_layer(), rank=2, implementation=implementation)
    h = torch.randn(3, 12, requires_grad=True)
    logits = tt.nn.tied_head(layer)(h)
    torch.testing.assert_close(logits, F.linear(h, layer.weight))
    (grad,) = torch.autograd.grad(logits[:, 7].sum(), h, retain_graph=True)
    torch.testing.assert_close(grad, layer.weight[7].detach().expand(3, -1))


def test_state_comes_and_goes_with_the_row() -> None:
    layer = tt.nn.Embedding.from_dense(dense_layer(), rank=2)
    fresh = tt.nn.Embedding(50, 12, padding_idx=7, rank=layer.ranks, in_modes=layer.in_modes, out_modes=layer.out_modes)
    older = fresh.state_dict()
    assert "padding_row" not in older  # a zero row is not stored: as in older releases
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(IDS), layer(IDS))
    assert torch.equal(copy.deepcopy(fresh)(IDS), layer(IDS))
    fresh.load_state_dict(older)
    assert fresh(IDS)[0, 0].abs().max() == 0
    assert layer.to(torch.float32).padding_row.dtype is torch.float32


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_it_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    dense = getattr(nn, kind).from_pretrained(table_of(), padding_idx=7)
    model = nn.Sequential(getattr(tt.nn, kind).from_dense(dense, rank=2))
    tt.save_pretrained(model, tmp_path)
    loaded = tt.load_pretrained(tmp_path, model=nn.Sequential(getattr(nn, kind)(50, 12, padding_idx=7)))
    assert torch.equal(loaded[0].weight, model[0].weight)
    assert torch.equal(loaded[0].weight[7], dense.weight[7])


def test_a_compressed_model_keeps_it() -> None:
    dense = nn.Embedding.from_pretrained(torch.randn(400, 3) @ torch.randn(3, 48), freeze=False, padding_idx=0)
    result = tt.compress(nn.Sequential(dense), budget="4x", measure=False, allow_slower=True)
    assert isinstance(result.model[0], tt.nn.Embedding)
    assert torch.equal(result.model(torch.tensor([0])), dense(torch.tensor([0])))


def test_a_row_needs_an_id() -> None:
    with pytest.raises(ShapeError, match="padding_idx=None"):
        tt.nn.Embedding(50, 12, has_padding_row=True)
