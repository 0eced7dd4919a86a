"""Refit: layer by layer, the last factor fitted anew to what the original gave, on inputs as they come by now.

A layer of a compressed model is given other inputs than the original's, since those before it are not exact. Front to
back, every layer's last factor and bias are fitted by ridge regression from its inputs now to the original's outputs.
No labels, no backward pass.

Sources: anchored least squares as in AA-SVD, arXiv:2604.02119; for recurrent layers Prabhavalkar et al.,
arXiv:1603.08042, and its refinements by alternating roll-outs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensortrain.compression.stages.base import Work, stage
from tensortrain.compression.stages.held_outputs import Distances, HeldOutputs
from tensortrain.compression.stages.last_factor import (
    Equations,
    LastFactor,
    is_plain_layer,
    last_factor,
    why_no_last_factor,
)
from tensortrain.compression.stages.material import Material, material, running
from tensortrain.compression.stages.streams import Part, Streams
from tensortrain.compression.survey.layers import part_of
from tensortrain.compression.words import in_short, named
from tensortrain.nn import FactorizedLayer
from tensortrain.system.observer import Observer
from tensortrain.system.processes import first_of, gathered, own_place, together
from tensortrain.train.joined import same_numbers_

__all__ = ["GAIN", "Refit", "fittable_layers", "heard", "in_order", "refit_", "refitted", "wanted_output"]

_DAMPINGS = (1.0, 0.1, 1e-2, 1e-3)  # of the mean square of what a factor is given

GAIN = 1e-3  # of the distance: less is noise of the held-back batches


@dataclass(frozen=True)
class Refit:
    """Fit the last factor of every changed layer anew, on the compressed model's own inputs.

    A fit is kept only where it brings the model's outputs nearer to the original's on batches that were held back.

    Frozen layers, and those that ``include`` or ``exclude`` left out of the plan, stay as they are.

    Attributes:
        n_batches: Batches to fit on.
        n_held_back: Batches to judge by.
        dampings: How strongly a factor is drawn towards what it was; the best one is taken, layer by layer.
    """

    n_batches: int = 12
    n_held_back: int = 2
    dampings: tuple[float, ...] = _DAMPINGS


@dataclass
class Outcome:
    """What became of the layers.

    Attributes:
        kept, worse: Names of layers whose fit was kept, and of those where it did not help.
        passed_over: Layers by the reason for which they were not fitted.
        before, after: Distances of the outputs.
    """

    before: Distances
    after: Distances
    kept: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, name: str, reason: str) -> None:
        self.passed_over.setdefault(reason, []).append(name)

    def notes(self) -> list[str]:
        found = [f"Not refitted: {named(names)}, {reason}." for reason, names in self.passed_over.items()]
        if self.kept:
            found.append(
                f"{len(self.kept)} of {len(self.kept) + len(self.worse)} layers were refitted on the compressed "
                f"model's own inputs: on batches held back its outputs lie {self.after.mean:.3g} from the original's, "
                f"{self.before.mean:.3g} before."
            )
        return found


def fittable_layers(given: Material, *, changed: bool = False) -> list[str]:
    """Layers whose weight may be fitted: factorized ones, and dense ones with the outputs that they had.

    A dense layer that nothing was done to is among them: it can make up for what was lost before it.

    Args:
        changed: Only layers that something was done to.
    """
    old = dict(given.original.named_modules())
    return [
        name
        for name, module in given.small.named_modules()
        if (given.names is None or name in given.names)
        and (isinstance(module, FactorizedLayer) or _may_be_fitted(old.get(name), module, changed))
    ]


def _may_be_fitted(before: Any, now: nn.Module, changed: bool) -> bool:
    return is_plain_layer(now) and _gives_as_much(before, now) and not (changed and _same_shape(before, now))


def _same_shape(before: Any, now: Any) -> bool:
    return bool(before.weight.shape == now.weight.shape)


def _gives_as_much(before: Any, now: Any) -> bool:
    """Whether a layer has the outputs that it had: a maker of fewer units has not."""
    attributes = ("out_features", "out_channels", "nf")
    return any(getattr(before, a, None) == getattr(now, a, -1) for a in attributes)


def refit_(given: Material, settings: Refit, observer: Observer) -> Outcome:
    """Fit a compressed model's last factors in place; see :class:`Refit`.

    Cost: two forward passes over the batches, two of each block for every layer in it, and one over those held back
    for every layer.
    """
    original, small, batches, held = given.original, given.small, given.batches, given.held
    with running(original), running(small), torch.no_grad():
        before = held.distances(small)
        outcome = Outcome(before, before)
        streams = Streams.of(original, small, batches, held.judge.outputs)
        names = in_order(given, fittable_layers(given))
        observer.on_start("refit", len(names))
        try:
            for k, name in enumerate(names):
                _refit_one(streams, name, held, settings, outcome)
                observer.on_step(k + 1)
        finally:
            observer.on_end()
        same_numbers_(small)  # processors of several kinds solve one system to different last digits
    return outcome


def in_order(given: Material, names: Sequence[str]) -> list[str]:
    """The compressed model's layers that run on the first batch of all, by when they do."""
    seen: dict[str, None] = {}
    with ExitStack() as stack:
        for name in names:
            layer = given.small.get_submodule(name)
            hook = layer.register_forward_pre_hook(lambda m, a, name=name: seen.setdefault(name))
            stack.callback(hook.remove)
        for batch in given.batches[:1]:
            given.held.judge.outputs(given.small, batch)
    return first_of(list(seen))


