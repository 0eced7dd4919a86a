"""Plans agree with the dense weight, whatever their kind, and the cheapest one is chosen."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from torch import Tensor

from tensortrain.contract import Chain, CostModel, chain_to_dense, merge_cores, plan_chain
from tensortrain.errors import KindError, RankError, ShapeError, TTError

MODEL = CostModel.reference("cpu")
FORCES = (None, "left-to-right", "right-to-left", "merged", "dense", "factorized")
CHAINS = {
    "order 1": Chain((5,), (7,), (1, 1)),
    "order 2": Chain((3, 4), (5, 2), (1, 6, 1)),
    "odd modes": Chain((3, 5, 2), (2, 3, 7), (1, 4, 3, 1)),
    "rank 1": Chain((2, 3, 4, 2), (3, 2, 2, 5), (1, 1, 1, 1, 1)),
    "big ranks": Chain((2, 2, 2), (3, 2, 2), (1, 40, 33, 1)),
    "modes of size 1": Chain((1, 4, 1, 3), (5, 1, 1, 2), (1, 3, 2, 4, 1)),
    "low rank": Chain((1, 12), (15, 1), (1, 3, 1)),
    "low rank mirrored": Chain((12, 1), (1, 15), (1, 3, 1)),
    "order 5": Chain((2, 1, 3, 2, 2), (2, 3, 1, 2, 2), (1, 2, 4, 3, 2, 1)),
    "order 6": Chain((2, 2, 3, 2, 2, 2), (2, 3, 2, 2, 2, 1), (1, 3, 4, 2, 5, 2, 1)),
}
VGG = Chain((4,) * 6, (2, 7, 8, 8, 7, 4), (1, 4, 4, 4, 4, 4, 1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_cores(chain: Chain, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    scale = [1.0 / (r * j) ** 0.5 for r, _, j, _ in chain.core_shapes]
    return [torch.randn(s, dtype=dtype) * c for s, c in zip(chain.core_shapes, scale, strict=True)]


def entrywise_dense(cores: list[Tensor]) -> Tensor:
    """The definition itself, entry by entry: a product of matrices."""
    chain = Chain.of(cores)
    rows = itertools.product(*map(range, chain.out_modes))
    columns = list(itertools.product(*map(range, chain.in_modes)))
    entries = []
    for row in rows:
        for column in columns:
            product = torch.eye(1, dtype=cores[0].dtype)
            for core, i, j in zip(cores, row, column, strict=True):
                product = product @ core[:, i, j, :]
            entries.append(product.reshape(()))
    return torch.stack(entries).reshape(chain.out_features, chain.in_features)


def forms_of(chain: Chain, batch: int = 3, training: bool = False) -> list:
    """Plans of every kind, under constants that favour each form of a step in turn."""
    from dataclasses import replace

    shy_of_copies = replace(MODEL, permute_bytes_s=1.0)
    fond_of_copies = replace(MODEL, permute_bytes_s=1e30, batched_flops_s=1.0)
    return [
        plan_chain(chain, batch=batch, force=force, cost_model=model, training=training)
        for model in (MODEL, shy_of_copies, fond_of_copies)
        for force in FORCES
    ]


@pytest.mark.parametrize("name", ["order 1", "order 2", "odd modes", "modes of size 1", "low rank"])
def test_dense_is_the_definition(name: str) -> None:
    cores = random_cores(CHAINS[name])
    torch.testing.assert_close(chain_to_dense(cores), entrywise_dense(cores), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", CHAINS)
def test_every_plan_agrees_with_dense(name: str) -> None:
    chain = CHAINS[name]
    cores = random_cores(chain)
    x = torch.randn(3, chain.in_features, dtype=torch.float64)
    expected = x @ chain_to_dense(cores).T
    for plan in forms_of(chain):
        torch.testing.assert_close(plan.execute(x, cores), expected, rtol=1e-12, atol=1e-12)
        kept = plan.prepare(cores)
        torch.testing.assert_close(plan.execute(x, cores, kept), expected, rtol=1e-12, atol=1e-12)


def test_the_forms_under_test_cover_all_steps() -> None:
    plans = [plan for chain in CHAINS.values() for plan in forms_of(chain)]
    assert {(p.direction, s.kind) for p in plans for s in p.steps} == {
        (None, "linear"),
        *itertools.product(("left-to-right", "right-to-left"), ("linear", "batched", "copied")),
    }


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 2, 1)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    chain = CHAINS["odd modes"]
    cores = random_cores(chain)
    x = torch.randn(*shape, chain.in_features, dtype=torch.float64)
    expected = x @ chain_to_dense(cores).T
    for plan in forms_of(chain):
        y = plan.execute(x, cores)
        assert y.shape == (*shape, chain.out_features)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_plan_for_an_empty_batch() -> None:
    assert plan_chain(VGG, batch=0, cost_model=MODEL) == plan_chain(VGG, batch=1, cost_model=MODEL)


def test_strided_input_and_cores() -> None:
    chain = CHAINS["order 6"]
    cores = [core.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for core in random_cores(chain)]
    assert not all(core.is_contiguous() for core in cores)
    x = torch.randn(chain.in_features, 5, dtype=torch.float64).T[::2]
    expected = x @ chain_to_dense(cores).T
    for plan in forms_of(chain):
        torch.testing.assert_close(plan.execute(x, cores), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["order 1", "odd modes", "modes of size 1", "low rank", "order 5"])
def test_gradients(name: str) -> None:
    chain = CHAINS[name]
    cores = [core.requires_grad_() for core in random_cores(chain)]
    x = torch.randn(2, chain.in_features, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, chain.out_features, dtype=torch.float64)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, chain_to_dense(cores)), (x, *cores), g)
    for plan in forms_of(chain, training=True):
        found = torch.autograd.grad(plan.execute(x, cores), (x, *cores), g)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("force", ["left-to-right", "right-to-left", "merged", "dense"])
def test_gradcheck(force: str) -> None:
    chain = Chain((2, 2, 1), (1, 2, 3), (1, 2, 3, 1))
    cores = [core.requires_grad_() for core in random_cores(chain)]
    x = torch.randn(2, chain.in_features, dtype=torch.float64, requires_grad=True)
    plan = plan_chain(chain, batch=2, force=force, training=True, cost_model=MODEL)
    assert torch.autograd.gradcheck(lambda x, *cores: plan.execute(x, cores), (x, *cores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_dtypes(dtype: torch.dtype) -> None:
    chain = CHAINS["odd modes"]
    cores = random_cores(chain, dtype)
    x = torch.randn(3, chain.in_features, dtype=dtype)
    exact = [core.to(torch.complex128) for core in cores]
    expected = x.to(torch.complex128) @ chain_to_dense(exact).T
    # One rounding per product and core; measured at most 0.9 eps here.
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    for plan in forms_of(chain):
        y = plan.execute(x, cores)
        assert y.dtype == dtype
        assert (y.to(torch.complex128) - expected).abs().max() <= tolerance


def test_autocast() -> None:
    chain = CHAINS["odd modes"]
    cores = [core.requires_grad_() for core in random_cores(chain, torch.float32)]
    x = torch.randn(3, chain.in_features)
    for plan in forms_of(chain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = plan.execute(x, cores)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert all(core.grad is not None and core.grad.dtype == torch.float32 for core in cores)


def test_merge_cores_keeps_the_matrix_and_single_cores() -> None:
    chain = CHAINS["order 6"]
    cores = random_cores(chain)
    merged = merge_cores(cores, ((0, 3), (3, 4), (4, 6)))
    assert merged[1] is cores[3]
    assert [tuple(core.shape) for core in merged] == [(1, 12, 12, 2), (2, 2, 2, 5), (5, 4, 2, 1)]
    torch.testing.assert_close(chain_to_dense(merged), chain_to_dense(cores), rtol=0, atol=1e-14)
    with pytest.raises(ShapeError, match="groups must cover the cores in order"):
        merge_cores(cores, ((0, 3), (4, 6)))


# The choice


@pytest.mark.parametrize("name", [*CHAINS, "vgg"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 100, 10_000])
def test_the_choice_is_the_cheapest(name: str, training: bool, batch: int) -> None:
    chain = VGG if name == "vgg" else CHAINS[name]
    plans = {
        force: plan_chain(chain, batch=batch, training=training, force=force, cost_model=MODEL) for force in FORCES
    }
    assert plans[None].predicted_s == min(plan.predicted_s for plan in plans.values())
    assert not plans["factorized"].uses_dense
    assert plans["dense"].uses_dense
    for sweep in ("left-to-right", "right-to-left"):
        assert plans[sweep].kind == plans[sweep].direction == sweep
        assert len(plans[sweep].steps) == chain.order
    if chain.order > 2 and name != "modes of size 1":
        assert plans["merged"].kind == "merged"


@pytest.mark.parametrize("training", [False, True])
def test_shortest_path_finds_the_best_of_all_merges(training: bool) -> None:
    """All contiguous merges one by one, priced as the path search prices them."""
    from tensortrain.contract.price_chain import ChainPricer, Path

    chain = CHAINS["order 6"]
    pricer = ChainPricer(chain, 50, torch.float32, "cpu", training, MODEL)
    best = float("inf")
    for direction in ("left-to-right", "right-to-left"):
        for cuts in itertools.product((False, True), repeat=chain.order - 1):
            bonds = [0, *(k for k, cut in enumerate(cuts, 1) if cut), chain.order]
            spans = list(itertools.pairwise(bonds))
            if not all(pricer.may_merge(*span) for span in spans):
                continue
            paths = {(False, False): Path(0.0, (), 0, False)}
            for span in spans if direction == "left-to-right" else spans[::-1]:
                longer: dict = {}
                for path in paths.values():
                    pricer.extend(longer, path, direction, span)
                paths = longer
            best = min(best, *(p.seconds + pricer.copy_s(p.pending_bytes) for p in paths.values()))
    found = plan_chain(chain, batch=50, training=training, force="factorized", cost_model=MODEL)
    assert found.predicted_s == pytest.approx(best, rel=1e-12)


def test_large_layer_of_low_rank_is_merged() -> None:
    for batch, training in itertools.product((1, 100), (False, True)):
        plan = plan_chain(VGG, batch=batch, training=training, cost_model=MODEL)
        assert plan.kind == "merged"
        assert plan.speed_up > 8
        assert plan.flops < plan.dense_flops / 8


def test_tall_batch_on_a_small_layer_is_dense() -> None:
    chain = Chain((8, 8, 12), (12, 16, 16), (1, 32, 32, 1))
    plan = plan_chain(chain, batch=4096, cost_model=MODEL)
    assert plan.kind == "dense"
    assert plan.uses_dense
    kept_out = plan_chain(chain, batch=4096, allow_dense=False, cost_model=MODEL)
    assert not kept_out.uses_dense
    assert kept_out.predicted_s > plan.predicted_s


def test_low_rank_runs_as_two_plain_products() -> None:
    plan = plan_chain(Chain((1, 512), (1024, 1), (1, 10, 1)), batch=64, cost_model=MODEL)
    assert [(s.kind, s.m, s.k, s.n) for s in plan.steps] == [
        ("linear", 64, 1024, 10),
        ("linear", 64, 10, 512),
    ]


def test_factorized_never_holds_half_a_dense_weight() -> None:
    chain = Chain((4, 4, 4), (4, 4, 4), (1, 16, 4, 1))
    for force in ("factorized", "merged"):
        plan = plan_chain(chain, batch=10_000, force=force, cost_model=MODEL)
        weights = plan.prepare(random_cores(chain))
        assert max(weight.numel() for weight in weights) <= chain.dense_numel // 2


def test_flops_count_the_products() -> None:
    plan = plan_chain(CHAINS["odd modes"], batch=3, force="right-to-left", cost_model=MODEL)
    # b j_1 .. j_k r_{k-1} i_k r_k i_{k+1} .. i_d, for k = 3, 2, 1
    assert plan.flops == 2 * 3 * (2 * 3 * 7 * 3 * 2 * 1 + 2 * 3 * 4 * 5 * 3 * 2 + 2 * 1 * 3 * 4 * 5 * 2)


def test_training_counts_backward_and_merges() -> None:
    inference = plan_chain(VGG, batch=7, force="left-to-right", cost_model=MODEL)
    training = plan_chain(VGG, batch=7, force="left-to-right", training=True, cost_model=MODEL)
    assert training.flops == 3 * inference.flops
    dense = plan_chain(VGG, batch=7, force="dense", training=True, cost_model=MODEL)
    assert dense.flops > dense.dense_flops == 3 * 2 * 7 * VGG.dense_numel
    assert dense.predicted_s > dense.dense_s


def test_single_image_memory() -> None:
    plan = plan_chain(VGG, batch=1, cost_model=MODEL)
    assert plan.peak_bytes <= 2**20
    assert plan_chain(VGG, batch=1, force="dense", cost_model=MODEL).peak_bytes == 4 * VGG.dense_numel


@pytest.mark.parametrize("force", ["left-to-right", "right-to-left", "merged"])
def test_peak_bytes_bounds_the_states(force: str) -> None:
    """States seen at run time stay below the promise."""
    chain = CHAINS["order 6"]
    plan = plan_chain(chain, batch=64, dtype=torch.float64, force=force, cost_model=MODEL)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._schema.name in ("aten::bmm", "aten::mm", "aten::clone"):
                sizes.append(out.nbytes)
            return out

    cores = random_cores(chain)
    prepared = plan.prepare(cores)
    with Watch():
        y = plan.execute(torch.randn(64, chain.in_features, dtype=torch.float64), cores, prepared)
    intermediate = [size for size in sizes if size != y.nbytes]
    assert intermediate
    assert max(intermediate) <= plan.peak_bytes


def test_plans_are_remembered_and_frozen() -> None:
    plan = plan_chain(VGG, batch=5, cost_model=MODEL)
    assert plan_chain(VGG, batch=5, cost_model=MODEL) is plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(AttributeError):
        plan.kind = "dense"  # type: ignore[misc]


def test_print() -> None:
    plan = plan_chain(VGG, batch=100, cost_model=MODEL)
    text = str(plan)
    for step in plan.steps:
        assert f"{step.batch} x ({step.m} x {step.k}) ({step.k} x {step.n})" in text
        assert step.cores in text
    assert f"{plan.flops:.2e}" in text
    assert f"{plan.dense_flops:.2e}" in text
    assert f"speed-up: {plan.speed_up:.3g}x predicted" in text
    assert "plan: merged, right-to-left" in text
    assert "peak: " in text
    assert "plan: dense\n" in str(plan_chain(VGG, batch=1, force="dense", training=True, cost_model=MODEL))


def test_many_cores_plan_quickly_and_run() -> None:
    chain = Chain((2,) * 14, (2,) * 14, (1, *(3,) * 13, 1))
    cores = random_cores(chain)
    x = torch.randn(2, chain.in_features, dtype=torch.float64)
    sweep = plan_chain(chain, batch=2, force="left-to-right", cost_model=MODEL).execute(x, cores)
    merged = plan_chain(chain, batch=2, force="merged", cost_model=MODEL).execute(x, cores)
    torch.testing.assert_close(merged, sweep, rtol=1e-10, atol=1e-12 * sweep.abs().max().item())


# Tracing


@pytest.mark.parametrize("force", ["left-to-right", "right-to-left", "merged", "dense"])
def test_export_with_a_dynamic_batch(force: str) -> None:
    chain = CHAINS["odd modes"]
    plan = plan_chain(chain, batch=3, force=force, cost_model=MODEL)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cores = torch.nn.ParameterList(random_cores(chain))

        def forward(self, x: Tensor) -> Tensor:
            return plan.execute(x, list(self.cores))

    layer, x = Layer(), torch.randn(3, chain.in_features, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
    tall = torch.randn(11, chain.in_features, dtype=torch.float64)
    torch.testing.assert_close(program.module()(tall), layer(tall), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("force", ["left-to-right", "right-to-left", "merged", "dense"])
def test_compiles_without_a_graph_break(force: str) -> None:
    chain = CHAINS["odd modes"]
    cores = [torch.nn.Parameter(core) for core in random_cores(chain)]
    plan = plan_chain(chain, batch=3, force=force, cost_model=MODEL)
    graphs: list[int] = []

    def count(graph, example_inputs):
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x: plan.execute(x, cores), fullgraph=True, backend=count)
    for batch in (11, 13, 8):
        x = torch.randn(batch, chain.in_features, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, 0)  # an error if anything branches on the batch
        torch.testing.assert_close(run(x), plan.execute(x, cores), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


# Errors


def test_messages() -> None:
    with pytest.raises(ShapeError, match="one output and one input mode per core"):
        Chain((2, 3), (4,), (1, 2, 1))
    with pytest.raises(ShapeError, match="modes must be positive: in_modes"):
        Chain((2, 3), (4, 0), (1, 2, 1))
    with pytest.raises(RankError, match="one rank per bond"):
        Chain((2, 3), (4, 5), (1, 1))
    with pytest.raises(RankError, match="1 at both ends"):
        Chain((2, 3), (4, 5), (1, 2, 2))
    with pytest.raises(ShapeError, match="neighbouring cores must share a rank"):
        Chain.of([torch.ones(1, 2, 2, 3), torch.ones(2, 2, 2, 1)])
    with pytest.raises(ShapeError, match="cores of a TT-matrix must have order 4"):
        Chain.of([torch.ones(1, 2, 1)])
    with pytest.raises(KindError, match="a plan is forced by the name of its kind"):
        plan_chain(VGG, batch=1, force="fastest")  # type: ignore[arg-type]


def test_execute_checks_what_it_is_given() -> None:
    chain = CHAINS["order 2"]
    plan, cores = plan_chain(chain, batch=1, cost_model=MODEL), random_cores(chain)
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., 10\)"):
        plan.execute(torch.ones(3, 9, dtype=torch.float64), cores)
    with pytest.raises(ShapeError, match="cores must have the planned shapes"):
        plan.execute(torch.ones(3, 10, dtype=torch.float64), cores[::-1])
    with pytest.raises(TTError):
        plan.execute(torch.tensor(1.0, dtype=torch.float64), cores)
