"""Layers behave as modules do: state dicts, copies, derived weights that never go stale, options carried over."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.contract import ContractionPlan
from tensortrain.formats import FactorSpec
from tensortrain.nn import COUNTERPARTS, FactorizedLayer
from tensortrain.testing import rel_error

MAKERS: dict[str, Callable[..., FactorizedLayer]] = {
    "linear tt": lambda **o: tt.nn.Linear(12, 20, rank=3, **o),
    "linear low_rank": lambda **o: tt.nn.Linear(12, 20, format="low_rank", rank=3, **o),
    "conv tt": lambda **o: tt.nn.Conv2d(4, 6, 3, padding=1, rank=3, **o),
    "conv tt_naive": lambda **o: tt.nn.Conv2d(4, 6, 3, padding=1, format="tt_naive", rank=3, **o),
    "conv tucker2": lambda **o: tt.nn.Conv2d(4, 6, 3, padding=1, format="tucker2", rank=3, **o),
    "conv low_rank": lambda **o: tt.nn.Conv2d(4, 6, 3, padding=1, format="low_rank", rank=3, **o),
    "conv groups": lambda **o: tt.nn.Conv2d(4, 6, 3, padding=1, groups=2, rank=3, **o),
    "embedding tt": lambda **o: tt.nn.Embedding(50, 12, rank=3, **o),
    "embedding low_rank": lambda **o: tt.nn.Embedding(50, 12, format="low_rank", rank=3, **o),
}
every_layer = pytest.mark.parametrize("name", MAKERS)
every_implementation = pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])


def example(layer: FactorizedLayer) -> Tensor:
    dtype = layer.cores[0].dtype
    if isinstance(layer, tt.nn.Linear):
        return torch.randn(5, 12, dtype=dtype)
    if isinstance(layer, tt.nn.Embedding):
        return torch.randint(50, (7,))
    return torch.randn(2, 4, 6, 5, dtype=dtype)


def uncached(layer: FactorizedLayer, x: Tensor) -> Tensor:
    """What the layer must give: torch's operation on a weight built from the cores of this moment."""
    weight = layer.format.to_dense([core.detach() for core in layer.cores], layer.spec)
    if isinstance(layer, tt.nn.Linear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, tt.nn.Embedding):
        return F.embedding(x, weight)
    return F.conv2d(x, weight, layer.bias, padding=1, groups=layer.groups)  # type: ignore[attr-defined]


# -- state dicts and copies ---------------------------------------------------------------------------


@every_layer
def test_state_dict_holds_cores_and_bias_alone(name: str) -> None:
    layer = MAKERS[name]()
    with torch.no_grad():
        layer(example(layer))  # what is kept for speed stays out
    expected = {f"cores.{k}" for k in range(len(layer.cores))} | ({"bias"} if layer.bias is not None else set())
    assert set(layer.state_dict()) == expected
    assert dict(layer.named_buffers()) == {}
    assert layer.spec.core_shapes == tuple(tuple(core.shape) for core in layer.cores)


@every_layer
def test_state_dict_goes_through_a_file(name: str) -> None:
    layer, other = MAKERS[name](), MAKERS[name]()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = example(layer)
    assert torch.equal(layer(x), other(x))


def test_state_dict_of_another_spec_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        tt.nn.Linear(12, 20, rank=3).load_state_dict(tt.nn.Linear(12, 20, rank=2).state_dict())


@every_layer
def test_deepcopy_is_independent(name: str) -> None:
    layer = MAKERS[name]()
    x = example(layer)
    with torch.no_grad():
        before = layer(x)
        twin = copy.deepcopy(layer)
        assert twin.spec == layer.spec
        assert twin.resident_cache_bytes == 0
        assert torch.equal(twin(x), before)
        twin.cores[0].mul_(2)
        assert rel_error(twin(x), uncached(twin, x)) <= 1e-12
        assert torch.equal(layer(x), before)


@every_layer
def test_config_builds_an_equal_layer(name: str) -> None:
    layer = MAKERS[name]()
    twin = type(layer)(**layer.config())
    twin.load_state_dict(layer.state_dict())
    x = example(layer)
    assert twin.spec == layer.spec
    assert torch.equal(twin(x), layer(x))
    assert FactorSpec.from_dict(layer.spec.to_dict()) == layer.spec


