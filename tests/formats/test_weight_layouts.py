"""What a format's cores mean, entry by entry from the published definition."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tensortrain.formats import FactorSpec, WeightShape, get_format

LINEAR = WeightShape("linear", 12, 10)
CONV = WeightShape("conv", 6, 4, (2, 3))
TABLE = WeightShape("embedding", 6, 11)


def random_cores(spec: FactorSpec) -> list[Tensor]:
    return [torch.randn(shape) for shape in spec.core_shapes]


def digits(index: int, modes: tuple[int, ...]) -> list[int]:
    """C order: the first mode is the slowest."""
    return [int(k) for k in list(itertools.product(*map(range, modes)))[index]]


def product(matrices: list[Tensor]) -> float:
    state = torch.eye(1)
    for matrix in matrices:
        state = state @ matrix
    return float(state)


def dense(cores: list[Tensor], spec: FactorSpec) -> Tensor:
    found = get_format(spec.format).to_dense(cores, spec)
    assert tuple(found.shape) == spec.weight.dense_shape
    return found


def assert_entries(found: Tensor, entry: Any) -> None:
    for index in itertools.product(*map(range, found.shape)):
        assert float(found[index]) == pytest.approx(entry(*index), rel=1e-12, abs=1e-12)


def test_tt_linear() -> None:
    spec = get_format("tt").spec(LINEAR, rank=(1, 3, 2, 1), out_modes=(2, 3, 2), in_modes=(5, 1, 2))
    cores = random_cores(spec)

    def entry(i: int, j: int) -> float:
        rows, columns = digits(i, (2, 3, 2)), digits(j, (5, 1, 2))
        return product([core[:, a, b] for core, a, b in zip(cores, rows, columns, strict=True)])

    assert_entries(dense(cores, spec), entry)


def test_tt_convolution() -> None:
    spec = get_format("tt").spec(CONV, rank=(1, 3, 4, 1), out_modes=(3, 2), in_modes=(2, 2))
    cores = random_cores(spec)
    assert spec.core_shapes == ((1, 1, 6, 3), (3, 3, 2, 4), (4, 2, 2, 1))

    def entry(s: int, c: int, x: int, y: int) -> float:
        (s1, s2), (c1, c2) = digits(s, (3, 2)), digits(c, (2, 2))
        return product([cores[0][:, 0, 3 * x + y], cores[1][:, s1, c1], cores[2][:, s2, c2]])

    assert_entries(dense(cores, spec), entry)


def test_tt_1x1_convolution_has_no_spatial_core() -> None:
    weight = WeightShape("conv", 6, 4, (1, 1))
    spec = get_format("tt").spec(weight, rank=(1, 4, 1), out_modes=(3, 2), in_modes=(2, 2))
    linear = get_format("tt").spec(WeightShape("linear", 6, 4), rank=(1, 4, 1), out_modes=(3, 2), in_modes=(2, 2))
    cores = random_cores(spec)
    assert spec.core_shapes == linear.core_shapes
    assert torch.equal(dense(cores, spec)[:, :, 0, 0], dense(cores, linear))


def test_tt_naive_convolution() -> None:
    spec = get_format("tt_naive").spec(CONV, rank=(1, 2, 3, 4, 1))
    cores = random_cores(spec)
    assert spec.core_shapes == ((1, 1, 2, 2), (2, 1, 3, 3), (3, 1, 4, 4), (4, 6, 1, 1))

    def entry(s: int, c: int, x: int, y: int) -> float:
        return product([cores[0][:, 0, x], cores[1][:, 0, y], cores[2][:, 0, c], cores[3][:, s, 0]])

    assert_entries(dense(cores, spec), entry)


def test_tt_embedding() -> None:
    spec = get_format("tt").spec(TABLE, rank=(1, 3, 2, 1), out_modes=(3, 1, 2), in_modes=(2, 3, 2))
    cores = random_cores(spec)

    def entry(token: int, column: int) -> float:
        ids, columns = digits(token, (2, 3, 2)), digits(column, (3, 1, 2))
        return product([core[:, a, b] for core, a, b in zip(cores, columns, ids, strict=True)])

    assert_entries(dense(cores, spec), entry)


def test_tucker2_convolution() -> None:
    spec = get_format("tucker2").spec(CONV, rank=(3, 2))
    assert spec.core_shapes == ((3, 4), (2, 3, 2, 3), (6, 2))
    inner, core, outer = cores = random_cores(spec)

    def entry(s: int, c: int, x: int, y: int) -> float:
        return float(outer[s] @ core[:, :, x, y] @ inner[:, c])

    assert_entries(dense(cores, spec), entry)


def test_low_rank() -> None:
    fmt = get_format("low_rank")
    for weight, shapes in (
        (LINEAR, ((3, 10), (12, 3))),
        (CONV, ((3, 4, 2, 3), (6, 3))),
        (TABLE, ((11, 3), (6, 3))),
    ):
        spec = fmt.spec(weight, rank=3)
        first, second = cores = random_cores(spec)
        assert spec.core_shapes == shapes
        equation = {"linear": "rj,ir->ij", "conv": "rcxy,sr->scxy", "embedding": "nr,jr->nj"}[weight.kind]
        torch.testing.assert_close(dense(cores, spec), torch.einsum(equation, first, second))


SPECS = [
    get_format(name).spec(weight, rank=rank)
    for name, weight, rank in (
        ("tt", LINEAR, 3),
        ("tt", CONV, 3),
        ("tt", TABLE, 3),
        ("tt_naive", CONV, 2),
        ("tucker2", CONV, (3, 2)),
        ("low_rank", LINEAR, 2),
        ("low_rank", CONV, 2),
        ("low_rank", TABLE, 2),
        ("tt", WeightShape("conv", 12, 4, (3, 3), groups=2), 3),
        ("tucker2", WeightShape("conv", 12, 4, (3,), groups=2), 2),
    )
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format} {spec.weight.kind} {spec.weight.groups}")
def test_a_spec_is_plain_data(spec: FactorSpec) -> None:
    assert FactorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(spec) == hash(FactorSpec.from_dict(spec.to_dict()))
    fmt = get_format(spec.format)
    caps = fmt.rank_caps(spec)
    assert len(caps) == len(spec.ranks)
    assert all(r <= cap for r, cap in zip(spec.ranks, caps, strict=True))
    one = spec.one_group()
    spectra = fmt.spectra(torch.randn(one.weight.dense_shape), one)
    inner = fmt.inner_ranks(one)
    assert len(spectra) == len(inner)
    assert all(len(values) >= r for values, r in zip(spectra, inner, strict=True))


def test_a_spec_keeps_ranks_above_the_feasible() -> None:
    spec = get_format("tt").spec(LINEAR, rank=(1, 99, 1), out_modes=(4, 3), in_modes=(2, 5))
    assert spec.ranks == (1, 99, 1)
    assert FactorSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"format": "nonesuch"},
        {"kind": "recurrent"},
        {"ranks": [1, 0, 1]},
        {"ranks": [1, 2]},
        {"in_modes": [3, 3]},
        {"out_modes": "ab"},
        {"in_features": None},
        {"kernel": 3},
    ],
    ids=str,
)
def test_a_damaged_spec_is_refused(change: dict[str, Any]) -> None:
    spec = get_format("tt").spec(LINEAR, rank=2, out_modes=(4, 3), in_modes=(2, 5))
    with pytest.raises(ValueError, match=r"[a-z].*\."):
        FactorSpec.from_dict({**spec.to_dict(), **change})


def test_a_spec_with_a_field_missing_is_refused() -> None:
    data = get_format("tt").spec(LINEAR, rank=2).to_dict()
    del data["ranks"]
    with pytest.raises(ValueError, match="ranks"):
        FactorSpec.from_dict(data)


@pytest.mark.parametrize(
    ("name", "weight", "rank", "out_modes", "in_modes", "expected"),
    [
        ("tt", LINEAR, 1, (3, 4), (5, 2), 6),  # a Kronecker product: 3 times 2
        ("tt", LINEAR, (1, 5, 3, 1), (1, 1, 12), (5, 2, 1), 3),
        ("tt", LINEAR, (1, 2, 2, 1), (2, 3, 2), (1, 5, 2), 10),
        ("low_rank", LINEAR, 4, None, None, 4),
        ("low_rank", TABLE, 4, None, None, 4),
        ("tt", CONV, (1, 2, 1), (6,), (4,), 4),
        ("tt", CONV, (1, 2, 3, 1), (1, 6), (4, 1), 3),
        ("tt_naive", CONV, (1, 2, 4, 2, 1), None, None, 2),
        ("tucker2", CONV, (2, 3), None, None, 2),
    ],
)
def test_generic_cores_reach_the_largest_matrix_rank(
    name: str, weight: WeightShape, rank: Any, out_modes: Any, in_modes: Any, expected: int
) -> None:
    fmt = get_format(name)
    spec = fmt.spec(weight, rank=rank, out_modes=out_modes, in_modes=in_modes)
    assert fmt.max_matrix_rank(spec) == expected
    matrix = fmt.to_dense([core.double() for core in random_cores(spec)], spec)
    if weight.kind == "conv":
        matrix = matrix[:, :, 0, 0]
    assert int(torch.linalg.matrix_rank(matrix)) == expected
