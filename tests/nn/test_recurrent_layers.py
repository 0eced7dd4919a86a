"""Recurrent layers are torch's with the same dense weights: outputs, final states, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_reference import assert_same_gradients, flat, gru_reset_before
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tensortrain as tt
from tensortrain.testing import rel_error

KINDS: dict[str, tuple[type[nn.Module], type[Any], dict[str, Any]]] = {
    "rnn tanh": (nn.RNN, tt.nn.RNN, {}),
    "rnn relu": (nn.RNN, tt.nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, tt.nn.GRU, {}),
    "lstm": (nn.LSTM, tt.nn.LSTM, {}),
    "lstm projected": (nn.LSTM, tt.nn.LSTM, {"proj_size": 5}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_implementation = pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
COMPRESS = ("input", "hidden", "both")


def pair(kind: str, inputs: int = 6, hidden: int = 8, *, compress: str = "both", **options: Any) -> tuple[Any, Any]:
    """Torch's layer, and ours with exact cores of its weights."""
    dense_type, ours, more = KINDS[kind]
    extra = {
        name: options.pop(name) for name in ("format", "implementation", "in_modes", "out_modes") if name in options
    }
    dense = dense_type(inputs, hidden, **more, **options)
    return dense, ours.from_dense(dense, compress=compress, **extra)


def states(dense: Any, batch: int | None) -> Any:
    n = dense.num_layers * (1 + dense.bidirectional)
    shape = (n,) if batch is None else (n, batch)
    h = torch.randn(*shape, dense.proj_size or dense.hidden_size)
    return (h, torch.randn(*shape, dense.hidden_size)) if isinstance(dense, nn.LSTM) else h


@every_implementation
@pytest.mark.parametrize("compress", COMPRESS)
@every_kind
def test_equals_torch(kind: str, compress: str, implementation: str) -> None:
    dense, layer = pair(kind, compress=compress, implementation=implementation)
    x = torch.randn(7, 3, 6)
    assert_same_gradients(layer, dense, x)
    assert_same_gradients(layer, dense, x, states(dense, 3))


@pytest.mark.parametrize("implementation", ["factorized", "auto"])
@every_kind
def test_layers_directions_and_batch_first(kind: str, implementation: str) -> None:
    dense, layer = pair(
        kind, num_layers=3, bidirectional=True, batch_first=True, bias=False, implementation=implementation
    )
    x = torch.randn(3, 5, 6)
    assert_same_gradients(layer, dense, x)
    assert_same_gradients(layer, dense, x, states(dense, 3))
    assert_same_gradients(layer, dense, x.transpose(0, 1).contiguous().transpose(0, 1))


@every_kind
@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@pytest.mark.parametrize("lengths", [(2, 5, 1, 5), (4,), (3, 3)])
def test_packed(kind: str, implementation: str, lengths: tuple[int, ...]) -> None:
    dense, layer = pair(kind, num_layers=2, bidirectional=True, implementation=implementation)
    x = torch.randn(5, len(lengths), 6)

    def pack(x: Tensor) -> PackedSequence:
        return pack_padded_sequence(x, list(lengths), enforce_sorted=False)

    assert_same_gradients(layer, dense, x, pack=pack)
    assert_same_gradients(layer, dense, x, states(dense, len(lengths)), pack=pack)
    padded, found = pad_packed_sequence(layer(pack(x))[0])
    assert found.tolist() == list(lengths)
    assert padded.shape == (max(lengths), len(lengths), 2 * layer.l0.output_size)


@every_kind
@pytest.mark.parametrize("implementation", ["factorized", "dense"])
def test_packed_in_order(kind: str, implementation: str) -> None:
    dense, layer = pair(kind, implementation=implementation)
    packed = pack_padded_sequence(torch.randn(4, 3, 6), [4, 2, 2])
    found, exact = layer(packed), dense(packed)
    assert found[0].sorted_indices is None
    for mine, theirs in zip(flat(found), flat(exact), strict=True):
        assert rel_error(mine, theirs) <= 1e-12


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(kind: str, batch_first: bool) -> None:
    dense, layer = pair(kind, num_layers=2, batch_first=batch_first, implementation="factorized")
    x = torch.randn(5, 6)
    assert_same_gradients(layer, dense, x)
    assert_same_gradients(layer, dense, x, states(dense, None))


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@every_kind
def test_sizes_that_do_not_split(kind: str, implementation: str) -> None:
    dense, layer = pair(kind, 7, 11, implementation=implementation)
    assert_same_gradients(layer, dense, torch.randn(2, 3, 7))
    dense, layer = pair(kind, 1, 6, implementation=implementation)
    assert_same_gradients(layer, dense, torch.randn(1, 1, 1))


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@every_kind
def test_empty_batch(kind: str, implementation: str) -> None:
    _, layer = pair(kind, bidirectional=True, num_layers=2, implementation=implementation)
    output, state = layer(torch.randn(4, 0, 6))
    assert output.shape == (4, 0, 2 * layer.l0.output_size)
    assert flat((output, state))[1].shape == (4, 0, layer.l0.output_size)


