"""Layers behave as modules do: every format of every kind inherits the suite, and what is each layer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.contract import ContractionPlan
from tensortrain.formats import format_names, get_format
from tensortrain.nn import COUNTERPARTS, FactorizedLayer
from tensortrain.nn.conv.transpose import swap_channels
from tensortrain.nn.conv.ways import DenseWay
from tensortrain.testing import LayerSuite, rel_error

GROUPED = ("tt", "tt_naive", "tucker2", "low_rank")


def formats_for(kind: str) -> tuple[str, ...]:
    return tuple(name for name in format_names() if kind in get_format(name).kinds)


def every_format(formats: tuple[str, ...]) -> Any:
    """A fixture that runs a suite once for each of them."""

    @pytest.fixture(autouse=True, params=formats)
    def set_format(self: Any, request: pytest.FixtureRequest) -> None:
        self.format = request.param

    return set_format


class TestLinear(LayerSuite):
    set_format = every_format(formats_for("linear"))

    def make(self, **options: Any) -> FactorizedLayer:
        return tt.nn.Linear(4, 6, format=self.format, **{"rank": 2, **options})

    def example(self) -> Tensor:
        return torch.randn(4, 4)


class TestConvolution(LayerSuite):
    set_format = every_format(formats_for("conv"))

    def make(self, **options: Any) -> FactorizedLayer:
        return tt.nn.Conv2d(4, 6, 3, padding=1, format=self.format, **{"rank": 2, **options})

    def example(self) -> Tensor:
        return torch.randn(2, 4, 4, 3)


class TestGroups(LayerSuite):
    set_format = every_format(GROUPED)

    def make(self, **options: Any) -> FactorizedLayer:
        more = {"stride": 2, "padding": "valid", "dilation": (1, 2), "groups": 2, "bias": False, "rank": 2}
        return tt.nn.Conv2d(4, 6, (2, 3), format=self.format, **{**more, **options})

    def example(self) -> Tensor:
        return torch.randn(2, 4, 4, 6)


class TestSamePadding(LayerSuite):
    set_format = every_format(("tt",))

    def make(self, **options: Any) -> FactorizedLayer:
        more = {"padding": "same", "padding_mode": "reflect", "rank": 2}
        return tt.nn.Conv1d(4, 6, 4, format=self.format, **{**more, **options})

    def example(self) -> Tensor:
        return torch.randn(3, 4, 5)


class TestTransposed(LayerSuite):
    set_format = every_format(("tt", "tucker2"))

    def make(self, **options: Any) -> FactorizedLayer:
        return tt.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, format=self.format, **{"rank": 2, **options})

    def example(self) -> Tensor:
        return torch.randn(2, 4, 3, 2)

    def reference(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().reference(layer, x, swap_channels(weight, layer.groups), bias)


class TestEmbedding(LayerSuite):
    set_format = every_format(formats_for("embedding"))

    def make(self, **options: Any) -> FactorizedLayer:
        return tt.nn.Embedding(7, 4, format=self.format, **{"rank": 2, **options})

    def example(self) -> Tensor:
        return torch.tensor([0, 6, 5, 5, 3])  # repeated ids add up their gradients


class TestBag(LayerSuite):
    set_format = every_format(("tt",))

    def make(self, **options: Any) -> FactorizedLayer:
        return tt.nn.EmbeddingBag(7, 4, mode="sum", format=self.format, **{"rank": 2, **options})

    def example(self) -> Tensor:
        return torch.tensor([[0, 6, 5, 5], [3, 3, 3, 1], [6, 4, 2, 1]])


LAYERS: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "linear": lambda: (tt.nn.Linear(12, 20, rank=3), torch.randn(5, 12)),
    "low rank": lambda: (tt.nn.Linear(12, 20, format="low_rank", rank=3), torch.randn(5, 12)),
    "conv": lambda: (tt.nn.Conv2d(4, 6, 3, padding=1, rank=3), torch.randn(2, 4, 6, 5)),
    "conv tt-naive": lambda: (tt.nn.Conv2d(4, 6, 3, format="tt_naive", rank=3), torch.randn(2, 4, 6, 5)),
    "conv tucker2": lambda: (tt.nn.Conv2d(4, 6, 3, format="tucker2", rank=3), torch.randn(2, 4, 6, 5)),
    "conv low_rank": lambda: (tt.nn.Conv2d(4, 6, 3, format="low_rank", rank=3), torch.randn(2, 4, 6, 5)),
    "groups": lambda: (tt.nn.Conv2d(4, 6, 3, groups=2, rank=3), torch.randn(2, 4, 6, 5)),
    "embedding": lambda: (tt.nn.Embedding(50, 12, rank=3), torch.randint(50, (7,))),
    "embedding low_rank": lambda: (tt.nn.Embedding(50, 12, format="low_rank", rank=3), torch.randint(50, (7,))),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def test_stacked_in_a_model_with_tied_use() -> None:
    shared = tt.nn.Linear(12, 12, rank=3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert sum(p.numel() for p in model.parameters()) == shared.n_params
    x = torch.randn(3, 12)
    exact = F.linear(torch.tanh(F.linear(x, shared.weight, shared.bias)), shared.weight, shared.bias)
    assert rel_error(model(x), exact) <= 1e-12


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
    layer, x = LAYERS[name]()
    exact = layer(x).detach()
    layer.cuda()
    assert rel_error(layer(x.cuda()).cpu(), exact) <= 1e-12
    assert COUNTERPARTS[layer.dense_type].from_dense(layer.to_dense(), rank=2).cores[0].is_cuda


@every_layer
def test_plan_tells_what_forward_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS[name]()
    built: list[Any] = []
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
    convolved = DenseWay.run

    def convolving(self: DenseWay, x: Tensor, prepared: tuple[Tensor, ...], *rest: Any) -> Tensor:
        built.append(prepared[0].shape)
        return convolved(self, x, prepared, *rest)

    monkeypatch.setattr(DenseWay, "run", convolving)
    layer(x)
    plan = layer.plan(x.shape[0]) if not hasattr(layer, "kernel_size") else layer.plan(x.shape[0], x.shape[2:])
    assert bool(built) == plan.uses_dense


def test_repr_of_a_convolution_has_its_options() -> None:
    layer = tt.nn.Conv2d(4, 6, 3, padding=1, rank=3)
    assert "kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)" in repr(layer)


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
