"""Synthetic video: a small coloured picture drifts through heavy noise in one of eight directions.

The pictures are Fashion-MNIST at half size, 14 x 14; a frame has 32 x 40 pixels of three colours. A picture starts
near the middle and moves by the same step from frame to frame. All of it depends on the seed alone, and the noise of
a clip is the same whenever the clip is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tensortrain.data import ImageData

__all__ = ["DIRECTIONS", "FRAME", "Clips", "video"]

FRAME = (32, 40, 3)  # rows, columns, colours; the last runs fastest
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))  # rows down, columns right
_SIDE = 14
_VALIDATION_IMAGES = 10_000  # the last of the training images
_BLACK, _WHITE = 112, 144  # grey levels of 0 and 1: room for the noise on both sides
_AT_A_TIME = 500


@dataclass(frozen=True)
class Clips:
    """Clips of bytes ``(n, frames, 3840)`` and their directions ``(n,)``."""

    pixels: Tensor
    labels: Tensor


def video(images: ImageData, n_train: int, options: dict[str, Any]) -> tuple[Clips, Clips, Clips]:
    """Clips for training, validation and test, from three disjoint sets of pictures."""
    seen, kept = images.train_images[:-_VALIDATION_IMAGES], images.train_images[-_VALIDATION_IMAGES:]
    sets = ((seen, n_train), (kept, options["validation"]), (images.test_images, options["test"]))
    train, validation, test = (
        _clips(pictures, n, options, torch.Generator().manual_seed(options["seed"] + k))
        for k, (pictures, n) in enumerate(sets)
    )
    return train, validation, test


def _clips(pictures: Tensor, n: int, options: dict[str, Any], generator: torch.Generator) -> Clips:
    parts = [_some(pictures, min(_AT_A_TIME, n - first), options, generator) for first in range(0, n, _AT_A_TIME)]
    return Clips(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def _some(pictures: Tensor, n: int, options: dict[str, Any], generator: torch.Generator) -> Clips:
    n_frames = options["frames"]
    which = torch.randint(len(pictures), (n,), generator=generator)
    labels = torch.randint(len(DIRECTIONS), (n,), generator=generator)
    colours = torch.rand(n, 1, 1, 1, 3, generator=generator)
    colours = colours / colours.amax(-1, keepdim=True)
    middle, jitter = (torch.tensor(FRAME[:2]) - _SIDE) // 2, options["jitter"]
    start = middle + torch.randint(-jitter, jitter + 1, (n, 2), generator=generator)
    steps = options["speed"] * torch.arange(n_frames)[:, None]  # t 1
    corners = start[:, None] + steps * torch.tensor(DIRECTIONS)[labels][:, None]  # n t 2
    small = F.avg_pool2d(pictures[which].float() / 255, 2)  # n 14 14
    frames = _pasted(small, corners)[..., None] * colours  # n t 32 40 3
    frames += options["noise"] * torch.randn(frames.shape, generator=generator)
    levels = (_BLACK + (_WHITE - _BLACK) * frames).round().clamp(0, 255).to(torch.uint8)
    return Clips(levels.flatten(2), labels)


def _pasted(pictures: Tensor, corners: Tensor) -> Tensor:
    """Pictures on black frames with their upper left corners where told: (n, t, 32, 40)."""
    framed = F.pad(pictures, (0, 1, 0, 1))  # row and column 14 are black, and stand for all that is outside
    rows, cols = (torch.arange(size) - corners[..., k, None] for k, size in enumerate(FRAME[:2]))  # n t 32, n t 40
    rows, cols = (torch.where((at >= 0) & (at < _SIDE), at, _SIDE) for at in (rows, cols))
    clip = torch.arange(len(pictures))[:, None, None, None]
    return framed[clip, rows[..., :, None], cols[..., None, :]]
