"""What all tensor-network models share: how they are stored, their random numbers, and the checks of what comes in."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tensortrain.cores.halves import Halves, outer
from tensortrain.cores.scaling import times_pow2
from tensortrain.errors import CheckpointError, DataError, KindError, RankError
from tensortrain.system.history import History
from tensortrain.system.store.doors import doors

__all__ = [
    "TensorModel",
    "adam",
    "chain_ranks",
    "check_choice",
    "check_finite",
    "check_sizes",
    "checked_labels",
    "checked_values",
    "held",
    "label_scores",
    "only_figures",
    "seed_from",
    "settle_",
]

_MOST_SETTLINGS = 60  # a factor of two each, where scores say nothing at all

Model = TypeVar("Model", bound="TensorModel")


class TensorModel(nn.Module):
    """A model that tells what builds it anew, and saves and loads itself by that."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments, as JSON has them, that build a model of the same shapes."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the model into a folder of safetensors and JSON, see ``tensortrain.save_pretrained``."""
        return doors.save(self, directory)

    @classmethod
    def from_pretrained(cls: type[Model], directory: str | os.PathLike[str]) -> Model:
        """Load what ``save_pretrained`` wrote: equal parameters, to the bit.

        Raises:
            CheckpointError: A file is missing, damaged, or of another kind of model.
        """
        model = doors.load(directory)
        if not isinstance(model, cls):
            raise CheckpointError(
                f"a checkpoint must be of the class that loads it: {directory} has a {type(model).__name__}, expected "
                f"a {cls.__name__}. Use {type(model).__name__}.from_pretrained or tensortrain.load_pretrained."
            )
        return model


def chain_ranks(bond_dim: int | Sequence[int], modes: Sequence[int], name: str = "bond_dim") -> tuple[int, ...]:
    """Ranks ``(1, .., 1)`` of a chain: a number is cut to what the modes allow, a sequence is taken as it is.

    Raises:
        RankError: They are below 1, or not as many as the chain has.
    """
    order = len(modes)
    if isinstance(bond_dim, int):
        given: list[int] = [1, *[bond_dim] * (order - 1), 1]
        for k in range(1, order):
            given[k] = min(given[k], given[k - 1] * modes[k - 1])
        for k in reversed(range(1, order)):
            given[k] = min(given[k], given[k + 1] * modes[k])
    else:
        given = list(bond_dim)
        given = given if len(given) == order + 1 else [1, *given, 1]
    if len(given) != order + 1 or min(given) < 1 or given[0] != 1 or given[-1] != 1:
        raise RankError(
            f"a chain must have ranks of 1 or more between its {order} sites: {name} has {bond_dim}, expected a number "
            f"or {order - 1} of them. Pass one number for all bonds."
        )
    return tuple(given)


def checked_values(x: object, n_sites: int, n_values: int, *, least: int = 0, name: str = "x") -> Tensor:
    """Whole numbers ``(b, n_sites)`` from ``least`` to ``n_values - 1``.

    Raises:
        DataError: It is anything else.
    """
    what = f"{name} must hold values of {n_sites} sites"
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        found, way = (str(x.dtype), f"{name}.long()") if isinstance(x, Tensor) else _made_tensor(x, name)
        raise DataError(f"{what}: it has {found}, expected an int64 tensor (b, {n_sites}). Convert it with {way}.")
    if x.ndim != 2 or x.shape[1] != n_sites:
        raise DataError(f"{what}: it has shape {tuple(x.shape)}, expected (b, {n_sites}). Put samples along axis 0.")
    if x.numel():
        low, high = (int(v) for v in torch.aminmax(x))
        if low < least or high >= n_values:
            also = ", or -1 where a site is left open" if least < 0 else ""
            raise DataError(
                f"{what}: it has numbers from {low} to {high}, expected 0 to {n_values - 1}{also}. Number the values "
                "from 0, and give the model as many n_values as there are."
            )
    return x.long()


def _made_tensor(x: object, name: str) -> tuple[str, str]:
    """What something is called, and what makes a tensor of it."""
    return type(x).__name__, f"torch.as_tensor({name})"


def checked_labels(y: object, n_samples: int, n_classes: int) -> Tensor:
    """Class numbers ``(b,)`` int64.

    Raises:
        DataError: It is anything else.
    """
    is_whole = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex())
    if not isinstance(y, Tensor) or not is_whole or tuple(y.shape) != (n_samples,):
        found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(
            f"labels must be class numbers, one for each sample: y has {found}, expected int64 of shape "
            f"({n_samples},). Pass y.argmax(1) of labels that are one-hot."
        )
    if y.numel():
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= n_classes:
            raise DataError(
                f"labels must lie in their range: y has numbers from {low} to {high}, expected 0 to {n_classes - 1}. "
                "Number the classes from 0, and give the model as many n_classes as there are."
            )
    return y.long()


def check_sizes(**sizes: object) -> None:
    """Refuse sizes that are no whole numbers of 1 or more.

    Raises:
        RankError: The first of them, by its name.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise RankError(f"sizes must be whole numbers of 1 or more: {name} has {size!r}. Pass a larger one.")


