"""What plans predict of the smallest forms of a layer, where few directions of its output count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensortrain.compression.choose.candidates import families
from tensortrain.compression.survey.layers import find_layers
from tensortrain.formats import Weighting, get_format

pytestmark = pytest.mark.usefixtures("double")


def trained(out: int, ins: int, strong: int) -> tuple[nn.Linear, Weighting]:
    """A layer that says a few things loudly, the only ones that count, and many others softly."""
    basis, layer = torch.linalg.qr(torch.randn(out, strong))[0], nn.Linear(ins, out)
    with torch.no_grad():
        layer.weight.copy_(2 * basis @ torch.randn(strong, ins) + torch.randn(out, ins))
    return layer, Weighting(torch.eye(ins), basis @ basis.T + 1e-6 * torch.eye(out))


@pytest.mark.parametrize(("out", "ins", "strong"), [(96, 120, 5), (128, 64, 9)])
def test_a_form_that_is_too_small_for_what_counts_is_not_taken_for_a_good_one(out, ins, strong) -> None:
    torch.manual_seed(0)
    layer, weighting = trained(out, ins, strong)
    found = find_layers(nn.Sequential(layer))[0][0]
    for family in families(found, formats=("tt",), weighting=weighting, wide=True):
        smallest = min(family.candidates(growth=0.08, wide=True), key=lambda one: one.point.n_params)
        reached = get_format("tt").probe(found.kernel, smallest.spec, weighting)
        assert smallest.point.rel_error > 0.8 * reached, smallest.spec
