"""How far a model's outputs lie from the original's on batches that no fit has seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.system.processes import gathered, own_place, own_share, together
from tensortrain.train.batches import (
    device_of,
    map_tensors,
    n_examples,
    opened,
    read_batch,
    tensors_in,
    to_device,
)
from tensortrain.train.losses import output_distance, positions
from tensortrain.train.outputs import Output, judged_outputs, relative_distance, scale_of
from tensortrain.train.task import Task, as_logits

__all__ = ["Distances", "HeldOutputs", "Judge", "split_batches"]


_FEWEST_EXAMPLES, _MOST_PIECES = 4, 8  # of a piece; of a batch
_CLEARLY = 2.0  # standard errors


@dataclass(frozen=True)
class Judge:
    """How outputs are made and compared.

    Attributes:
        task: How the model is judged.
        output: Which outputs count, see ``judged_outputs``.
    """

    task: Task
    output: Output | None = None

    @property
    def in_nats(self) -> bool:
        """Whether the main output is judged by divergence."""
        return self.task.main is not None and (self.task.softmax or self.task.kind == "multi-label")

    def drawing(self, k: int) -> AbstractContextManager[Any]:
        """The same random numbers for every model on batch k, where a model draws some."""
        return _drawn_alike(k) if self.task.random else nullcontext()

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The outputs that count."""
        return judged_outputs(model, batch, self.output, with_labels=self.task.with_labels)[0]


@dataclass(frozen=True)
class Distances:
    """How far outputs lie from the original's, piece by piece of the batches.

    Attributes:
        judged: Divergence of class probabilities, relative squared distance of other outputs.
        plain: Relative squared distance of all outputs, logits among them.
        in_nats: The main output is judged by divergence.
    """

    judged: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()
    in_nats: bool = True

    @property
    def mean(self) -> float:
        """Of what they are judged by."""
        return _mean(self.judged)

    def is_nearer(self, other: Distances, *, gain: float, clearly: bool = False) -> bool:
        """Whether outputs lie nearer than others did, by more than a share.

        Of divergences a few examples that are uncertain make up most, and the others say little about what the logits
        have become: the gain must be clearly more than pieces differ in, and logits must come no farther.

        Args:
            clearly: Squares have to be clearly nearer too: of several fits one is always the nearest by chance.
        """
        if not math.isfinite(other.mean):
            return math.isfinite(self.mean)
        if not self.mean < (1 - gain) * other.mean:
            return False
        if self.in_nats and _mean(self.plain) > _mean(other.plain):
            return False
        if not (self.in_nats or clearly):
            return True
        gains = torch.tensor(other.judged, dtype=torch.float64) - torch.tensor(self.judged, dtype=torch.float64)
        return len(gains) < 2 or float(gains.mean()) > _CLEARLY * float(gains.std()) / math.sqrt(len(gains))


@dataclass
class HeldOutputs:
    """The original's outputs on batches held back, and how far others lie from them.

    Attributes:
        batches: These, in pieces where the model takes them.
        expected: The original's outputs, one entry a batch.
        shares: Of each output, how its spread in a batch compares to that in all of them: by it a relative distance
            counts, or a batch of examples that are nearly alike would outdo all others. Those that are missing are 1.
    """

    judge: Judge
    batches: Sequence[Any]
    expected: list[dict[str, Tensor]] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def of(cls, original: nn.Module, batches: Sequence[Any], judge: Judge) -> HeldOutputs:
        """Run the original once, on pieces of the batches, to see how far these differ.

        Whole batches are taken where it does not run on pieces.
        """
        pieces = [piece for batch in batches for piece in _pieces(batch)]
        try:
            with together():
                expected = _expected(original, pieces, judge)
                found = cls(judge, pieces, expected, _shares(original, pieces, expected, judge))
                distance = found.distance(original)
            if not math.isnan(distance):
                return found
        except Exception:  # what can be cut need not run in pieces
            pass
        expected = _expected(original, batches, judge)
        return cls(judge, batches, expected, _shares(original, batches, expected, judge))

    def distance(self, model: nn.Module) -> float:
        """Mean over the batches: divergence of class probabilities, relative squared distance of other outputs.

        Infinite where an output is no number any more.
        """
        return self.distances(model).mean

    @torch.no_grad()
    def distances(self, model: nn.Module) -> Distances:
        """The same batch by batch; of several processes those of all."""
        parts = gathered(self._own_distances(model))
        judged, plain = (tuple(itertools.chain.from_iterable(values)) for values in zip(*parts, strict=True))
        return Distances(judged, plain, self.judge.in_nats)

    def _own_distances(self, model: nn.Module) -> tuple[list[float], list[float]]:
        judged, plain = [], []
        for k, (batch, expected) in enumerate(zip(self.batches, self.expected, strict=True)):
            with self.judge.drawing(k):
                outputs, labels = self.judge.outputs(model, batch), read_batch(model, batch).labels
            if any(_is_broken(outputs[name], y) for name, y in expected.items() if name in outputs):
                return [math.inf], [math.inf]
            shares = self.shares[k]
            values = [
                shares.get(name, 1.0) * float(value)
                for name, y in expected.items()
                if (value := output_distance(self.judge.task, outputs, {name: y}, batch, labels)) is not None
            ]
            if values:
                judged.append(sum(values))
                plain.append(self._plain(outputs, expected, batch, labels))
        return judged, plain

    def _plain(self, outputs: dict[str, Tensor], expected: dict[str, Tensor], batch: Any, labels: Any) -> float:
        task, total = self.judge.task, 0.0
        for name, wanted in expected.items():
            if name in outputs and wanted.is_floating_point():
                mask = positions(task, name, wanted, batch, labels)
                pair = [outputs[name], wanted]
                if name == task.main and task.softmax:
                    pair = [as_logits(task, y) for y in pair]
                    mask = None if mask is None else mask.reshape(-1)
                pair = pair if mask is None else [y[mask] for y in pair]
                total += float(relative_distance(*pair)) if pair[1].numel() else 0.0
        return total


