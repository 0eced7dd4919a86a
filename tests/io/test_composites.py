"""Layers made of several maps load into torch's layer, into one of any rank, and back into torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import CheckpointError
from tensortrain.io import load_pretrained, save_pretrained

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "gru": ("GRU", (12, 8), {}, {}),
    "gru, two layers both ways": ("GRU", (12, 8), {"num_layers": 2, "bidirectional": True}, {"compress": "both"}),
    "lstm with a projection": ("LSTM", (12, 8), {"proj_size": 4}, {}),
    "rnn of the hidden map": ("RNN", (12, 8), {"nonlinearity": "relu", "bias": False}, {"compress": "hidden"}),
    "cell": ("LSTMCell", (12, 8), {}, {}),
    "attention": ("MultiheadAttention", (16, 4), {"add_bias_kv": True}, {}),
    "attention of other keys": ("MultiheadAttention", (16, 4), {"kdim": 12, "vdim": 20}, {}),
    "encoder layer": ("TransformerEncoderLayer", (16, 4, 32), {"norm_first": True, "layer_norm_eps": 1e-3}, {}),
}


class Net(nn.Module):
    def __init__(self, case: str, rank: int | None = None) -> None:
        super().__init__()
        kind, sizes, options, ours = CASES[case]
        torch.manual_seed(0)
        self.part: Any = getattr(nn, kind)(*sizes, **options)
        if rank is not None:
            self.part = getattr(tt.nn, kind).from_dense(self.part, rank=rank, **ours)
        self.head = nn.Linear(3, 2)

    def forward(self) -> list[Tensor]:
        x = torch.randn(5, 2, self.part.self_attn.embed_dim if hasattr(self.part, "self_attn") else 12)
        if "MultiheadAttention" in type(self.part).__name__:
            inputs = [torch.randn(5, 2, n) for n in (self.part.embed_dim, self.part.kdim, self.part.vdim)]
            return [self.part(*inputs)[0]]
        found = self.part(x[0] if "Cell" in type(self.part).__name__ else x)
        return list(found) if isinstance(found, tuple) else [found]


def run(model: nn.Module) -> list[Any]:
    torch.manual_seed(1)
    return model()  # type: ignore[no-any-return]


def equal(a: list[Any], b: list[Any]) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else equal(list(x), list(y)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("into", ["class", "dense", "factorized", "other rank"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path: Path, case: str, into: str) -> None:
    model = Net(case, rank=3).eval()
    save_pretrained(model, tmp_path / "m")
    given: Any = {
        "class": lambda: Net(case),
        "dense": Net(case),
        "factorized": Net(case, rank=3),
        "other rank": Net(case, rank=2),
    }[into]
    part = getattr(given, "part", None)
    again = load_pretrained(tmp_path / "m", given)
    assert type(again.part) is type(model.part)
    assert part in (None, again.part)
    assert equal(run(again), run(model))


@pytest.mark.parametrize("case", CASES)
def test_dense_checkpoint_into_a_factorized_model(tmp_path: Path, case: str) -> None:
    model = Net(case).eval()
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m", Net(case, rank=2))
    assert type(again.part) is type(model.part)
    assert equal(run(again), run(model))


def test_bare_layer(tmp_path: Path) -> None:
    layer, dense = tt.nn.GRU(12, 8, rank=2).eval(), nn.GRU(12, 8)
    save_pretrained(layer, tmp_path / "m")
    assert load_pretrained(tmp_path / "m", dense) is dense
    x = torch.randn(4, 2, 12)
    assert torch.equal(dense(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    "saved, given, match",
    [
        (lambda: tt.nn.GRU(12, 8), lambda: nn.LSTM(12, 8), "has LSTM at 'part'"),
        (lambda: tt.nn.GRU(12, 8), lambda: nn.GRU(12, 9), "hidden_size 8, not 9"),
        (lambda: tt.nn.GRU(12, 8, reset_after=False), lambda: nn.GRU(12, 8), "reset_after False, not True"),
        (lambda: tt.nn.MultiheadAttention(16, 4), lambda: nn.MultiheadAttention(16, 2), "num_heads 4, not 2"),
    ],
)
def test_another_layer_is_refused(tmp_path: Path, saved: Any, given: Any, match: str) -> None:
    save_pretrained(nn.ModuleDict({"part": saved()}), tmp_path / "m")
    model = nn.ModuleDict({"part": given()})
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(tmp_path / "m", model)
    assert type(model["part"]).__module__.startswith("torch.nn")
