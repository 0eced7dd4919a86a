"""Layers take what torch's take: its keywords, sparse and nested inputs, and tracers of every kind."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import tensortrain as tt
from tensortrain.errors import KindError, ShapeError

NAMES = [
    *("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("Embedding", "EmbeddingBag", "RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"),
    *("MultiheadAttention", "TransformerEncoderLayer"),
]


@pytest.mark.parametrize("name", NAMES)
def test_forward_has_the_arguments_of_torch(name: str) -> None:
    mine, torchs = (inspect.signature(getattr(module, name).forward).parameters for module in (tt.nn, nn))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in torchs.values()]


class OfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = tt.nn.MultiheadAttention(16, 4, batch_first=True, rank=2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return y


def floats(*sizes: int) -> Callable[[int], Tensor]:
    return lambda b: torch.randn(b, *sizes)


def ids(b: int) -> Tensor:
    return torch.randint(50, (b, 4))


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[int], Tensor]]] = {
    "linear": (lambda: tt.nn.Linear(48, 36, rank=3), floats(48)),
    "linear, core by core": (lambda: tt.nn.Linear(48, 36, rank=3, implementation="factorized"), floats(48)),
    "linear, padded": (lambda: tt.nn.Linear(1009, 499, rank=3), floats(1009)),
    "linear cp": (lambda: tt.nn.Linear(48, 36, format="cp", rank=3, implementation="factorized"), floats(48)),
    "conv": (lambda: tt.nn.Conv2d(8, 12, 3, rank=2, groups=2, implementation="factorized"), floats(8, 7, 6)),
    "conv btt": (lambda: tt.nn.Conv2d(8, 12, 3, rank=2, format="btt", implementation="factorized"), floats(8, 7, 6)),
    "transposed": (lambda: tt.nn.ConvTranspose2d(8, 12, 3, 2, rank=3, implementation="factorized"), floats(8, 5, 5)),
    "embedding": (lambda: tt.nn.Embedding(50, 12, padding_idx=2, hot_rows=3, rank=3), ids),
    "embedding cp": (lambda: tt.nn.Embedding(50, 12, max_norm=1.0, format="cp", rank=3), ids),
    "bag": (lambda: tt.nn.EmbeddingBag(50, 12, mode="sum", padding_idx=2, rank=3), ids),
    "gru": (lambda: tt.nn.GRU(24, 16, 2, batch_first=True, bidirectional=True, rank=2), floats(5, 24)),
    "lstm": (lambda: tt.nn.LSTM(24, 16, batch_first=True, compress="both", rank=2), floats(5, 24)),
    "cell": (lambda: tt.nn.GRUCell(24, 16, rank=2), floats(24)),
    "attention": (OfAttention, floats(5, 16)),
    "encoder layer": (lambda: tt.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, rank=2), floats(5, 16)),
    "tied head": (lambda: tt.nn.tied_head(tt.nn.Embedding(50, 12, padding_idx=2, rank=3)), floats(12)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def check_same(one: Any, other: Any, x: Tensor) -> None:
    torch.testing.assert_close(first(one(x)), first(other(x)), rtol=1e-8, atol=1e-10)


# -- tracers -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@every_layer
def test_jit_trace_for_any_batch(name: str) -> None:
    build, inputs = LAYERS[name]
    layer = build().eval()
    traced = torch.jit.trace(layer, inputs(3))
    for rows in (3, 7):
        check_same(traced, layer, inputs(rows))


@pytest.mark.parametrize("is_root", [False, True])
@every_layer
def test_symbolic_trace(name: str, is_root: bool) -> None:
    build, inputs = LAYERS[name]
    layer = build().eval()
    model = layer if is_root else nn.Sequential(layer)
    graph = fx.symbolic_trace(model)
    for rows in (3, 7):
        check_same(graph, model, inputs(rows))


@pytest.mark.parametrize("mode", ["real", "fake"])
@every_layer
def test_make_fx(name: str, mode: str) -> None:
    build, inputs = LAYERS[name]
    layer, x = build().eval(), inputs(3)
    with torch.no_grad():
        first(layer(x))
    graph = make_fx(lambda x: first(layer(x)), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    check_same(graph, layer, x)


def test_a_traced_layer_merges_only_where_that_is_fastest() -> None:
    layer = tt.nn.Linear(1024, 1024, in_modes=(32, 32), out_modes=(32, 32), rank=48)
    assert largest_result(layer, torch.randn(1, 1024)) < 1024 * 1024
    assert largest_result(layer, torch.randn(512, 1024)) >= 1024 * 1024


def largest_result(layer: nn.Module, x: Tensor) -> int:
    """Entries of the largest tensor that an exported program makes."""
    nodes = torch.export.export(layer, (x,)).graph.nodes
    return max(node.meta["val"].numel() for node in nodes if isinstance(node.meta.get("val"), Tensor))


# -- layouts -----------------------------------------------------------------------------------------------------


def sparse(layout: str, x: Tensor) -> Tensor:
    make: dict[str, Callable[[], Tensor]] = {
        "coo": x.to_sparse,
        "csr": x.to_sparse_csr,
        "csc": x.to_sparse_csc,
        "bsr": lambda: x.to_sparse_bsr((2, 2)),
        "3 axes": x[None].to_sparse,
        "empty": x[:0].to_sparse,
    }
    return make[layout]()


@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "3 axes", "empty"])
def test_sparse_rows(layout: str, implementation: Any) -> None:
    layer = tt.nn.Linear(48, 36, rank=3, implementation=implementation)
    x = sparse(layout, torch.randn(6, 48) * (torch.rand(6, 48) < 0.2))
    exact = F.linear(x.to_dense(), layer.weight, layer.bias)
    upstream = torch.randn_like(exact)
    torch.testing.assert_close(layer(x), exact)
    mine, theirs = (torch.autograd.grad(y, list(layer.parameters()), upstream) for y in (layer(x), exact))
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), exact)


def test_onednn_layout() -> None:
    layer, x = tt.nn.Linear(48, 36, rank=3, dtype=torch.float32), torch.randn(5, 48, dtype=torch.float32)
    assert layer(x.to_mkldnn()).is_mkldnn
    torch.testing.assert_close(layer(x.to_mkldnn()).to_dense(), layer(x))


@pytest.mark.parametrize("name", ["conv", "embedding", "bag", "gru"])
def test_sparse_inputs_that_torch_refuses(name: str) -> None:
    build, inputs = LAYERS[name]
    with pytest.raises(KindError, match="must be a plain tensor"):
        build()(inputs(3).to_sparse())


def nested(layout: torch.layout, lengths: tuple[int, ...] = (2, 4, 3), size: int = 48) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, size) for n in lengths], layout=layout)


def check_nested(found: Any, exact: Any) -> None:
    assert found.layout is exact.layout
    for mine, theirs in zip(found.unbind(), exact.unbind(), strict=True):
        torch.testing.assert_close(mine, theirs)


layouts = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)


@layouts
@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
def test_nested_rows(implementation: Any, layout: torch.layout) -> None:
    layer, x = tt.nn.Linear(48, 36, rank=3, implementation=implementation), nested(layout)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            layer(torch.randn(9, 48))
            check_nested(layer(x), F.linear(x, layer.weight.clone(), layer.bias))


@layouts
def test_nested_ids(layout: torch.layout) -> None:
    layer = tt.nn.Embedding(50, 12, rank=3)
    x = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([49])], layout=layout)
    check_nested(layer(x), F.embedding(x, layer.weight.clone()))


@layouts
@torch.no_grad()
def test_nested_attention(layout: torch.layout) -> None:
    layer, x = tt.nn.MultiheadAttention(48, 4, batch_first=True, rank=3).eval(), nested(layout)
    found = layer(x, x, x, need_weights=False)[0]
    for row, whole in zip(found.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(row, layer(whole, whole, whole, need_weights=False)[0])
    with pytest.raises(ShapeError, match="come together"):
        layer(x, torch.randn(3, 4, 48), x)


@layouts
def test_nested_encoder_layer(layout: torch.layout) -> None:
    layer = tt.nn.TransformerEncoderLayer(48, 4, 32, batch_first=True, rank=3).eval()
    x = nested(layout)
    for row, whole in zip(layer(x).unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(row, layer(whole))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)], ids=str)
def test_in_a_padded_encoder_of_torch(places: tuple[int, ...], grad: bool) -> None:
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 2).eval()
    model = copy.deepcopy(dense)
    for place in places:
        block: Any = model.layers[place]
        block.linear1, block.linear2 = (tt.nn.Linear.from_dense(one) for one in (block.linear1, block.linear2))
    x, padding = torch.randn(3, 6, 24), torch.arange(6) >= torch.tensor([[6], [4], [3]])
    with torch.set_grad_enabled(grad):
        found, exact = (one(x, src_key_padding_mask=padding) for one in (model, dense))
    torch.testing.assert_close(found[~padding], exact[~padding])


@torch.no_grad()
def test_attention_in_an_encoder_layer_of_torch() -> None:
    dense = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True).eval()
    layer = copy.deepcopy(dense)
    layer.self_attn = tt.nn.MultiheadAttention.from_dense(dense.self_attn)
    x, padding = torch.randn(3, 6, 24), torch.arange(6) >= torch.tensor([[6], [4], [3]])
    found, exact = (one(x, src_key_padding_mask=padding) for one in (layer, dense))
    torch.testing.assert_close(found[~padding], exact[~padding])
    assert nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()(x).shape == x.shape