@contextmanager
def _drawn_alike(k: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(k)
        yield


def _expected(original: nn.Module, batches: Sequence[Any], judge: Judge) -> list[dict[str, Tensor]]:
    found = []
    for k, batch in enumerate(batches):
        with judge.drawing(k):
            found.append(judge.outputs(original, batch))
    return found


def _shares(
    original: nn.Module, batches: Sequence[Any], expected: Sequence[dict[str, Tensor]], judge: Judge
) -> list[dict[str, float]]:
    """Of outputs that are judged by relative distances, batch by batch."""
    found: list[dict[str, float]] = []
    for batch, outputs in zip(batches, expected, strict=True):
        labels = read_batch(original, batch).labels
        found.append({})
        for name, y in outputs.items():
            if y.is_floating_point() and not (name == judge.task.main and judge.in_nats):
                mask = positions(judge.task, name, y, batch, labels)
                found[-1][name] = float(scale_of(y if mask is None else y[mask]))
    totals: dict[str, list[float]] = {}
    for one in itertools.chain.from_iterable(gathered(found)):
        for name, value in one.items():
            totals.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in totals.items()}
    return [{name: value / means[name] for name, value in one.items()} for one in found]


def _pieces(batch: Any) -> list[Any]:
    """A batch cut along its first axis; whole where its tensors do not share it."""
    n, sizes = n_examples(batch), {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors_in(batch)}
    size = max(_FEWEST_EXAMPLES, -(-n // _MOST_PIECES))
    if sizes != {n} or n < 2 * size:
        return [batch]
    cuts = range(0, n - size + 1, size)  # the last one takes the rest
    ends = [*cuts[1:], n]
    return [map_tensors(partial(_between, begin=a, end=b), batch) for a, b in zip(cuts, ends, strict=True)]


def _between(x: Tensor, begin: int, end: int) -> Tensor:
    return x[begin:end]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _is_broken(y: Tensor, wanted: Tensor) -> bool:
    """Whether entries are no numbers that are some of the original's."""
    same = y.shape == wanted.shape
    return y.is_floating_point() and same and bool((torch.isfinite(wanted) & ~torch.isfinite(y)).any())


def split_batches(
    data: Iterable[Any], n_fit: int, n_held: int, model: nn.Module, *, n_seen: int
) -> tuple[list[Any], list[Any]]:
    """Batches to fit on, the first ones, and others held back; none of these where there are too few.

    Several processes deal out their batches one by one: each gets its own of what one process would have.

    Args:
        n_seen: How many of the first batches the plan has seen; those held back come after them where there are more.
    """
    device = device_of(model)
    with opened(data) as batches:
        n_read = own_share(max(n_fit, n_seen) + n_held)
        some = [batch for batch in itertools.islice(batches, n_read) if n_examples(batch)]
    n = sum(gathered(len(some)))
    first_held = n - n_held if n > n_held else n
    fitting = [batch for k, batch in enumerate(some) if own_place(k) < min(n_fit, first_held)]
    held = [batch for k, batch in enumerate(some) if own_place(k) >= first_held]
    return list(_moved(fitting, device)), list(_moved(held, device))


def _moved(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    return (to_device(batch, device) for batch in batches)
