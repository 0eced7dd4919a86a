"""Compiled convolutions at inference run by a dense kernel that is kept from call to call, as eager ones do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.nn.conv import kept
from tensortrain.nn.keeping import can_keep
from tensortrain.system.native import library, python_only

pytestmark = [
    pytest.mark.skipif(library() is None, reason="the kernels are not built"),
    pytest.mark.usefixtures("fresh_compiler"),
]

LAYERS: dict[str, Any] = {
    "low_rank": lambda: tt.nn.Conv2d(6, 10, 3, padding=1, format="low_rank", rank=4),
    "train, strides, groups": lambda: tt.nn.Conv2d(8, 12, (3, 2), stride=2, dilation=2, groups=2, rank=3),
    "one axis, no bias": lambda: tt.nn.Conv1d(6, 9, 4, bias=False, format="cp", rank=5),
    "transposed": lambda: tt.nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, groups=2, rank=3),
}
INPUTS = {"low_rank": (2, 6, 7, 7), "train, strides, groups": (1, 8, 9, 9), "one axis, no bias": (3, 6, 12)}
INPUTS["transposed"] = (2, 6, 5, 5)


@pytest.fixture
def n_built() -> Iterator[list[str]]:
    """The specs that kernels were built of."""
    kernels: Any = library()
    assert can_keep()
    built: list[str] = []

    def noting(told: str, is_transposed: bool, cores: Any) -> Tensor:
        built.append(told)
        return kept._built(told, is_transposed, cores)

    kernels.know_kernel_builder(noting)
    yield built
    kernels.know_kernel_builder(kept._built)


def compiled(layer: nn.Module) -> Any:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("name", LAYERS)
def test_the_kernel_is_built_once_and_again_when_a_core_changes(name: str, n_built: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(INPUTS[name])
    run = compiled(layer)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(x), layer(x))
        assert len(n_built) == 1
        for change in (
            lambda: layer.cores[0].mul_(2),
            lambda: layer.load_state_dict({**layer.state_dict(), "cores.1": layer.cores[1] + 1}),
            lambda: layer.load_state_dict({k: 3 * v for k, v in layer.state_dict().items()}, assign=True),
        ):
            change()
            torch.testing.assert_close(run(x), layer(x))
        assert len(n_built) == 4
    layer.cores[0].data.mul_(2)
    layer.clear_cache()
    with torch.no_grad():
        torch.testing.assert_close(run(x), layer(x))
    with torch.inference_mode():
        torch.testing.assert_close(run(x), layer(x))


def test_an_optimizer_changes_it_and_gradients_pass_it_by(n_built: list[str]) -> None:
    layer, x = LAYERS["low_rank"](), torch.randn(INPUTS["low_rank"])
    run, optimizer = compiled(layer), torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(x), layer(x))
        grads = torch.autograd.grad(run(x).square().sum(), list(layer.parameters()))
        wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch.testing.assert_close(grads, wanted)
        run(x).square().sum().backward()
        optimizer.step()
    assert len(n_built) == 2


def test_equal_layers_share_a_program_but_no_kernel(n_built: list[str]) -> None:
    layers = [LAYERS["low_rank"]().eval() for _ in range(3)]
    x = torch.randn(INPUTS["low_rank"])
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for layer in layers:
                layer.compile(backend="aot_eager")
                torch.testing.assert_close(layer(x), copy.deepcopy(layer).forward(x))
    assert len(n_built) == 3


def test_the_kernel_counts_as_held_and_goes_with_the_layer() -> None:
    gc.collect()  # layers of other tests
    layer, x = LAYERS["low_rank"]().eval(), torch.randn(INPUTS["low_rank"])
    run = compiled(layer)
    with torch.no_grad():
        run(x)
    held = 10 * 6 * 9 * x.element_size()
    assert layer.resident_cache_bytes == held
    layer.clear_cache()
    assert layer.resident_cache_bytes == 0
    with torch.no_grad():
        run(x)
    n_known = len(kept._ENDS)
    layer.double()
    assert len(kept._ENDS) == n_known - 1
    with torch.no_grad():
        run(x.double())
    assert len(kept._ENDS) == n_known
    del layer, run
    torch._dynamo.reset()
    gc.collect()
    assert len(kept._ENDS) == n_known - 1


def test_what_is_exported_or_cast_or_transformed_or_without_kernels_does_without(n_built: list[str]) -> None:
    layer, x = LAYERS["low_rank"]().float().eval(), torch.randn(INPUTS["low_rank"]).float()
    with torch.no_grad():
        program = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(program(x), layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert compiled(layer)(x).dtype == torch.bfloat16
        torch._dynamo.reset()
        with python_only():
            torch.testing.assert_close(compiled(layer)(x), layer(x))
        torch._dynamo.reset()
        mapped = torch.compile(torch.vmap(layer), backend="aot_eager")
        torch.testing.assert_close(mapped(x[None]), layer(x)[None])
    assert n_built == []