def test_stacked_in_a_model_with_tied_use() -> None:
    shared = tt.nn.Linear(12, 12, rank=3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert sum(p.numel() for p in model.parameters()) == shared.n_params
    x = torch.randn(3, 12)
    exact = F.linear(torch.tanh(F.linear(x, shared.weight, shared.bias)), shared.weight, shared.bias)
    assert rel_error(model(x), exact) <= 1e-12


# -- derived weights ----------------------------------------------------------------------------------


def load_other(layer: FactorizedLayer) -> None:
    layer.load_state_dict({key: torch.randn_like(value) for key, value in layer.state_dict().items()})


def step(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Callable[[FactorizedLayer], None]:
    def run(layer: FactorizedLayer) -> None:
        stepper = optimizer(layer.parameters())
        with torch.enable_grad():
            layer(example(layer)).square().sum().backward()
        stepper.step()

    return run


def edit(layer: FactorizedLayer) -> None:
    layer.cores[-1].mul_(1.5)


def edit_a_slice(layer: FactorizedLayer) -> None:
    layer.cores[0][..., 0] += 1.0


def copy_into(layer: FactorizedLayer) -> None:
    layer.cores[0].copy_(torch.randn_like(layer.cores[0]))


def replace(layer: FactorizedLayer) -> None:
    layer.cores[0] = nn.Parameter(torch.randn_like(layer.cores[0]))


def write_behind_the_back(layer: FactorizedLayer) -> None:
    layer.cores[0].data = torch.randn_like(layer.cores[0])
    layer.clear_cache()


def reset(layer: FactorizedLayer) -> None:
    layer.reset_parameters()


CHANGES = {
    "load_state_dict": load_other,
    "SGD": step(lambda p: torch.optim.SGD(p, lr=0.1)),
    "Adam": step(lambda p: torch.optim.Adam(p, lr=0.1)),
    "AdamW, fused": step(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "Adam, foreach": step(lambda p: torch.optim.Adam(p, lr=0.1, foreach=True)),
    "in place": edit,
    "a slice": edit_a_slice,
    "copy_": copy_into,
    "another parameter": replace,
    ".data, then clear_cache": write_behind_the_back,
    "reset_parameters": reset,
}


@every_implementation
@pytest.mark.parametrize("change", CHANGES)
@every_layer
def test_no_stale_weight_after(name: str, change: str, implementation: str) -> None:
    layer = MAKERS[name](implementation=implementation)
    x = example(layer)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        CHANGES[change](layer)
        after = layer(x)
        assert rel_error(after, uncached(layer, x)) <= 1e-12
        assert rel_error(after, before) > 1e-3


@every_layer
def test_the_dense_weight_is_kept_while_nothing_changes(name: str) -> None:
    layer = MAKERS[name](implementation="dense")
    with torch.no_grad():
        first = layer.runner.dense_weight(layer)
        assert layer.runner.dense_weight(layer) is first
        assert layer.resident_cache_bytes == first.numel() * 8
        layer.cores[0].add_(0)
        assert layer.runner.dense_weight(layer) is not first
    layer.clear_cache()
    assert layer.resident_cache_bytes == 0


@every_layer
def test_factorized_never_builds_the_dense_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MAKERS[name](implementation="factorized")
    monkeypatch.setattr(type(layer.format), "dense_group", lambda *a, **k: pytest.fail("built the dense weight"))
    layer(example(layer)).sum().backward()
    with torch.no_grad():
        layer(example(layer))


@every_layer
def test_auto_builds_none_above_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MAKERS[name](implementation="auto")
    layer.dense_limit_bytes = layer.spec.weight.n_params * 8 - 1
    monkeypatch.setattr(type(layer.format), "dense_group", lambda *a, **k: pytest.fail("built the dense weight"))
    layer(example(layer)).sum().backward()
    with torch.no_grad():
        layer(example(layer))


@every_layer
def test_to_another_dtype_and_back(name: str) -> None:
    layer = MAKERS[name]()
    x = example(layer)
    with torch.no_grad():
        before = layer(x)
        layer.to(torch.float32)
        narrow = x.float() if x.is_floating_point() else x
        found = layer(narrow)
        assert found.dtype == torch.float32
        assert rel_error(found, before) <= 1e-5
        layer.double()
        assert layer(x).dtype == torch.float64
        assert rel_error(layer(x), uncached(layer, x)) <= 1e-12


@every_layer
def test_inference_mode_then_training(name: str) -> None:
    layer = MAKERS[name]()
    x = example(layer)
    with torch.inference_mode():
        before = layer(x)
    found = layer(x)
    assert rel_error(found, before) <= 1e-12
    found.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@every_layer
def test_frozen_cores_still_pass_gradients_to_the_input(name: str) -> None:
    layer = MAKERS[name]().requires_grad_(False)
    x = example(layer)
    if not x.is_floating_point():
        assert not layer(x).requires_grad
        return
    for _ in range(2):  # the second call reads the weight that the first one kept
        leaf = x.clone().requires_grad_()
        other = x.clone().requires_grad_()
        (mine,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
        (exact,) = torch.autograd.grad(uncached(layer, other).square().sum(), other)
        assert rel_error(mine, exact) <= 1e-12


# -- from and to torch's layers -----------------------------------------------------------------------

TORCH_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Linear": lambda **o: nn.Linear(12, 20, **o),
    "Linear, no bias": lambda **o: nn.Linear(12, 20, bias=False, **o),
    "Conv1d": lambda **o: nn.Conv1d(4, 6, 3, padding=1, **o),
    "Conv2d": lambda **o: nn.Conv2d(4, 6, (2, 3), stride=2, dilation=(1, 2), groups=2, **o),
    "Conv2d, same": lambda **o: nn.Conv2d(4, 6, 2, padding="same", padding_mode="reflect", bias=False, **o),
    "Conv3d": lambda **o: nn.Conv3d(4, 6, 2, **o),
    "Embedding": lambda **o: nn.Embedding(53, 12, padding_idx=3, **o),
}


def formats_of(dense: nn.Module) -> tuple[str, ...]:
    return ("tt", "tt_naive", "tucker2", "low_rank") if hasattr(dense, "kernel_size") else ("tt", "low_rank")


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_manners_carry_over_both_ways(name: str) -> None:
    dense = TORCH_LAYERS[name](dtype=torch.float32).eval()
    dense.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    for format in formats_of(dense):
        layer: Any = COUNTERPARTS[type(dense)].from_dense(dense, format=format, rank=2)
        assert not layer.training
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        assert all(not core.requires_grad for core in layer.cores)
        back = layer.to_dense()
        assert type(back) is type(dense)
        assert repr(back) == repr(dense)
        assert not back.training
        assert not back.weight.requires_grad
        assert torch.equal(back.weight, layer.weight)
        if getattr(dense, "bias", None) is not None:
            assert torch.equal(layer.bias, dense.bias)
            assert layer.bias is not dense.bias
            assert layer.bias.requires_grad
            assert torch.equal(back.bias, dense.bias)


@pytest.mark.parametrize("name", TORCH_LAYERS)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 0.08)])
def test_without_rank_and_eps_exact_to_dtype(name: str, dtype: torch.dtype, tol: float) -> None:
    # What counts as exact is tensortrain.tensor.default_eps: 0.078 in bfloat16 at order 4.
    dense = TORCH_LAYERS[name](dtype=dtype)
    before = dense.weight.detach().clone()  # type: ignore[union-attr, operator]
    for format in formats_of(dense):
        layer = COUNTERPARTS[type(dense)].from_dense(dense, format=format)
        wide = layer.format.to_dense([core.detach().double() for core in layer.cores], layer.spec)
        assert rel_error(wide, before) <= tol
    assert torch.equal(dense.weight, before)  # type: ignore[arg-type]


