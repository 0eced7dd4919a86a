"""Layers go through ``torch.compile`` in one graph and through ``torch.export``, with the results of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.testing import rel_error

LAYERS: dict[str, tuple[Callable[..., Any], Callable[[int], Tensor]]] = {
    "linear tt": (
        lambda **o: tt.nn.Linear(64, 81, in_modes=(4, 4, 4), out_modes=(3, 3, 9), rank=3, **o),
        lambda b: torch.randn(b, 64),
    ),
    "linear low_rank": (
        lambda **o: tt.nn.Linear(64, 81, format="low_rank", rank=3, **o),
        lambda b: torch.randn(b, 64),
    ),
    "conv tt": (
        lambda **o: tt.nn.Conv2d(8, 12, 3, padding=1, rank=3, **o),
        lambda b: torch.randn(b, 8, 7, 6),
    ),
    "conv tucker2, circular": (
        lambda **o: tt.nn.Conv2d(8, 12, 3, 2, 1, padding_mode="circular", format="tucker2", rank=3, **o),
        lambda b: torch.randn(b, 8, 7, 6),
    ),
    "conv low_rank, groups": (
        lambda **o: tt.nn.Conv2d(8, 12, 3, groups=2, format="low_rank", rank=3, **o),
        lambda b: torch.randn(b, 8, 7, 6),
    ),
    "embedding tt": (
        lambda **o: tt.nn.Embedding(50, 12, padding_idx=3, rank=3, **o),
        lambda b: torch.randint(50, (b, 4)),
    ),
    "embedding low_rank": (
        lambda **o: tt.nn.Embedding(50, 12, max_norm=1.0, format="low_rank", rank=3, **o),
        lambda b: torch.randint(50, (b, 4)),
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_implementation = pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make(name: str, implementation: str = "auto") -> tuple[Any, Callable[[int], Tensor]]:
    build, inputs = LAYERS[name]
    return build(implementation=implementation), inputs


def gradients(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = call(x)
    return list(torch.autograd.grad(y, list(layer.parameters()), torch.randn(y.shape)))


@every_layer
def test_compiles_to_one_graph(name: str) -> None:
    layer, inputs = make(name, "factorized")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = inputs(5)
    with torch.no_grad():
        assert rel_error(compiled(x), layer(x)) <= 1e-12
        for core in layer.cores:  # a compiled layer reads its cores anew
            core.add_(torch.randn_like(core))
        assert rel_error(compiled(x), layer(x)) <= 1e-12


# What "auto" takes is one of the other two; that it asks for it without a break shows in one layer of each kind.
IMPLEMENTED = [(name, how) for name in LAYERS for how in ("factorized", "dense")]
IMPLEMENTED += [(name, "auto") for name in ("linear tt", "conv tt", "embedding tt")]


@pytest.mark.slow
@pytest.mark.parametrize("name, implementation", IMPLEMENTED)
def test_compiled_gradients(name: str, implementation: str) -> None:
    check_compiled_gradients(name, implementation, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear tt", "conv tucker2, circular", "embedding tt"])
def test_inductor(name: str) -> None:
    check_compiled_gradients(name, "factorized", "inductor")


def check_compiled_gradients(name: str, implementation: str, backend: str) -> None:
    layer, inputs = make(name, implementation)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = inputs(5)
    assert rel_error(compiled(x), layer(x)) <= 1e-12
    for mine, exact in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        assert rel_error(mine, exact) <= 1e-12


def test_one_graph_for_every_batch() -> None:
    layer, inputs = make("linear tt", "factorized")
    from torch._dynamo.testing import CompileCounter  # slow to import

    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 5, 17, 64):
        x = inputs(rows)
        assert rel_error(compiled(x), layer(x)) <= 1e-12
    assert counter.frame_count == 1


@every_implementation
@every_layer
def test_exports(name: str, implementation: str) -> None:
    layer, inputs = make(name, implementation)
    layer.eval()
    x = inputs(5)
    program = torch.export.export(layer, (x,))
    assert rel_error(program.module()(x), layer(x)) <= 1e-12
    assert set(program.state_dict) == set(layer.state_dict())


@every_layer
def test_exports_with_any_batch(name: str) -> None:
    layer, inputs = make(name, "factorized")
    layer.eval()
    program = torch.export.export(layer, (inputs(5),), dynamic_shapes=({0: torch.export.Dim("b", min=2, max=512)},))
    for rows in (2, 9, 33):
        x = inputs(rows)
        assert rel_error(program.module()(x), layer(x)) <= 1e-12


CONVOLUTIONS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "tt_separate": (lambda: tt.nn.Conv2d(24, 32, 3, padding=1, format="tt_separate", rank=4), (3, 24, 10, 11)),
    "block_term, stride": (lambda: tt.nn.Conv2d(24, 32, 3, 2, format="block_term", rank=4), (3, 24, 10, 11)),
    "cp along one axis": (lambda: tt.nn.Conv1d(24, 20, 5, padding=2, format="cp", rank=4), (3, 24, 17)),
    "tucker2 in three": (lambda: tt.nn.Conv3d(8, 6, 3, format="tucker2", rank=3), (1, 8, 5, 6, 7)),
    "tt_naive, groups": (lambda: tt.nn.Conv2d(24, 32, 3, groups=2, format="tt_naive", rank=4), (3, 24, 10, 11)),
    "tucker2 transposed": (lambda: tt.nn.ConvTranspose2d(24, 20, 4, 2, 1, format="tucker2", rank=4), (3, 24, 6, 7)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_compiled_convolutions_run_in_hops(name: str, dynamic: bool) -> None:
    make_layer, shape = CONVOLUTIONS[name]
    layer = make_layer()
    layer.implementation = "factorized"
    targets: list[str] = []

    def look(program: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in program.graph.nodes)
        return program.forward

    x = torch.randn(shape)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=look, dynamic=dynamic)
    assert rel_error(compiled(x), layer(x)) <= 1e-12
    assert any("run_hops" in target for target in targets)
    for mine, exact in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        assert rel_error(mine, exact) <= 1e-12


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_export_with_any_batch(name: str) -> None:
    make_layer, shape = CONVOLUTIONS[name]
    layer = make_layer().eval()
    layer.implementation = "factorized"
    example = torch.randn(4, *shape[1:])
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: torch.export.Dim("b", min=2, max=512)},))
    for rows in (2, 9):
        x = torch.randn(rows, *shape[1:])
        assert rel_error(program.module()(x), layer(x)) <= 1e-12


def test_a_model_of_layers_exports() -> None:
    model = nn.Sequential(
        tt.nn.Conv2d(3, 8, 3, padding=1, format="tucker2", rank=2),
        nn.ReLU(),
        nn.Flatten(),
        tt.nn.Linear(8 * 6 * 6, 10, rank=3),
    ).eval()
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(model, (x,))
    assert rel_error(program.module()(x), model(x)) <= 1e-12
