"""Torch's kernel on dense weights and the steps of the layer compute the same, to the second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import tensortrain as tt
from tensortrain.nn.recurrent import layers, ways
from tensortrain.nn.recurrent.cells import GRUCell, LSTMCell, RNNCell
from tensortrain.nn.recurrent.ways import KERNEL, STEPS


@pytest.fixture(params=[True, False], ids=["kernel", "steps"])
def by_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(layers, "fastest_way", lambda *args: KERNEL if request.param else STEPS)
    return bool(request.param)


def outputs_of(layer: Any, x: Any) -> list[Tensor]:
    output, final = layer(x)
    finals = final if isinstance(final, tuple) else (final,)
    return [output.data if hasattr(output, "data") and not isinstance(output, Tensor) else output, *finals]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}])
def test_both_ways_agree_with_torch(kind: str, options: dict[str, Any], by_kernel: bool) -> None:
    torch.manual_seed(0)
    layer = getattr(tt.nn, kind)(18, 12, rank=3, compress="both", **options)
    dense, x = layer.to_dense(), torch.randn(7, 3, 18, requires_grad=True)
    for given in (x, pack_padded_sequence(x, torch.tensor([7, 5, 2]))):
        found, expected = outputs_of(layer, given), outputs_of(dense, given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(sum(y.sin().sum() for y in ys), x, retain_graph=True)[0] for ys in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    if kind == "LSTM":
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], dense(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}])
def test_gradients_of_torchs_kernel_have_gradients(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = tt.nn.LSTM(10, 6, rank=2, **options), torch.randn(4, 2, 10)
    found = []
    for way in (KERNEL, STEPS):
        monkeypatch.setattr(layers, "fastest_way", lambda *args, way=way: way)
        cores = list(layer.parameters())
        first = torch.autograd.grad(layer(x)[0].square().sum(), cores, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), cores))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_must_not_be_dense_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fastest_way", lambda *args: pytest.fail("was asked"))
    x = torch.randn(3, 2, 16)
    tt.nn.GRU(16, 8, rank=2, implementation="factorized")(x)
    tt.nn.GRU(16, 8, rank=2, reset_after=False)(x)
    layer = tt.nn.GRU(16, 8, rank=2)
    layer.l0.ih.dense_limit_bytes = 10
    layer(x)


def test_a_trial_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ways, "_KNOWN", {})
    monkeypatch.setattr(ways, "_FAR_APART", float("inf"))
    layer, x = tt.nn.LSTM(24, 16, rank=2), torch.randn(5, 2, 24)
    before = [p.clone() for p in layer.parameters()]
    layer(x)[0].sum().backward()
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    dense = layer.to_dense()
    dense(x)[0].sum().backward()
    torch.testing.assert_close(layer.l0.hh.weight.grad, dense.weight_hh_l0.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LSTMCell, GRUCell, RNNCell])
@pytest.mark.parametrize("faster", [True, False])
def test_cells_take_torchs_step(kind: Any, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortrain.nn.recurrent.cells.fused_step_is_faster", lambda *args: faster)
    torch.manual_seed(0)
    cell = kind(18, 12, rank=3, compress="both")
    dense = cell.to_dense()
    h = torch.randn(4, 12)
    for x, state in ((torch.randn(4, 18), h), (torch.randn(18), h[0]), (torch.randn(4, 18), None)):
        given = (state, state) if kind is LSTMCell and state is not None else state
        torch.testing.assert_close(cell(x, given), dense(x, given), rtol=1e-4, atol=1e-5)


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    torch.manual_seed(0)
    layer = tt.nn.LSTM(6, 8, rank=2)
    for cell in layer.cells().values():
        cell.ih.implementation = "dense"  # torch's kernel runs
    x = torch.randn(5, 3, 6, requires_grad=True)
    y = layer(x)[0].square().sum()
    parameters = [x, *layer.parameters()]
    first = torch.autograd.grad(y, parameters, retain_graph=True)
    again = torch.autograd.grad(y, parameters)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, parameters)
