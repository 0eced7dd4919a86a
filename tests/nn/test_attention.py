"""Attention and encoder layers are torch's with the same dense weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import DTypeError, ShapeError
from tensortrain.testing import rel_error

IMPLEMENTATIONS = ("auto", "factorized", "dense")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_mode = pytest.mark.parametrize("training", [True, False])


def assert_same(layer: Any, dense: nn.Module, *inputs: Any, tol: float = 1e-12, **options: Any) -> None:
    """Results and gradients equal those of torch's layer on the dense weights made of our parameters."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    found = tensors(layer(*inputs, **options))
    exact = tensors(torch.func.functional_call(dense, layer.dense_weights(), inputs, options))
    upstream = [torch.randn_like(y) for y in exact]
    wanted = list({id(t): t for t in (*inputs, *layer.parameters())}.values())
    mine = torch.autograd.grad(found, wanted, upstream)
    theirs = torch.autograd.grad(exact, wanted, upstream)
    # Torch adds the bias of the keys to every score of a query alike: its gradient is zero up to rounding.
    scale = max(float(g.norm()) for g in theirs)
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert rel_error(a, b) <= tol
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).norm()) <= tol * max(float(b.norm()), 1e-2 * scale)


def tensors(result: Any) -> list[Tensor]:
    """A layer's output, and the attention weights where there are any."""
    return [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]


def attention(implementation: str = "factorized", *, training: bool = True, **options: Any) -> tuple[Any, Any]:
    dense = nn.MultiheadAttention(12, 3, **options)
    for parameter in dense.parameters():  # torch starts biases at zero
        nn.init.normal_(parameter, std=0.4)
    dense.train(training)
    return dense, tt.nn.MultiheadAttention.from_dense(dense, implementation=implementation)


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "padding": lambda: {"key_padding_mask": torch.tensor([[False] * 5, [False, True, False, True, True]])},
    "padding, additive": lambda: {"key_padding_mask": torch.randn(2, 5)},
    "2-D": lambda: {"attn_mask": torch.rand(4, 5) < 0.3},
    "2-D, additive": lambda: {"attn_mask": torch.randn(4, 5)},
    "3-D": lambda: {"attn_mask": torch.rand(6, 4, 5) < 0.3},
    "3-D, additive": lambda: {"attn_mask": torch.randn(6, 4, 5)},
    "both": lambda: {
        "attn_mask": torch.randn(6, 4, 5),
        "key_padding_mask": torch.tensor([[0.0] * 5, [0.0, -torch.inf, 0.0, -torch.inf, 0.0]]),
    },
}
WEIGHTS: dict[str, dict[str, bool]] = {
    "averaged": {},
    "per head": {"average_attn_weights": False},
    "none": {"need_weights": False},
}
SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "both extra": {"add_bias_kv": True, "add_zero_attn": True},
    "other sizes": {"kdim": 7, "vdim": 10},
    "one other size": {"kdim": 7, "bias": False},
}


def unblocked(mask: dict[str, Any]) -> dict[str, Any]:
    """Leave every query a key to attend to: torch gives NaN otherwise."""
    for name, value in mask.items():
        if value.dtype == torch.bool:
            mask[name] = value.index_fill(-1, torch.tensor([0]), False)
    return mask


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_torch(mask: str, weights: str, batch_first: bool) -> None:
    for sizes in SIZES.values():
        dense, layer = attention(batch_first=batch_first, **sizes)
        query = torch.randn(4, 2, 12)
        key, value = torch.randn(5, 2, dense.kdim), torch.randn(5, 2, dense.vdim)
        inputs = [x.transpose(0, 1) if batch_first else x for x in (query, key, value)]
        assert_same(layer, dense, *inputs, **unblocked(MASKS[mask]()), **WEIGHTS[weights])


