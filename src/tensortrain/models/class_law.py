"""The scores of a classifier as amplitudes of a law on examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tensortrain.errors import DataError, KindError
from tensortrain.models.born import BornMachine
from tensortrain.models.checks import checked_count, checked_labels, whole
from tensortrain.tensor import TensorTrain

if TYPE_CHECKING:
    from tensortrain.models.classifier import MPSClassifier

__all__ = ["class_law", "class_samples"]


@torch.no_grad()
def class_law(model: MPSClassifier, label: int, values: Sequence[float] | Tensor | None) -> BornMachine:
    """See ``MPSClassifier.law``."""
    one = whole(label)
    chosen = int(checked_labels(label if one is None else torch.tensor([one]), 1, model.n_classes))
    grid = _grid(model, values)
    vectors = model._vectors(grid[:, None].expand(-1, model.n_features))  # features v m
    cores = []
    for core, here in zip(model.cores, vectors, strict=True):
        one = core[chosen] if core.ndim == 4 else core
        cores.append(torch.einsum("rms,vm->rvs", one, here.to(one.dtype)).contiguous())
    return BornMachine.from_train(TensorTrain(tuple(cores)))


def class_samples(
    model: MPSClassifier,
    n: int,
    label: int | Tensor,
    values: Sequence[float] | Tensor | None,
    given: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """See ``MPSClassifier.sample``."""
    n, one = checked_count(n), whole(label)
    labels = checked_labels(label if one is None else torch.full((n,), one), n, model.n_classes)
    grid = _grid(model, values)
    condition = None if given is None else _numbers(model, given, grid, n)
    found = grid.new_empty(n, model.n_features)
    for one in labels.unique().tolist():
        rows = torch.nonzero(labels == one)[:, 0].to(grid.device)
        here = condition if condition is None or condition.shape[0] == 1 else condition[rows]
        found[rows] = grid[class_law(model, one, values).sample(len(rows), given=here, generator=generator)]
    return found


def _grid(model: MPSClassifier, values: Sequence[float] | Tensor | None) -> Tensor:
    """Numbers that a feature may have, ``(v,)``."""
    if values is None:
        if model.features.kind != "one-hot":
            raise KindError(
                f"a law of examples must have values to sum over: feature_map is {model.features.kind!r}, which takes "
                "any number, expected 'one-hot' or values=. Pass such as values=torch.linspace(0, 1, 16)."
            )
        values = (0.0, 1.0)
    first = model.cores[0]
    grid = torch.as_tensor(values).to(first.device, first.dtype)
    if grid.ndim != 1 or len(grid) == 0 or len(grid.unique()) < len(grid):
        raise DataError(
            f"values must be different numbers: values has shape {tuple(grid.shape)} and {len(grid.unique())} "
            "different ones, expected (v,) with v of them. Pass values.unique()."
        )
    return grid


def _numbers(model: MPSClassifier, given: Tensor, grid: Tensor, n: int) -> Tensor:
    """A condition by the numbers of its values, ``(1, d)`` or ``(n, d)``; -1 where it is NaN."""
    rows = given.unsqueeze(0) if isinstance(given, Tensor) and given.ndim == 1 else given
    is_right = isinstance(rows, Tensor) and rows.is_floating_point() and rows.ndim == 2
    if not is_right or rows.shape[1] != model.n_features or rows.shape[0] not in (1, n):
        found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise DataError(
            f"a condition must be one for all examples or one each: given has {found}, expected numbers of shape "
            f"({model.n_features},) or ({n}, {model.n_features}). Put NaN where a feature is free."
        )
    rows = rows.to(grid.device, grid.dtype)
    is_one = rows[..., None] == grid
    if not bool((is_one.any(-1) | rows.isnan()).all()):
        raise DataError(
            f"a condition must have values of the law: given has others than the {len(grid)} of values. Round them to "
            "the nearest, or put NaN where a feature is free."
        )
    return torch.where(rows.isnan(), -1, is_one.long().argmax(-1))
