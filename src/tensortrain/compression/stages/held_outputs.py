"""How far a model's outputs lie from the original's on batches that no fit has seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.train.batches import device_of, n_examples, opened, read_batch, to_device
from tensortrain.train.losses import output_distance
from tensortrain.train.outputs import Output, judged_outputs
from tensortrain.train.task import Task

__all__ = ["HeldOutputs", "Judge", "split_batches"]


@dataclass(frozen=True)
class Judge:
    """How outputs are made and compared.

    Attributes:
        task: How the model is judged.
        output: Which outputs count, see ``judged_outputs``.
    """

    task: Task
    output: Output | None = None

    def drawing(self, k: int) -> AbstractContextManager[Any]:
        """The same random numbers for every model on batch k, where a model draws some."""
        return _drawn_alike(k) if self.task.random else nullcontext()

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The outputs that count."""
        return judged_outputs(model, batch, self.output, with_labels=self.task.with_labels)[0]


@dataclass
class HeldOutputs:
    """The original's outputs on batches held back, and how far others lie from them.

    Attributes:
        expected: The original's outputs, one entry a batch.
    """

    judge: Judge
    batches: Sequence[Any]
    expected: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def of(cls, original: nn.Module, batches: Sequence[Any], judge: Judge) -> HeldOutputs:
        """Run the original once."""
        found = []
        for k, batch in enumerate(batches):
            with judge.drawing(k):
                found.append(judge.outputs(original, batch))
        return cls(judge, batches, found)

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Mean over the batches: divergence of class probabilities, relative squared distance of other outputs.

        Infinite where an output is no number any more.
        """
        found = []
        for k, (batch, expected) in enumerate(zip(self.batches, self.expected, strict=True)):
            with self.judge.drawing(k):
                outputs, labels = self.judge.outputs(model, batch), read_batch(model, batch).labels
            if any(_is_broken(outputs[name], y) for name, y in expected.items() if name in outputs):
                return float("inf")
            value = output_distance(self.judge.task, outputs, expected, batch, labels)
            if value is not None:
                found.append(float(value))
        return sum(found) / len(found) if found else float("nan")


@contextmanager
def _drawn_alike(k: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(k)
        yield


def _is_broken(y: Tensor, wanted: Tensor) -> bool:
    """Whether entries are no numbers that are some of the original's."""
    same = y.shape == wanted.shape
    return y.is_floating_point() and same and bool((torch.isfinite(wanted) & ~torch.isfinite(y)).any())


def split_batches(
    data: Iterable[Any], n_fit: int, n_held: int, model: nn.Module, *, n_seen: int
) -> tuple[list[Any], list[Any]]:
    """Batches to fit on, the first ones, and others held back; none of these where there are too few.

    Args:
        n_seen: How many of the first batches the plan has seen; those held back come after them where there are more.
    """
    device = device_of(model)
    with opened(data) as batches:
        some = [batch for batch in itertools.islice(batches, max(n_fit, n_seen) + n_held) if n_examples(batch)]
    held = some[-n_held:] if len(some) > n_held else []
    return list(_moved(some[: min(n_fit, len(some) - len(held))], device)), list(_moved(held, device))


def _moved(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    return (to_device(batch, device) for batch in batches)
