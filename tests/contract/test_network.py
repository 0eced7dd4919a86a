"""Networks of named legs: shapes, products, plans."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tensortrain.contract import CostModel, Network, plan_network
from tensortrain.contract.products import contraction, contraction_flops, run
from tensortrain.errors import KindError, ShapeError
from tensortrain.testing import rel_error

MODEL = CostModel.reference("cpu")
CP = Network(
    (("i1", "a"), ("i2", "a"), ("o1", "a"), ("o2", "a")),
    ("o1", "o2"),
    ("i1", "i2"),
    (("o1", 3), ("o2", 5), ("i1", 4), ("i2", 7), ("a", 2)),
)
BTT = Network(
    (("i2", "i1", "o1", "a"), ("o1", "a", "i2", "o2")),
    ("o1", "o2"),
    ("i1", "i2"),
    (("o1", 3), ("o2", 5), ("i1", 4), ("i2", 7), ("a", 2)),
)
RING = Network(
    (("r0", "o1", "i1", "r1"), ("r1", "o2", "i2", "r0")),
    ("o1", "o2"),
    ("i1", "i2"),
    (("o1", 3), ("o2", 5), ("i1", 4), ("i2", 7), ("r0", 2), ("r1", 3)),
)
DENSE = Network((("i", "o"),), ("o",), ("i",), (("o", 3), ("i", 4)))
EQUATIONS = {"cp": "ka,la,ma,na->mnkl", "btt": "lkma,maln->mnkl", "ring": "rmks,snlr->mnkl", "dense": "io->oi"}
NETWORKS = {"cp": CP, "btt": BTT, "ring": RING, "dense": DENSE}
every_network = pytest.mark.parametrize("name", NETWORKS)


def cores_of(network: Network, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in network.core_shapes]


def dense_of(name: str, cores: list[Tensor]) -> Tensor:
    network = NETWORKS[name]
    return torch.einsum(EQUATIONS[name], *cores).reshape(network.out_features, network.in_features)


@every_network
def test_the_dense_weight_is_the_einsum(name: str) -> None:
    cores = cores_of(NETWORKS[name])
    assert rel_error(NETWORKS[name].to_dense(cores), dense_of(name, cores)) <= 1e-14


def test_counts() -> None:
    assert CP.core_shapes == ((4, 2), (7, 2), (3, 2), (5, 2))
    assert (CP.out_features, CP.in_features, CP.n_params, CP.dense_numel) == (15, 28, 38, 420)
    assert (CP.n_paths, BTT.n_paths, RING.n_paths, DENSE.n_paths) == (2, 2, 6, 1)
    assert (CP.private_legs(0), BTT.private_legs(0), BTT.private_legs(1)) == (("i1",), ("i1",), ("o2",))


@every_network
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_squared_norm(dtype: torch.dtype, name: str) -> None:
    cores = cores_of(NETWORKS[name], dtype)
    exact = dense_of(name, cores).abs().square().sum().detach()
    assert float(NETWORKS[name].squared_norm(cores).detach()) == pytest.approx(float(exact), rel=1e-12)


def test_the_squared_norm_of_a_large_weight_never_builds_it() -> None:
    n, d = 64, 4  # 2e14 entries
    legs = [f"{side}{k}" for side in "io" for k in range(d)]
    large = Network(
        tuple((leg, "a") for leg in legs), tuple(legs[d:]), tuple(legs[:d]), (*((leg, n) for leg in legs), ("a", 3))
    )
    cores = [torch.randn(n, 3, dtype=torch.float64) for _ in legs]
    exact = math.prod(core.T @ core for core in cores[1:]) * (cores[0].T @ cores[0])
    assert float(large.squared_norm(cores)) == pytest.approx(float(exact.sum()), rel=1e-12)


@every_network
@pytest.mark.parametrize("force", ["factorized", "dense", None])
@pytest.mark.parametrize("batch", [1, 6, 5000])
@pytest.mark.parametrize("training", [False, True])
def test_every_plan_multiplies(training: bool, batch: int, force: str | None, name: str) -> None:
    network = NETWORKS[name]
    plan = plan_network(network, batch=batch, training=training, force=force, cost_model=MODEL)  # type: ignore[arg-type]
    cores = cores_of(network)
    weight = dense_of(name, cores)
    for shape in ((6,), (0,), (2, 3), ()):
        x = torch.randn(*shape, network.in_features, dtype=torch.float64)
        y = plan.execute(x, cores)
        assert y.shape == (*shape, network.out_features)
        assert rel_error(y, x @ weight.T) <= 1e-13
        assert torch.equal(plan.execute(x, (), plan.prepare(cores)), y)
    x = torch.randn(network.in_features, 5, dtype=torch.float64).T  # not contiguous
    y = plan.execute(x, cores)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, cores, upstream)
    exact = torch.autograd.grad(x @ weight.T, cores, upstream)
    assert all(rel_error(f, e) <= 1e-12 for f, e in zip(found, exact, strict=True))


@every_network
def test_a_plan_tells_what_it_costs(name: str) -> None:
    network = NETWORKS[name]
    plan = plan_network(network, batch=8, force="factorized", cost_model=MODEL)
    assert not plan.uses_dense
    assert plan.flops == sum(step.flops for step in plan.steps if 0 in step.sources)
    assert plan.dense_flops == 2 * 8 * network.out_features * network.in_features
    assert plan.predicted_s > 0
    assert "core by core" in str(plan)
    assert plan.steps[-1].equation in str(plan)
    dense = plan_network(network, batch=8, force="dense", cost_model=MODEL)
    assert dense.uses_dense
    assert dense.flops == dense.dense_flops
    assert "dense weight" in str(dense)


def test_flops_of_block_tensor_trains_are_their_parameters() -> None:
    # Every entry multiplies once: 2 r (N m_1 + M n_2) per row (arXiv:2406.06248).
    plan = plan_network(BTT, batch=1, force="factorized", cost_model=MODEL)
    assert plan.flops == 2 * BTT.n_params == 2 * 2 * (28 * 3 + 15 * 7)


def test_factorized_plans_never_build_the_dense_weight() -> None:
    for network in (CP, BTT, RING):
        for batch in (1, 100, 10**6):
            plan = plan_network(network, batch=batch, force="factorized", cost_model=MODEL)
            merged = [step.result_numel for step in plan.steps if 0 not in step.sources]
            assert all(2 * numel <= network.dense_numel for numel in merged)


def test_orders_of_contraction_agree() -> None:
    cores = cores_of(RING)
    inputs, output = RING.cores, (*RING.out_legs, *RING.in_legs)
    for order in ("auto", "forward", "backward"):
        steps = contraction(inputs, output, RING.sizes, order)  # type: ignore[arg-type]
        assert rel_error(run(steps, cores).reshape(15, 28), dense_of("ring", cores)) <= 1e-14
        assert contraction_flops(steps) == 2 * 15 * 28 * 6


def test_fans_are_those_of_the_paper() -> None:
    # A: f_in = m_0, f_out = r n_0; B: f_in = r m_1, f_out = n_1 (arXiv:2406.06248).
    assert BTT.core_fans() == ((4, 2 * 3), (2 * 7, 5))
    assert CP.core_fans() == ((4, 2), (7, 1), (1, 3), (2, 5))


def test_what_is_refused() -> None:
    plan = plan_network(CP, batch=2, cost_model=MODEL)
    with pytest.raises(ShapeError, match=r"\(2, 27\).*28"):
        plan.execute(torch.zeros(2, 27), cores_of(CP))
    with pytest.raises(ShapeError, match="planned shapes"):
        plan.execute(torch.zeros(2, 28), cores_of(BTT))
    with pytest.raises(KindError, match="'merged'"):
        plan_network(CP, batch=2, force="merged")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="legs"):
        Network((("i", "o"),), ("o",), ("i",), tuple((f"l{k}", 1) for k in range(60)))
