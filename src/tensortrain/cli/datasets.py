"""The data sets that commands can name, and one way to measure accuracy on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tensortrain import data as sets
from tensortrain.contract import CostModel, use_cost_model
from tensortrain.data import ImageBatches, ImageData, image_batches
from tensortrain.errors import DataError
from tensortrain.system.observer import Observer
from tensortrain.train.evaluation import evaluate_accuracy
from tensortrain.train.modes import evaluating

__all__ = [
    "accuracy_on_test",
    "check_fits",
    "example_images",
    "first",
    "load_images",
    "train_batches",
]

_TEST_BATCH = 500


def load_images(dataset: str | None, root: Path | None, observer: Observer | None = None) -> ImageData:
    """Load the images that a command names.

    Args:
        dataset: None for Fashion-MNIST, or the digits where that is not to be had (which is said).
        root: Folder with the files of Fashion-MNIST.

    Raises:
        DataError: The name is not known, or files are missing or damaged.
    """
    if dataset == "digits":
        if root is not None:
            raise DataError(
                f"a folder of data must be read: --data has {root}, but the digits come with scikit-learn. "
                "Leave out --data or --dataset digits."
            )
        return sets.digits()
    if dataset == "fashion-mnist":
        return sets.fashion_mnist(root, observer=observer)
    if dataset is None:
        return sets.images(root, observer=observer)
    raise DataError(
        f"a data set must be known: --dataset has {dataset!r}, expected fashion-mnist or digits. Choose one."
    )


def first(data: ImageData, *, n_train: int | None = None, n_test: int | None = None) -> ImageData:
    """The first images of each split."""
    for what, n in (("training", n_train), ("test", n_test)):
        if n is not None and n < 1:
            raise DataError(f"a number of images must be positive: {n} {what} images asked. Ask for 1 or more.")
    return replace(
        data,
        train_images=data.train_images[:n_train],
        train_labels=data.train_labels[:n_train],
        test_images=data.test_images[:n_test],
        test_labels=data.test_labels[:n_test],
    )


def train_batches(data: ImageData, *, batch_size: int = 128, augment: bool = True, seed: int = 0) -> ImageBatches:
    """A new loader, at its first epoch."""
    return image_batches(data.train_images, data.train_labels, batch_size=batch_size, augment=augment, seed=seed)


def accuracy_on_test(model: nn.Module, data: ImageData) -> float:
    """Share of right answers on the test images.

    Plans are made with fixed constants instead of timings: another plan rounds otherwise, and an accuracy
    must not hang on how busy the machine is.
    """
    batches = image_batches(data.test_images, data.test_labels, batch_size=_TEST_BATCH, shuffle=False)
    with use_cost_model(CostModel.reference("cpu")):
        return evaluate_accuracy(model, batches)


def example_images(data: ImageData, n: int = 128) -> Tensor:
    """The first test images as a network takes them: ``(n, 1, H, W)``."""
    batches = image_batches(data.test_images[:n], data.test_labels[:n], batch_size=n, shuffle=False)
    return next(iter(batches))[0]


def check_fits(model: nn.Module, x: Tensor, where: str) -> None:
    """Run two examples before long work.

    Raises:
        DataError: The model does not take them.
    """
    try:
        with evaluating(model), torch.no_grad():
            model(x[:2])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the data must fit the model: {where} fails on inputs of shape {tuple(x.shape[1:])} with "
            f"{type(error).__name__}: {reason:.200} Choose another --dataset or --shape."
        ) from error
