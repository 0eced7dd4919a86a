"""Hot rows: a few ids keep a row of their own, exact and trained beside the cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import ModeIndexError, NonFiniteError, ShapeError
from tensortrain.testing import IMPLEMENTATIONS, rel_error

HOT = [2, 7, 30, 52]
KINDS = (tt.nn.Embedding, tt.nn.EmbeddingBag)


def counts_of(hot: list[int]) -> Tensor:
    counts = torch.ones(53)
    counts[hot] = torch.arange(100.0, 100.0 + len(hot))
    return counts


def make(kind: Any = tt.nn.Embedding, **options: Any) -> Any:
    layer = kind(53, 12, **{"rank": 3, "hot_rows": 4, **options}).populate_hot_rows_(counts_of(HOT))
    with torch.no_grad():
        layer.hot_weight.add_(1.0)  # as if trained, so that a row from the wrong place shows
    return layer


def effective_table(layer: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """Cores and hot rows that record gradients, and the table made of them the plain way."""
    cores = [core.detach().clone().requires_grad_() for core in layer.cores]
    hot = layer.hot_weight.detach().clone().requires_grad_()
    table = layer.format.to_dense(cores, layer.spec).clone()
    table[layer.hot_ids] = hot
    return cores, hot, table


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["tt", "low_rank"])
@pytest.mark.parametrize("ids", [[[2, 5, 2], [52, 0, 7]], [[0, 1, 3]], [[2, 7, 30]], [[]]])
def test_rows_and_gradients(ids: list[list[int]], format: str, implementation: str) -> None:
    layer = make(format=format, implementation=implementation)
    cores, hot, table = effective_table(layer)
    given = torch.tensor(ids, dtype=torch.int64)
    exact = table[given]
    with torch.no_grad():
        assert rel_error(layer(given), exact) <= 1e-12
    found = layer(given)
    assert found.shape == exact.shape
    assert rel_error(found, exact) <= 1e-12
    upstream = torch.randn_like(exact)
    ours = torch.autograd.grad(found, [*layer.cores, layer.hot_weight], upstream)
    theirs = torch.autograd.grad(exact, [*cores, hot], upstream)
    assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))
    assert rel_error(layer.weight, table) <= 1e-12
    assert rel_error(layer.to_dense().weight, table) <= 1e-12


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str) -> None:
    layer = make(tt.nn.EmbeddingBag, mode=mode, padding_idx=5, implementation="factorized")
    cores, hot, table = effective_table(layer)
    ids = torch.tensor([[2, 5, 2, 9], [52, 0, 7, 7], [5, 5, 5, 5]])
    exact = nn.functional.embedding_bag(ids, table, mode=mode, padding_idx=5)
    found = layer(ids)
    assert rel_error(found, exact) <= 1e-12
    upstream = torch.randn_like(exact)
    ours = torch.autograd.grad(found, [*layer.cores, layer.hot_weight], upstream)
    theirs = torch.autograd.grad(exact, [*cores, hot], upstream)
    assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_hot_ids_do_not_reach_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = make(implementation="factorized"), []
    lookup = type(layer.format).lookup

    def spy(self: Any, ids: Tensor, *rest: Any) -> Tensor:
        seen.extend(ids.tolist())
        return lookup(self, ids, *rest)

    monkeypatch.setattr(type(layer.format), "lookup", spy)
    layer(torch.tensor([2, 5, 52, 6])).sum().backward()
    assert seen == [5, 6]
    layer.zero_grad()
    layer(torch.tensor(HOT)).sum().backward()
    assert all(core.grad is None or core.grad.abs().max() == 0 for core in layer.cores)
    assert torch.equal(layer.hot_weight.grad, torch.ones(4, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_off_by_default(kind: Any) -> None:
    layer = kind(53, 12, rank=3)
    assert set(layer.state_dict()) == {"cores.0", "cores.1", "cores.2"}
    assert "hot_rows" not in layer.config()
    assert layer.n_params == layer.spec.n_params
    with pytest.raises(ShapeError, match="found hot_rows=0"):
        layer.populate_hot_rows_(torch.ones(53))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_state_and_config(kind: Any) -> None:
    layer = make(kind)
    assert layer.n_params == layer.spec.n_params + 4 * 12 == sum(p.numel() for p in layer.parameters())
    assert layer.compression == pytest.approx(53 * 12 / layer.n_params, rel=1e-12)
    again = kind(**layer.config())
    again.load_state_dict(layer.state_dict())
    ids = torch.arange(53)[None]
    assert torch.equal(again(ids), layer(ids))
    assert set(layer.state_dict()) == {"cores.0", "cores.1", "cores.2", "hot_weight", "hot_ids"}


def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    model = nn.Sequential(make(), nn.Linear(12, 3))
    tt.save_pretrained(model, tmp_path)
    again = tt.load_pretrained(tmp_path, model=nn.Sequential(nn.Embedding(53, 12), nn.Linear(12, 3)))
    ids = torch.arange(53)
    assert torch.equal(again(ids), model(ids))


def test_filling_changes_no_row() -> None:
    layer = tt.nn.Embedding(53, 12, rank=3, hot_rows=4)
    ids = torch.arange(53)
    before = layer(ids)
    assert rel_error(layer.populate_hot_rows_(counts_of(HOT))(ids), before) <= 1e-14
    assert layer.hot_ids.tolist() == HOT
    with torch.no_grad():
        layer.hot_weight.add_(1.0)
    trained = layer(ids)
    layer.populate_hot_rows_(counts_of([7, 8, 9, 30]))  # 7 and 30 stay hot and keep what they have learned
    after = layer(ids)
    assert layer.hot_ids.tolist() == [7, 8, 9, 30]
    assert torch.equal(after[[7, 30]], trained[[7, 30]])
    cold = [k for k in range(53) if k not in (7, 30)]
    assert rel_error(after[cold], before[cold]) <= 1e-14
    layer.reset_parameters()
    assert layer.hot_ids.tolist() == [-1] * 4
    assert rel_error(layer(ids), layer.format.to_dense(list(layer.cores), layer.spec)) <= 1e-12


def test_the_ids_met_most_become_hot() -> None:
    layer = tt.nn.Embedding(53, 12, padding_idx=0, rank=3, hot_rows=3)
    text = torch.tensor([[0, 0, 0, 5, 5, 9], [9, 5, 20, 20, 1, 0]])
    assert layer.populate_hot_rows_(ids=text).hot_ids.tolist() == [5, 9, 20]  # the padding row is zero anyway
    assert layer.populate_hot_rows_(ids=text[:, :3]).hot_ids.tolist() == [5, 9, 20]
    # Fewer ids than rows: the others stay unused.
    assert layer.populate_hot_rows_(ids=torch.tensor([7, 7, 0])).hot_ids.tolist() == [-1, -1, 7]
    assert layer(torch.tensor([0])).abs().max() == 0
    assert layer.weight[0].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_keeps_hot_rows_exactly(kind: Any) -> None:
    dense = kind.dense_type(53, 12)
    layer = kind.from_dense(dense, rank=2, hot_rows=4, counts=counts_of(HOT))
    assert torch.equal(layer.weight[HOT], dense.weight[HOT])
    assert rel_error(layer.weight, dense.weight) > 0.1
    assert layer.hot_weight.requires_grad
    frozen = kind.from_dense(dense.requires_grad_(False), rank=2, hot_rows=4, counts=counts_of(HOT))
    assert not any(p.requires_grad for p in frozen.parameters())
    later = kind.from_dense(dense, rank=2, hot_rows=4)
    assert later.hot_ids.tolist() == [-1] * 4
    later.populate_hot_rows_(counts_of(HOT), table=dense.weight)
    assert torch.equal(later.weight[HOT], dense.weight[HOT])


def test_cores_are_fitted_to_the_cold_rows() -> None:
    dense = nn.Embedding(60, 16)
    counts = 1.0 / torch.arange(1, 61) ** 2
    with_hot = tt.nn.Embedding.from_dense(dense, rank=2, input_gram=counts, hot_rows=5)
    plain = tt.nn.Embedding.from_dense(dense, rank=2, input_gram=counts)
    assert with_hot.hot_ids.tolist() == [0, 1, 2, 3, 4]

    def cold_error(layer: tt.nn.Embedding) -> float:
        lost = (layer.weight - dense.weight)[5:].square().sum(dim=1)
        return float((counts[5:] * lost).sum().detach())

    assert cold_error(with_hot) < 0.9 * cold_error(plain)


def test_max_norm_frequencies_and_autocast_hold_for_hot_rows() -> None:
    layer = make(max_norm=2.0, scale_grad_by_freq=True)
    ids = torch.tensor([2, 2, 2, 5])
    assert float(layer(ids).detach().norm(dim=1).max()) <= 2.0
    layer.max_norm = None
    layer(ids).sum().backward()
    assert rel_error(layer.hot_weight.grad[0], torch.ones(12)) <= 1e-14  # 3 times a third
    narrow = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrow(ids).dtype == torch.float32


def test_compiles_and_exports() -> None:
    for layer in (make(implementation="factorized"), tt.nn.Embedding(53, 12, rank=3, hot_rows=4)):
        ids = torch.tensor([2, 5, 52, 6, 0])
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert rel_error(compiled(ids), layer(ids)) <= 1e-12
        ours = torch.autograd.grad(compiled(ids).square().sum(), list(layer.parameters()))
        theirs = torch.autograd.grad(layer(ids).square().sum(), list(layer.parameters()))
        assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))
        program = torch.export.export(layer, (ids,))
        assert rel_error(program.module()(ids), layer(ids)) <= 1e-12


def test_messages() -> None:
    layer = make()
    with pytest.raises(ShapeError, match="hot_rows must not exceed the vocabulary"):
        tt.nn.Embedding(53, 12, rank=3, hot_rows=54)
    with pytest.raises(ShapeError, match="both or neither"):
        layer.populate_hot_rows_()
    with pytest.raises(ShapeError, match="Pass ids="):
        layer.populate_hot_rows_(torch.tensor([1, 2, 2]))
    with pytest.raises(NonFiniteError, match="not negative"):
        layer.populate_hot_rows_(-torch.ones(53))
    with pytest.raises(ModeIndexError, match="0 to 52"):
        layer.populate_hot_rows_(ids=torch.tensor([53]))
    with pytest.raises(ShapeError, match="a row per id"):
        layer.populate_hot_rows_(torch.ones(53), table=torch.randn(52, 12))