def test_a_frozen_bias_stays_frozen() -> None:
    dense = nn.Linear(12, 20)
    dense.bias.requires_grad_(False)
    layer = tt.nn.Linear.from_dense(dense, rank=2)
    assert not layer.bias.requires_grad
    assert all(core.requires_grad for core in layer.cores)
    assert not layer.to_dense().bias.requires_grad


def test_ranks_and_modes_of_from_dense() -> None:
    dense = nn.Linear(24, 36)
    layer = tt.nn.Linear.from_dense(dense, rank=(1, 3, 2, 1), in_modes=(2, 3, 4), out_modes=(3, 3, 4))
    assert (layer.ranks, layer.in_modes, layer.out_modes) == ((1, 3, 2, 1), (2, 3, 4), (3, 3, 4))
    # A tuple is a cap here: there is a weight to tell what is of use.
    assert tt.nn.Linear.from_dense(dense, rank=(1, 99, 99, 1), in_modes=(2, 3, 4), out_modes=(3, 3, 4)).ranks == (
        1,
        6,
        16,
        1,
    )
    assert tt.nn.Linear.from_dense(dense, format="low_rank", rank=5).ranks == (1, 5, 1)
    assert tt.nn.Linear.from_dense(dense, rank=0.25).spec.n_params <= 24 * 36 / 4


