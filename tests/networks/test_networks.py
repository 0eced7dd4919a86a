"""The package's own networks: sizes and published counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensortrain.errors import ShapeError
from tensortrain.networks import DENSE_RECIPE, MLP, ConvFC


def n_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def test_published_conv_fc_counts():
    with torch.device("meta"):
        model = ConvFC(in_channels=3, image_size=32, width=1.0)
    assert n_weights(model) == 13_929_152
    assert sum(p.numel() for p in model.parameters()) == 13_934_538


@pytest.mark.parametrize("size", [28, 32, 29, 5])
def test_conv_fc_takes_its_image_size(size):
    model = ConvFC(in_channels=2, num_classes=7, image_size=size, width=0.1, hidden=(12, 8)).double()
    x = torch.randn(3, 2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (3, 7)


def test_conv_fc_refuses_other_images():
    model = ConvFC()
    for shape in ((2, 1, 32, 32), (2, 3, 28, 28), (1, 28, 28), (2, 784)):
        with pytest.raises(ShapeError, match=r"expected \(b, 1, 28, 28\)"):
            model(torch.zeros(shape))


def test_mlp_counts():
    assert sum(p.numel() for p in MLP().parameters()) == 785 * 256 + 257 * 128 + 129 * 10
    assert MLP()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_channels_last_gives_the_same_logits():
    model = ConvFC(hidden=(32, 16)).double().eval()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model(x)
    after = model.to(memory_format=torch.channels_last)(x)
    assert (before - after).abs().max() <= 1e-12
    assert set(DENSE_RECIPE) == {"channels_last", "data", "fit"}
