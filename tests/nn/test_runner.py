"""A layer and what runs it: copies, old pickles, what holds what."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.nn import runner

MAKERS = {
    "chain": lambda: tt.nn.Linear(24, 20, rank=3),
    "network": lambda: tt.nn.Linear(24, 20, format="cp", rank=3),
    "padded": lambda: tt.nn.Linear(23, 19, in_modes=(4, 6), out_modes=(4, 5), rank=3),
    "convolution": lambda: tt.nn.Conv2d(8, 12, 3, rank=3),
    "embedding": lambda: tt.nn.Embedding(50, 12, rank=3),
    "tied head": lambda: tt.nn.tied_head(tt.nn.Embedding(50, 12, rank=3)),
}


def input_of(layer: Any) -> torch.Tensor:
    if isinstance(layer, tt.nn.Embedding):
        return torch.randint(50, (5,))
    if isinstance(layer, tt.nn.Conv2d):
        return torch.randn(2, 8, 5, 5)
    return torch.randn(5, layer.in_features)


@pytest.mark.parametrize("kind", MAKERS)
def test_layers_pickled_when_plans_lay_in_them(kind: str) -> None:
    layer = MAKERS[kind]()
    x = input_of(layer)
    expected = layer(x)
    state = copy.copy(layer).__dict__  # as it was pickled then
    for old in [name for name in ("runner", "_runner", "_planned") if name in state]:
        del state[old]
    state |= {"_plans": {"some": "plan"}, "_static_plan": None}
    loaded: Any = type(layer).__new__(type(layer))
    loaded.__setstate__(state)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert "_plans" not in vars(loaded)


@pytest.mark.parametrize("kind", MAKERS)
def test_copies_and_pickles_run_as_the_layer(kind: str) -> None:
    layer = MAKERS[kind]()
    x = input_of(layer)
    with torch.no_grad():
        expected = [layer(x), layer(x)][-1]
        for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_layer_leaves_memory_with_its_last_name(kind: str) -> None:
    layer = MAKERS[kind]()
    layer(input_of(layer)).sum().backward()
    with torch.no_grad():
        layer(input_of(layer))
    gc.collect()
    gc.disable()
    try:
        kept = weakref.ref(next(layer.parameters()))
        del layer
        assert kept() is None
    finally:
        gc.enable()


def test_another_spec_brings_another_runner() -> None:
    layer, other = tt.nn.Linear(24, 20, rank=3), tt.nn.Linear(24, 20, rank=2)
    before = layer.plan(4)
    layer.take_spec(other.spec)
    layer.cores = nn.ParameterList(other.cores)
    assert layer.plan(4).shape != before.shape
    x = torch.randn(4, 24)
    torch.testing.assert_close(layer(x), x @ other.weight.T + layer.bias)


def test_large_weights_share_a_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SMALL_WEIGHT_BYTES", 0)
    monkeypatch.setattr(runner, "memory_bytes", lambda: 8 * 3 * 64 * 64 * 8)  # three weights fit their eighth
    layers = [tt.nn.Linear(64, 64, rank=8, implementation="dense") for _ in range(3)]
    more = tt.nn.Linear(64, 64, rank=8)
    with torch.no_grad():
        for layer in layers[:2]:
            layer(torch.randn(2, 64))
        assert runner._may_keep_dense(more)
        layers[2](torch.randn(2, 64))
        assert not runner._may_keep_dense(more)
        layers[0].clear_cache()
        assert runner._may_keep_dense(more)


def test_tables_of_embeddings_are_kept_while_small_unless_told_otherwise() -> None:
    table, linear = tt.nn.Embedding(50, 12, rank=3), tt.nn.Linear(12, 50, rank=3)
    assert table.kept_limit_bytes == runner.SMALL_WEIGHT_BYTES <= linear.kept_limit_bytes
    table.dense_limit_bytes = 2**40
    assert table.kept_limit_bytes == 2**40
