"""Whole sequences by the kernels compute what the steps do, forward, back and twice back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import tensortrain as tt
from tensortrain.errors import DTypeError
from tensortrain.nn.recurrent import layers, sequences
from tensortrain.nn.recurrent.ways import DENSE_STEPS, KERNEL, STEPS
from tensortrain.system.native import library, python_only

pytestmark = pytest.mark.skipif(
    library() is None, reason="needs the kernels: build them with tensortrain build-kernels"
)

KINDS = ["LSTM", "GRU", "RNN", "RNN relu"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Every call of the kernels; torch's own is never taken, and no step is made in Python where they run."""
    found: list[Any] = []
    run = sequences.Direction.run
    monkeypatch.setattr(layers, "fastest_way", lambda *args: getattr(request, "param", STEPS))
    monkeypatch.setattr(sequences.Direction, "run", lambda self, *a: (found.append(self), run(self, *a))[1])
    return found


def layer_of(kind: str, *sizes: int, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "RNN relu":
        kind, options = "RNN", {**options, "nonlinearity": "relu"}
    options = {"rank": 2, "compress": "both", "dtype": torch.float64, **options}
    return getattr(tt.nn, kind)(*sizes, **options)


def outputs_of(found: Any) -> list[Tensor]:
    output, final = found
    finals = final if isinstance(final, tuple) else (final,)
    return [output if isinstance(output, Tensor) else output.data, *finals]


def agree(found: Any, expected: Any, **how: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **how)


def with_gradients(layer: Any, x: Tensor, state: Any, pack: Tensor | None = None) -> list[Tensor]:
    given = x if pack is None else pack_padded_sequence(x, pack, batch_first=getattr(layer, "batch_first", False))
    outputs = outputs_of(layer(given, state))
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    states = () if state is None else state if isinstance(state, tuple) else (state,)
    return [*outputs, *torch.autograd.grad(loss, [x, *states, *layer.parameters()])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 2, "bias": False, "batch_first": True},
        {"compress": "input"},
        {"compress": "none", "bidirectional": True, "batch_first": True},
    ],
    ids=["plain", "both ways", "two layers", "dense hidden", "dense"],
)
@pytest.mark.parametrize("pack", [None, (6, 4, 4, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("hidden", [6, 1, 11])
@pytest.mark.parametrize("calls", [STEPS, DENSE_STEPS], indirect=True)
def test_they_agree_with_the_steps(kind: str, options: Any, pack: Any, hidden: int, calls: list[Any]) -> None:
    layer = layer_of(kind, 6, hidden, **options)
    n = layer.num_layers * (1 + layer.bidirectional)
    x = torch.randn((4, 6, 6) if layer.batch_first else (6, 4, 6), dtype=torch.float64, requires_grad=True)
    states = [torch.randn(n, 4, hidden, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
    state = tuple(states) if kind == "LSTM" else states[0]
    lengths = None if pack is None else torch.tensor(pack)
    for given in (state, None):
        found = with_gradients(layer, x, given, lengths)
        n_calls = len(calls)
        assert n_calls > 0
        with python_only():
            agree(found, with_gradients(layer, x, given, lengths), rtol=1e-10, atol=1e-11)
        assert len(calls) == n_calls  # that was another way


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind: str, calls: list[Any]) -> None:
    layer = layer_of(kind, 4, 4)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    cores = list(layer.parameters())

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip([name for name, _ in layer.named_parameters()], values, strict=True))
        return tuple(outputs_of(torch.func.functional_call(layer, named, (x,))))

    assert torch.autograd.gradcheck(run, (x, *cores))
    assert torch.autograd.gradgradcheck(run, (x, *cores))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gradients_on_many_rows(kind: str, dtype: torch.dtype, calls: list[Any]) -> None:
    """Enough rows for all threads, and sizes that fill no register."""
    layer = layer_of(kind, 30, 45, rank=4, dtype=dtype)
    x = torch.randn(9, 67, 30, dtype=dtype)
    with torch.no_grad():
        found = outputs_of(layer(x))
        with python_only():
            expected = outputs_of(layer(x))
    assert calls
    agree(
        found, expected, **({"rtol": 1e-4, "atol": 2e-6} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-12})
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nonlinearities_hold_over_all_numbers(dtype: torch.dtype, calls: list[Any]) -> None:
    """Through a net without weights: saturated, tiny, infinite and undefined inputs."""
    special = [0.0, 1e-30, -1e-12, 3e-4, 0.3, -0.35, 5.0, -18.0, 90.0, -800.0, 1e30]
    special += [float("inf"), -float("inf"), float("nan")]
    x = torch.cat([torch.linspace(-30, 30, 2001, dtype=dtype), torch.tensor(special, dtype=dtype)])
    layer = tt.nn.RNN(1, 1, compress="none", bias=False, dtype=dtype)
    nn.init.ones_(layer.l0.ih.weight)
    nn.init.zeros_(layer.l0.hh.weight)
    with torch.no_grad():
        found = layer(x.view(1, -1, 1))[0].flatten()
    assert len(calls) == 1
    expected, precision = torch.tanh(x), 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=precision, atol=0, equal_nan=True)
    gate, x = tt.nn.GRU(1, 1, compress="none", bias=False, dtype=dtype), x[:-3]
    nn.init.zeros_(gate.l0.hh.weight)
    with torch.no_grad():
        gate.l0.ih.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]], dtype=dtype))
        found = gate(x.view(1, -1, 1), torch.ones(1, len(x), 1, dtype=dtype))[0].flatten()  # z itself
    usual = x > -80
    torch.testing.assert_close(found[usual], torch.sigmoid(x)[usual], rtol=8 * precision, atol=0)
    assert (found[~usual] < 1e-30).all()


