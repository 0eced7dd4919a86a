"""The registry: a new format is one class, and every layer can use it at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import ShapeError
from tensortrain.formats import ChainFormat, FactorSpec, Kind, WeightShape, format_names, get_format, register
from tensortrain.formats.base import _FORMATS, check_modes
from tensortrain.testing import rel_error


class Kronecker(ChainFormat):
    """A sum of Kronecker products: a train of two cores whose modes lie as square as can be."""

    name: ClassVar[str] = "toy-kronecker"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    description: ClassVar[str] = "a sum of Kronecker products"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        outs = check_modes(out_modes or tt.nn.suggest_modes(weight.out_features, 2), weight.out_features, "out_modes")
        ins = check_modes(in_modes or tt.nn.suggest_modes(weight.in_features, 2), weight.in_features, "in_modes")
        return outs, ins

    def chain_modes(self, spec: FactorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return spec.out_modes, spec.in_modes


@pytest.fixture
def kronecker() -> Iterator[None]:
    register(Kronecker)
    yield
    del _FORMATS[Kronecker.name]


def test_names_are_sorted_and_known() -> None:
    assert format_names() == tuple(sorted(format_names()))
    chains = {"tt", "tt_naive", "low_rank", "kronecker", "tt_separate"}
    assert {*chains, "tucker2", "cp", "tucker", "ring", "block_term", "btt"} <= set(format_names())
    for name in format_names():
        fmt = get_format(name)
        assert fmt.name == name
        assert fmt.kinds
        assert fmt.description


@pytest.mark.usefixtures("kronecker")
def test_a_new_format_serves_a_layer() -> None:
    assert "toy-kronecker" in format_names()
    layer = tt.nn.Linear(12, 20, format="toy-kronecker", rank=2)
    assert layer.n_params == 2 * (3 * 4 + 4 * 5) + 20
    terms = [torch.kron(layer.cores[0][0, :, :, r], layer.cores[1][r, :, :, 0]) for r in range(2)]
    assert rel_error(layer.weight, terms[0] + terms[1]) <= 1e-13
    x = torch.randn(3, 12)
    assert rel_error(layer(x), F.linear(x, layer.weight, layer.bias)) <= 1e-13
    assert str(layer.plan(3))


@pytest.mark.usefixtures("kronecker")
def test_a_new_format_takes_part_in_everything() -> None:
    dense = nn.Linear(12, 20)
    exact = tt.nn.Linear.from_dense(dense, format="toy-kronecker")
    assert rel_error(exact.to_dense().weight, dense.weight) <= 1e-13
    close = tt.nn.Linear.from_dense(dense, format="toy-kronecker", eps=0.3)
    assert rel_error(close.weight, dense.weight) <= 0.3
    assert FactorSpec.from_dict(close.spec.to_dict()) == close.spec
    spread = tt.nn.Linear(300, 400, format="toy-kronecker", rank=3, init=0.5).weight.std()
    assert float(spread.detach()) == pytest.approx(0.5, rel=0.05)
    spec = close.spec
    spectra = get_format("toy-kronecker").spectra(dense.weight.detach(), spec)
    path = tt.formats.rank_path(spec, spectra)
    assert path[-1].n_params == sum(math.prod(shape) for shape in exact.spec.core_shapes)


@pytest.mark.usefixtures("kronecker")
def test_a_format_serves_only_its_kinds() -> None:
    with pytest.raises(ShapeError, match=r"toy-kronecker.*serves \['linear'\].*'conv'"):
        tt.nn.Conv2d(4, 4, 3, format="toy-kronecker")


def test_once_gone_it_is_unknown_again() -> None:
    with pytest.raises(ShapeError, match=r"'toy-kronecker', known are \['block_term', 'btt', 'cp'"):
        tt.nn.Linear(12, 20, format="toy-kronecker")


def test_a_format_without_a_convolution_of_its_own_says_so() -> None:
    call: Any = super(ChainFormat, get_format("tt")).convolve
    with pytest.raises(tt.TTError, match="core by core"):
        call(torch.zeros(1), [], None, None, None)


def test_registering_twice_replaces() -> None:
    register(Kronecker)
    first = get_format("toy-kronecker")
    register(Kronecker)
    try:
        assert get_format("toy-kronecker") is not first
        assert format_names().count("toy-kronecker") == 1
    finally:
        del _FORMATS["toy-kronecker"]


def test_dense_of_a_factorization_is_that_of_its_format() -> None:
    spec = get_format("low_rank").spec(WeightShape("linear", 4, 5), rank=2)
    cores: list[Tensor] = [torch.randn(shape) for shape in spec.core_shapes]
    found = tt.formats.Factorization(spec, tuple(cores))
    torch.testing.assert_close(found.to_dense(), cores[1] @ cores[0], rtol=0, atol=1e-6)  # a few roundings of about 1


def test_names_have_underscores_and_hyphens_are_understood() -> None:
    fmt = get_format("tt-naive")
    assert fmt is get_format("tt_naive")
    assert fmt.name == "tt_naive"
    assert not any("-" in name for name in format_names())
    layer = tt.nn.Conv2d(4, 6, 3, format="tt-naive", rank=2)
    assert layer.spec.format == "tt_naive"
    assert "tt_naive" in str(layer)
    written = {**layer.spec.to_dict(), "format": "tt-naive"}  # as plans of earlier versions have it
    assert FactorSpec.from_dict(written) == layer.spec
