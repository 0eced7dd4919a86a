"""How far a model's outputs lie from the original's on batches that no fit has seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
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
        return cls(judge, batches, [judge.outputs(original, batch) for batch in batches])

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Mean over the batches: divergence of class probabilities, relative squared distance of other outputs."""
        found = []
        for batch, expected in zip(self.batches, self.expected, strict=True):
            outputs, labels = self.judge.outputs(model, batch), read_batch(model, batch).labels
            value = output_distance(self.judge.task, outputs, expected, batch, labels)
            if value is not None:
                found.append(float(value))
        return sum(found) / len(found) if found else float("nan")


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
