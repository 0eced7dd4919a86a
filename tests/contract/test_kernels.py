"""The compiled kernels against Python's way, which is their readable twin."""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import pickle
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tensortrain as tt
from tensortrain.contract import (
    Chain,
    ContractionPlan,
    CostModel,
    chain_to_dense,
)
from tensortrain.contract.choose import chain_candidates
from tensortrain.contract.grouped import grouped_product
from tensortrain.errors import KernelBuildError, ShapeError
from tensortrain.nn import runner
from tensortrain.system import (
    native as kernels,
)
from tensortrain.system.native import load as loading

built = pytest.mark.skipif(kernels.library() is None, reason="kernels are not built: tensortrain build-kernels")

CHAINS = [
    Chain((4, 3), (2, 5), (1, 3, 1)),
    Chain((2, 3, 2), (3, 2, 4), (1, 4, 3, 1)),
    Chain((3, 1, 2, 2), (1, 4, 2, 3), (1, 2, 5, 2, 1)),
    Chain((7,), (5,), (1, 1)),
    Chain((2, 2), (2, 2), (1, 9, 1)),  # a rank above the feasible
]


def all_plans(chain: Chain, batch: int, training: bool) -> list[ContractionPlan]:
    model = CostModel.reference("cpu")
    plans: list[ContractionPlan] = []
    for force in (None, "left-to-right", "right-to-left", "merged", "dense"):
        found = chain_candidates(
            chain, batch=batch, dtype=torch.float64, training=training, force=force, cost_model=model
        )
        plans += [plan for plan in found if plan not in plans]
    return plans + [plan.flipped() for plan in plans if plan.flipped().flips]