@every_implementation
@every_mode
def test_self_attention(training: bool, implementation: str) -> None:
    dense, layer = attention(implementation, training=training, batch_first=True)
    x = torch.randn(3, 6, 12)
    assert_same(layer, dense, x, x, x)
    with torch.no_grad():  # torch has a path of its own for this
        assert rel_error(layer(x, x, x)[0], dense(x, x, x)[0]) <= 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
def test_causal(weights: str) -> None:
    for sizes in ({}, {"add_zero_attn": True}):
        dense, layer = attention(**sizes)
        x, mask = torch.randn(4, 2, 12), nn.Transformer.generate_square_subsequent_mask(4)
        exact = dense(x, x, x, attn_mask=mask, **WEIGHTS[weights])  # without the hint
        found = layer(x, x, x, attn_mask=mask, is_causal=True, **WEIGHTS[weights])
        for a, b in zip(found, exact, strict=True):
            assert (a is None and b is None) or rel_error(a, b) <= 1e-12


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_without_a_batch(weights: str, batch_first: bool) -> None:
    dense, layer = attention(batch_first=batch_first)
    query, key, value = torch.randn(4, 12), torch.randn(5, 12), torch.randn(5, 12)
    padding = torch.tensor([False, True, False, False, True])
    assert_same(layer, dense, query, key, value, **WEIGHTS[weights])
    assert_same(layer, dense, query, key, value, key_padding_mask=padding, **WEIGHTS[weights])
    assert_same(layer, dense, query, key, value, attn_mask=torch.randn(3, 4, 5), **WEIGHTS[weights])


def test_empty_batch_and_no_queries() -> None:
    dense, layer = attention()
    empty, some = torch.randn(4, 0, 12), torch.randn(5, 2, 12)
    for mine, theirs in zip(layer(empty, empty, empty), dense(empty, empty, empty), strict=True):
        assert mine.shape == theirs.shape
    assert layer(some[:0], some, some)[0].shape == (0, 2, 12)


def test_dropout_acts_in_training_alone() -> None:
    layer = tt.nn.MultiheadAttention(12, 3, dropout=0.5)
    x = torch.randn(4, 2, 12)
    for options in WEIGHTS.values():
        layer.train()
        assert not torch.equal(layer(x, x, x, **options)[0], layer(x, x, x, **options)[0])
        layer.eval()
        assert torch.equal(layer(x, x, x, **options)[0], layer(x, x, x, **options)[0])
    layer.train()
    weights = layer(x, x, x)[1]
    assert (weights == 0).any() or float(weights.sum(-1).sub(1).abs().max()) > 0.1


def test_gradcheck() -> None:
    layer = tt.nn.MultiheadAttention(4, 2, rank=2, add_bias_kv=True, implementation="factorized")
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, x, x))

    given = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, (torch.randn(3, 1, 4).requires_grad_(), *given))


@every_mode
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_encoder_layer_equals_torch(bias: bool, norm_first: bool, activation: Any, training: bool) -> None:
    for batch_first in (False, True):
        dense = nn.TransformerEncoderLayer(
            12, 2, 20, 0.0, activation, 1e-3, batch_first=batch_first, norm_first=norm_first, bias=bias
        ).train(training)
        layer = tt.nn.TransformerEncoderLayer.from_dense(dense, implementation="factorized")
        x = torch.randn(2, 3, 12)
        assert_same(layer, dense, x)
        batch, length = (2, 3) if batch_first else (3, 2)
        padding = torch.rand(batch, length) < 0.3
        padding[:, 0] = False
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        assert_same(layer, dense, x, src_key_padding_mask=padding)
        assert_same(layer, dense, x, src_mask=mask, is_causal=True)
        assert_same(layer, dense, x, src_mask=torch.randn(2 * batch, length, length))
        assert_same(layer, dense, x[0], src_mask=None)


