"""A format that can only be put together serves convolutions, embeddings and tied heads all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.formats import FactorSpec, Fit, Format, WeightShape, base
from tensortrain.testing import IMPLEMENTATIONS, rel_error


class Scaled(Format):
    """The dense weight times a number: no chain, no steps, no lookup."""

    name = "scaled"
    kinds = frozenset({"conv", "embedding"})

    def spec(self, weight: WeightShape, *, rank: Any, out_modes=None, in_modes=None, clip=None) -> FactorSpec:
        self.check_kind(weight)
        one = weight.one_group()
        return FactorSpec(self.name, weight, (one.out_features,), (one.in_features,), (1,))

    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        return (1,), spec.weight.one_group().dense_shape

    def factorize_group(self, dense: Tensor, spec: FactorSpec, **options: Any) -> Any:
        return Fit(spec, (dense.new_full((1,), 2.0), dense / 2))

    def dense_group(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        return cores[0] * cores[1]

    def n_paths(self, spec: FactorSpec) -> int:
        return 1

    def spectra(self, dense: Tensor, spec: FactorSpec, **options: Any) -> list[Tensor]:
        return []

    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        return ()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._FORMATS, "scaled", Scaled())


def assert_trains(layer: Any, found: Tensor, exact: Tensor) -> None:
    assert rel_error(found, exact) <= 1e-12
    found.square().sum().backward()
    assert all(core.grad is not None and core.grad.abs().max() > 0 for core in layer.cores)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [tt.nn.Conv2d, tt.nn.ConvTranspose2d])
def test_convolutions(kind: Any, groups: int, implementation: str) -> None:
    dense = kind.dense_type(4, 6, 3, stride=2, groups=groups)
    layer = kind.from_dense(dense, format="scaled", implementation=implementation)
    x = torch.randn(2, 4, 7, 6)
    assert layer.plan(2, (7, 6)).uses_dense
    assert_trains(layer, layer(x), dense(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embeddings(implementation: str) -> None:
    ids = torch.tensor([[0, 3, 7], [7, 2, 3]])
    for kind in (tt.nn.Embedding, tt.nn.EmbeddingBag):
        dense = kind.dense_type(20, 6)
        layer = kind.from_dense(dense, format="scaled", implementation=implementation)
        assert layer.plan(6).uses_dense
        assert_trains(layer, layer(ids), dense(ids))
        head, h = tt.nn.tied_head(layer), torch.randn(3, 6)
        assert_trains(layer, head(h), h @ dense.weight.T)
