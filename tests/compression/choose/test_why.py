"""What is said of a choice is true of the menu it was made from."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import batches, decay_, mlp

from tensortrain.compression import plan_compression
from tensortrain.compression.choose.candidates import candidates
from tensortrain.compression.choose.why import why_not_other
from tensortrain.compression.survey.layers import find_layers

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


def test_the_next_forms_of_low_rank_are_one_rank_away() -> None:
    torch.manual_seed(0)
    layer = find_layers(decay_(mlp(40, 30)))[0][0]
    menu = sorted(candidates(layer, formats=("low_rank",)), key=lambda one: one.point.n_params)
    text = why_not_other(menu[2], menu, dense_params=1200, reach=0.5)
    more, saved, fewer, lost = re.fullmatch(
        r"(\S+) more parameters would spoil (\S+) % of the output less; (\S+) fewer (\S+) % more", text
    ).groups()  # type: ignore[union-attr]
    errors = [one.point.rel_error**2 for one in menu]
    assert more == fewer == "70"
    assert float(saved) == pytest.approx(50 * (errors[2] - errors[3]), rel=0.06)
    assert float(lost) == pytest.approx(50 * (errors[1] - errors[2]), rel=0.06)


def test_ends_of_the_menu_have_one_side() -> None:
    layer = find_layers(decay_(mlp(40, 30)))[0][0]
    menu = sorted(candidates(layer, formats=("low_rank",)), key=lambda one: one.point.n_params)
    assert " more parameters" in why_not_other(menu[0], menu, dense_params=1200, reach=1.0)
    assert "fewer" not in why_not_other(menu[0], menu, dense_params=1200, reach=1.0)
    assert why_not_other(menu[0], menu, dense_params=1200, reach=None) == ""


def test_prices_of_layers_are_alike() -> None:
    """Which is what an allocation is."""
    torch.manual_seed(0)
    model, data = decay_(mlp(96, 96, 96, 96), 0.7), batches(6, 32, 96)
    plan = plan_compression(model, budget="3x", data=data, allow_slower=True, formats=("low_rank",))
    gains, costs = [], []
    for layer in plan.layers:
        more, saved = re.match(r"([\d,]+) more parameters would spoil (\S+) %", layer.why).groups()  # type: ignore[union-attr]
        fewer, lost = re.search(r"([\d,]+) fewer (\S+) %", layer.why).groups()  # type: ignore[union-attr]
        gains.append(float(saved) / int(more.replace(",", "")))
        costs.append(float(lost) / int(fewer.replace(",", "")))
    assert max(gains) <= 1.1 * min(costs)
