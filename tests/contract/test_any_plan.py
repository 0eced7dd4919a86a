"""Whoever holds a plan need not ask whether it is a chain's or a network's."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract import Chain, CostModel, Network, Plan, chain_to_dense, kernels
from tensortrain.contract.choose import candidates

MODEL = CostModel.reference("cpu")
CHAIN = Chain((3, 5, 2), (2, 4, 3), (1, 4, 3, 1))
SIZES = (("i", 5), ("j", 4), ("k", 3), ("l", 6), ("r", 2))
NETWORK = Network((("j", "k", "r"), ("i", "r"), ("l", "k", "r")), ("i", "l"), ("j", "k"), SIZES)
SHAPES = {"chain": CHAIN, "network": NETWORK}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Any:
    return SHAPES[request.param]


def problem(shape: Any) -> tuple[list[Tensor], Tensor]:
    cores = [torch.randn(size, dtype=torch.float64) for size in shape.core_shapes]
    return cores, chain_to_dense(cores) if shape is CHAIN else shape.to_dense(cores)


def plans_of(shape: Any, training: bool = False) -> tuple[Plan, ...]:
    plans: tuple[Plan, ...] = candidates(shape, batch=4, dtype=torch.float64, training=training, cost_model=MODEL)
    assert {plan.uses_dense for plan in plans} == {False, True}
    return plans


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("less", [(0, 0), (1, 0), (0, 2), (3, 1)])
def test_all_plans_run_by_one_signature(shape: Any, less: tuple[int, int], bias: bool) -> None:
    cores, dense = problem(shape)
    n, m = shape.in_features - less[0], shape.out_features - less[1]
    x, b = torch.randn(2, 3, n, dtype=torch.float64), torch.randn(m, dtype=torch.float64) if bias else None
    expected = F.linear(x, dense[:m, :n], b)
    for plan in plans_of(shape):
        fitted = plan.fit(n, m)
        assert (fitted.in_features, fitted.out_features) == (n, m)
        assert (fitted is plan) == (less == (0, 0))
        found = [fitted.execute(x, cores, bias=b), fitted.execute(x, (), fitted.prepare(cores), b)]
        with kernels.python_only():
            found.append(fitted.execute(x, cores, None, b))
        for y in found:
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert y.is_contiguous()


def test_plans_of_one_key_prepare_the_same(shape: Any) -> None:
    cores, _ = problem(shape)
    by_key: dict[Any, tuple[Tensor, ...]] = {}
    for plan in (*plans_of(shape), *(plan.flipped() for plan in plans_of(shape)), *plans_of(shape, training=True)):
        known = by_key.setdefault(plan.prepared_key, plan.prepare(cores))
        for one, other in zip(known, plan.prepare(cores), strict=True):
            assert torch.equal(one, other)
    assert len(by_key) > 1


def test_plans_are_told_apart_and_told(shape: Any) -> None:
    plans = plans_of(shape)
    assert len({repr(plan.course) for plan in plans}) == len(plans)
    for plan in plans:
        assert plan.shape is shape
        assert str(plan.flops) in repr(plan)
        assert ("dense" in plan.words) == plan.uses_dense
        assert "float64 on cpu" in str(plan)


def test_what_was_compiled_is_no_part_of_a_plan(shape: Any) -> None:
    cores, _ = problem(shape)
    for plan in plans_of(shape):
        plan.execute(torch.randn(4, shape.in_features, dtype=torch.float64), cores)
        for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
            assert other == plan
            assert other.compiled.by_readiness == {}


OLD_NAMES = {
    "plan": ("ContractionPlan", "Direction", "Form", "Kind", "Step", "linear_product"),
    "network": ("NetworkPlan", "Product", "Sizes", "network_candidates", "plan_network", "contraction", "run"),
    "choose": ("chain_candidates", "plan_chain"),
}


@pytest.mark.parametrize("module", OLD_NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_before_are_found(module: str) -> None:
    found = importlib.import_module(f"tensortrain.contract.{module}")
    for name in OLD_NAMES[module]:
        assert getattr(found, name).__class__ is not None
    with pytest.raises(AttributeError, match="never_there"):
        _ = found.never_there
