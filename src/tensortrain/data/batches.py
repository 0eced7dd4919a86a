"""Batches of images whose order and augmentation depend on (seed, epoch) alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tensortrain.errors import DataError

FASHION_MEAN, FASHION_STD = 0.2860, 0.3530  # of the training pixels on a scale of 0 to 1
_MAX_SHIFT = 2


class ImageBatches:
    """A re-iterable source of ``(x, y)``, batches as ``train.batches`` reads them; build it with
    :func:`image_batches`.

    ``x`` is float32 ``(b, 1, H, W)``, ``y`` int64 ``(b,)``. Every pass over it in one epoch gives the same
    batches; :meth:`set_epoch` moves to another order and other augmentations.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        augment: bool,
        shuffle: bool,
        drop_last: bool,
        mean: float,
        std: float,
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.augment, self.shuffle, self.drop_last = augment, shuffle, drop_last
        self.mean, self.std = mean, std

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, as ``DistributedSampler.set_epoch`` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.labels.numel(), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def split_off(self, share: int, n_batches: int) -> tuple[ImageBatches, ImageBatches]:
        """Two loaders over disjoint images: the rest, and one image in ``share``, at most ``n_batches`` full.

        The images set aside come without augmentation, always in one order.
        """
        n = self.labels.numel()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).to(self.labels.device)
        count = min(n_batches * self.batch_size, max(1, n // share))
        rest, aside = copy.copy(self), copy.copy(self)
        frame = _MAX_SHIFT if self.augment else 0
        height, width = self.images.shape[1:]
        aside.images = self.images[order[:count], frame : height - frame, frame : width - frame]
        aside.labels, aside.augment, aside.shuffle, aside.drop_last = self.labels[order[:count]], False, False, False
        kept = order[count:].sort().values
        rest.images, rest.labels = self.images[kept], self.labels[kept]
        return rest, aside

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = self._order(generator)
        moves = self._moves(generator) if self.augment else None
        for k in range(len(self)):
            rows = slice(k * self.batch_size, (k + 1) * self.batch_size)
            index = order[rows]
            pixels = self.images[index] if moves is None else self._shifted(index, moves[rows])
            x = (pixels.float() - 255 * self.mean) / (255 * self.std)
            yield x.unsqueeze(1), self.labels[index]

    def _order(self, generator: torch.Generator) -> Tensor:
        n = self.labels.numel()
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        return order.to(self.labels.device)

    def _moves(self, generator: torch.Generator) -> Tensor:
        """Draw (shift down, shift right, flip) for a whole epoch: (n, 3)."""
        n = self.labels.numel()
        shifts = torch.randint(0, 2 * _MAX_SHIFT + 1, (n, 2), generator=generator)
        flips = torch.randint(0, 2, (n, 1), generator=generator)
        return torch.cat((shifts, flips), dim=1).to(self.labels.device)

    def _shifted(self, index: Tensor, moves: Tensor) -> Tensor:
        """Cut one window per image out of the framed images: a single gather for shift and flip."""
        height, width = (size - 2 * _MAX_SHIFT for size in self.images.shape[1:])
        down = torch.arange(height, device=index.device)
        right = torch.arange(width, device=index.device)
        right = torch.where(moves[:, 2:] == 1, right.flip(0), right)  # b W
        rows = moves[:, 0:1] + down  # b H
        cols = moves[:, 1:2] + right  # b W
        return self.images[index[:, None, None], rows[:, :, None], cols[:, None, :]]


def image_batches(
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    seed: int = 0,
    device: torch.device | str | None = None,
    augment: bool = False,
    pad_to: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    mean: float = FASHION_MEAN,
    std: float = FASHION_STD,
) -> ImageBatches:
    """Make a re-iterable loader of normalised image batches.

    Args:
        images: uint8 ``(n, H, W)``.
        labels: int64 ``(n,)``.
        batch_size: Images in a batch.
        seed: With the epoch, decides order and augmentation; the global generators are not touched.
        device: Where the data is kept and the batches are made; as given when None.
        augment: Shift by up to two pixels each way and flip left to right, each at random.
        pad_to: Side of the square the images are centred in, in pixels.
        shuffle: Draw a new order each epoch; False keeps the order of ``images``.
        drop_last: Leave out the last batch when it is not full.
        mean: Subtracted from the pixels, on a scale of 0 to 1.
        std: Divides the pixels after that.

    Returns:
        ImageBatches: gives ``(x, y)`` with ``x`` float32 ``(b, 1, H, W)``; has ``len`` and ``set_epoch``.

    Raises:
        DataError: Sizes or dtypes do not fit.

    Cost: about 1 ms for a batch of 128 with augmentation on one CPU core.

    Example:
        >>> images, labels = torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10)
        >>> batches = image_batches(images, labels, batch_size=4)
        >>> [tuple(x.shape) for x, y in batches]
        [(4, 1, 28, 28), (4, 1, 28, 28), (2, 1, 28, 28)]
    """
    _check(images, labels, batch_size)
    if pad_to is not None:
        images = _centred(images, pad_to)
    if augment:
        images = F.pad(images, (_MAX_SHIFT,) * 4)
    return ImageBatches(
        images.to(device),
        labels.to(device),
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        shuffle=shuffle,
        drop_last=drop_last,
        mean=mean,
        std=std,
    )


def _check(images: Tensor, labels: Tensor, batch_size: int) -> None:
    if images.ndim != 3 or images.dtype != torch.uint8:
        raise DataError(
            f"images must be uint8 (n, H, W): images has {images.dtype} {tuple(images.shape)}, expected "
            "torch.uint8 and three axes. Pass the pixels as they come from tensortrain.data."
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"every image must have one label: labels has shape {tuple(labels.shape)}, expected "
            f"({images.shape[0]},). Pass images and labels of the same split."
        )
    if batch_size < 1:
        raise DataError(
            f"a batch must hold at least one image: batch_size has {batch_size}, expected 1 or more. "
            "Pass a positive batch_size."
        )


def _centred(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[1:]
    if side < max(height, width):
        raise DataError(
            f"padding cannot shrink an image: pad_to has {side}, expected at least {max(height, width)}. "
            "Raise pad_to or leave it out."
        )
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top))
