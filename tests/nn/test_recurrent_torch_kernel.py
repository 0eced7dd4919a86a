"""LSTMs in training by torch's own kernel on weights that our kernels make: the same numbers, whoever looks on."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import tensortrain as tt
from tensortrain.nn.recurrent import layers, sequences
from tensortrain.nn.recurrent.ways import KERNEL
from tensortrain.system.native import library, python_only

pytestmark = pytest.mark.skipif(
    library() is None or not torch.backends.mkldnn.is_available(),
    reason="needs the kernels (build them with tensortrain build-kernels) and oneDNN",
)


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch's kernel everywhere; what our kernels made the weights for."""
    found: list[Any] = []
    run = sequences.Direction.run
    monkeypatch.setattr(layers, "_way_of", lambda *args: KERNEL)
    monkeypatch.setattr(sequences.Direction, "run", lambda self, *a: (found.append(self), run(self, *a))[1])
    return found


LAYERS = [
    {},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"compress": "hidden"},
    {"compress": "both", "format": "low_rank", "bidirectional": True},
    {"format": "tt", "num_layers": 2, "compress": "input"},
    {"format": "cp"},
]


def layer_of(**options: Any) -> tt.nn.LSTM:
    torch.manual_seed(3)
    return tt.nn.LSTM(7, 11, **{"rank": 2, "compress": "both", "dtype": torch.float32, **options})


def inputs_of(layer: tt.nn.LSTM, *, with_state: bool) -> list[Tensor]:
    torch.manual_seed(4)
    x = torch.randn(5, 3, 7, dtype=torch.float32, requires_grad=True)
    batch, n = x.shape[1 - layer.batch_first], layer.num_layers * (1 + layer.bidirectional)
    state = [torch.randn(n, batch, 11, dtype=torch.float32, requires_grad=True) for _ in range(2)]
    return [x, *state] if with_state else [x]


def outputs_of(layer: Any, given: list[Tensor]) -> list[Tensor]:
    y, state = layer(given[0], tuple(given[1:]) or None)
    return [y, *state]


def gradients_of(layer: Any, given: list[Tensor], used: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    outputs = outputs_of(layer, given)
    loss = sum((outputs[k] * torch.linspace(-1, 1, outputs[k].numel()).view_as(outputs[k])).sum() for k in used)
    wanted = [*given, *layer.parameters()]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_numbers_and_gradients_are_those_of_the_steps_in_python(
    options: dict[str, Any], with_state: bool, by_torch: list[Any]
) -> None:
    layer = layer_of(**options)
    given = inputs_of(layer, with_state=with_state)
    double = copy.deepcopy(layer).double()
    doubled = [one.detach().double().requires_grad_() for one in given]
    with python_only():
        expected, of = outputs_of(double, doubled), gradients_of(double, doubled)
    for _ in range(2):  # the second time by the short way
        found, gradients = outputs_of(layer, given), gradients_of(layer, given)
        for a, b in zip([*found, *gradients], [*expected, *of], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    n = layer.num_layers * (1 + layer.bidirectional)
    if options.get("format") != "cp":  # whose chains are made in Python
        assert len(by_torch) == n  # and no more, since the short way needs none of it


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2)])
def test_some_outputs_alone_may_be_used(used: tuple[int, ...]) -> None:
    layer = layer_of(batch_first=True, bidirectional=True)
    given = inputs_of(layer, with_state=True)
    found = [gradients_of(layer, given, used) for _ in range(2)]
    with python_only():
        expected = gradients_of(copy.deepcopy(layer), given, used)
    for gradients in found:
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_have_gradients() -> None:
    layer = layer_of(batch_first=True)
    given = inputs_of(layer, with_state=True)

    def second() -> list[Tensor]:
        wanted = [*given, *layer.parameters()]
        first = torch.autograd.grad(outputs_of(layer, given)[0].pow(2).sum(), wanted, create_graph=True)
        loss = sum(one.pow(2).sum() for one in first)
        return list(torch.autograd.grad(loss, wanted, allow_unused=True))  # type: ignore[arg-type]

    found = [second() for _ in range(2)]
    with python_only():
        expected = second()
    for gradients in found:
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_frozen_maps_and_weights_that_move_between_the_calls() -> None:
    layer = layer_of()
    (x,) = inputs_of(layer, with_state=False)
    cells = list(layer.cells().values())
    for parameter in cells[0].hh.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        layer(x)[0].sum().backward()
        twin = layer.to_dense()
        torch.testing.assert_close(layer(x)[0], twin(x)[0])
        optimizer.step()
    assert all(p.grad is None for p in cells[0].hh.parameters())
    assert all(p.grad is not None for p in cells[0].ih.parameters())


def test_biases_do_not_share_a_gradient() -> None:
    layer = layer_of()
    (x,) = inputs_of(layer, with_state=False)
    layer(x)[0].sum().backward()
    cell = next(iter(layer.cells().values()))
    cell.ih.bias.grad.zero_()
    assert cell.hh.bias.grad.abs().sum() > 0


def test_a_graph_may_be_kept_and_outputs_that_were_written_to_are_told() -> None:
    layer = layer_of()
    (x,) = inputs_of(layer, with_state=False)
    layer(x)
    y = layer(x)[0]
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], first)
    y = layer(x)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()


def test_checkpoints_find_the_same_saved() -> None:
    layer = layer_of(num_layers=2)
    (x,) = inputs_of(layer, with_state=False)
    expected = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    y = checkpoint(lambda given: layer(given)[0], x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_sequences_doubles_and_copies_go_other_ways(by_torch: list[Any]) -> None:
    layer = layer_of()
    packed = pack_sequence([torch.randn(4, 7, dtype=torch.float32), torch.randn(2, 7, dtype=torch.float32)])
    y, _ = layer(packed)
    y.data.sum().backward()
    twin = copy.deepcopy(layer).double()
    twin(torch.randn(5, 3, 7, dtype=torch.float64))[0].sum().backward()
    assert not by_torch
    (x,) = inputs_of(layer, with_state=False)
    layer(x)[0].sum().backward()
    saved = io.BytesIO()
    torch.save(copy.deepcopy(layer).state_dict(), saved)  # what is kept of the call is in no copy
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], layer(x)[0])
