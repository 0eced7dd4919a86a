"""A step of training of a small convolution is one call there and one back, and sees every change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tensortrain as tt
from tensortrain.formats import format_names, get_format
from tensortrain.nn.conv.ways import DenseWay, HopsWay, Way
from tensortrain.system.native import library
from tensortrain.testing import rel_error

FORMATS = [name for name in format_names() if "conv" in get_format(name).kinds]
KINDS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "line": (tt.nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (9,)),
    "plane": (tt.nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": (2, 1), "bias": False}, (7, 6)),
    "groups": (tt.nn.Conv2d, {"kernel_size": 3, "groups": 2}, (5, 6)),
    "volume": (tt.nn.Conv3d, {"kernel_size": (1, 3, 3), "padding": 1}, (2, 5, 4)),
    "1x1": (tt.nn.Conv2d, {"kernel_size": 1}, (5, 4)),
    "other padding": (tt.nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 4)),
    "transposed": (tt.nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "output_padding": 1}, (4, 4)),
}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if library() is None:
        pytest.skip("the kernels are not built")
    return


def make(kind: str = "plane", format: str = "tt", dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    layer, options, spatial = KINDS[kind]
    torch.manual_seed(0)
    return layer(8, 12, format=format, rank=3, dtype=dtype, **options), torch.randn(2, 8, *spatial, dtype=dtype)


def take(layer: Any, x: Tensor, pick: Any) -> Way:
    """Let the layer run by the first way of training that is picked."""
    plan = layer.plan(x.shape[0], tuple(x.shape[2:]))
    spatial, load = tuple(x.shape[2:]), _load(layer, x)
    model = tt.contract.CostModel.reference()
    ways = [*layer._dense_ways(load, model, plan.key), *layer._other_ways(load, model, plan.key)]
    way = next(way for way in ways if pick(way))
    for last in (False, True):
        found = layer._plan_of(x.shape[0], spatial, may_pack=False, channels_last=last)
        layer.runner.layer_plans[found.key] = _with_way(found, way)
    return way


def _load(layer: Any, x: Tensor) -> Any:
    from tensortrain.contract.hops import Load

    options, spatial = layer.conv_options(), tuple(x.shape[2:])
    still = frozenset(axis for axis in range(layer.n_axes) if options.is_still(axis))
    outs = layer._out_spatial(spatial)
    return Load(x.shape[0], spatial, outs, still, options.is_transposed, True, x.element_size())


def _with_way(plan: Any, way: Way) -> Any:
    from dataclasses import replace

    return replace(plan, way=way)


def is_merged(way: Way) -> bool:
    return isinstance(way, DenseWay) and way.network is not None and way.layout == "plain"


def in_hops(way: Way) -> bool:
    return isinstance(way, HopsWay)


def gradients(layer: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    leaves = [x, *layer.parameters()] if x.requires_grad else list(layer.parameters())
    return list(torch.autograd.grad((y * y).sum() + y.flatten()[::3].sum(), leaves))


def check(layer: Any, x: Tensor, tolerance: float = 1e-10) -> None:
    """Output and gradients are those of torch's own operations on the kernel that the cores make."""
    x = x.detach().requires_grad_()
    weight = layer.dense_from(layer.core_list())
    y = layer.conv_options()(x, weight, layer.bias, layer.groups)
    for _ in range(2):
        found = layer(x)
        assert found.shape == y.shape
        assert found.stride() == y.stride() or not x.is_contiguous()
        assert rel_error(found, y) <= tolerance
    for one, other in zip(gradients(layer, x, layer(x)), gradients(layer, x, y), strict=True):
        assert rel_error(one, other) <= tolerance


@pytest.mark.parametrize("pick", [is_merged, in_hops])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_steps_are_those_of_the_dense_kernel(format: str, kind: str, pick: Any) -> None:
    layer, x = make(kind, format)
    take(layer, x, pick)
    layer(x)
    assert layer.runner.way(layer, x) is not None
    check(layer, x)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    check(layer, last)


@pytest.mark.parametrize("pick", [is_merged, in_hops])
def test_single_precision(pick: Any) -> None:
    layer, x = make("plane", "tucker2", torch.float32)
    take(layer, x, pick)
    check(layer, x, 1e-5)


