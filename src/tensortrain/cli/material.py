"""What a model is compressed with: batches, a figure to judge it by, and how it is healed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tensortrain import networks as models
from tensortrain.cli.datasets import accuracy_on_test, check_fits, example_images, load_images, train_batches
from tensortrain.cli.resolve import ResolvedModel, example_inputs
from tensortrain.cli.texts import TEXT_SETS, load_snippets
from tensortrain.compression.survey.output_weights import OutputFunction, sentence_embedding
from tensortrain.system.observer import Observer
from tensortrain.train.evaluation import Evaluate

__all__ = ["Material", "gather"]

_IMAGE_RATE, _TEXT_RATE = 1e-3, 1.5e-4  # a pretrained encoder forgets at rates that suit a small network


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything ``compress`` takes beside model and budget.

    Attributes:
        batches: For calibration and healing; None leaves both out.
        evaluate, metric_name, example, output: As ``tensortrain.compress`` takes them.
        loss, lr: For healing.
        note: Where the data came from.
        save_beside: Writes what the checkpoint's folder should hold too, such as a tokenizer.
    """

    batches: Iterable[Any] | None = None
    evaluate: Evaluate | None = None
    metric_name: str = "metric"
    example: Any = None
    output: OutputFunction | None = None
    loss: Literal["distill", "feature"] = "distill"
    lr: float = _IMAGE_RATE
    note: str | None = None
    save_beside: Callable[[Path], Any] | None = None


def gather(
    found: ResolvedModel,
    *,
    data: Path | None,
    dataset: str | None,
    tokenizer: Path | None,
    shape: str | None,
    seed: int,
    observer: Observer,
) -> Material:
    """Load what was asked for; without a word about it, Fashion-MNIST for models of the package, else nothing.

    Raises:
        DataError: The data cannot be read, or does not fit the model.
        KindError: Texts without a tokenizer.
    """
    if dataset in TEXT_SETS:
        return _texts(found, data, tokenizer, seed, observer)
    if data is None and dataset is None and models.describe(found.model) is None:
        return _nothing(found, shape, observer)
    return _images(found, data, dataset, seed, observer)


def _texts(found: ResolvedModel, data: Path | None, tokenizer: Path | None, seed: int, observer: Observer) -> Material:
    snippets = load_snippets(data, (tokenizer, found.folder), observer)
    return Material(
        batches=snippets.train_batches(seed),
        evaluate=snippets.cosine_to(found.model, observer),
        metric_name="cosine to the original",
        output=sentence_embedding,
        loss="feature",
        lr=_TEXT_RATE,
        note=f"Data: movie snippets ({snippets.texts.source}).",
        save_beside=snippets.tokenizer.save_pretrained,
    )


def _images(found: ResolvedModel, data: Path | None, dataset: str | None, seed: int, observer: Observer) -> Material:
    images = load_images(dataset, data, observer)
    example = example_images(images)
    check_fits(found.model, example, found.name)
    return Material(
        batches=train_batches(images, seed=seed),
        evaluate=lambda model: accuracy_on_test(model, images),
        metric_name="accuracy",
        example=example,
        note=f"Data: {images.name} ({images.source}).",
    )


def _nothing(found: ResolvedModel, shape: str | None, observer: Observer) -> Material:
    observer.message("No data given: the weights alone decide, and nothing is healed.")
    example = example_inputs(found.model, shape, batch=128)
    if example is not None:
        check_fits(found.model, example, found.name)
    return Material(example=example)
