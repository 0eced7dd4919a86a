"""Healing may not hurt: a model is looked at on batches that it is not trained on, and its best state is kept."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.system.processes import gathered, together
from tensortrain.system.seeds import seed_all
from tensortrain.train.batches import device_of, map_tensors, n_examples, to_device
from tensortrain.train.held_back import has_rows, rows_of
from tensortrain.train.losses import Loss
from tensortrain.train.preserve import preserved

__all__ = ["Guard", "Measured"]

_LOOKS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the run after which the model is looked at
_RISES = 3  # looks in a row, from the start, each farther off than the one before
_EARLIEST = 10  # steps: before, nothing can be said
_LOST = 1.0  # loss of outputs that tell nothing about the original's
_FAR = 1.2  # times the loss at the start: less is no reason to give up
_PIECES, _FEW_ROWS = 8, 4  # what is measured on comes in so many pieces, of no fewer rows


@dataclass(frozen=True)
class Measured:
    """A loss on held-back data: one value for each piece of it, and the pieces' sizes."""

    values: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Over all examples; infinite where the model gives no numbers."""
        total = sum(n * value for value, n in zip(self.values, self.counts, strict=True))
        return total / sum(self.counts) if sum(self.counts) and math.isfinite(total) else math.inf

    def lower_than(self, other: Measured) -> bool:
        """Whether these are smaller by more than the noise: the standard error of the differences between pairs.

        Of fewer than four pieces nothing is known but that a mean of n squares is good to about 1/sqrt(n).
        """
        if not math.isfinite(self.mean):
            return False
        if len(self.values) != len(other.values) or len(self.values) < 4:
            return self.mean < other.mean * (1 - other.noise)
        gains = [n * (b - a) for a, b, n in zip(self.values, other.values, self.counts, strict=True)]
        return statistics.fmean(gains) > statistics.stdev(gains) / math.sqrt(len(gains))

    @property
    def noise(self) -> float:
        """Share of the mean that may be chance."""
        return min(0.25, 1 / math.sqrt(max(1, sum(self.counts))))


class Guard:
    """Watches a healing as ``fit``'s monitor.

    Args:
        model: As it was cut.
        batches: To measure on.
        loss: ``(model, batch) -> how far the outputs are from the original's``; None where nothing counts.
        held: The batches are not trained on.
        split: Their rows may be parted.
        grad: The loss takes gradients itself.

    Attributes:
        start, best: Of the cut model, and the least seen.
        seen: Means on the way.
        notes: Sentences for the report.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loss: Loss,
        *,
        held: bool,
        split: bool = True,
        grad: bool = False,
    ) -> None:
        self.loss, self.where = loss, "held-back data" if held else "the first batches"
        device = device_of(model)
        self.grad = grad
        self.pieces = [to_device(batch, device) for batch in batches]
        if split:
            self.pieces = [piece for batch in self.pieces for piece in _pieces(batch, len(batches))]
        self.seen: list[float] = []
        self.notes: list[str] = []
        self.start = self.best = self.measure(model)
        self.first_state = self.best_state = _state_of(model)

    def begin(self, model: nn.Module) -> None:
        """The batch norms have new statistics: the better ones are the start."""
        now = self.measure(model)
        if now.lower_than(self.start):
            self.start = self.best = now
            self.first_state = self.best_state = _state_of(model)
        else:
            _put_back(model, self.first_state)

    def measure(self, model: nn.Module) -> Measured:
        """The loss on all pieces; those on which nothing counts have no part.

        Of several processes, each with data of its own, all get that of all, or none does.
        """
        with together():
            parts = gathered(self._own(model))
        return Measured(*(tuple(itertools.chain(*column)) for column in zip(*parts, strict=True)))

    def _own(self, model: nn.Module) -> tuple[list[float], list[int]]:
        values, counts = list[float](), list[int]()
        with preserved(model), torch.set_grad_enabled(self.grad):
            model.eval()
            for piece in self.pieces:
                seed_all(0)  # models that draw noise draw the same
                value = self.loss(model, piece)
                if value is not None and n_examples(piece):
                    values.append(float(value.detach()))
                    counts.append(n_examples(piece))
        return values, counts

    def _measured(self, model: nn.Module) -> Measured:
        """At the end: a measure that fails by now, for whatever reason, decides for what was measured before."""
        try:
            return self.measure(model)
        except Exception:
            return Measured((), ())

    def due(self, step: int, total: int) -> bool:
        return step in {max(1, round(share * total)) for share in _LOOKS}

    def look(self, model: nn.Module, step: int) -> bool:
        now = self.measure(model)
        self.seen.append(now.mean)
        if now.mean < self.best.mean:
            self.best, self.best_state = now, _state_of(model)
        if not self._is_lost(step):
            return False
        self.notes.append(
            f"Healing stopped after {step} steps: the outputs on {self.where} went away from the original's from the "
            f"start ({self.start.mean:.3g}, then {', '.join(f'{value:.3g}' for value in self.seen)}). Lower lr."
        )
        return True

    def _is_lost(self, step: int) -> bool:
        if step < _EARLIEST:
            return False
        rises = all(later > earlier for earlier, later in itertools.pairwise([self.start.mean, *self.seen]))
        far = all(value > max(_LOST, 10 * self.start.mean) for value in self.seen)
        return far or (len(self.seen) >= _RISES and rises and self.seen[-1] > _FAR * self.start.mean)

    def failed(self, error: BaseException, step: int) -> None:
        reason = " ".join(str(error).split())
        how = "by Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {reason:.200}"
        self.notes.append(f"Healing ended early, after {step} steps ({how}). The best state so far is kept.")

    def unsaved(self, error: Exception, step: int) -> None:
        reason = " ".join(str(error).split())
        self.notes.append(f"The checkpoint could not be written at step {step} ({reason:.200}); healing went on.")

    def finish(self, model: nn.Module) -> None:
        """Put the best state back where the last one is not it; called with the weights in their own dtype."""
        if not math.isfinite(self.start.mean):
            return
        now = self._measured(model)
        if now.mean <= self.best.mean * (1 + now.noise) and now.lower_than(self.start):
            return
        _put_back(model, self.best_state)
        # rounding to a low dtype may cost all that was gained
        if self.best.lower_than(self.start) and self._measured(model).lower_than(self.start):
            return
        _put_back(model, self.first_state)
        self.notes.append(
            f"Healing brought the outputs no nearer to the original's on {self.where}, but for noise "
            f"({self.start.mean:.3g} as it was cut, {now.mean:.3g} after): the model stays as it was cut."
        )

    def state(self) -> dict[str, Any]:
        return {
            "start": asdict(self.start),
            "best": asdict(self.best),
            **{name: copy.copy(getattr(self, name)) for name in ("seen", "notes", "best_state", "first_state")},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state()) or state["first_state"].keys() != self.first_state.keys():
            raise KeyError("monitor")
        for name, value in state.items():
            setattr(self, name, Measured(**value) if name in ("start", "best") else value)


def _pieces(batch: Any, n_batches: int) -> list[Any]:
    """A batch in parts, so that there are some to compare: one figure has no noise to be seen."""
    n = n_examples(batch)
    parts = min(-(-_PIECES // n_batches), n // _FEW_ROWS) if has_rows(batch) else 1
    if parts <= 1:
        return [batch]
    edges = [round(k * n / parts) for k in range(parts + 1)]
    return [map_tensors(partial(rows_of, start=a, stop=b), batch) for a, b in itertools.pairwise(edges)]


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: trainable parameters and buffers."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.copy_(state[name])
