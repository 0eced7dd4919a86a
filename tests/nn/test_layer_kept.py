"""Compiled linear layers and embeddings at inference run by what is kept from call to call, as eager ones do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.nn import kept
from tensortrain.nn.keeping import can_keep
from tensortrain.system.native import library, python_only

pytestmark = [
    pytest.mark.skipif(library() is None, reason="the kernels are not built"),
    pytest.mark.usefixtures("fresh_compiler"),
]

Case = tuple[Callable[[], Any], Callable[[int], Tensor]]
LAYERS: dict[str, Case] = {
    "train": (lambda: tt.nn.Linear(24, 30, rank=3), lambda b: torch.randn(b, 24)),
    "train of three, core by core": (
        lambda: tt.nn.Linear(64, 81, in_modes=(4, 4, 4), out_modes=(3, 3, 9), rank=3, implementation="factorized"),
        lambda b: torch.randn(2, b, 64),
    ),
    "padded sizes, no bias": (lambda: tt.nn.Linear(23, 31, bias=False, rank=3), lambda b: torch.randn(23, b).t()),
    "low rank": (lambda: tt.nn.Linear(24, 30, format="low_rank", rank=3), lambda b: torch.randn(b, 24)),
    "table": (lambda: tt.nn.Embedding(50, 12, rank=3), lambda b: torch.randint(50, (b, 4))),
    "table in slices, padding": (
        lambda: tt.nn.Embedding(50, 12, padding_idx=3, rank=3, implementation="factorized"),
        lambda b: torch.randint(50, (b,)),
    ),
    "table of low rank": (
        lambda: tt.nn.Embedding(50, 12, max_norm=1.0, format="low_rank", rank=3, implementation="factorized"),
        lambda b: torch.randint(50, (b, 4)),
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def long_ways() -> Iterator[list[str]]:
    """What was told of layers that took the long way."""
    kernels: Any = library()
    assert can_keep()
    taken: list[str] = []

    def noting(told: str, *args: Any) -> Tensor:
        taken.append(told)
        return kept._ran(told, *args)

    kernels.know_way_runner(noting)
    yield taken
    kernels.know_way_runner(kept._ran)


def compiled(layer: nn.Module, **options: Any) -> Any:
    return torch.compile(layer, backend="aot_eager", fullgraph=True, **options)


@every_layer
def test_it_is_merged_once_and_again_when_a_core_changes(name: str, long_ways: list[str]) -> None:
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    layer, x = make().eval(), inputs(5)
    run = compiled(layer)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(x), layer(x))
        assert len(long_ways) == 1
        for n, change in enumerate(
            (
                lambda: layer.cores[0].mul_(2),
                lambda: layer.load_state_dict({**layer.state_dict(), "cores.1": layer.cores[1] + 1}),
                lambda: layer.load_state_dict({k: 3 * v for k, v in layer.state_dict().items()}, assign=True),
                lambda: setattr(layer.cores[0], "data", 2 * layer.cores[0].data),
            )
        ):
            change()
            for _ in range(2):
                torch.testing.assert_close(run(x), copy.deepcopy(layer)(x))
            n_most = n + 2
            n_least = 1 if name == "table of low rank" else n_most  # it is read as it lies
            assert n_least <= len(long_ways) <= n_most
    layer.cores[0].data.mul_(2)
    layer.clear_cache()
    with torch.no_grad():
        torch.testing.assert_close(run(x), layer(x))
    with torch.inference_mode():
        torch.testing.assert_close(run(x), layer(x))


@every_layer
def test_gradients_pass_it_by(name: str, long_ways: list[str]) -> None:
    make, inputs = LAYERS[name]
    layer, x = make(), inputs(5)
    run, optimizer = compiled(layer), torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    for n in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(x), layer(x))
        before = len(long_ways)
        grads = torch.autograd.grad(run(x).square().sum(), list(layer.parameters()))
        wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch.testing.assert_close(grads, wanted)
        run(x).square().sum().backward()
        optimizer.step()
        assert len(long_ways) == before <= n + 1


@every_layer
def test_any_number_of_rows_in_one_program(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    make, inputs = LAYERS[name]
    layer, counter = make().eval(), CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        run(inputs(3))
        n_programs = counter.frame_count
        for rows in (5, 17, 64):
            x = inputs(rows)
            found = run(x)
            torch.testing.assert_close(found, layer(x))
            assert found.is_contiguous()
        assert counter.frame_count == n_programs
        x = inputs(0)
        torch.testing.assert_close(run(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_layer
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    make, inputs = LAYERS[name]
    layer, x = make().to(dtype).eval(), inputs(5)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(layer)(x), layer(x))


@pytest.mark.parametrize("name", ["train", "table"])
def test_equal_layers_share_a_program_but_no_weights(name: str, long_ways: list[str]) -> None:
    make, inputs = LAYERS[name]
    layers, x = [make().eval() for _ in range(3)], inputs(5)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for layer in layers:
                layer.compile(backend="aot_eager")
                torch.testing.assert_close(layer(x), copy.deepcopy(layer).forward(x))
    assert len(long_ways) == 3


@pytest.mark.parametrize("name", ["train", "table"])
def test_what_is_kept_counts_as_held_and_goes_with_the_layer(name: str) -> None:
    gc.collect()  # layers of other tests
    make, inputs = LAYERS[name]
    layer, x = make().eval(), inputs(5)
    run = compiled(layer)
    with torch.no_grad():
        run(x)
    n_known = len(kept._ENDS)
    layer.clear_cache()
    assert layer.resident_cache_bytes == 0
    assert len(kept._ENDS) == len(kept._RUNNERS) == n_known - 1
    layer.implementation = "dense"
    with torch.no_grad():
        torch.testing.assert_close(run(x), copy.deepcopy(layer)(x))
    assert layer.resident_cache_bytes == layer.spec.weight.n_params * layer.cores[0].element_size()
    layer.bfloat16()
    assert len(kept._ENDS) == n_known - 1
    with torch.no_grad():
        run(x.bfloat16() if x.is_floating_point() else x)
    assert len(kept._ENDS) == n_known
    del layer, run
    torch._dynamo.reset()
    gc.collect()
    assert len(kept._ENDS) == len(kept._RUNNERS) == n_known - 1


@pytest.mark.parametrize("name", ["train", "table"])
def test_what_is_exported_or_cast_or_transformed_or_without_kernels_does_without(
    name: str, long_ways: list[str]
) -> None:
    make, inputs = LAYERS[name]
    layer, x = make().float().eval(), inputs(5)
    x = x.float() if x.is_floating_point() else x
    with torch.no_grad():
        program = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(program(x), layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(layer)(x), layer(x), rtol=0.05, atol=0.05)
        torch._dynamo.reset()
        with python_only():
            torch.testing.assert_close(compiled(layer)(x), layer(x))
        torch._dynamo.reset()
        mapped = torch.compile(torch.vmap(layer), backend="aot_eager")
        torch.testing.assert_close(mapped(x[None]), layer(x)[None])
    assert long_ways == []


def test_switched_off_after_it_was_compiled() -> None:
    layer, x = tt.nn.Linear(24, 30, rank=3).eval(), torch.randn(5, 24)
    run = compiled(layer)
    with torch.no_grad():
        expected = run(x)
        with python_only():
            torch.testing.assert_close(run(x), expected)
        torch.testing.assert_close(run(x), expected)


def test_an_id_past_the_table_is_told() -> None:
    layer = tt.nn.Embedding(50, 12, rank=3).eval()
    run = compiled(layer)
    with torch.no_grad():
        run(torch.tensor([1, 2]))
        with pytest.raises(tt.errors.ModeIndexError):
            run(torch.tensor([1, 50]))


def test_an_ordered_layer_and_one_with_hooked_cores_keep_their_path() -> None:
    x = torch.randn(5, 24)
    layer = tt.nn.Linear(24, 30, rank=3, ordered="both").eval()
    with torch.no_grad():
        layer.in_order.copy_(torch.randperm(24))
        torch.testing.assert_close(compiled(layer)(x), layer(x))
    torch._dynamo.reset()
    hooked = tt.nn.Linear(24, 30, rank=3).eval()
    with torch.no_grad():
        expected = 4 * (hooked(x) - hooked.bias) + hooked.bias
        hooked.cores.register_forward_hook(lambda *given: [2 * core for core in given[2]])
        torch.testing.assert_close(compiled(hooked)(x), expected)
