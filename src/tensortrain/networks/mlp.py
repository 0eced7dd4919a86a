"""A small fully connected network, for examples and quick checks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from tensortrain.networks.registry import register


@register("mlp")
class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between.

    Args:
        in_features: Numbers in one input.
        hidden: Sizes of the hidden layers.
        num_classes: Size of the output.

    Shape: ``(b, ...)`` with ``in_features`` numbers each to ``(b, num_classes)``.

    Example:
        >>> import torch
        >>> MLP()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_features: int = 784, hidden: Sequence[int] = (256, 128), num_classes: int = 10) -> None:
        super().__init__()
        self.config = {"in_features": in_features, "hidden": list(hidden), "num_classes": num_classes}
        sizes = (in_features, *hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(b, num_classes)``."""
        return self.layers(x.flatten(1))
