"""What smaller forms of the layers change of the output, with all positions of an example taken together.

Second moments take the positions of an example for independent. Where a model means over them, an error that is alike
at all of them adds up, and of that they see nothing: behind the last layer of a sentence encoder a hundredth. So the
errors ``e_p`` that a form makes at the positions p of an example are taken on the way forward, and on the way backward
multiplied with the gradients there: ``E[(sum_p g_p e_p)^2]`` is what the output changes by, as far as it is linear. One
pass serves the forms of all layers, of which none is put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.output_weights import (
    Judge,
    Take,
    along_random_directions,
    frozen,
    go_backward,
)
from tensortrain.compression.survey.summaries import is_summarized
from tensortrain.compression.words import in_short
from tensortrain.errors import TTError
from tensortrain.system.observer import Observer
from tensortrain.system.parking import activations_parked, let_go
from tensortrain.system.processes import gathered, n_processes, own_rank
from tensortrain.train.batches import n_examples
from tensortrain.train.preserve import preserved

__all__ = ["Trial", "losses_of"]

_SAMPLES = 128  # examples times random directions, at least: a mean of their squares is known to an eighth
_MOST_DIRECTIONS = 4
# Squares of normal numbers are as uneven as if a third of them were alike and the others nothing. Of a classifier that
# is certain of nearly all examples a few decide, and two batches do not tell which.
_LEAST_SAMPLES = 12


@dataclass(frozen=True)
class Trial:
    """A form of a layer that is tried.

    Attributes:
        change: What its weight has more than that of the layer, ``(outputs, inputs)`` in torch's order.
        shift: What it adds to every output.
    """

    layer: FoundLayer
    change: Tensor
    shift: Tensor | None = None

    def error(self, x: Any) -> Tensor | None:
        """What the layer's output changes by; None of a kind of layer or input that this is not known of."""
        apply = _KINDS.get(self.layer.weight.kind)
        if apply is None or not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
            return None
        found = apply(self, x)
        let_go(self.change)
        return found

    def _of_linear(self, x: Tensor) -> Tensor | None:
        if not x.is_floating_point():
            return None
        return F.linear(x, self.change.to(x.dtype), None if self.shift is None else self.shift.to(x.dtype))

    def _of_conv(self, x: Tensor) -> Tensor | None:
        conv: Any = self.layer.module
        if not is_summarized(self.layer):
            return None
        change = self.change.reshape(conv.weight.shape).to(x.dtype)
        found: Tensor = conv._conv_forward(x, change, None if self.shift is None else self.shift.to(x.dtype))
        return found

    def _of_embedding(self, x: Tensor) -> Tensor | None:
        return F.embedding(x, self.change.T) if type(self.layer.module) is nn.Embedding else None


_KINDS = {"linear": Trial._of_linear, "conv": Trial._of_conv, "embedding": Trial._of_embedding}


@dataclass
class _Sum:
    """Of one trial: what the errors of a batch add up to, example by example, and the squares of those before."""

    by_example: Tensor | None = None
    squares: float = 0.0
    fourths: float = 0.0

    def add(self, error: Tensor, axis: int, n: int, gradient: Tensor) -> None:
        """Take in the gradients of one call."""
        products = (gradient * error).float().nan_to_num(0.0, 0.0, 0.0).sum(dim=axis)
        more = _by_example(products, n)
        known = self.by_example
        if known is None:
            self.by_example = more
        elif len(known) == len(more):
            self.by_example = known + more
        else:  # where one call tells examples apart and another does not
            self.by_example = (known.sum() + more.sum())[None]

    def settle(self) -> None:
        if self.by_example is not None:
            squares = self.by_example.double().square()
            self.squares += float(squares.sum())
            self.fourths += float(squares.square().sum())
        self.by_example = None