def check_finite(x: Tensor, name: str = "x") -> None:
    """Refuse NaN and infinite numbers.

    Raises:
        DataError: There are some.
    """
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            f"{name} must be finite: it has NaN or Inf, expected numbers. Leave these samples out, or fill."
        )


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Refuse an option of no known name.

    Raises:
        KindError: It is none of ``choices``.
    """
    if value not in choices:
        raise KindError(f"{name} must be known: it has {value!r}, expected one of {', '.join(map(repr, choices))}.")


def seed_from(generator: torch.Generator | None) -> int:
    """A number for what takes a seed."""
    device = generator.device if generator is not None else None
    return int(torch.randint(2**40, (), generator=generator, device=device))


def adam(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    """The optimizer of models whose cores all learn at once."""
    return torch.optim.Adam(parameters, lr=lr)


def only_figures(history: History, names: Sequence[str], **renamed: str) -> History:
    """Some of the figures of a run, under other names where these are given."""
    kept = {renamed.get(name, name): history.columns[name] for name in names if name in history.columns}
    return History(kept, history.stop)


def held(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """``mantissa * 2**exponent``, one exponent for each row, kept finite where it would leave the range."""
    top = math.frexp(torch.finfo(mantissa.dtype).max)[1]
    largest = mantissa.detach().abs().amax(-1) if mantissa.numel() else mantissa.detach().sum(-1)
    return times_pow2(mantissa, torch.minimum(exponent, top - 1 - torch.frexp(largest).exponent))


def label_scores(core: Tensor, halves: Halves, row: Tensor) -> Tensor:
    """Scores ``(b, classes)`` where two walks meet a core with an axis of classes, ``(classes, r, n, s)``."""
    dtype = halves.left.dtype
    here = core.to(dtype).flatten(1, 2).movedim(0, 1).flatten(1)  # r n (classes s)
    seen = (outer(halves.left, row.to(dtype)) @ here).unflatten(-1, (core.shape[0], -1))
    return held((seen * halves.right.unsqueeze(1)).sum(-1), halves.exponent)


@torch.no_grad()
def settle_(cores: Sequence[nn.Parameter], degree: int, scores: Callable[[], Tensor]) -> None:
    """Bring scores that are far from 1 there, by one factor for all cores, so that a softmax can learn from them.

    A product over many positions of features that are mostly below 1, or above, has scores of no use: all alike, or
    all beyond the range.

    Args:
        cores: Parameters of which the scores are a product of some degree.
        degree: How often they occur in it.
        scores: Computes them for some examples.
    """
    for _ in range(_MOST_SETTLINGS):
        size = float(scores().double().abs().median())
        if not size > 0:
            factor = 2.0
        elif not size < torch.finfo(cores[0].dtype).max / 1e4:
            factor = 0.5
        else:
            factor = size ** (-1 / degree)
        if 0.1 <= size <= 10:
            return
        for core in cores:
            core.mul_(factor)