@pytest.mark.parametrize("format", ["tt", "low_rank"])
@every_kind
def test_formats(kind: str, format: str) -> None:
    dense, layer = pair(kind, format=format, implementation="factorized")
    assert {cell.hh.spec.format for cell in layer.cells().values()} == {format}
    assert_same_gradients(layer, dense, torch.randn(4, 2, 6))


@pytest.mark.parametrize("compress", COMPRESS)
@every_implementation
def test_reset_before_the_hidden_product(compress: str, implementation: str) -> None:
    layer = tt.nn.GRU(
        6, 8, 2, bidirectional=True, reset_after=False, rank=2, compress=compress, implementation=implementation
    )
    x = torch.randn(5, 3, 6)
    found, exact = layer(x), gru_reset_before(layer, x)
    gradients = []
    for outputs in (found, exact):
        upstream = [torch.full_like(y, 0.5) for y in outputs]
        gradients.append(torch.autograd.grad(outputs, list(layer.parameters()), upstream))
    for mine, theirs in zip((*found, *gradients[0]), (*exact, *gradients[1]), strict=True):
        assert rel_error(mine, theirs) <= 1e-12
    torch_like = tt.nn.GRU(6, 8, 2, bidirectional=True, rank=2, compress=compress)
    torch_like.load_state_dict(layer.state_dict())
    assert rel_error(torch_like(x)[0], found[0]) > 1e-3  # the two conventions differ


@pytest.mark.parametrize("implementation", ["factorized", "dense"])
@every_kind
def test_gradcheck(kind: str, implementation: str) -> None:
    _, ours, more = KINDS[kind]
    more = {**more, "proj_size": 1} if "proj_size" in more else more
    layer = ours(4, 2, rank=2, compress="both", bidirectional=True, implementation=implementation, **more)
    names = [name for name, _ in layer.named_parameters()]
    given = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))))

    assert torch.autograd.gradcheck(call, (torch.randn(3, 2, 4).requires_grad_(), *given))


@every_kind
def test_float32(kind: str) -> None:
    dense_type, ours, more = KINDS[kind]
    dense = dense_type(6, 8, **more, dtype=torch.float32)
    x = torch.randn(9, 3, 6, dtype=torch.float32)
    for implementation in ("factorized", "dense"):
        layer = ours.from_dense(dense, compress="both", implementation=implementation)
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        for mine, theirs in zip(flat(layer(x)), flat(dense.double()(x.double())), strict=True):
            assert mine.dtype == torch.float32
            assert rel_error(mine, theirs) <= 1e-5
        dense.float()


@every_implementation
@every_kind
def test_autocast(kind: str, implementation: str) -> None:
    _, ours, more = KINDS[kind]
    layer = ours(6, 8, rank=3, compress="both", implementation=implementation, dtype=torch.float32, **more)
    x = torch.randn(5, 3, 6, dtype=torch.float32)
    exact = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)[0]
    assert found.dtype == torch.bfloat16
    assert rel_error(found, exact) <= 0.03  # a few roundings of 0.4 %
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@every_implementation
@every_kind
def test_bfloat16(kind: str, implementation: str) -> None:
    _, ours, more = KINDS[kind]
    layer = ours(6, 8, rank=3, compress="both", implementation=implementation, dtype=torch.bfloat16, **more)
    x = torch.randn(5, 3, 6, dtype=torch.bfloat16)
    found = layer(x)[0]
    assert found.dtype == torch.bfloat16
    assert rel_error(found, layer.double()(x.double())[0]) <= 0.03  # a few roundings of 0.4 %
