"""The conv-fc network of "Ultimate tensorization": six convolutions and three fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from tensortrain.errors import ShapeError
from tensortrain.networks.registry import register

_CHANNELS = (64, 64, 128, 128, 128, 128)
_POOL_AFTER = (1, 3)

# Trains ConvFC() on Fashion-MNIST to about 92.9 % in six passes: a few minutes on two CPU cores.
# "data" goes to tensortrain.data.image_batches, "fit" to tensortrain.train.loop.fit with the cross
# entropy; channels_last (model.to(memory_format=...)) makes the convolutions half again as fast on a CPU.
DENSE_RECIPE: dict[str, Any] = {
    "channels_last": True,
    "data": {"batch_size": 128, "augment": True, "seed": 0},
    "fit": {
        "epochs": 6,
        "optimizer": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.02,
        "schedule": "onecycle",
        "seed": 0,
    },
}


@register("conv-fc")
class ConvFC(nn.Module):
    """Six 3x3 convolutions, two poolings, three fully connected layers; batch norm and ReLU between.

    Args:
        in_channels: Channels of the images.
        num_classes: Size of the output.
        image_size: Side of the square images, in pixels.
        width: Multiplies the published channels 64, 64, 128, 128, 128, 128.
        hidden: Sizes of the two hidden fully connected layers.

    Shape: ``(b, in_channels, image_size, image_size)`` to ``(b, num_classes)``.

    Source: Garipov, Podoprikhin, Novikov, Vetrov, "Ultimate tensorization", arXiv:1611.03214; the published
    network is ``ConvFC(in_channels=3, image_size=32, width=1.0)``.

    Example:
        >>> sum(p.numel() for p in ConvFC(in_channels=3, image_size=32, width=1.0).parameters())
        13934538
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        width: float = 0.25,
        hidden: Sequence[int] = (1536, 512),
    ) -> None:
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "image_size": image_size,
            "width": width,
            "hidden": list(hidden),
        }
        channels = [max(1, round(width * n)) for n in _CHANNELS]
        self.features = nn.Sequential(*_convolutions(in_channels, channels))
        side = (image_size + 3) // 4  # two poolings that round up
        self.n_features = channels[-1] * side * side
        self.classifier = nn.Sequential(*_fully_connected((self.n_features, *hidden), num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(b, num_classes)``."""
        channels, side = self.config["in_channels"], self.config["image_size"]
        if x.shape[1:] != (channels, side, side):
            raise ShapeError(
                f"images must fit the network: the input has shape {tuple(x.shape)}, expected "
                f"(b, {channels}, {side}, {side}). Reshape the input or build the network for its size."
            )
        return self.classifier(self.features(x).flatten(1))


def _convolutions(in_channels: int, channels: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(zip((in_channels, *channels), channels, strict=False)):
        # Batch norm has a shift of its own, so a bias here would be a parameter without effect.
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if k in _POOL_AFTER:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return layers


def _fully_connected(sizes: Sequence[int], num_classes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return [*layers, nn.Linear(sizes[-1], num_classes)]
