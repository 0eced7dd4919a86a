"""In what metric changes of a model's outputs are measured: nats for class probabilities, squares for values.

A change ``d`` of logits costs ``1/2 d^T (diag(p) - p p^T) d`` nats, ``p`` their probabilities: classes that are never
likely count for nothing. Its matrix is the Fisher information, which needs no labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.train.batches import read_batch
from tensortrain.train.losses import positions, unmasked
from tensortrain.train.outputs import CONSTANT, counted, relative_distance, spread
from tensortrain.train.task import Task, as_logits

__all__ = ["Metric"]

_AT_ONCE = 2**21  # logits that noise is drawn for
_DOUBLES_AT_ONCE = 2**18  # logits that are made doubles of


@dataclass(frozen=True)
class Metric:
    """Of each output of a model, the metric that its changes are measured in.

    Attributes:
        task: How the model is judged; squared changes of all outputs where that is not known.
    """

    model: nn.Module
    task: Task | None = None

    def in_nats(self, name: str) -> bool:
        """Whether an output holds class probabilities: energies of a change are twice the divergence it makes."""
        task = self.task
        return task is not None and name == task.main and (task.softmax or task.kind == "multi-label")

    def spread(self, name: str, y: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Sums over a batch, in the metric: squares about the mean, and squares."""
        y = y.detach()
        if not self.in_nats(name):
            return spread(self._values(name, y, batch))
        logits = self._logits(name, y, batch)
        (total,) = _summed([some.sum(dim=0)] for some in _in_double(logits))
        mean = total / len(logits)
        about, whole = _summed(self._energies(some, some - mean, some) for some in _in_double(logits))
        return about, whole

    def share(self, name: str, y: Tensor, wanted: Tensor, batch: Any) -> float:
        """What a changed output spoils of the original's, in the metric that plans predict it in."""
        if not self.in_nats(name):
            return float(relative_distance(self._values(name, y, batch), self._values(name, wanted, batch)))
        about, square = self.spread(name, wanted, batch)
        scale = about if about > CONSTANT * square else square
        pairs = (_in_double(self._logits(name, one, batch)) for one in (wanted, y))
        (energy,) = _summed(self._energies(some, changed - some) for some, changed in zip(*pairs, strict=True))
        return float(energy / scale)

    def along(self, name: str, y: Tensor, batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The places of an output that count, and a random direction of theirs whose second moment is the metric."""
        if not self.in_nats(name):
            values = self._values(name, y, batch)
            noise = torch.randn(values.shape, generator=generator).to(values)
            return values, torch.where(counted(values), noise, 0)
        logits = self._logits(name, y, batch)
        along = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for some, place in zip(_in_parts(logits.detach()), _in_parts(along), strict=True):
            noise = torch.randn(some.shape, generator=generator).to(some)
            place.copy_(self._direction(some, noise))
        return logits, along

    def drawn_sizes(self, name: str, y: Tensor, batch: Any) -> tuple[tuple[int, ...], ...]:
        """Sizes of the random numbers that ``along`` draws for an output, in their order."""
        if not self.in_nats(name):
            return (tuple(self._values(name, y, batch).shape),)
        return tuple(tuple(some.shape) for some in _in_parts(self._logits(name, y, batch)))

    def _direction(self, logits: Tensor, noise: Tensor) -> Tensor:
        """A draw with the second moment of ``p - onehot(y)``, ``y ~ p``.

        Normal instead of one class drawn: a confident model hardly ever draws the classes whose gradients count.
        """
        assert self.task is not None
        if not self.task.softmax:
            p = torch.sigmoid(logits)
            return (p * (1 - p)).sqrt() * noise
        p = torch.softmax(logits, dim=-1)
        part = p.sqrt() * noise
        return part - p * part.sum(dim=-1, keepdim=True)

    def _energies(self, logits: Tensor, *changes: Tensor) -> list[Tensor]:
        """Sums of ``d^T (diag(p) - p p^T) d`` over the rows."""
        assert self.task is not None
        if not self.task.softmax:
            p = torch.sigmoid(logits)
            return [(p * (1 - p) * change.square()).sum() for change in changes]
        p = torch.softmax(logits, dim=-1)
        about = (change - (p * change).sum(dim=-1, keepdim=True) for change in changes)
        return [(p * one.square()).sum() for one in about]

    def _logits(self, name: str, y: Tensor, batch: Any) -> Tensor:
        """Rows of logits at the places that count, ``(n, c)``."""
        assert self.task is not None
        if not self.task.softmax:
            y = torch.logit(y.clamp(1e-6, 1 - 1e-6)) if self.task.probabilities else y
            return unmasked(y.reshape(-1, y.shape[-1] if y.ndim else 1), counted(y).reshape(-1, y.shape[-1] or 1))
        rows = as_logits(self.task, y)
        rows = unmasked(rows, counted(rows))
        mask = self._mask(name, y, batch)
        return rows if mask is None else _some_rows(rows, mask.reshape(-1))

    def _values(self, name: str, y: Tensor, batch: Any) -> Tensor:
        """The places of an output that count; of an embedding, its direction alone."""
        if self.task is not None and self.task.kind == "embed" and name == self.task.main and y.ndim > 1:
            y = F.normalize(y, dim=-1)
        mask = self._mask(name, y, batch)
        return y if mask is None else y[mask]

    def _mask(self, name: str, y: Tensor, batch: Any) -> Tensor | None:
        if self.task is None:
            return None
        return positions(self.task, name, y, batch, read_batch(self.model, batch).labels)


def _some_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows that count; of one text that goes on to its end they are no copy, which would be large."""
    places = mask.nonzero().flatten()
    n = len(places)
    if n and int(places[-1] - places[0]) == n - 1:
        return rows.narrow(0, int(places[0]), n)
    return rows[places]


def _in_parts(logits: Tensor, n: int = _AT_ONCE) -> tuple[Tensor, ...]:
    """Rows of logits, some at a time: of a large vocabulary all of them would be larger than the model's layers."""
    return logits.split(max(1, n // max(1, logits.shape[-1])))


def _in_double(logits: Tensor) -> Iterator[Tensor]:
    return (some.double() for some in _in_parts(logits, _DOUBLES_AT_ONCE))


def _summed(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(column).sum(dim=0) for column in zip(*parts, strict=True)]