@pytest.mark.cuda
@every_layer
def test_on_the_gpu(name: str) -> None:
    layer = MAKERS[name]()
    x = example(layer)
    exact = uncached(layer, x)
    layer.cuda()
    assert rel_error(layer(x.cuda()).cpu(), exact) <= 1e-12
    assert COUNTERPARTS[layer.dense_type].from_dense(layer.to_dense(), rank=2).cores[0].is_cuda


# -- what a layer says of itself ----------------------------------------------------------------------


@every_implementation
@every_layer
def test_plan_prints(name: str, implementation: str) -> None:
    layer: Any = MAKERS[name](implementation=implementation)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            plan = layer.plan(16)
            text = str(plan)
            assert "flops" in text
            assert len(text.splitlines()) >= 3
            assert plan.predicted_s >= 0
            assert plan.flops >= 0
            if implementation != "auto":
                assert plan.uses_dense == (implementation == "dense")


@every_layer
def test_plan_tells_what_forward_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = MAKERS[name]()
    x = example(layer)
    built = []
    whole = type(layer.format).dense_group

    def watched(self: Any, cores: Any, spec: Any) -> Tensor:
        built.append(spec)
        return whole(self, cores, spec)

    multiplied = ContractionPlan.execute

    def multiplying(self: ContractionPlan, *args: Any, **options: Any) -> Tensor:
        if self.uses_dense:
            built.append(self.chain)
        return multiplied(self, *args, **options)

    monkeypatch.setattr(type(layer.format), "dense_group", watched)
    layer.plan(x.shape[0]) if not hasattr(layer, "kernel_size") else layer.plan(x.shape[0], x.shape[2:])  # trials
    monkeypatch.setattr(ContractionPlan, "execute", multiplying)
    layer(x)
    plan = layer.plan(x.shape[0]) if not hasattr(layer, "kernel_size") else layer.plan(x.shape[0], x.shape[2:])
    assert bool(built) == plan.uses_dense


@every_layer
def test_repr_names_format_modes_ranks_and_counts(name: str) -> None:
    layer = MAKERS[name]()
    text = repr(layer)
    for part in (
        f"format={layer.spec.format}",
        f"in_modes={layer.in_modes}",
        f"out_modes={layer.out_modes}",
        ",".join(map(str, layer.ranks)),
        f"params={layer.n_params}",
        "x smaller",
    ):
        assert part in text
    if name.startswith("conv"):
        assert "kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)" in text


def test_how_it_ran() -> None:
    layer = tt.nn.Linear(12, 20, rank=3)
    with torch.no_grad():
        layer(torch.randn(4, 12))
    assert "dense" in layer.how_it_ran()
    layer = tt.nn.Linear(12, 20, rank=3, implementation="factorized")
    with torch.no_grad():
        layer(torch.randn(4, 12))
    assert "[" in layer.how_it_ran()
    assert "dense" not in layer.how_it_ran()


def test_cores_may_be_kept_elsewhere():
    """By weight norm, or in a replica for another device."""
    layer, x = tt.nn.Linear(24, 20, rank=4), torch.randn(3, 24)
    expected = layer(x)
    replica = layer._replicate_for_data_parallel()
    replica.bias = layer.bias
    replica.cores = layer.cores._replicate_for_data_parallel()
    for name, core in layer.cores._parameters.items():
        setattr(replica.cores, name, core)
    torch.testing.assert_close(replica(x), expected)
    torch.nn.utils.weight_norm(layer.cores, "0")
    torch.testing.assert_close(layer(x), expected)


def test_cores_keep_their_order_when_weight_norm_is_taken_off() -> None:
    layer = tt.nn.Linear(16, 16, in_modes=(4, 4), out_modes=(4, 4), rank=1)  # cores of one shape
    x = torch.randn(3, 16)
    before = [layer(x), layer(x)][-1]
    torch.nn.utils.weight_norm(layer.cores, "0")
    torch.nn.utils.remove_weight_norm(layer.cores, "0")
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), before)