def _by_example(products: Tensor, n: int) -> Tensor:
    """Sums over the positions of each of n examples, or of all of them where no axis tells them apart.

    Directions are drawn for each example by itself, so that the square of the sum over all is as large in the mean.
    """
    for axis, size in enumerate(products.shape):
        if size == n:
            return products.movedim(axis, 0).reshape(n, -1).sum(dim=1)
    if n and products.ndim and products.shape[0] % n == 0:
        return products.reshape(n, -1).sum(dim=1)
    return products.sum()[None]


@dataclass
class _Passes:
    """Passes forward and backward with the errors of all trials."""

    trials: Sequence[Trial]
    sums: list[_Sum] = field(default_factory=list)
    n: int = 0

    def taken(self, layer: FoundLayer, x: Any, result: Tensor) -> Take | None:
        """What the gradients of a call of a layer are handed to."""
        axis = result.ndim - (1 + len(layer.weight.kernel) if layer.weight.kind == "conv" else 1)
        with torch.no_grad():
            pairs = [
                (total, trial.error(x))
                for total, trial in zip(self.sums, self.trials, strict=True)
                if trial.layer is layer
            ]
        takes = [
            partial(total.add, error, axis, self.n)
            for total, error in pairs
            if error is not None and error.shape == result.shape
        ]
        if not takes:
            return None

        def take(gradient: Tensor) -> None:
            for one in takes:
                one(gradient.detach())

        return take

    def settle(self) -> None:
        for total in self.sums:
            total.settle()


def losses_of(
    model: nn.Module, trials: Sequence[Trial], found: Calibration, judge: Judge, metric: Metric, observer: Observer
) -> list[float | None]:
    """Share of the output that each form spoils where it is the only one; None of those that could not be told, or not
    well, since a few examples decide.

    Nothing of the model is changed. Where it fails on these batches, ``found.notes`` takes in why.

    Args:
        found: Of the model, with gradients. Batches that it held back are taken, those it was made from where there
            are none.
        judge: Gives the outputs that count.

    Cost: one pass forward and some backward over those batches.
    """
    batches = found.held
    passes = _Passes(trials, [_Sum() for _ in trials])
    layers = list({id(trial.layer): trial.layer for trial in trials}.values())
    count, failed = 0, ""
    observer.on_start("errors", len(batches))
    try:
        with preserved(model):
            model.eval()
            for k, batch in enumerate(batches):
                passes.n = n_examples(batch)
                times = min(_MOST_DIRECTIONS, -(-_SAMPLES // (passes.n * len(batches))))
                # Of several processes each draws for its own batches what one would have drawn for them.
                generator = torch.Generator().manual_seed(1 + own_rank() + k * n_processes())

                def along(outputs: Any, batch: Any, generator: torch.Generator = generator) -> Any:
                    passes.settle()
                    return along_random_directions(metric, found.output_shares, generator, outputs, batch)

                with frozen(model), activations_parked(model.parameters()):
                    count += times * go_backward(layers, batch, judge, along, passes.taken, times=times)
                passes.settle()
                found.tidy()
                observer.on_step(k + 1)
    except Exception as error:  # what runs on the batches of the calibration need not on these
        if _is_our_fault(error):
            raise
        failed = f"No forms of layers were tried: the model fails on the batches held back ({in_short(error)})."
    finally:
        observer.on_end()
    parts = gathered((failed, count, [(total.squares, total.fourths) for total in passes.sums]))
    count = sum(n for _, n, _ in parts)
    found.notes += [text for text, _, _ in parts if text][:1]
    if any(text for text, _, _ in parts) or not count:
        return [None] * len(trials)
    columns = zip(*(some for _, _, some in parts), strict=True)
    sums = [(sum(one for one, _ in column), sum(other for _, other in column)) for column in columns]
    return [
        squares / count / found.output_scale if squares**2 > _LEAST_SAMPLES * fourths else None
        for squares, fourths in sums
    ]


def _is_our_fault(error: Exception) -> bool:
    """Whether code of this package went wrong by itself: not the model, nor data that it refuses, nor a full memory."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    is_refused = isinstance(error, (TTError, MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)
    return name.startswith(__package__.partition(".")[0] + ".compression") and not is_refused