def test_frozen_parts_get_no_gradients(calls: list[Any]) -> None:
    layer = layer_of("LSTM", 5, 6)
    layer.l0.hh.requires_grad_(False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    layer(x)[0].sum().backward()
    assert calls
    assert all((p.grad is None) == name.startswith("l0.hh") for name, p in layer.named_parameters())


def test_only_the_last_state_is_asked(calls: list[Any]) -> None:
    layer = layer_of("GRU", 5, 6, bidirectional=True)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(layer(x)[1].square().sum(), [x, *layer.parameters()])
    with python_only():
        agree(found, torch.autograd.grad(layer(x)[1].square().sum(), [x, *layer.parameters()]))
    assert calls


def test_a_graph_that_is_kept_serves_twice_and_a_gone_one_says_so(calls: list[Any]) -> None:
    layer = layer_of("LSTM", 5, 6)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    y = layer(x)[0].square().sum()
    first = torch.autograd.grad(y, list(layer.parameters()), retain_graph=True)
    agree(first, torch.autograd.grad(y, list(layer.parameters())))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, list(layer.parameters()))
    assert calls


def test_weights_that_change_are_seen(calls: list[Any]) -> None:
    layer, x = layer_of("GRU", 5, 6), torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)[0]
        layer.l0.hh.cores[0].mul_(2)
        after = layer(x)[0]
        with python_only():
            torch.testing.assert_close(after, layer(x)[0])
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["hook", "transform", "autocast", "half", "projected", "published"])
def test_where_they_do_not_serve_the_steps_run(how: str, calls: list[Any]) -> None:
    """Something looks on, the numbers are of another kind, or the step is another one."""
    options: dict[str, Any] = {"projected": {"proj_size": 3}, "published": {"reset_after": False}}.get(how, {})
    layer = layer_of("LSTM" if how == "projected" else "GRU", 5, 6, **options)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    if how == "transform":
        found = torch.func.vmap(lambda x: layer(x)[0])(torch.stack([x, 2 * x]))
        n_calls = len(calls)
        torch.testing.assert_close(found[1], layer(2 * x)[0])
        del calls[n_calls:]
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            layer.float()(x.float())
    elif how == "half":
        layer.bfloat16()(x.bfloat16())
    else:
        if how == "hook":
            layer.l0.hh.register_forward_hook(lambda *a: None)
        layer(x)
    assert not calls


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_single_steps_run_by_them_too(kind: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortrain.nn.recurrent.cells.fused_step_is_faster", lambda *args: False)
    torch.manual_seed(0)
    cell = getattr(tt.nn, kind)(6, 9, rank=2, compress="both", dtype=torch.float64)
    dense, x = cell.to_dense(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        found, expected = cell(x), dense(x)
    agree(*((found, expected) if kind == "LSTMCell" else ([found], [expected])))
    assert calls


@pytest.mark.usefixtures("fixed_plans")
def test_the_hidden_map_is_factorized_where_its_products_take_clearly_less() -> None:
    layer = layer_of("LSTM", 64, 512, rank=4, dtype=torch.float32)
    one = layer.l0.hh
    plan = sequences.plan_of_steps(one, 1)
    assert not plan.uses_dense
    one.implementation = "dense"
    assert sequences.plan_of_steps(one, 1).uses_dense


def test_copies_and_pickles_are_whole(calls: list[Any]) -> None:
    layer, x = layer_of("LSTM", 5, 6), torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)[0]
        assert torch.equal(copy.deepcopy(layer)(x)[0], y)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
def test_later_calls_of_a_size_take_a_short_way(
    kind: str, options: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(kind, 5, 6, **options), torch.randn(4, 3, 5, dtype=torch.float64)
    n = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(n, 4 if layer.batch_first else 3, 6, dtype=torch.float64)
    state = (h, h + 1) if kind == "LSTM" else h
    long_ways: list[str] = []
    run = type(layer)._run
    monkeypatch.setattr(type(layer), "_run", lambda self, *a: (long_ways.append("long"), run(self, *a))[1])
    dense = layer.to_dense()
    with torch.no_grad():
        for given in (None, state):
            first = outputs_of(layer(x, given))
            agree(outputs_of(layer(x, given)), first)
            agree(first, outputs_of(dense(x, given)))
        layer.l0.hh.cores[0].mul_(2)
        changed = outputs_of(layer(x))
        agree(changed, outputs_of(layer.to_dense()(x)))
        assert len(long_ways) == 2  # the first of all, and of these cores
        seen: list[Any] = []
        layer.l0.hh.register_forward_hook(lambda *a: seen.append(1))
        agree(outputs_of(layer(x)), changed)
        assert len(seen) == 4 if not layer.batch_first else len(seen) == 3  # every step
        with pytest.raises(DTypeError):
            layer(x.float())


@pytest.mark.parametrize("options", [{"proj_size": 3}, {"reset_after": False}], ids=["projected", "published"])
def test_other_steps_have_no_short_way(options: Any, calls: list[Any]) -> None:
    layer = layer_of("LSTM" if "proj_size" in options else "GRU", 5, 6, **options)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        first = outputs_of(layer(x))
        agree(outputs_of(layer(x)), first)
    assert not calls


def test_layers_above_run_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: (asked.append(list(names)), names[0])[1])
    layer = tt.nn.LSTM(5, 6, 3, compress="both", rank=2)
    with torch.no_grad():
        layer(torch.randn(4, 3, 5))
    assert asked == [[KERNEL, STEPS, DENSE_STEPS]]  # torch's kernel, and nothing to choose above it
