"""Learning rates per core: the factors of the paper, every parameter once, options passed through."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import RankError
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.shaping.param_groups import core_lr_factors


def rates(groups: list[dict[str, Any]]) -> dict[int, float]:
    return {id(p): group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    "layer, factors",
    [
        # d_in / (n_k r_{k-1}) / 3 with n = (2, 3, 4), r = (1, 5, 4)
        (
            tt.nn.Linear(24, 60, in_modes=(2, 3, 4), out_modes=(5, 4, 3), rank=(1, 5, 4, 1)),
            (24 / 2 / 3, 24 / 15 / 3, 24 / 16 / 3),
        ),
        (tt.nn.Linear(24, 60, format="low_rank", rank=5), (24 / 24 / 2, 24 / 5 / 2)),
        (tt.nn.Linear(7, 5, in_modes=(7,), out_modes=(5,), rank=1), (1.0,)),
        # the spatial core sees 9 positions, the others their channels
        (
            tt.nn.Conv2d(6, 8, 3, in_modes=(2, 3), out_modes=(4, 2), rank=(1, 5, 4, 1)),
            (54 / 9 / 3, 54 / 10 / 3, 54 / 12 / 3),
        ),
        (tt.nn.Conv2d(6, 8, 3, format="low_rank", rank=5), (54 / 54 / 2, 54 / 5 / 2)),
        (tt.nn.Conv2d(6, 8, 3, format="tucker2", rank=(5, 4)), (54 / 6 / 3, 54 / 45 / 3, 54 / 4 / 3)),
        (tt.nn.Conv2d(6, 8, 3, groups=2, format="low_rank", rank=2), (27 / 27 / 2, 27 / 2 / 2)),
        # one-hot inputs
        (
            tt.nn.Embedding(60, 12, in_modes=(3, 4, 5), out_modes=(2, 3, 2), rank=(1, 5, 4, 1)),
            (1 / 3, 1 / 5 / 3, 1 / 4 / 3),
        ),
    ],
    ids=lambda value: value.spec.format if isinstance(value, nn.Module) else "",
)
def test_factors_of_every_format(layer: tt.nn.FactorizedLayer, factors: tuple[float, ...]) -> None:
    assert core_lr_factors(layer.spec) == pytest.approx(factors, rel=1e-14)
    found = rates(tt.nn.param_groups(layer, 1e-3))
    assert [found[id(core)] for core in layer.cores] == pytest.approx([1e-3 * f for f in factors], rel=1e-14)
    if layer.bias is not None:
        assert found[id(layer.bias)] == 1e-3


def test_a_format_that_tells_its_fans_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two cores of a block tensor train: m_0 = 4 and r m_1 = 15 of d_in = 20."""

    def core_fans(self: Any, spec: FactorSpec) -> tuple[tuple[int, int], ...]:
        return (4, 6), (15, 5)

    monkeypatch.setattr(type(get_format("low_rank")), "core_fans", core_fans)
    spec = tt.nn.Linear(20, 10, format="low_rank", rank=3).spec
    assert core_lr_factors(spec) == (20 / 4 / 2, 20 / 15 / 2)


def model_with_sharing() -> nn.Module:
    shared = tt.nn.Linear(12, 12, rank=3)
    frozen = nn.Linear(12, 4)
    frozen.weight.requires_grad_(False)
    tied = tt.nn.Linear(12, 12, format="low_rank", rank=3)
    tied.cores[0] = nn.Parameter(torch.randn(3, 12))
    twin = tt.nn.Linear(12, 12, format="low_rank", rank=3)
    twin.cores[0] = tied.cores[0]
    norm = nn.LayerNorm(12)
    rotated = tt.nn.orthogonal(tt.nn.Linear(8, 8, in_modes=(2,) * 3, out_modes=(2,) * 3, rank=3))
    return nn.ModuleList([shared, nn.Sequential(shared, norm), frozen, tied, twin, rotated])


def test_every_parameter_comes_once() -> None:
    model = model_with_sharing()
    groups = tt.nn.param_groups(model, 0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    assert groups[0]["lr"] == 0.01
    assert len({group["lr"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups)  # refuses a parameter that comes twice


def test_options_pass_through() -> None:
    groups = tt.nn.param_groups(model_with_sharing(), 0.01, weight_decay=0.3, betas=(0.5, 0.6))
    assert all(group["weight_decay"] == 0.3 and group["betas"] == (0.5, 0.6) for group in groups)
    optimizer = torch.optim.Adam(groups, lr=123.0)
    assert all(group["lr"] != 123.0 and group["weight_decay"] == 0.3 for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", ["slice", "left", "spectral"])
def test_numbers_behind_a_core_take_its_rate(kind: str) -> None:
    layer = tt.nn.orthogonal(tt.nn.Linear(30, 30, in_modes=(2, 3, 5), out_modes=(2, 3, 5), rank=3), kind)
    found = rates(tt.nn.param_groups(layer, 1.0))
    for k, factor in enumerate(core_lr_factors(layer.spec)):
        assert [found[id(p)] for p in layer.cores.free(k)] == [factor] * len(layer.cores.free(k))


def test_models_without_factorized_layers_learn_at_one_rate() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    (group,) = tt.nn.param_groups(model, 0.1)
    assert group["lr"] == 0.1
    assert len(group["params"]) == 4


def test_one_sign_step_moves_outputs_alike_at_every_width() -> None:
    """Along muP's rate of the dense layer, which goes with 1 / d_in: with the rule a step of Adam's kind moves outputs
    half as much at 16 times the width, without it an eighth."""
    assert _moved(1024, by_core=True) / _moved(64, by_core=True) > 0.4
    assert _moved(1024, by_core=False) / _moved(64, by_core=False) < 0.2


def _moved(n: int, *, by_core: bool) -> float:
    torch.manual_seed(0)
    modes = (math.isqrt(n),) * 2
    layer = tt.nn.Linear(n, n, bias=False, in_modes=modes, out_modes=modes, rank=4, dtype=torch.float64)
    x, upstream = torch.randn(32, n), torch.randn(32, n)
    before = layer(x)
    before.backward(upstream)
    lr = 1e-3 / n
    groups = tt.nn.param_groups(layer, lr) if by_core else [{"params": list(layer.parameters()), "lr": lr}]
    with torch.no_grad():
        for group in groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())
        return (layer(x) - before).square().mean().sqrt().item()


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates(lr: float) -> None:
    with pytest.raises(RankError, match="positive"):
        tt.nn.param_groups(nn.Linear(2, 2), lr)


def test_fans_of_chains_agree_with_the_formats_own() -> None:
    """Where a chain format tells its fans as well, both are the same."""
    for name, kind in itertools.product(("tt", "low_rank"), ("linear", "conv")):
        fmt = get_format(name)
        if not hasattr(fmt, "core_fans"):
            continue
        layer = tt.nn.Linear(24, 60, format=name, rank=4) if kind == "linear" else tt.nn.Conv2d(4, 6, 3, format=name)
        fans = fmt.core_fans(layer.spec)
        d_in = layer.spec.weight.fan_in
        assert core_lr_factors(layer.spec) == pytest.approx([d_in / f / len(fans) for f, _ in fans])
