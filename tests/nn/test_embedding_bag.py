"""Embedding bags are torch's with the same table: every mode and option, outputs and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import DTypeError, ModeIndexError, ShapeError
from tensortrain.nn.embedding import bag as embedding_bag
from tensortrain.testing import IMPLEMENTATIONS, TOLERANCE, assert_gradcheck, dense_parts, rel_error, wide

MODES = ("sum", "mean", "max")
FORMATS = ("tt", "low_rank")
# Bags of 3, 0, 2, 0 and 5 ids, ids again and again, one bag of padding (3) alone, the padding row in others too.
IDS = torch.tensor([0, 3, 7, 3, 3, 52, 7, 7, 3, 1])
OFFSETS = torch.tensor([0, 3, 3, 5, 5])
ENDS = torch.tensor([0, 3, 3, 5, 5, 10])


def make(**options: Any) -> tt.nn.EmbeddingBag:
    return tt.nn.EmbeddingBag(53, 12, **{"rank": 3, **options})


def assert_agrees(layer: Any, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> None:
    """Output, gradients of every core and of the weights are torch's on the dense table."""
    tol = TOLERANCE[layer.cores[0].dtype]
    cores, table, _ = dense_parts(layer)
    if layer.max_norm is not None:  # torch writes the scaled rows into its table, which no gradient can follow
        norms = table.norm(p=layer.norm_type, dim=1, keepdim=True)
        table = torch.where(norms > layer.max_norm, table * (layer.max_norm / (norms + 1e-7)), table)
    bag_ids, bag_padding = ids, layer.padding_idx
    if layer.scale_grad_by_freq:
        # torch 2.13 divides by wrong counts in bags on the CPU (pytorch #190063), by the right ones elsewhere.
        table = F.embedding(ids.reshape(-1), table, layer.padding_idx, None, 2.0, True)
        table = torch.cat([torch.zeros(1, 12), table])
        bag_ids, bag_padding = torch.arange(1, ids.numel() + 1).reshape(ids.shape), 0
        bag_ids = bag_ids.masked_fill(ids == layer.padding_idx, 0) if layer.padding_idx is not None else bag_ids
    exact_weights = None if weights is None else wide(weights).requires_grad_()
    exact = F.embedding_bag(
        bag_ids,
        table,
        offsets,
        mode=layer.mode,
        per_sample_weights=exact_weights,
        include_last_offset=layer.include_last_offset and ids.ndim == 1,
        padding_idx=bag_padding,
    )
    with torch.no_grad():
        assert rel_error(layer(ids, offsets, weights), exact) <= tol
    weights = None if weights is None else weights.detach().requires_grad_()
    found = layer(ids, offsets, weights)
    assert found.shape == exact.shape
    assert found.dtype == layer.cores[0].dtype
    assert rel_error(found, exact) <= tol
    upstream = torch.randn(exact.shape)
    mine = [*layer.cores, *([] if weights is None else [weights])]
    theirs = [*cores, *([] if exact_weights is None else [exact_weights])]
    found_grads = torch.autograd.grad(found, mine, upstream.to(found.dtype))
    exact_grads = torch.autograd.grad(exact, theirs, upstream.to(exact.dtype))
    for a, b in zip(found_grads, exact_grads, strict=True):
        assert rel_error(a, b) <= tol


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "padding, first row": {"padding_idx": 0},
    "padding, last row": {"padding_idx": -1},
    "max_norm": {"max_norm": 3.0},
    "max_norm, 1-norm, padding": {"max_norm": 9.0, "norm_type": 1.0, "padding_idx": 3},
    "frequencies": {"scale_grad_by_freq": True},
    "frequencies, padding": {"scale_grad_by_freq": True, "padding_idx": 3},
    "frequencies, max_norm": {"scale_grad_by_freq": True, "max_norm": 3.0},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees(name: str, mode: str, format: str, implementation: str) -> None:
    options = OPTIONS[name]
    if mode == "max" and options.get("scale_grad_by_freq"):
        with pytest.raises(ShapeError, match="does not scale gradients by frequency"):
            make(mode=mode, **options)
        return
    layer = make(mode=mode, format=format, implementation=implementation, **options)
    assert_agrees(layer, IDS, OFFSETS)
    assert_agrees(layer, IDS.reshape(2, 5))
    weights = torch.randn(10) if mode == "sum" else None
    layer.include_last_offset = True
    assert_agrees(layer, IDS, ENDS, weights)
    assert_agrees(layer, IDS.reshape(5, 2), None, None if weights is None else weights.reshape(5, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_single_precision(implementation: str, mode: str) -> None:
    layer = make(mode=mode, implementation=implementation, padding_idx=3, dtype=torch.float32)
    assert_agrees(layer, IDS, OFFSETS, torch.randn(10, dtype=torch.float32) if mode == "sum" else None)


def test_max_norm_scales_some_rows() -> None:
    norms = make().weight.detach().norm(dim=1)
    assert 0.1 < float((norms > 3.0).double().mean()) < 0.9  # else the cases above show nothing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_empty_bags_are_zero(padding_idx: int | None, mode: str) -> None:
    layer = make(mode=mode, padding_idx=padding_idx)
    found = layer(IDS, OFFSETS)
    assert torch.equal(found[[1, 3]], torch.zeros(2, 12))
    assert (found[2].abs().max() == 0) == (padding_idx == 3)  # a bag of padding alone
    nothing = torch.zeros(0, dtype=torch.int64)
    for offsets, n_bags in ((torch.tensor([0]), 1), (torch.tensor([0, 0, 0]), 3), (nothing, 0)):
        assert torch.equal(layer(nothing, offsets), torch.zeros(n_bags, 12))
    assert torch.equal(layer(torch.zeros(4, 0, dtype=torch.int64)), torch.zeros(4, 12))
    assert layer(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("parts", [1, 3000])
def test_many_rows_are_taken_in_parts(
    parts: int, padding_idx: int | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(mode=mode, padding_idx=padding_idx, implementation="factorized")
    ids, offsets = torch.randint(53, (200,)), torch.arange(0, 200, 8)
    calls: list[int] = []
    reduce = embedding_bag.EmbeddingBag._reduce

    def counted(self: Any, places: Tensor, rows: Tensor, *rest: Any) -> Tensor:
        calls.append(rows.nbytes)
        return reduce(self, places, rows, *rest)

    monkeypatch.setattr(embedding_bag, "_MAX_ROW_BYTES", parts)
    monkeypatch.setattr(embedding_bag.EmbeddingBag, "_reduce", counted)
    weights = torch.randn(200) if mode == "sum" else None
    assert_agrees(layer, ids, offsets, weights)
    assert len(calls) == 50 if parts == 1 else len(calls) > 4  # called twice, each time in so many parts
    layer.include_last_offset = True
    assert_agrees(layer, ids, torch.cat([offsets, torch.tensor([200])]), weights)
    assert parts == 1 or max(calls) <= parts


def test_distinct_rows_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = make(mode="max", implementation="factorized"), []
    lookup = type(layer.format).lookup

    def spy(self: Any, ids: Tensor, *rest: Any) -> Tensor:
        seen.append(ids)
        return lookup(self, ids, *rest)

    monkeypatch.setattr(type(layer.format), "lookup", spy)
    layer(IDS, OFFSETS)
    assert [ids.tolist() for ids in seen] == [[0, 1, 3, 7, 52]]


def test_narrow_integers_and_nested_bags() -> None:
    layer = make(mode="sum")
    exact = layer(IDS, OFFSETS)
    assert rel_error(layer(IDS.int(), OFFSETS.int()), exact) == 0
    nested = torch.nested.nested_tensor([IDS[:3], IDS[3:5], IDS[5:]], layout=torch.jagged)
    assert rel_error(layer(nested), exact[[0, 2, 4]]) <= 1e-14
    weights = torch.nested.nested_tensor_from_jagged(torch.rand(10), nested.offsets())
    theirs = layer.to_dense()(nested, per_sample_weights=weights)
    assert rel_error(layer(nested, per_sample_weights=weights), theirs) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    for implementation in ("factorized", "dense"):
        layer = make(mode=mode, implementation=implementation, padding_idx=3, rank=2)
        assert_gradcheck(layer, IDS.reshape(2, 5))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_from_dense_and_back(mode: str, format: str) -> None:
    dense = nn.EmbeddingBag(53, 12, 3.0, 1.0, mode != "max", mode, include_last_offset=True, padding_idx=2)
    layer = tt.nn.EmbeddingBag.from_dense(dense, format=format)
    back = layer.to_dense()
    assert repr(back) == repr(dense)
    assert back.include_last_offset
    assert rel_error(back.weight, dense.weight) <= 1e-13
    assert rel_error(layer(IDS, ENDS), dense(IDS, ENDS)) <= 1e-12  # torch changes its table here, so this comes last


def test_from_pretrained() -> None:
    table = torch.randn(53, 12)
    layer = tt.nn.EmbeddingBag.from_pretrained(table, mode="sum", include_last_offset=True, format="low_rank")
    theirs = nn.EmbeddingBag.from_pretrained(table, mode="sum", include_last_offset=True)
    assert rel_error(layer(IDS, ENDS), theirs(IDS, ENDS)) <= 1e-12
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for p in tt.nn.EmbeddingBag.from_pretrained(table, freeze=False).parameters())


def test_counts_config_and_checkpoint() -> None:
    layer = tt.nn.EmbeddingBag(25000, 256, in_modes=(25, 30, 40), out_modes=(4, 8, 8), rank=16)
    assert layer.n_params == 68160
    assert layer.mode == "mean"
    layer = make(mode="max", padding_idx=3, hot_rows=5)
    again = tt.nn.EmbeddingBag(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(IDS, OFFSETS), layer(IDS, OFFSETS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_compiles_and_exports(padding_idx: int | None, mode: str) -> None:
    for implementation in ("factorized", "dense"):
        layer = make(mode=mode, padding_idx=padding_idx, implementation=implementation, hot_rows=4)
        layer.populate_hot_rows_(ids=IDS)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        exact = layer(IDS, OFFSETS)
        found = compiled(IDS, OFFSETS)
        assert rel_error(found, exact) <= 1e-12
        upstream, parameters = torch.randn_like(exact), list(layer.parameters())
        ours = torch.autograd.grad(found, parameters, upstream)
        theirs = torch.autograd.grad(exact, parameters, upstream)
        assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))
    program = torch.export.export(layer.eval(), (IDS, OFFSETS))
    assert rel_error(program.module()(IDS, OFFSETS), exact) <= 1e-12


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_compiled_frequencies(padding_idx: int | None) -> None:
    layer = make(scale_grad_by_freq=True, padding_idx=padding_idx, implementation="factorized")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    ours = torch.autograd.grad(compiled(IDS, OFFSETS).square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(layer(IDS, OFFSETS).square().sum(), list(layer.parameters()))
    assert all(rel_error(a, b) <= 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_a_model_with_bags_is_compressed_and_saved(tmp_path: Any) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(600, 16, mode="sum")
            self.out = nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.bag(ids))

    model, ids = Text(), torch.randint(600, (32, 6))
    table = torch.randn(600, 2) @ torch.randn(2, 16)
    with torch.no_grad():
        model.bag.weight.copy_(table)
    result = tt.compress(model, budget=0.3, data=[ids])
    assert isinstance(result.model.bag, tt.nn.EmbeddingBag)
    assert rel_error(result.model(ids), model(ids)) <= 1e-6
    tt.save_pretrained(result.model, tmp_path)
    again = tt.load_pretrained(tmp_path, model=Text())
    assert torch.equal(again(ids), result.model(ids))


def test_messages() -> None:
    layer, total = make(), make(mode="sum")
    with pytest.raises(ShapeError, match="mode must be one of"):
        make(mode="median")
    with pytest.raises(ShapeError, match="sparse=True"):
        make(sparse=True)
    with pytest.raises(ShapeError, match="need no offsets"):
        layer(IDS.reshape(2, 5), OFFSETS)
    with pytest.raises(ShapeError, match="offsets None"):
        layer(IDS)
    with pytest.raises(ShapeError, match=r"ids must be \(b, n\)"):
        layer(torch.zeros(1, 2, 3, dtype=torch.int64))
    for offsets in ([1, 3], [0, 11], [0, 5, 3]):
        with pytest.raises(ShapeError, match="offsets must rise"):
            layer(IDS, torch.tensor(offsets))
    with pytest.raises(ModeIndexError, match="0 to 52"):
        layer(IDS + 1, OFFSETS)
    with pytest.raises(ShapeError, match="need mode 'sum'"):
        layer(IDS, OFFSETS, torch.ones(10))
    with pytest.raises(ShapeError, match="shape of the ids"):
        total(IDS, OFFSETS, torch.ones(9))
    with pytest.raises(DTypeError, match="dtype of the layer"):
        total(IDS, OFFSETS, torch.ones(10, dtype=torch.float32))


@pytest.mark.parametrize("mode", MODES)
def test_bags_of_one_length_are_trained_alike_by_every_call(mode: str) -> None:
    torch.manual_seed(0)
    layer = make(mode=mode, dtype=torch.float64)
    ids = torch.randint(53, (5, 4))
    for _ in range(3):  # the first call leaves a shorter way to the next ones
        assert_agrees(layer, ids)
        assert layer.runner.way is not None
    equal = torch.full((2, 3), 7)
    assert_agrees(layer, equal)
    with pytest.raises(ModeIndexError):
        layer(torch.full((2, 3), 53))
