"""Batches of tokenized texts whose order depends on (seed, epoch) alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.errors import DataError

Tokenizer = Callable[..., Any]


class TextBatches:
    """A re-iterable source of ``{"input_ids", "attention_mask"}``, batches as ``train.batches`` reads them; build it
    with :func:`text_batches`.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, *, batch_size: int, max_length: int, seed: int | None
    ) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.batch_size, self.max_length, self.seed, self.epoch = batch_size, max_length, seed, 0
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        self.groups = [by_length[k : k + batch_size] for k in range(0, len(texts), batch_size)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, as ``DistributedSampler.set_epoch`` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def split_off(self, share: int, n_batches: int) -> tuple[TextBatches, TextBatches]:
        """Two loaders over disjoint batches: the rest, and one batch in ``share``, at most ``n_batches``."""
        count = min(n_batches, max(1, len(self.groups) // share))
        places = {int((k + 0.5) * len(self.groups) / count) for k in range(count)}
        rest, aside = copy.copy(self), copy.copy(self)
        rest.groups = [group for k, group in enumerate(self.groups) if k not in places]
        aside.groups, aside.seed = [self.groups[k] for k in sorted(places)], None
        return rest, aside

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for k in self._order():
            texts = [self.texts[i] for i in self.groups[k]]
            found = self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            yield {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def in_order(self, rows: Sequence[Tensor]) -> Tensor:
        """One row per text, as the batches of this epoch gave them, in the order of the texts."""
        places = torch.tensor([i for k in self._order() for i in self.groups[k]])
        stacked = torch.cat(list(rows))
        return torch.empty_like(stacked).index_copy_(0, places.to(stacked.device), stacked)

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(len(self.groups)))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(len(self.groups), generator=generator).tolist()


def text_batches(
    texts: Sequence[str], tokenizer: Tokenizer, *, batch_size: int = 32, max_length: int = 64, seed: int | None = None
) -> TextBatches:
    """Make a re-iterable loader of tokenized texts; a batch has texts of like length, so that little is padded.

    Args:
        texts: n strings.
        tokenizer: Of transformers, or a callable with its arguments.
        batch_size: Texts in a batch.
        max_length: Tokens that are kept of one text.
        seed: With the epoch, decides the order of the batches; None goes from short to long.

    Raises:
        DataError: No texts, or a size below one.

    Example:
        >>> batches = text_batches(["good", "bad"], tokenizer)  # doctest: +SKIP
    """
    for what, size in (("texts", len(texts)), ("batch_size", batch_size), ("max_length", max_length)):
        if size < 1:
            raise DataError(f"batches must hold a text: {what} has {size}, expected 1 or more. Pass more.")
    return TextBatches(texts, tokenizer, batch_size=batch_size, max_length=max_length, seed=seed)
