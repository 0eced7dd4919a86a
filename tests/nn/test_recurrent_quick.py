"""The short way of recurrent layers and cells at inference: torch's kernel on weights that are kept, never stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tensortrain as tt
from tensortrain.errors import ShapeError

CELLS = ["RNNCell", "GRUCell", "LSTMCell"]
LAYERS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "GRU": {"num_layers": 2},
    "LSTM": {"bidirectional": True, "batch_first": True},
}


def first(found: Any) -> torch.Tensor:
    while isinstance(found, tuple):
        found = found[0]
    return found


def agree(ours: Any, *inputs: Any) -> None:
    with torch.no_grad():
        expected = ours.to_dense()(*inputs)
        for _ in range(3):
            torch.testing.assert_close(ours(*inputs), expected)


@pytest.mark.parametrize("compress", ["input", "both"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_follow_their_cores(kind: str, compress: str) -> None:
    torch.manual_seed(0)
    cell: Any = getattr(tt.nn, kind)(12, 8, compress=compress)
    x, h = torch.randn(3, 12), torch.randn(3, 8)
    state = (h, h.flip(0)) if kind == "LSTMCell" else h
    agree(cell, x)
    agree(cell, x, state)
    with torch.no_grad():
        cell.ih.cores[0].mul_(2)
    agree(cell, x, state)
    cell.ih.implementation = "factorized"
    agree(cell, x, state)
    seen: list[int] = []
    cell.ih.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        cell(x)
    assert seen == [1]


@pytest.mark.parametrize("kind", CELLS)
def test_cells_refuse_what_does_not_fit(kind: str) -> None:
    cell: Any = getattr(tt.nn, kind)(12, 8)
    agree(cell, torch.randn(3, 12))
    with torch.no_grad():
        with pytest.raises(ShapeError):
            cell(torch.randn(3, 11))
        with pytest.raises(ShapeError):
            cell(torch.randn(3, 12), torch.randn(2, 8))
    assert cell(torch.randn(3, 12))[0].requires_grad
    assert first(cell(torch.randn(12))).shape == (8,)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_follow_their_cores(kind: str) -> None:
    torch.manual_seed(0)
    options = LAYERS[kind]
    layer: Any = getattr(tt.nn, kind)(12, 8, compress="both", **options)
    for cell in layer.cells().values():
        cell.ih.implementation = cell.hh.implementation = "dense"  # torch's kernel runs
    x = torch.randn(5, 3, 12)
    agree(layer, x)
    n = len(layer.cells())
    h = torch.randn(n, 5 if options.get("batch_first") else 3, 8)
    agree(layer, x, (h, -h) if kind == "LSTM" else h)
    with torch.no_grad():
        for cell in layer.cells().values():
            cell.hh.cores[-1].mul_(1.5)
    agree(layer, x)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    agree(layer, x)
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()
    agree(layer, x)
    with torch.no_grad(), pytest.raises(ShapeError):
        layer(x, (h[:, :1], h) if kind == "LSTM" else h[:, :1])
    assert layer(x)[0].requires_grad


def test_dropout_between_layers_still_drops() -> None:
    layer: Any = tt.nn.GRU(6, 4, num_layers=2, dropout=0.5)
    for cell in layer.cells().values():
        cell.ih.implementation = "dense"
    x = torch.randn(4, 2, 6)
    with torch.no_grad():
        layer.eval()
        torch.testing.assert_close(layer(x), layer(x))
        layer.train()
        assert not torch.equal(layer(x)[0], layer(x)[0])
