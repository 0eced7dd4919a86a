"""What a layer computes depends on the dtype of its cores alone, not on torch's default dtype, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.nn.embedding.layers import scale_gradient

FORMATS = ["tt", "low_rank", "cp", "ring", "block_term", "btt", "tucker", "kronecker", "tt_separate"]
Made = tuple[nn.Module, tuple[Tensor, ...]]


def _ids() -> Tensor:
    return torch.tensor([3, 3, 3, 7, 7, 1, 0, 9, 9, 9, 9, 9, 9, 9])


def _bag(dtype: torch.dtype, **options: Any) -> Made:
    return tt.nn.EmbeddingBag(12, 8, rank=2, dtype=dtype, **options), (_ids(), torch.tensor([0, 5, 6]))


def _x(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


LAYERS: dict[str, Callable[[torch.dtype], Made]] = {
    "conv": lambda t: (tt.nn.Conv2d(4, 6, 3, rank=2, dtype=t), (_x(2, 4, 5, 5, dtype=t),)),
    "transposed conv": lambda t: (tt.nn.ConvTranspose2d(4, 6, 3, rank=2, dtype=t), (_x(2, 4, 5, 5, dtype=t),)),
    "embedding": lambda t: (tt.nn.Embedding(12, 8, rank=2, scale_grad_by_freq=True, max_norm=1.0, dtype=t), (_ids(),)),
    "bag": lambda t: _bag(t, mode="mean"),
    "bag by frequency": lambda t: _bag(t, mode="sum", scale_grad_by_freq=True),
    "lstm": lambda t: (tt.nn.LSTM(6, 8, rank=2, dtype=t), (_x(3, 2, 6, dtype=t),)),
    "gru": lambda t: (tt.nn.GRU(6, 8, rank=2, dtype=t), (_x(3, 2, 6, dtype=t),)),
    "attention": lambda t: (
        tt.nn.MultiheadAttention(8, 2, rank=2, dtype=t),
        tuple(_x(3, 2, 8, dtype=t) for _ in range(3)),
    ),
}
for _format in FORMATS:
    LAYERS[_format] = lambda t, f=_format: (  # type: ignore[misc]
        tt.nn.Linear(12, 8, format=f, rank=2, dtype=t),
        (_x(5, 12, dtype=t),),
    )


def _run(make: Callable[[torch.dtype], Made], dtype: torch.dtype, default: torch.dtype) -> list[Tensor]:
    torch.set_default_dtype(default)
    torch.manual_seed(0)
    layer, inputs = make(dtype)
    found = layer(*inputs)
    output = found[0] if isinstance(found, tuple) else found
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype) -> None:
    narrow, wide = (_run(LAYERS[name], dtype, default) for default in (torch.float32, torch.float64))
    assert all(a.dtype == dtype for a in narrow)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_decompositions(name: str, dtype: torch.dtype) -> None:
    dense = nn.Linear(12, 8, dtype=dtype)
    grams = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        gram = torch.eye(12, dtype=dtype) + 0.5
        grams.append(tt.nn.Linear.from_dense(dense, format=name, rank=2, input_gram=gram))
    assert all(core.dtype == dtype for core in grams[0].cores)
    assert all(torch.equal(a, b) for a, b in zip(grams[0].cores, grams[1].cores, strict=True))


def test_gradients_by_frequency_are_as_exact_as_their_dtype() -> None:
    torch.set_default_dtype(torch.float32)
    counts = torch.tensor([3, 7, 49])
    rows = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    scale_gradient(rows, counts).sum().backward()
    assert torch.equal(rows.grad[:, 0], 1.0 / counts.double())  # type: ignore[index]
