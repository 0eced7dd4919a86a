"""Sentence encoders on the command line: batches of snippets, nearness to the original, a probe for sentiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain import data as sets
from tensortrain.cli.hugging_face import load_tokenizer
from tensortrain.compression.survey.output_weights import sentence_embedding
from tensortrain.data import TextBatches, TextData, text_batches
from tensortrain.errors import DataError, OptionalDependencyError, TTError
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.modes import evaluating

__all__ = ["TEXT_SETS", "Snippets", "load_snippets"]

TEXT_SETS = ("movie-snippets",)
_N_PROBE = 1500  # snippets that the probe learns from, and as many to test it on: a minute for a small encoder
_N_COSINE = 300


class Snippets:
    """Rated movie snippets, cut into tokens for one model.

    Attributes:
        texts: All snippets with their ratings and split.
        tokenizer: Of the model.
    """

    def __init__(self, texts: TextData, tokenizer: Any) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def train_batches(self, seed: int) -> TextBatches:
        """A new loader over the training snippets, at its first epoch."""
        return self._batches(self.texts.train_index, seed)

    def cosine_to(self, original: nn.Module, observer: Observer | None = None) -> Callable[[nn.Module], float]:
        """``model -> mean cosine`` between its sentence vectors and the original's, on held-out snippets."""
        batches = self._batches(self.texts.test_index[:_N_COSINE])
        expected = embed(original, batches, observer)

        def cosine(model: nn.Module) -> float:
            return float((embed(model, batches) * expected).sum(dim=-1).double().mean())

        return cosine

    def probe_accuracy(self, model: nn.Module, *, limit: int | None = None, observer: Observer | None = None) -> float:
        """Held-out accuracy of a logistic regression that tells good reviews from bad by their vectors.

        Raises:
            DataError: ``limit`` is below one.
            OptionalDependencyError: scikit-learn is not installed.
        """
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise OptionalDependencyError(
                "the probe needs scikit-learn: it is not installed. Install it with pip install scikit-learn."
            ) from error
        train, test = self.texts.train_index[:_N_PROBE], self._tested(limit)
        rows = embed(model, self._batches(torch.cat((train, test))), observer).numpy()
        n = train.numel()
        probe = LogisticRegression(max_iter=1000).fit(rows[:n], self.texts.labels[train].numpy())
        return float(probe.score(rows[n:], self.texts.labels[test].numpy()))

    def n_tested(self, limit: int | None) -> int:
        """How many snippets the probe is tested on."""
        return self._tested(limit).numel()

    def _tested(self, limit: int | None) -> Tensor:
        if limit is not None and limit < 1:
            raise DataError(f"a number of snippets must be positive: {limit} asked. Ask for 1 or more.")
        return self.texts.test_index[: _N_PROBE if limit is None else limit]

    def _batches(self, index: Tensor, seed: int | None = None) -> TextBatches:
        return text_batches([self.texts.texts[i] for i in index.tolist()], self.tokenizer, seed=seed)


def load_snippets(
    root: Path | None, tokenizer_folders: Sequence[Path | None], observer: Observer | None = None
) -> Snippets:
    """Load the snippets, and the tokenizer from the first folder that is given.

    Raises:
        DataError: The snippets are missing or damaged.
        KindError: No folder, or one without a tokenizer.
    """
    folder = next((folder for folder in tokenizer_folders if folder is not None), None)
    tokenizer = load_tokenizer(folder)  # first: it is the quicker one to be wrong
    return Snippets(sets.movie_snippets(root, observer=observer), tokenizer)


@torch.no_grad()
def embed(model: nn.Module, batches: TextBatches, observer: Observer | None = None) -> Tensor:
    """Sentence vectors in the order of the texts, one row each; the model is run in eval mode.

    Raises:
        TTError: The model is no sentence encoder.
    """
    observer = observer or Silent()
    rows = []
    observer.on_start("embed", len(batches))
    try:
        with evaluating(model):
            for k, batch in enumerate(batches):
                rows.append(_vectors(model, batch))
                observer.on_step(k + 1)
    finally:
        observer.on_end()
    return batches.in_order(rows)


def _vectors(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    try:
        return sentence_embedding(model, batch)
    except TTError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the texts must fit the model: {type(model).__name__} fails on tokens with {type(error).__name__}: "
            f"{reason:.200} Use a sentence encoder and its own tokenizer."
        ) from error