@pytest.mark.parametrize("pick", [is_merged, in_hops])
@pytest.mark.parametrize("format", ["tt", "cp"])
def test_derivatives_of_gradients(format: str, pick: Any) -> None:
    layer = tt.nn.Conv1d(2, 3, 2, format=format, rank=2, dtype=torch.float64)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    take(layer, x, pick)
    layer(x)
    assert layer.runner.way(layer, x) is not None
    leaves = [x, *layer.parameters()]

    def run(*_: Tensor) -> Tensor:
        return layer(x)

    assert torch.autograd.gradcheck(run, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_the_short_way_sees_every_change() -> None:
    layer, x = make()
    take(layer, x, is_merged)
    layer(x)
    way = layer.runner.way

    def is_short() -> bool:
        return layer.runner.way is not None and layer.runner.way(layer, x) is not None

    assert is_short()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    check(layer, x)
    assert layer(x[:, :, 1:]).shape[2] == layer(x).shape[2] - 1
    assert is_short()  # sizes do not drive each other out
    assert layer.plan(2).spatial == (7, 6)
    assert way(layer, x.float()) is None
    assert way(layer, x[0]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_short()
    with torch.no_grad():
        kept = layer(x)  # by a weight that lies ready from now on
        assert layer.resident_cache_bytes > 0
        assert rel_error(layer(x), kept) == 0
    assert not is_short()
    layer(x)
    assert layer.resident_cache_bytes == 0  # nobody needs it while the cores change
    assert is_short()
    layer.cores[0] = torch.nn.Parameter(torch.randn_like(layer.cores[0]))
    check(layer, x)
    for core in layer.cores:
        core.requires_grad_(False)
    assert not is_short()
    layer.cores[1].requires_grad_(True)
    y = layer(x)
    assert rel_error(y, layer.to_dense()(x)) <= 1e-10
    y.sum().backward()
    assert [core.grad is None for core in layer.cores][:2] == [True, False]
    layer.implementation = "factorized"
    assert not is_short()
    assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-10


def test_who_looks_on_sees_what_torch_does() -> None:
    layer, x = make()
    take(layer, x, is_merged)
    layer(x)
    exact = gradients(layer, x.requires_grad_(), layer(x))
    assert layer.runner.way(layer, x) is not None
    handle = layer.cores.register_forward_hook(lambda module, args, cores: [2 * core for core in cores])
    assert layer.runner.way(layer, x) is None
    assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-10
    handle.remove()
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: packed.append(one) or one, lambda one: one):
        y = layer(x)
    assert packed
    fresh = make()[0]
    fresh.load_state_dict(layer.state_dict())
    take(fresh, x.detach(), is_merged)
    first = checkpoint(fresh, x, use_reentrant=False)  # the short way is there when it is run again
    for found, other in zip(gradients(fresh, x, first), exact, strict=True):
        assert rel_error(found, other) <= 1e-10
    again = checkpoint(layer, x, use_reentrant=False)
    parameters = dict(layer.named_parameters())
    called = torch.func.functional_call(layer, {name: 1.0 * one for name, one in parameters.items()}, (x,))
    for one in (y, again, called):
        for found, other in zip(gradients(layer, x, one), exact, strict=True):
            assert rel_error(found, other) <= 1e-10
    by_func = torch.func.grad(lambda given: torch.func.functional_call(layer, given, (x,)).square().sum())(parameters)
    plain = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for found, other in zip(by_func.values(), plain, strict=True):
        assert rel_error(found, other) <= 1e-10
    rows = torch.eye(3, dtype=x.dtype)
    many = torch.autograd.grad(layer(x).flatten()[:3], list(parameters.values()), rows, is_grads_batched=True)
    for found, core in zip(many, parameters.values(), strict=True):
        assert found.shape == (3, *core.shape)


def test_shared_layers_and_copies() -> None:
    layer = tt.nn.Conv2d(6, 6, 3, padding=1, format="tucker2", rank=3, dtype=torch.float64)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    take(layer, x, is_merged)
    layer(x)
    weight = layer.dense_from(layer.core_list())
    exact = layer.conv_options()(x, weight, layer.bias)
    exact = layer.conv_options()(exact, weight, layer.bias)
    found = layer(layer(x))
    for one, other in zip(gradients(layer, x, found), gradients(layer, x, exact), strict=True):
        assert rel_error(one, other) <= 1e-10
    other = copy.deepcopy(layer)
    assert other.runner.way is None or other.runner.way(other, x) is None
    assert rel_error(other(x), layer(x)) <= 1e-12


def test_empty_batches_and_compiled_programs() -> None:
    layer, x = make()
    take(layer, x, is_merged)
    layer(x)
    layer(x[:0]).sum().backward()
    assert all(core.grad is not None and core.grad.abs().max() == 0 for core in layer.cores)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert rel_error(compiled(x), layer(x)) <= 1e-10
