"""Whole sequences by the kernels where callers do with inputs, outputs and gradients whatever torch lets them do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

import tensortrain as tt
from tensortrain.nn.recurrent import layers, sequences
from tensortrain.nn.recurrent.ways import KERNEL, STEPS
from tensortrain.system.native import library, python_only

KINDS = ["LSTM", "GRU", "RNN"]
needs_kernels = pytest.mark.skipif(
    library() is None, reason="needs the kernels: build them with tensortrain build-kernels"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Every call of the kernels; torch's own is taken where a test asks for it."""
    found: list[Any] = []
    run = sequences.Direction.run
    way = getattr(request, "param", STEPS)
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: way if way in names else names[-1])
    monkeypatch.setattr(sequences.Direction, "run", lambda self, *a: (found.append(self), run(self, *a))[1])
    return found


def layer_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(tt.nn, kind)(4, 6, **{"rank": 2, "compress": "both", "dtype": torch.float64, **options})


def an_input(**options: Any) -> Tensor:
    return torch.randn(5, 3, 4, **{"dtype": torch.float64, "requires_grad": True, **options})


def agree(found: Any, expected: Any, **how: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **how)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_written_to(kind: str, calls: list[Any]) -> None:
    layer, x = layer_of(kind), an_input()

    def run() -> tuple[Tensor, ...]:
        y, _ = layer(x)
        y.mul_(2.0).relu_()
        return torch.autograd.grad((y**2).sum(), [x, *layer.parameters()])

    found = run()
    assert calls
    with python_only():
        agree(found, run())


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_taken_for_what_they_stand_for(kind: str, calls: list[Any]) -> None:
    """Negated as the imaginary part of a conjugate is, or nothing at all, in the outputs and the last states."""
    layer, x = layer_of(kind), an_input()
    wanted = [x, *layer.parameters()]

    def outputs() -> list[Tensor]:
        y, last = layer(x)
        return [y, *(last if isinstance(last, tuple) else (last,))]

    found = outputs()
    assert calls
    negated = [torch._neg_view(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)) for y in found]
    assert all(one.is_neg() for one in negated)
    ours = torch.autograd.grad(found, wanted, negated, retain_graph=True)
    agree(ours, torch.autograd.grad(found, wanted, [one.resolve_neg() for one in negated], retain_graph=True))
    with python_only():
        agree(ours, torch.autograd.grad(outputs(), wanted, negated))
    nothing = torch._efficientzerotensor(found[0].shape, dtype=torch.float64)
    assert not any(one.any() for one in torch.autograd.grad(found[0], wanted, nothing))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_tangents_of_gradients_go_along(kind: str, calls: list[Any]) -> None:
    layer, x = layer_of(kind), an_input()
    y, _ = layer(x)
    assert calls
    grad, tangent = torch.randn_like(y), torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)  # linear in what arrives
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(y, x, forward_ad.make_dual(grad, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind: str, calls: list[Any]) -> None:
    """Under a transform, and after the parameters were frozen."""
    layer, x = layer_of(kind), an_input()
    y, _ = layer(x)
    assert calls
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in grads])
    found = torch.func.vmap(lambda one: torch.autograd.grad(y, x, one, retain_graph=True)[0])(grads)
    torch.testing.assert_close(found, expected)
    layer.requires_grad_(False)
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, grads[0])[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress", ["both", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("calls", [STEPS, KERNEL], indirect=True)
def test_second_derivatives_through_the_state_of_a_call_before(
    kind: str, compress: str, dtype: torch.dtype, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state depends on the weights that the second call has too: that way counts once."""
    layer, x = layer_of(kind, compress=compress, dtype=dtype), an_input(dtype=dtype)
    wanted = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        y, state = layer(x)
        after, _ = layer(2 * x, state)
        first = torch.autograd.grad((after**2).sum() + (y**3).sum(), wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum((one**2).sum() for one in first), wanted)]

    found = run()
    monkeypatch.setattr(layers, "_way_of", lambda *args: STEPS)
    with python_only():
        expected = run()
    agree(found, expected, **({"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("counts", [(2, 3, 1), (3, -1, 4), (4, 3)])
@pytest.mark.parametrize("calls", [STEPS], indirect=True)
def test_counts_that_fit_no_rows_are_refused(counts: tuple[int, ...], calls: list[Any]) -> None:
    for kind in KINDS:
        packed = PackedSequence(torch.ones(6, 4, dtype=torch.float64), torch.tensor(counts))
        with pytest.raises(RuntimeError), torch.no_grad():
            layer_of(kind)(packed)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_belong_to_their_owner(kind: str, calls: list[Any]) -> None:
    """They lie apart, and are written to before the way back."""
    layer = layer_of(kind)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    apart = torch.tensor([3, 1, 2, 1, 1, 1])[::2]
    y = layer(PackedSequence(rows, apart))[0].data
    whole = layer(PackedSequence(rows, torch.tensor([3, 2, 1])))[0].data
    torch.testing.assert_close(y, whole)
    (expected,) = torch.autograd.grad((whole**2).sum(), rows)
    apart.fill_(1)
    torch.testing.assert_close(torch.autograd.grad((y**2).sum(), rows)[0], expected)
