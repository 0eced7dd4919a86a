"""Batches of rows of tensors, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tensortrain.errors import DataError

__all__ = ["RowBatches"]


class RowBatches:
    """A re-iterable source of ``(x,)`` or ``(x, y)``, batches as ``train.batches`` reads them.

    Args:
        *tensors: Equal first axes, of one row or more.
        batch_size: Rows in a batch; all when left out.
        seed: With the epoch, decides the order; the global generators are not touched.
        shuffle: Draw a new order each epoch.

    Example:
        >>> [len(x) for (x,) in RowBatches(torch.arange(5), batch_size=2)]
        [2, 2, 1]
    """

    def __init__(self, *tensors: Tensor, batch_size: int | None = None, seed: int = 0, shuffle: bool = True) -> None:
        n_rows = tensors[0].shape[0]
        if n_rows == 0 or any(tensor.shape[0] != n_rows for tensor in tensors):
            raise DataError(
                f"data must have rows, as many in each tensor: they have {[t.shape[0] for t in tensors]}, expected one "
                "number of 1 or more. Pass the samples along the first axis."
            )
        if batch_size is not None and batch_size < 1:
            raise DataError(
                f"a batch must have rows: batch_size has {batch_size}, expected 1 or more. Leave it out for all."
            )
        self.tensors, self.seed, self.epoch = tensors, seed, 0
        self.batch_size = min(batch_size or n_rows, n_rows)
        self.shuffle = shuffle and self.batch_size < n_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.tensors[0].shape[0] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n_rows = self.tensors[0].shape[0]
        if not self.shuffle:
            for start in range(0, n_rows, self.batch_size):
                yield tuple(tensor[start : start + self.batch_size] for tensor in self.tensors)
            return
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(n_rows, generator=generator).to(self.tensors[0].device)
        for rows in order.split(self.batch_size):
            yield tuple(tensor[rows] for tensor in self.tensors)
