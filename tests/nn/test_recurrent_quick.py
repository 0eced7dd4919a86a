"""The short way of recurrent layers and cells: what an earlier call of a size left ready, never stale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import tensortrain as tt
from tensortrain.errors import ShapeError
from tensortrain.nn.recurrent import layers
from tensortrain.nn.recurrent.ways import STEPS
from tensortrain.system.native import library, python_only

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


# -- by our kernels -------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    library() is None, reason="needs the kernels: build them with tensortrain build-kernels"
)
MODULES = [*CELLS, *LAYERS]


def module_of(kind: str, **options: Any) -> tuple[Any, torch.Tensor, Any]:
    """A cell or layer in float64, an input and a state."""
    torch.manual_seed(0)
    is_cell = kind in CELLS
    options = {"rank": 3, "compress": "both", "dtype": torch.float64, **({} if is_cell else LAYERS[kind]), **options}
    module: Any = getattr(tt.nn, kind)(12, 8, **options)
    x = torch.randn((3, 12) if is_cell else (5, 3, 12), dtype=torch.float64, requires_grad=True)
    n = 1 if is_cell else len(module.cells())
    h = torch.randn(n, 5 if options.get("batch_first") else 3, 8, dtype=torch.float64, requires_grad=True)
    h = h[0].detach().requires_grad_() if is_cell else h
    return module, x, (h, h.detach().cos().requires_grad_()) if kind.startswith("LSTM") else h


def all_of(found: Any) -> list[torch.Tensor]:
    if found is None:
        return []
    return [found] if isinstance(found, torch.Tensor) else [one for part in found for one in all_of(part)]


def gradients_of(module: Any, x: torch.Tensor, state: Any, order: int = 1) -> list[torch.Tensor]:
    """Outputs and gradients, those of the second order too."""
    outputs = all_of(module(x, state))
    wanted = [x, *all_of(state), *(p for p in module.parameters() if p.requires_grad)]
    loss = sum((y.sin() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    found = [*torch.autograd.grad(loss, wanted, create_graph=order > 1, retain_graph=True, allow_unused=True)]
    if order > 1:
        again = sum(g.square().sum() for g in found if g is not None)
        found += torch.autograd.grad(again, wanted, retain_graph=True, allow_unused=True)
    return [*outputs, *(g for g in found if g is not None)]


def goes_the_short_way(module: Any, x: torch.Tensor, state: Any) -> bool:
    return module._short_way is not None and module._short_way(module, x, state) is not None


def alike(found: list[torch.Tensor], expected: list[torch.Tensor], **how: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **how)


@needs_kernels
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("format", ["tt", "low_rank"])
@pytest.mark.parametrize("compress", ["input", "both"])
@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
def test_training_takes_it_too(
    kind: str, format: str, compress: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: STEPS)
    module, x, state = module_of(kind, format=format, compress=compress, implementation=implementation)
    with python_only():
        expected = gradients_of(module, x, state, order=2)
    for _ in range(2):
        alike(gradients_of(module, x, state, order=2), expected, rtol=1e-8, atol=1e-9)
    assert goes_the_short_way(module, x, state)
    for one, factor in ((next(module.named_maps())[1], 1.5), (x, 0.5)):
        with torch.no_grad():
            (one.cores[0] if isinstance(one, tt.nn.Linear) else one).mul_(factor)
    with python_only():
        expected = gradients_of(module, x, state)
    alike(gradients_of(module, x, state), expected, rtol=1e-9, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("kind", MODULES)
def test_frozen_parts_stay_frozen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: STEPS)
    module, x, state = module_of(kind)
    first = next(module.named_maps())[1]
    for _ in range(2):
        gradients_of(module, x, state)  # leaves a way that trains all
    first.cores.requires_grad_(False)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = None
        sum(y.sum() for y in all_of(module(x, state))).backward()  # type: ignore[union-attr]
        assert [p.grad is None for p in first.parameters()] == [not p.requires_grad for p in first.parameters()]
    with torch.no_grad():
        before = all_of(module(x, state))
        first.cores[0].mul_(2)
    with python_only():
        expected = gradients_of(module, x, state)
    alike(gradients_of(module, x, state), expected, rtol=1e-9, atol=1e-10)
    assert not torch.equal(before[0], expected[0])


@needs_kernels
@pytest.mark.parametrize("kind", MODULES)
def test_the_way_ends_with_what_it_rests_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, hooks, modules in another's place, caches that are cleared, copies."""
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: STEPS)
    for what in ("setting", "hook", "another", "clear", "copy", "shape", "state"):
        module, x, state = module_of(kind)
        with torch.no_grad():
            for _ in range(2):
                module(x, state)
            assert goes_the_short_way(module, x, state)
            cell = module if kind in CELLS else module.l0
            if what == "setting":
                cell.hh.implementation = "factorized"
            elif what == "hook":
                cell.ih.register_forward_hook(lambda one, args, y: 2 * y)
            elif what == "another":
                cell.ih = torch.nn.Linear(12, cell.n_gates * 8, dtype=torch.float64)
            elif what == "clear":
                cell.hh.cores[0].data.mul_(2)
                cell.hh.clear_cache()
            elif what == "copy":
                module = copy.deepcopy(module)
                assert module._short_way is None
            elif what == "shape":
                x = x[..., :1, :]
                state = first_rows(state, 1) if kind in CELLS or not LAYERS[kind].get("batch_first") else state
            else:
                state = None
            if what != "state":
                assert not goes_the_short_way(module, x, state)
            found = all_of(module(x, state))
            with python_only():
                alike(found, all_of(module(x, state)), rtol=1e-10, atol=1e-12)


def first_rows(state: Any, n: int) -> Any:
    return tuple(first_rows(one, n) for one in state) if isinstance(state, tuple) else state[..., :n, :]


@needs_kernels
@pytest.mark.parametrize("kind", MODULES)
def test_checkpoints_find_what_they_saved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call takes the long way, its repetition the short one."""
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: STEPS)
    for format in ("tt", "low_rank"):
        module, x, state = module_of(kind, format=format)

        def run(x: torch.Tensor, module: Any = module, state: Any = state) -> torch.Tensor:
            return sum(y.square().sum() for y in all_of(module(x, state)))  # type: ignore[return-value]

        found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), [x, *module.parameters()])
        alike(list(found), list(torch.autograd.grad(run(x), [x, *module.parameters()])))


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
def test_shared_maps_and_single_examples(kind: str) -> None:
    torch.manual_seed(0)
    cell: Any = getattr(tt.nn, kind)(8, 8, rank=2, compress="both", dtype=torch.float64)
    cell.hh = cell.ih
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        found = gradients_of(cell, x, None)
    with python_only():
        alike(found, gradients_of(cell, x, None))
    assert goes_the_short_way(cell, x, None)
    assert first(cell(x)).shape == (8,)


@needs_kernels
def test_many_rows_are_carried_by_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fastest_way", lambda names, *args: STEPS)
    torch.manual_seed(0)
    layer = tt.nn.GRU(16, 24, rank=3, compress="both", implementation="factorized", dtype=torch.float64)
    x = torch.randn(400, 80, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    for lengths in (None, torch.arange(400, 320, -1)):

        def run(lengths: Any = lengths) -> list[torch.Tensor]:
            given = x if lengths is None else pack_padded_sequence(x, lengths)
            return list(torch.autograd.grad(layer(given)[1].sum(), wanted))

        found = run()
        with python_only():
            alike(found, run())