def _refit_one(streams: Streams, name: str, held: HeldOutputs, settings: Refit, outcome: Outcome) -> None:
    layer, old = streams.small.get_submodule(name), part_of(streams.original, name)
    reason = why_no_last_factor(layer)
    if old is None:
        reason = "the original has no such layer"
    if isinstance(old, FactorizedLayer):
        reason = "the original's is factorized itself"
    if reason or old is None:
        outcome.pass_over(name, reason)
        return
    factor = last_factor(layer)
    if not all(tensor.requires_grad for tensor in factor.tensors()):
        outcome.pass_over(name, "their weights are frozen")
        return
    try:
        with together():
            fit = _equations(streams.part_of(name), old, layer, factor, streams.batches)
            change = None if fit is None else _best(fit, factor, settings)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        outcome.pass_over(name, f"its equations have no solution ({in_short(error)})")
        return
    if change is not None:
        _try(streams.small, name, factor, change, held, outcome)


def _equations(
    part: Part, old: nn.Module, layer: nn.Module, factor: LastFactor, batches: Sequence[Any]
) -> tuple[Equations, Equations] | None:
    """Of most batches, and of every fourth one to choose the damping by; None where the layer's calls do not match."""
    fitting, choosing = sums = Equations(), Equations()
    chooses, match = sum(gathered(len(batches))) > 3, True
    for k, batch in enumerate(batches):
        wanted, given = heard(old, lambda k=k: part.run_original(k)), heard(layer, lambda k=k: part.run_small(k))
        match = match and len(wanted) == len(given)
        mask = batch.get("attention_mask") if isinstance(batch, dict) or hasattr(batch, "get") else None
        is_fourth = chooses and own_place(k) % 4 == 3
        for before, now in zip(wanted, given, strict=True) if match else ():
            sums[is_fourth].add(factor, now.given, wanted_output(before, now), mask)
    if not all(gathered(match)):
        return None
    for each in sums:
        each.join_(next(layer.parameters()).device)
    return (fitting, choosing if choosing.n_rows else fitting) if fitting.n_rows else None


@dataclass
class Heard:
    """One call of a layer: what it was given and gave, and what its output was added to, if it was."""

    given: Tensor
    output: Tensor
    beside: Tensor | None = None


def wanted_output(old: Heard, now: Heard) -> Tensor:
    """The output that makes up for what the layers before lost: the sum with what it is added to is the original's."""
    if old.beside is None or now.beside is None or old.beside.shape != now.beside.shape:
        return old.output
    return old.output + (old.beside - now.beside)


class _Sums(TorchDispatchMode):
    """Watches for the sum that the last output of a layer goes into, as that of a residual connection."""

    def __init__(self, calls: list[Heard]) -> None:
        super().__init__()
        self.calls = calls
        self.last: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        last = self.last
        if last is not None and func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and len(args) == 2:
            for one, other in (args, args[::-1]):
                alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape == last.shape
                if alike and one.data_ptr() == last.data_ptr() and not (kwargs or {}):
                    self.calls[-1].beside, self.last = other.detach().clone(), None
                    break
        return func(*args, **(kwargs or {}))


def heard(layer: nn.Module, run: Any) -> list[Heard]:
    """What a layer is given and gives, call by call."""
    calls: list[Heard] = []
    sums = _Sums(calls)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            calls.append(Heard(x.detach().clone(), output.detach().clone()))  # the next layer may write to it
            sums.last = output

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        with sums:
            run()
    finally:
        handle.remove()
    return calls


def _best(fit: tuple[Equations, Equations], factor: LastFactor, settings: Refit) -> tuple[Tensor, Tensor | None] | None:
    """The factor, and bias, that is best on the batches to choose by; None where the old one is."""
    fitting, choosing = fit
    old, own = factor.matrix().double(), factor.bias()
    best, least = None, choosing.error(old, own)
    for damping in settings.dampings:
        matrix = fitting.solved(old, damping=damping, centred=own is not None)
        found = matrix, None if own is None else fitting.bias(matrix)
        error = choosing.error(*found)
        if error < least:
            best, least = found, error
    return best


def _try(
    small: nn.Module,
    name: str,
    factor: LastFactor,
    change: tuple[Tensor, Tensor | None],
    held: HeldOutputs,
    outcome: Outcome,
) -> None:
    """Put a fit in place; take it back where the outputs come no nearer."""
    kept = [tensor.detach().clone() for tensor in factor.tensors()]
    is_kept = False
    try:
        factor.write(*change)
        distances = held.distances(small)
        is_kept = distances.is_nearer(outcome.after, gain=GAIN)
    finally:  # also where it is interrupted
        if not is_kept:
            for tensor, value in zip(factor.tensors(), kept, strict=True):
                tensor.copy_(value)
    if is_kept:
        outcome.after = distances
    (outcome.kept if is_kept else outcome.worse).append(name)


@stage(Refit, outcome="refitted", needs_data=True)
def refitted(work: Work, settings: Refit) -> Work:
    """The work with its model's last factors fitted anew."""
    with material(work, settings.n_batches, settings.n_held_back) as found:
        if isinstance(found, str):
            return work.noted(f"Nothing was refitted: {found}")
        outcome = refit_(found, settings, work.options.observer)
    return work.noted(*outcome.notes())
