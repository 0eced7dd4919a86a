"""WeightCache gives what a fresh build would give, and builds no more often than it must."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tensortrain.contract import Chain, CostModel, WeightCache, plan_chain


class Source:
    """Two parameters, their sum, and a count of how often it was built."""

    def __init__(self) -> None:
        self.layer = torch.nn.Module()
        self.layer.a = Parameter(torch.randn(3, dtype=torch.float64))
        self.layer.b = Parameter(torch.randn(3, dtype=torch.float64))
        self.cache = WeightCache()
        self.n_builds = 0

    def build(self) -> Tensor:
        self.n_builds += 1
        return self.layer.a + self.layer.b

    def get(self) -> Tensor:
        return self.cache.get([self.layer.a, self.layer.b], self.build)

    def assert_current(self, n_builds: int) -> None:
        torch.testing.assert_close(self.get(), self.layer.a + self.layer.b, rtol=0, atol=0)
        assert self.n_builds == n_builds


@pytest.fixture
def source() -> Source:
    torch.manual_seed(0)
    return Source()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_built_once_while_nothing_changes(source: Source, mode: type) -> None:
    with mode():
        assert source.get() is source.get()
        source.assert_current(1)


def test_in_place_update(source: Source) -> None:
    with torch.no_grad():
        source.get()
        source.layer.b.add_(1.0)
        source.assert_current(2)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_optimizer_step(source: Source, options: dict) -> None:
    optimizer = torch.optim.Adam(source.layer.parameters(), lr=0.1, **options)
    for n_builds in (1, 3, 5):
        with torch.no_grad():
            source.assert_current(n_builds)
        source.get().sum().backward()  # builds afresh: gradients are recorded
        optimizer.step()


def test_load_state_dict(source: Source) -> None:
    with torch.no_grad():
        source.get()
        source.layer.load_state_dict({"a": torch.ones(3), "b": torch.ones(3)})
        source.assert_current(2)
        source.layer.load_state_dict({"a": torch.zeros(3), "b": torch.ones(3)}, assign=True)
        source.assert_current(3)


def test_dtype_there_and_back(source: Source) -> None:
    with torch.no_grad():
        source.get()
        source.layer.to(torch.float32)
        assert source.get().dtype == torch.float32
        source.layer.to(torch.float64)  # the values have been rounded
        source.assert_current(3)


def test_replaced_data(source: Source) -> None:
    with torch.no_grad():
        for n_builds in range(1, 20):
            source.assert_current(n_builds)
            # The old memory is free to be handed out again at once.
            source.layer.a.data = torch.full((3,), float(n_builds), dtype=torch.float64)


def test_replaced_parameter(source: Source) -> None:
    with torch.no_grad():
        for n_builds in range(1, 20):
            source.assert_current(n_builds)
            source.layer.a = Parameter(torch.full((3,), float(n_builds), dtype=torch.float64))


def test_gradients_are_never_cut(source: Source) -> None:
    with torch.no_grad():
        source.get()
    weight = source.get()
    assert weight.requires_grad
    (grad,) = torch.autograd.grad(weight.sum(), source.layer.a)
    torch.testing.assert_close(grad, torch.ones_like(grad))
    source.get()
    assert source.n_builds == 3


def test_frozen_sources_are_cached_in_grad_mode(source: Source) -> None:
    source.layer.requires_grad_(False)
    with torch.inference_mode():
        source.get()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (source.get() * x).sum().backward()  # needs a value that was not made in inference mode
    torch.testing.assert_close(x.grad, source.get())
    assert source.n_builds == 1


def test_inference_tensors_are_built_afresh() -> None:
    with torch.inference_mode():
        source = Source()
        source.get()
        source.layer.a.add_(1.0)
        source.assert_current(2)


def test_functional_transforms(source: Source) -> None:
    source.layer.requires_grad_(False)
    source.get()
    a, b = source.layer.a, source.layer.b
    grad = torch.func.grad(lambda t: source.cache.get([t, b], lambda: t * b).sum())(a.detach())
    torch.testing.assert_close(grad, b.detach())


def test_traced_programs_build_afresh(source: Source) -> None:
    source.layer.requires_grad_(False)
    with torch.no_grad():
        source.get()
        torch._dynamo.reset()
        run = torch.compile(lambda x: x * source.get(), fullgraph=True, backend="eager")
        x = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(run(x), source.layer.a + source.layer.b)
        source.layer.a.add_(1.0)
        torch.testing.assert_close(run(x), source.layer.a + source.layer.b)


def test_autocast_has_its_own_value() -> None:
    cache, a = WeightCache(), torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cache.get([a], lambda: a @ a).dtype == torch.bfloat16
    assert cache.get([a], lambda: a @ a).dtype == torch.float32


def test_tags_tell_values_apart() -> None:
    cache, a = WeightCache(), torch.ones(3)
    assert cache.get([a], lambda: 2 * a, tag="double").sum() == 6
    assert cache.get([a], lambda: 3 * a, tag="triple").sum() == 9
    assert cache.get([a], lambda: 0 * a, tag="double").sum() == 6
    a.add_(1)
    assert cache.get([a], lambda: 3 * a, tag="triple").sum() == 18
    assert cache.get([a], lambda: 2 * a, tag="double").sum() == 12


def test_prepared_cores_of_a_plan() -> None:
    chain = Chain((2, 3, 2), (3, 2, 2), (1, 2, 2, 1))
    cores = [torch.randn(shape, dtype=torch.float64) for shape in chain.core_shapes]
    plan = plan_chain(chain, batch=2, force="merged", cost_model=CostModel.reference("cpu"))
    cache, x = WeightCache(), torch.randn(2, 12, dtype=torch.float64)
    for _ in range(2):
        prepared = cache.get(cores, lambda: plan.prepare(cores), tag=plan.groups)
        torch.testing.assert_close(plan.execute(x, cores, prepared), plan.execute(x, cores))
        cores[1].mul_(2)


def test_bytes_leave_out_views_of_the_sources() -> None:
    cache, a = WeightCache(), torch.ones(100)
    assert cache.nbytes == 0
    cache.get([a], lambda: (a.reshape(10, 10), 2 * a))
    assert cache.nbytes == 400
    cache.clear()
    assert cache.nbytes == 0


def test_copies_are_empty_and_separate(source: Source) -> None:
    with torch.no_grad():
        source.get()
    for twin in (
        copy.copy(source.cache),
        copy.deepcopy(source.cache),
        pickle.loads(pickle.dumps(source.cache)),
    ):
        assert twin.nbytes == 0
        assert twin is not source.cache
    assert source.cache.nbytes == 24