def draw(
    chain: Chain, lead: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = torch.randn(*lead, chain.in_features, dtype=dtype, requires_grad=True)
    bias = torch.randn(chain.out_features, dtype=dtype, requires_grad=True)
    return x, bias, [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in chain.core_shapes]


@pytest.fixture
def layer() -> tt.nn.Linear:
    return tt.nn.Linear(24, 12, in_modes=(2, 3, 4), out_modes=(3, 2, 2), rank=3, dtype=torch.float64)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often Python's way was taken: without an entry, the kernels did it all."""
    calls: list[int] = []
    plain = ContractionPlan.prepare

    def prepare(self: ContractionPlan, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        calls.append(1)
        return plain(self, cores)

    monkeypatch.setattr(ContractionPlan, "prepare", prepare)
    return calls


@built
@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("lead", [(1,), (6,), (2, 3), ()], ids=str)
def test_every_plan_gives_the_values_and_gradients_of_python(chain: Chain, lead: tuple[int, ...]) -> None:
    x, bias, cores = draw(chain, lead)
    grad = torch.randn(*lead, chain.out_features, dtype=torch.float64)
    plans = all_plans(chain, max(1, x.numel() // chain.in_features), training=True)
    assert len(plans) >= 2
    for plan in plans:
        for b in (None, bias):
            inputs = [x, *cores] if b is None else [x, b, *cores]
            y = plan.execute(x, cores, bias=b)
            assert "SweepFunction" in y.grad_fn.name()
            found = torch.autograd.grad(y, inputs, grad)
            with kernels.python_only():
                expected = plan.execute(x, cores, bias=b)
                slow = torch.autograd.grad(expected, inputs, grad)
            torch.testing.assert_close(y, expected)
            for one, other in zip(found, slow, strict=True):
                torch.testing.assert_close(one, other)


@built
@pytest.mark.parametrize("chain", CHAINS[:3], ids=str)
def test_ready_matrices_give_the_values_and_gradients_of_python(chain: Chain) -> None:
    x, bias, cores = draw(chain, (5,))
    grad = torch.randn(5, chain.out_features, dtype=torch.float64)
    for plan in all_plans(chain, 5, training=False):
        ready = [part.detach().requires_grad_() for part in plan.prepare(cores)]
        y = plan.execute(x, (), ready, bias)
        assert "SweepFunction" in y.grad_fn.name() or (plan.uses_dense and not plan.flips)
        found = torch.autograd.grad(y, [x, bias, *ready], grad)
        with kernels.python_only():
            expected = plan.execute(x, (), ready, bias)
            slow = torch.autograd.grad(expected, [x, bias, *ready], grad)
        torch.testing.assert_close(y, expected)
        for one, other in zip(found, slow, strict=True):
            torch.testing.assert_close(one, other)


@built
def test_derivatives_are_right_to_second_order() -> None:
    # Its plans have the same steps as those of CHAINS[1]; the time grows with the square of the numbers drawn.
    chain = Chain((2, 2, 2), (3, 2, 2), (1, 2, 3, 1))
    x, bias, cores = draw(chain, (3,))
    for plan in all_plans(chain, 3, training=True):

        def run(x: Tensor, bias: Tensor, *cores: Tensor, plan: ContractionPlan = plan) -> Tensor:
            return plan.execute(x, cores, bias=bias)

        assert torch.autograd.gradcheck(run, (x, bias, *cores))
        assert torch.autograd.gradgradcheck(run, (x, bias, *cores))


@built
@pytest.mark.parametrize("wanted", range(5))
def test_penalties_on_one_gradient_reach_everything(wanted: int) -> None:
    chain = CHAINS[1]
    for plan in all_plans(chain, 3, training=True):
        x, bias, cores = draw(chain, (3,))
        inputs = [x, bias, *cores]

        def second(plan: ContractionPlan = plan, inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
            y = plan.execute(inputs[0], inputs[2:], bias=inputs[1])
            (first,) = torch.autograd.grad(y.sin().sum(), inputs[wanted], create_graph=True)
            return torch.autograd.grad(first.square().sum(), inputs)

        found = second()
        with kernels.python_only():
            expected = second()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@built
def test_second_derivatives_follow_inputs_that_depend_on_each_other() -> None:
    chain, plan = CHAINS[1], all_plans(CHAINS[1], 3, training=True)[0]
    source, bias, cores = draw(chain, (3,))

    def penalty(cores: Sequence[Tensor]) -> Tensor:
        x = source * cores[0].square().sum() + cores[-1].sum()
        y = plan.execute(x, [cores[0], cores[1] * cores[0].sum(), cores[2]], bias=bias)
        first = torch.autograd.grad(y.square().sum(), [x, *cores], create_graph=True)
        return sum(part.square().sum() for part in first)  # type: ignore[return-value]

    found = torch.autograd.grad(penalty(cores), cores)
    with kernels.python_only():
        expected = torch.autograd.grad(penalty(cores), cores)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@built
def test_only_the_gradients_that_are_needed_come_back() -> None:
    chain = CHAINS[1]
    for plan in all_plans(chain, 4, training=True):
        for n_wanted in (1, 2):
            for wanted in combinations(range(5), n_wanted):
                x, bias, cores = draw(chain, (4,))
                inputs = [x, bias, *cores]
                for k, tensor in enumerate(inputs):
                    tensor.requires_grad_(k in wanted)
                plan.execute(x, cores, bias=bias).sum().backward()
                found = [tensor.grad for tensor in inputs]
                with kernels.python_only():
                    leaves = [inputs[k] for k in wanted]
                    expected = torch.autograd.grad(plan.execute(x, cores, bias=bias).sum(), leaves)
                assert [k for k, grad in enumerate(found) if grad is not None] == list(wanted)
                for k, grad in zip(wanted, expected, strict=True):
                    torch.testing.assert_close(found[k], grad)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    chain = CHAINS[1]
    x, bias, cores = draw(chain, (6,), dtype)
    for plan in all_plans(chain, 6, training=False):
        y = plan.execute(x, cores, bias=bias)
        with kernels.python_only():
            expected = plan.execute(x, cores, bias=bias)
        assert y.dtype == expected.dtype == dtype
        # of sums of this size, in whatever order they are taken
        weight = chain_to_dense([core.detach().double().abs() for core in cores])
        size = (x.detach().double().abs() @ weight.t()).max() + bias.detach().abs().max()
        few_roundings = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=few_roundings, atol=few_roundings * float(size))


@built
def test_strided_inputs() -> None:
    chain = CHAINS[1]
    _, bias, cores = draw(chain, (1,))
    x = torch.randn(chain.in_features, 8, dtype=torch.float64).t()[::2].requires_grad_()
    for plan in all_plans(chain, 4, training=True):
        y = plan.execute(x, cores, bias=bias)
        with kernels.python_only():
            torch.testing.assert_close(y, plan.execute(x, cores, bias=bias))


@built
@pytest.mark.parametrize("rows", [1, 4, 5, 23])
def test_a_few_rows_at_a_time_change_nothing(rows: int) -> None:
    chain = CHAINS[1]
    x, bias, cores = draw(chain, (1, rows))
    for plan in all_plans(chain, rows, training=False):
        with torch.no_grad():
            ready = plan.prepare(cores)
            parts = plan.by_parts(4)
            torch.testing.assert_close(parts.execute(x, (), ready, bias), plan.execute(x, (), ready, bias))
        y = parts.execute(x, (), ready, bias)  # gradients are recorded: all rows at once
        (found,) = torch.autograd.grad(y.square().sum(), x)
        (expected,) = torch.autograd.grad(plan.execute(x, (), ready, bias).square().sum(), x)
        torch.testing.assert_close(found, expected)
        (first,) = torch.autograd.grad(parts.execute(x, (), ready, bias).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.sin().sum(), x)
        with kernels.python_only():
            (first,) = torch.autograd.grad(plan.execute(x, (), ready, bias).square().sum(), x, create_graph=True)
            (expected,) = torch.autograd.grad(first.sin().sum(), x)
        torch.testing.assert_close(found, expected)


@built
def test_many_gradients_at_once() -> None:
    chain = CHAINS[1]
    x, bias, cores = draw(chain, (3,))
    many = torch.randn(4, 3, chain.out_features, dtype=torch.float64)
    for plan in all_plans(chain, 3, training=True):
        y = plan.execute(x, cores, bias=bias)
        inputs = [x, bias, *cores]
        found = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in many]
        for got, expected in zip(found, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(expected))


@built
def test_where_no_gradient_arrives_none_leaves() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    chain = CHAINS[1]
    x, bias, cores = draw(chain, (3,))
    for plan in all_plans(chain, 3, training=True):
        Stop.apply(plan.execute(x, cores, bias=bias)).sum().backward()
        assert all(tensor.grad is None for tensor in (x, bias, *cores))


@built
def test_compiled_autograd() -> None:
    chain = CHAINS[1]
    x, bias, cores = draw(chain, (3,))
    inputs = [x, bias, *cores]
    for plan in all_plans(chain, 3, training=True)[:3]:
        expected = torch.autograd.grad(plan.execute(x, cores, bias=bias).sin().sum(), inputs)
        with compiled_autograd._enable(lambda graph: graph):
            found = torch.autograd.grad(plan.execute(x, cores, bias=bias).sin().sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@built
@pytest.mark.parametrize("k", range(3))
def test_a_way_back_can_be_traced(k: int) -> None:
    chain = CHAINS[1]
    x, bias, cores = draw(chain, (3,))
    y = all_plans(chain, 3, training=True)[k].execute(x, cores, bias=bias)

    def back(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, bias, *cores], grad, retain_graph=True)

    traced, grad = make_fx(back)(torch.ones_like(y)), torch.randn_like(y)
    for one, other in zip(traced(grad), back(grad), strict=True):
        torch.testing.assert_close(one, other)


@built
def test_a_way_back_has_forward_derivatives() -> None:
    chain = CHAINS[1]
    x, bias, cores = draw(chain, (3,))
    grad, tangent = torch.randn(2, 3, chain.out_features, dtype=torch.float64)
    for plan in all_plans(chain, 3, training=True):
        y = plan.execute(x, cores, bias=bias)
        expected = torch.autograd.grad(y, [x, bias, *cores], tangent, retain_graph=True)
        with forward_ad.dual_level():
            found = torch.autograd.grad(y, [x, bias, *cores], forward_ad.make_dual(grad, tangent))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(forward_ad.unpack_dual(one).tangent, other)


@built
@pytest.mark.parametrize("counts", [(3, 0, 4, 1), (0, 0, 8, 0), (8, 0, 0, 0)])
def test_grouped_products(counts: tuple[int, ...]) -> None:
    states = torch.randn(8, 2, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 4, 3, dtype=torch.float64).transpose(0, 1).requires_grad_()
    found = grouped_product(states, table, counts)
    gradients = torch.autograd.grad(found.square().sum(), [states, table])
    with kernels.python_only():
        expected = grouped_product(states, table, counts)
        slow = torch.autograd.grad(expected.square().sum(), [states, table])
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, slow, strict=True):
        torch.testing.assert_close(one, other)


# -- layers: the short way ----------------------------------------------------------------------------


@built
@pytest.mark.parametrize("format", ["tt", "low_rank", "cp", "tucker", "btt", "ring", "block_term", "kronecker"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
def test_layers_keep_giving_what_python_gives(format: str, bias: bool, implementation: Any) -> None:
    layer = tt.nn.Linear(24, 12, bias, format=format, rank=2, implementation=implementation, dtype=torch.float64)
    for rows in (1, 3, 7):
        x = torch.randn(rows, 24, dtype=torch.float64, requires_grad=True)
        for _ in range(3):  # the long way, then the short one
            y = layer(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
            with torch.no_grad():
                kept = layer(x)
            with kernels.python_only():
                expected = nn.functional.linear(x, layer.weight, layer.bias)
                slow = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(kept, expected)
            for one, other in zip(gradients, slow, strict=True):
                torch.testing.assert_close(one, other)


@built
def test_the_short_way_leaves_python_out(layer: tt.nn.Linear, counted: list[int]) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x), layer(x)
    with torch.no_grad():
        layer(x), layer(x)
    before = len(counted)
    with torch.no_grad():
        layer(x)
    layer(x)
    assert len(counted) == before


@built
@pytest.mark.parametrize("how", ["in place", "optimizer", "fused", "replaced", "loaded", "copied data", "dtype"])
def test_kept_weights_follow_the_cores(layer: tt.nn.Linear, how: str) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            before = layer(x)
    other = tt.nn.Linear(24, 12, in_modes=(2, 3, 4), out_modes=(3, 2, 2), rank=3, dtype=torch.float64)
    if how == "in place":
        with torch.no_grad():
            layer.cores[1].mul_(2)
    elif how in ("optimizer", "fused"):
        layer(x).square().sum().backward()
        torch.optim.Adam(layer.parameters(), lr=0.1, fused=how == "fused").step()
    elif how == "replaced":
        layer.cores[1] = nn.Parameter(layer.cores[1].detach() * 2)
    elif how == "loaded":
        layer.load_state_dict(other.state_dict())
    elif how == "copied data":
        layer.cores[1].data = layer.cores[1].data * 2
    else:
        layer.float().double()
        with torch.no_grad():
            layer.cores[0].neg_()
    with torch.no_grad():
        after = layer(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, nn.functional.linear(x, chain_to_dense(list(layer.cores)), layer.bias))


@built
def test_kept_weights_are_dropped_when_training_goes_on(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        layer(x), layer(x)
    layer(x), layer(x)
    assert layer.resident_cache_bytes == 0


@built
@pytest.mark.parametrize("by", ["layer", "weight"])
def test_kept_weights_are_dropped_when_training_goes_on_the_short_way(layer: tt.nn.Linear, by: str) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    layer.implementation = "dense"
    for _ in range(3):
        layer(x), layer(x)
        with torch.no_grad():
            layer(x) if by == "layer" else layer.weight
        assert layer.resident_cache_bytes > 0
        layer(x)
        assert layer.resident_cache_bytes == 0


@built
def test_the_dense_weight_leaves_memory_with_the_cache(layer: tt.nn.Linear) -> None:
    layer.implementation = "dense"
    with torch.no_grad():
        layer(torch.randn(5, 24, dtype=torch.float64))
        kept = weakref.ref(layer.runner.dense_weight(layer))  # what layer.weight copies
    assert kept() is not None
    layer.weight.sum().backward()  # the cores are about to change
    gc.collect()
    assert kept() is None


@built
def test_what_the_kernels_do_not_serve_takes_the_long_way(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(2):
        expected = layer(x)
        with torch.no_grad():
            layer(x)
    assert layer(torch.empty(0, 24, dtype=torch.float64)).shape == (0, 12)
    assert layer(torch.empty(2, 0, 24, dtype=torch.float64)).shape == (2, 0, 12)
    torch.testing.assert_close(torch.vmap(layer)(x), expected)
    cores = {name: 2 * value.detach() for name, value in layer.named_parameters()}
    doubled = torch.func.functional_call(layer, cores, (x,))
    torch.testing.assert_close(doubled, nn.functional.linear(x, 8 * layer.weight, 2 * layer.bias))
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ layer.weight.t())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, tangent)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0
    with pytest.raises(ShapeError, match="in_features"):
        layer(torch.randn(5, 23, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        layer(x.float())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x.clone()), expected)


@built
def test_autocast_takes_the_long_way() -> None:
    layer = tt.nn.Linear(24, 12, rank=3)
    x = torch.randn(5, 24)
    layer(x), layer(x)
    with torch.no_grad():
        layer(x), layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16


@built
def test_inference_mode_keeps_its_own_kind_of_tensor(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.inference_mode():
        found = [layer(x) for _ in range(3)]
    assert all(y.is_inference() for y in found)
    layer(x).sum().backward()
    assert layer.cores[0].grad is not None


@built
def test_frozen_layers_pass_gradients_on(layer: tt.nn.Linear) -> None:
    layer.requires_grad_(False)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(grad, layer.weight.sum(0).expand(5, -1))


@built
def test_copies_and_pickles_go_without_the_short_way(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = [layer(x), layer(x)][-1]
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
            torch.testing.assert_close(other(x), expected)
            torch.testing.assert_close(other(x), expected)


@built
def test_checkpointing_and_hooks_on_saved_tensors(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    layer(x), layer(x)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.parameters()])
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooked = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert packed
    for one, two, other in zip(found, hooked, expected, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(two, other)


@built
@pytest.mark.parametrize("format", ["tt", "cp", "low_rank"])
@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
@pytest.mark.parametrize("in_features", [24, 23])
def test_frozen_layers_save_the_same_when_they_run_again(format: str, implementation: Any, in_features: int) -> None:
    layer = tt.nn.Linear(in_features, 12, format=format, rank=3, implementation=implementation, dtype=torch.float64)
    layer.cores.requires_grad_(False)
    for rows in (1, 4, 30):  # checkpointing takes the long way, then the short one
        x = torch.randn(rows, in_features, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
        torch.testing.assert_close(grad, layer.weight.sum(0).expand(rows, -1))


@built
def test_an_input_changed_before_backward_is_noticed(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@built
def test_only_what_the_gradients_need_is_kept(layer: tt.nn.Linear) -> None:
    source = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    layer(source), layer(source)
    y = layer(source)
    with torch.no_grad():
        layer.bias.add_(1)
    y.sum().backward()
    layer.cores.requires_grad_(False)
    weight = layer.weight
    for _ in range(3):
        x = source * 1
        y = layer(x)
        x.add_(1)
        (first,) = torch.autograd.grad(y.square().sum(), source, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), source)
        torch.testing.assert_close(second, 2 * (weight.t() @ weight).sum(0).expand(5, -1))


@built
def test_frozen_layers_train_their_bias_on_inference_tensors(layer: tt.nn.Linear) -> None:
    layer.cores.requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(3):
        (grad,) = torch.autograd.grad(layer(x).sum(), layer.bias)
        torch.testing.assert_close(grad, torch.full_like(grad, 5))


@built
def test_nothing_is_recorded_in_inference_mode(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = [layer(x), layer(x)][-1]
    with torch.inference_mode(), torch.enable_grad():
        for _ in range(3):
            y = layer(x)
            assert not y.requires_grad
            torch.testing.assert_close(y, expected)


@built
def test_subclasses_see_their_operations(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(3):
        layer(x)
        assert type(layer(x.as_subclass(_Marked))) is _Marked
    with torch.no_grad():
        for _ in range(3):
            layer(x)
            assert type(layer(x.as_subclass(_Marked))) is _Marked
    chain = CHAINS[1]
    given, bias, cores = draw(chain, (3,))
    for plan in all_plans(chain, 3, training=True):
        assert type(plan.execute(given.as_subclass(_Marked), cores)) is _Marked
        assert type(plan.execute(given, [core.as_subclass(_Marked) for core in cores])) is _Marked
        assert type(plan.execute(given, cores, bias=bias.as_subclass(_Marked))) is _Marked


class _Marked(Tensor):
    """A subclass that shows only in its type."""


@built
@pytest.mark.parametrize("which", [0, 1, 2])
def test_pruned_cores_are_not_taken_for_plain_ones(layer: tt.nn.Linear, which: int) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(2):
        layer(x)
        with torch.no_grad():
            layer(x)
    prune.l1_unstructured(layer.cores, str(which), amount=0.5)
    with torch.no_grad():
        expected = nn.functional.linear(x, chain_to_dense(list(layer.cores)), layer.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)


@built
def test_constrained_cores_are_not_taken_for_plain_ones(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(2):
        layer(x)
        with torch.no_grad():
            layer(x)
    tt.nn.orthogonal(layer, kind="left")
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@built
def test_settings_made_later_count(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    layer.implementation = "dense"
    with torch.no_grad():
        layer(x), layer(x)
        layer.implementation = "factorized"
        layer(x), layer(x)
        assert "dense" not in layer.plan(5).kind
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@built
def test_threads_share_a_layer(layer: tt.nn.Linear) -> None:
    inputs = [torch.randn(rows, 24, dtype=torch.float64) for rows in (1, 3, 9, 17)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(50):
                    for x, y in zip(inputs, expected, strict=True):
                        torch.testing.assert_close(layer(x), y)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@built
def test_threads_share_a_layer_that_changes(layer: tt.nn.Linear) -> None:
    inputs = [torch.randn(rows, 24, dtype=torch.float64) for rows in (1, 3, 9, 30)]
    failures: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            with torch.no_grad():
                while not done.is_set():
                    for x in inputs:
                        layer(x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(600):
            layer.cores[0].mul_(1)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


@built
def test_another_thread_may_clear_a_layer_at_any_time(layer: tt.nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = [layer(x), layer(x)][-1]
    options = runner._options

    def interrupted(layer: tt.nn.Linear) -> tuple[Any, ...]:
        found = options(layer)
        layer.clear_cache()
        return found

    monkeypatch.setattr(runner, "_options", interrupted)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)


# -- building -----------------------------------------------------------------------------------------


def test_off_means_python(layer: tt.nn.Linear) -> None:
    with kernels.python_only():
        assert kernels.library() is None
        y = layer(torch.randn(5, 24, dtype=torch.float64))
        assert "SweepFunction" not in y.grad_fn.name()


@built
def test_off_means_python_for_layers_that_ran_before(layer: tt.nn.Linear) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x), layer(x)
    with torch.no_grad():
        layer(x), layer(x)
    with kernels.python_only():
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()
        assert "SweepFunction" not in layer(x).grad_fn.name()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine where nothing has been built."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert not loading.look_again()
        yield tmp_path
    loading.look_again()


def test_a_failed_build_says_what_is_missing_and_leaves_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match="C\\+\\+ compiler"):
        kernels.build()
    assert not list((elsewhere / "tensortrain").iterdir())
    assert kernels.library() is None


def test_a_cache_that_may_not_be_read_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/not/mine")
        patch.setattr(os, "stat", refuse)
        assert not loading.look_again()


@built
def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(KernelBuildError, match="XDG_CACHE_HOME"):
            kernels.build()
    loading.look_again()


@built
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 0.999])
def test_a_library_that_was_cut_short_is_passed_by(elsewhere: Path, share: float) -> None:
    """Loading one would end the process: the pages behind its end are not there."""
    source, target = next(iter(loading._modules)), kernels.built_path()
    target.parent.mkdir(parents=True)
    content = Path(source).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    loading.digest_path(target).write_text(digest)
    target.write_bytes(content[: int(share * len(content))])
    assert not loading.look_again()
    target.write_bytes(content)
    assert loading.is_whole(target)


@built
@pytest.mark.parametrize("digest", [None, "", "0" * 64, "\udc80"])
def test_a_library_without_its_checksum_is_passed_by(elsewhere: Path, digest: str | None) -> None:
    source, target = next(iter(loading._modules)), kernels.built_path()
    target.parent.mkdir(parents=True)
    target.write_bytes(Path(source).read_bytes())
    if digest is not None:
        loading.digest_path(target).write_bytes(digest.encode(errors="surrogateescape"))
    assert not loading.look_again()


def test_a_broken_library_is_passed_by(elsewhere: Path, layer: tt.nn.Linear) -> None:
    path = kernels.built_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    assert not loading.look_again()
    assert kernels.library() is None
    assert layer(torch.randn(2, 24, dtype=torch.float64)).shape == (2, 12)


@built
def test_small_layers_leave_the_number_of_threads_of_the_library_as_it_was() -> None:
    """Their products run on one thread; large ones of others are shared among as many threads as before."""
    found = torch.__config__.parallel_info()
    layer = tt.nn.Linear(60, 42, rank=7, in_modes=(12, 5), out_modes=(7, 6), implementation="factorized")
    x = torch.randn(16, 60, requires_grad=True)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    assert torch.__config__.parallel_info() == found
