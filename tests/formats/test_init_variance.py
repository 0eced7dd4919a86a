"""The dense weight has the variance asked for, in every format."""

from __future__ import annotations

import math

import pytest
import torch

from tensortrain.errors import KindError
from tensortrain.formats import FactorSpec, WeightShape, format_names, get_format

LINEAR = [name for name in format_names() if "linear" in get_format(name).kinds]
FREE = [name for name in LINEAR if name not in ("low_rank", "btt", "kronecker")]


def specs(name: str, rank: int) -> list[FactorSpec]:
    fmt = get_format(name)
    modes = {2: (12, 14), 3: (6, 5, 6), 4: (4, 4, 3, 3), 6: (2, 3, 2, 3, 2, 2)} if name in FREE else {2: (12, 14)}
    found = []
    for modes_d in modes.values():
        size = math.prod(modes_d)
        weight = WeightShape("linear", size, size)
        given = None if name == "low_rank" else modes_d
        found.append(fmt.spec(weight, rank=rank, out_modes=given, in_modes=given))
    return found


def draw(spec: FactorSpec) -> list[torch.Tensor]:
    return [torch.empty(shape) for shape in spec.core_shapes]


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_linear_weights(rank: int, name: str) -> None:
    for spec in specs(name, rank):
        cores = draw(spec)
        get_format(name).init_(cores, spec, 0.3, torch.Generator().manual_seed(1))
        dense = get_format(name).to_dense(cores, spec)
        assert float(dense.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("name", format_names())
def test_the_variance_on_average_is_exact(name: str) -> None:
    kind = "linear" if name in LINEAR else "conv"
    weight = WeightShape("linear", 12, 12) if kind == "linear" else WeightShape("conv", 12, 12, (3,))
    fmt = get_format(name)
    spec = fmt.spec(weight, rank=4)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(400):
        cores = [core.normal_(0.0, fmt.init_std(spec, 0.5), generator=generator) for core in draw(spec)]
        total += fmt.mean_square(cores, spec) / 400
    assert total == pytest.approx(0.25, rel=0.1)  # 400 draws leave some 3 per cent


# -- by the fans of every core ------------------------------------------------------------------------


def test_fans_of_the_paper() -> None:
    weight = WeightShape("linear", 30, 42)
    spec = get_format("tt").spec(weight, rank=4, out_modes=(5, 6), in_modes=(6, 7))
    assert get_format("tt").core_fans(spec) == ((6, 5 * 4), (7 * 4, 6))
    assert get_format("low_rank").core_fans(get_format("low_rank").spec(weight, rank=3)) == ((42, 3), (3, 30))
    spec = get_format("btt").spec(weight, rank=4, out_modes=(5, 6), in_modes=(6, 7))
    assert get_format("btt").core_fans(spec) == ((6, 4 * 5), (4 * 7, 6))


def test_structured_initialisation() -> None:
    fmt = get_format("btt")
    spec = fmt.spec(WeightShape("linear", 4096, 1024), rank=4, out_modes=(64, 64), in_modes=(32, 32))
    cores = draw(spec)
    fmt.init_structured_(cores, spec, torch.Generator().manual_seed(0))
    for core, (f_in, f_out) in zip(cores, fmt.core_fans(spec), strict=True):
        assert float(core.std()) == pytest.approx(min(1.0, math.sqrt(f_out / f_in)) / math.sqrt(f_in), rel=0.02)
    rows = torch.randn(16, 1024) @ fmt.to_dense(cores, spec).T
    assert 0.5 < float(rows.std()) < 2  # activations keep their size


def test_a_format_that_is_neither_chain_nor_network_must_say_its_fans() -> None:
    fmt = get_format("tucker2")
    with pytest.raises(KindError, match="core_fans"):
        super(type(fmt), fmt).core_fans(fmt.spec(WeightShape("conv", 4, 4, (3,)), rank=2))
