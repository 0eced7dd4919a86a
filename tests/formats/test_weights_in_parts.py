"""A large weight that is gone through in parts gives what the whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensortrain.formats import FactorSpec, Weighting, WeightShape, get_format
from tensortrain.formats import weighted_rank as ranks
from tensortrain.formats import weighting as weightings
from tensortrain.formats.weighted_rank import WeightedMatrix
from tensortrain.formats.weighting import times_moment
from tensortrain.system.parking import park

SHAPES = [("linear", 90, 14), ("linear", 14, 90), ("embedding", 14, 90), ("linear", 90, 1), ("linear", 1, 90)]
MOMENTS = [("full", "each"), ("full", None), ("each", "full"), ("each", "each"), ("each", None), ("full", "full")]


def moment(n: int, kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    rows = torch.randn(3 * n, n, dtype=torch.float64) * torch.linspace(2, 0.3, n, dtype=torch.float64)
    return rows.T @ rows if kind == "full" else rows.square().sum(dim=0)


def made(shape: tuple[str, int, int], kinds: tuple[str, str | None], dtype: torch.dtype) -> tuple:
    kind, n_out, n_in = shape
    weight = WeightShape(kind, n_out, n_in)
    dense = torch.randn(weight.dense_shape, dtype=dtype)
    return weight, dense, moment(n_in, kinds[0]), moment(n_out, kinds[1])


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightings, "_AT_ONCE", 50)
    monkeypatch.setattr(weightings, "_SOME_PARTS", 1)
    monkeypatch.setattr(ranks, "_AT_ONCE", 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kinds", MOMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_energies_and_low_rank_are_the_same(shape, kinds, dtype, request) -> None:
    weight, dense, inputs, outputs = made(shape, kinds, dtype)
    rank = min(5, *shape[1:])
    spec = get_format("low_rank").spec(weight, rank=rank)
    matrix = (dense.T if shape[0] == "embedding" else dense).float()
    wanted = _all(dense, matrix, spec, Weighting(inputs, outputs))
    request.getfixturevalue("in_parts")
    found = _all(dense, matrix, spec, Weighting(inputs, outputs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-5)


def _all(dense: Tensor, matrix: Tensor, spec: FactorSpec, weighting: Weighting) -> list[Tensor]:
    fit = get_format("low_rank").fit(dense, spec, weighting=weighting)
    (values,) = get_format("low_rank").spectra(dense, spec, weighting=weighting)
    energies = [weighting.energy_of_weight(matrix), weighting.energy(matrix), fit.rel_error]
    return [torch.tensor(energies), values.float(), fit.to_dense().float()]


def test_a_long_side_that_counts_alone_goes_in_parts(in_parts) -> None:
    for shape, kinds, goes in (
        (("linear", 90, 14), ("full", "each"), True),
        (("linear", 14, 90), ("each", "full"), True),
        (("embedding", 14, 90), ("each", "full"), True),
        (("linear", 90, 14), ("each", "full"), False),
        (("linear", 90, 14), ("full", "full"), False),
    ):
        weight, dense, inputs, outputs = made(shape, kinds, torch.float32)
        found = WeightedMatrix.of(dense, weight, Weighting(inputs, outputs))
        assert (found.weighted is None) == goes


def test_a_moment_in_a_file_is_multiplied_part_by_part() -> None:
    x, matrix = torch.randn(700, 600), torch.randn(7, 600)
    moment = (x.T @ x).double()
    torch.testing.assert_close(times_moment(matrix, park(moment)), times_moment(matrix, moment))