@every_mode
def test_inside_torchs_encoder(training: bool) -> None:
    dense_layer = nn.TransformerEncoderLayer(12, 2, 20, 0.0, batch_first=True)
    layer = tt.nn.TransformerEncoderLayer.from_dense(dense_layer, implementation="factorized")
    dense = nn.TransformerEncoder(dense_layer, 3, enable_nested_tensor=False).train(training)
    model = nn.TransformerEncoder(layer, 3, nn.LayerNorm(12), enable_nested_tensor=False).train(training)
    dense.norm = nn.LayerNorm(12)
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False, False, True, True, True]])
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for options in ({}, {"src_key_padding_mask": padding}, {"mask": mask}, {"mask": mask, "is_causal": True}):
        assert rel_error(model(x, **options), dense(x, **options)) <= 1e-12
    assert {id(p) for p in model.layers[0].parameters()}.isdisjoint({id(p) for p in model.layers[1].parameters()})


@every_implementation
def test_float32_and_autocast(implementation: str) -> None:
    dense = nn.TransformerEncoderLayer(12, 3, 20, 0.0, dtype=torch.float32)
    layer = tt.nn.TransformerEncoderLayer.from_dense(dense, implementation=implementation)
    x = torch.randn(5, 2, 12, dtype=torch.float32)
    mask = torch.rand(5, 5) < 0.3
    mask.fill_diagonal_(False)
    found, exact = layer(x, mask), dense.double()(x.double(), mask)
    assert found.dtype == torch.float32
    assert rel_error(found, exact) <= 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, mask)
        weighed = layer.self_attn(x, x, x, attn_mask=mask)[0]
    assert rel_error(found, exact) <= 0.03  # a few roundings of 0.4 %
    assert rel_error(weighed, layer.self_attn(x, x, x, attn_mask=mask)[0]) <= 0.03
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_initial_variance_is_torchs() -> None:
    for sizes in ({}, {"kdim": 24, "vdim": 40}):
        dense, layer = nn.MultiheadAttention(64, 4, **sizes), tt.nn.MultiheadAttention(64, 4, **sizes)
        weights = layer.dense_weights()
        for name, exact in dense.named_parameters():
            if exact.ndim > 1:
                found = float(weights[name].detach().square().mean() / exact.detach().square().mean())
                assert found == pytest.approx(1, rel=0.1), name  # torch's own draw varies by a few per cent
            else:
                assert float(weights[name].detach().abs().max()) == 0, name


x = torch.zeros(4, 2, 12)
WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "heads": (lambda a: tt.nn.MultiheadAttention(12, 5), ShapeError, "embed_dim=12, num_heads=5"),
    "modes": (lambda a: tt.nn.MultiheadAttention(12, 3, modes=(2, 5)), ShapeError, "multiply to exactly 12"),
    "size": (lambda a: a(x, x[..., :7], x), ShapeError, r"end with \(12, 12, 12\)"),
    "axes": (lambda a: a(x, x[:, 0], x), ShapeError, "a batch axis or none"),
    "four axes": (lambda a: a(x[None], x[None], x[None]), ShapeError, "a batch axis or none"),
    "batch": (lambda a: a(x[:, :1], x, x), ShapeError, "one batch with the query"),
    "lengths": (lambda a: a(x, x, x[:3]), ShapeError, "key and value must have one length"),
    "mask": (lambda a: a(x, x, x, attn_mask=torch.zeros(3, 4)), ShapeError, r"attn_mask .* found \(3, 4\)"),
    "padding": (lambda a: a(x, x, x, torch.zeros(4, 2)), ShapeError, r"key_padding_mask .* expected \(2, 4\)"),
    "mask dtype": (lambda a: a(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int64)), DTypeError, "int64"),
    "causal": (lambda a: a(x, x, x, is_causal=True), ShapeError, "attn_mask=None"),
    "activation": (lambda a: tt.nn.TransformerEncoderLayer(12, 3, activation="swish"), ShapeError, "'swish'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call(tt.nn.MultiheadAttention(12, 3, dtype=torch.float32))
