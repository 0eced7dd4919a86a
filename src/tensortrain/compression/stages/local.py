"""Local healing: block by block towards the original's outputs, without labels and without a pass through the rest.

Front to back, the parameters of a block are trained so that its outputs, on inputs as the compressed blocks before it
give them, come near those of the original's block on the original's inputs.

Source: block refinement as in AA-SVD, arXiv:2604.02119.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.stages.base import Work, stage
from tensortrain.compression.stages.held_outputs import Distances, HeldOutputs
from tensortrain.compression.stages.material import Material, material, running
from tensortrain.compression.stages.refit import GAIN, fittable_layers, heard, in_order, wanted_output
from tensortrain.compression.stages.streams import Part, Streams
from tensortrain.compression.survey.layers import part_of
from tensortrain.errors import RankError
from tensortrain.nn import Linear
from tensortrain.system.checkpoint import RunFile, start_signature
from tensortrain.system.observer import Observer
from tensortrain.system.processes import first_of, gathered, n_processes, own_rank, sum_
from tensortrain.train.joined import same_numbers_
from tensortrain.train.masters import float32_masters
from tensortrain.train.outputs import relative_distance
from tensortrain.train.schedules import SCHEDULES

__all__ = ["HealLocally", "heal_locally_"]

_LOOKS = 4  # at the model's outputs while a block is trained
_WARMUP = 0.05
_Values = list[Tensor]
_Pair = tuple[Callable[[], Any], Tensor, Any]  # runs the block on a batch, output wanted, mask
_Gradients = list[Tensor | None]  # one entry a parameter


@dataclass(frozen=True)
class HealLocally:
    """Train every block of a compressed model towards the original's, front to back; ``heal="local"`` for short.

    A block's training is kept only where it brings the model's outputs clearly nearer to the original's on batches that
    were held back: by more than their pieces differ in. Blocks are the children of the list or sequence that
    holds most of the model, where each is given what the one before returned; of other models every factorized layer is
    trained by itself.

    Attributes:
        steps: Of Adam, for each block.
        lr: Largest rate; it falls to zero as a cosine does. Of a sentence encoder at 2x, 1e-3 spoiled the first block.
        n_batches: Batches to train on.
        n_held_back: Batches to judge by.
    """

    steps: int = 200
    lr: float = 3e-4
    n_batches: int = 12
    n_held_back: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "n_batches", "n_held_back"):
            if getattr(self, name) < 1:
                raise RankError(
                    f"local healing must have {name} of at least 1: found {getattr(self, name)}. Give more."
                )
        if not 0 < self.lr < math.inf:
            raise RankError(f"a rate must be positive: lr has {self.lr}, expected a number above 0. Pass 3e-4.")


@dataclass
class _Healing:
    """What one run needs all along."""

    streams: Streams
    held: HeldOutputs
    settings: HealLocally
    distances: Distances
    done: int = 0  # units
    n_kept: int = 0

    def unit(self, name: str) -> None:
        """Train one block or layer."""
        block = self.streams.small.get_submodule(name)
        pairs = _in_turns(self._pairs(name))
        params = _own_parameters(self.streams.small, block)
        if not pairs or not params:
            return
        before = self.distances
        with float32_masters(block) as low:
            best = [p.detach().clone() for p in params]
            for _ in self._trained(pairs, params, low):
                with _mixed(params, low):
                    found = self.held.distances(self.streams.small)
                if found.is_nearer(before, gain=GAIN, clearly=True) and not found.mean >= self.distances.mean:
                    self.distances, best = found, [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, value in zip(params, best, strict=True):
                    p.grad = None
                    p.copy_(value)
        self.n_kept += self.distances is not before

    def _pairs(self, name: str) -> list[list[_Pair]]:
        """How to run a block on every batch, and the outputs wanted."""
        part = self.streams.part_of(name)
        found: list[list[_Pair]] = []
        with torch.no_grad():
            for k, batch in enumerate(self.streams.batches):
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                if part.name == name:
                    pairs: list[_Pair] = [(partial(part.run_small, k), part.run_original(k), mask)]
                else:
                    pairs = [(run, wanted, mask) for run, wanted in self._calls(name, part, k, mask)]
                found.append([one for one in pairs if isinstance(one[1], Tensor) and one[1].is_floating_point()])
        return found

    def _calls(self, name: str, part: Part, k: int, mask: Any) -> list[tuple[Callable[[], Any], Tensor]]:
        """The same of one layer; calls that can be made at once are."""
        old, new = (net.get_submodule(name) for net in (self.streams.original, self.streams.small))
        before, now = heard(old, partial(part.run_original, k)), heard(new, partial(part.run_small, k))
        if len(before) != len(now):
            return []
        calls = [(here.given, wanted_output(then, here)) for then, here in zip(before, now, strict=True)]
        calls = calls if any(_fits(mask, y) for _, y in calls) else _at_once(new, calls)
        return [(partial(_on_copy, new, x), y) for x, y in calls]

    def _trained(
        self, pairs: Sequence[_Pair | None], params: Sequence[nn.Parameter], low: torch.dtype | None
    ) -> Iterator[int]:
        """Train, and stop a few times to be looked at."""
        steps = self.settings.steps
        optimizer = torch.optim.Adam(params, lr=self.settings.lr)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: SCHEDULES["cosine"](n, steps, _WARMUP))
        looks = {max(1, round(steps * (k + 1) / _LOOKS)) for k in range(_LOOKS)}
        for step in range(1, steps + 1):
            gradients = _sent_round(_gradients(pairs[step % len(pairs)], params, low), params)
            if gradients is None:
                return
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            rate.step()
            if step in looks:
                yield step


def _in_turns(own: Sequence[Sequence[_Pair]]) -> list[_Pair | None]:
    """The pairs of all processes in the order in which one would have them; None where it is another's turn.

    Args:
        own: Of this process, batch by batch.
    """
    found: list[_Pair | None] = []
    for k, counts in enumerate(itertools.zip_longest(*gathered([len(pairs) for pairs in own]), fillvalue=0)):
        for rank, n in enumerate(counts):
            found += own[k] if n and rank == own_rank() else [None] * n
    return found


def _gradients(pair: _Pair | None, params: Sequence[nn.Parameter], low: torch.dtype | None) -> _Gradients | None:
    """Of the distance on one pair; None where it has none that are numbers."""
    if pair is None:
        return None
    run, wanted, mask = pair
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        with _mixed(params, low):
            loss = _distance(run(), wanted, mask)
        if not loss.requires_grad:
            return None
        found = torch.autograd.grad(loss, params, allow_unused=True)
    finite = all(bool(torch.isfinite(g).all()) for g in (loss.detach(), *found) if g is not None)
    return list(found) if finite else None


def _sent_round(own: _Gradients | None, params: Sequence[nn.Parameter]) -> _Gradients | None:
    """The gradients of the process whose turn it is, for all."""
    if n_processes() == 1:
        return own
    known = [None] * len(params) if own is None else own
    told = torch.tensor([own is not None, *(gradient is not None for gradient in known)], dtype=torch.float32)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(params, known, strict=True)]
    found = [tensor.contiguous() for tensor in found]
    sum_([told, *found])
    is_known, *are_known = told.bool().tolist()
    return [g if known else None for g, known in zip(found, are_known, strict=True)] if is_known else None


def _mixed(params: Sequence[nn.Parameter], low: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to the dtype that a block's parameters have outside of training; entered anew for every step."""
    return nullcontext() if low is None else torch.autocast(params[0].device.type, dtype=low)


def _at_once(layer: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a linear map's calls as those of one.

    Those of a recurrent cell are a few rows each, alike from step to step: fits to one call after another ended
    farther off than they began.
    """
    sizes = {(x.shape[1:], y.shape[1:]) for x, y in calls}
    if len(calls) < 2 or len(sizes) > 1 or not isinstance(layer, (nn.Linear, Linear)) or calls[0][0].ndim < 2:
        return calls
    xs, ys = zip(*calls, strict=True)
    return [(torch.cat(xs), torch.cat(ys))]


def _on_copy(layer: nn.Module, x: Tensor) -> Any:
    return layer(x.clone())


def _fits(mask: Any, y: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.shape == y.shape[:-1]


def _distance(output: Tensor, wanted: Tensor, mask: Any) -> Tensor:
    if _fits(mask, output):
        mask = mask.to(output.device).bool()
        output, wanted = output[mask], wanted[mask]
    return relative_distance(output, wanted)


def _own_parameters(model: nn.Module, block: nn.Module) -> list[nn.Parameter]:
    """Parameters of a block that nothing outside of it shares, and that may be trained."""
    inside = {id(module) for module in block.modules()}
    others = {id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    return [p for p in block.parameters() if p.requires_grad and id(p) not in others]


def _units(given: Material, streams: Streams) -> list[str]:
    """Blocks with a factorized or narrowed layer in them, and such layers outside of blocks, by when they run."""
    names = in_order(given, fittable_layers(given, changed=True))
    found: dict[str, None] = {}
    for name in names:
        block = next((b for b in streams.chain if f"{name}.".startswith(f"{b}.")), None)
        outside = block is None and part_of(streams.original, name) is not None
        if block is not None or outside:
            found.setdefault(block or name)
    return list(found)


def heal_locally_(
    given: Material, settings: HealLocally, observer: Observer, checkpoint: Path | None = None
) -> tuple[float, float, int, int]:
    """Train the blocks of a compressed model in place; see :class:`HealLocally`.

    Args:
        checkpoint: File to go on from after a kill: it is written after every block.

    Returns:
        Distance of the outputs before and after, blocks that were kept, blocks in all.

    Cost: about three passes through a block for every step, and four passes over the batches held back.
    """
    file = _file(given, settings, checkpoint)
    with running(given.original), running(given.small), torch.no_grad():
        before = given.held.distance(given.small)
        done, n_kept = _resumed(given.small, file)
        streams = Streams.of(given.original, given.small, given.batches, given.held.judge.outputs)
        healing = _Healing(streams, given.held, settings, given.held.distances(given.small), done, n_kept)
        names = _units(given, streams)
        observer.on_start("heal locally", len(names))
        try:
            for k, name in enumerate(names):
                if k >= healing.done:
                    healing.unit(name)
                    healing.done = k + 1
                    _write(given.small, file, healing)
                observer.on_step(k + 1, distance=healing.distances.mean)
        finally:
            observer.on_end()
    return before, healing.distances.mean, healing.n_kept, len(names)


def _file(given: Material, settings: HealLocally, checkpoint: Path | None) -> RunFile | None:
    if checkpoint is None:
        return None
    return RunFile(checkpoint, 0.0, {"local healing": settings}, start_signature(given.small.parameters()))


def _resumed(model: nn.Module, file: RunFile | None) -> tuple[int, int]:
    """Blocks that an earlier run has done, whose numbers are taken over; the first process reads them for all."""
    content = file.read() if file is not None and own_rank() == 0 and file.path.exists() else None
    if content is not None:
        with torch.no_grad():
            for p, value in zip(model.parameters(), content["parameters"], strict=True):
                p.copy_(value)
    same_numbers_(model)
    done, kept = first_of((0, 0) if content is None else (content["done"], content["kept"]))
    return done, kept


def _write(model: nn.Module, file: RunFile | None, healing: _Healing) -> None:
    if file is not None and own_rank() == 0:
        kept = [p.detach() for p in model.parameters()]
        file.write({"parameters": kept, "done": healing.done, "kept": healing.n_kept})


@stage(HealLocally, outcome="healed locally", needs_data=True, resumes=True)
def _heal_locally(work: Work, settings: HealLocally) -> Work:
    with material(work, settings.n_batches, settings.n_held_back) as found:
        if isinstance(found, str):
            return work.noted(f"Nothing was healed: {found}")
        before, after, n_kept, n = heal_locally_(found, settings, work.options.observer, work.checkpoint)
    frozen = "" if any(p.requires_grad for p in work.model.parameters()) else " All parameters are frozen."
    return work.noted(
        f"Local healing was kept for {n_kept} of {n} blocks: on batches held back the outputs lie {after:.3g} from "
        f"the original's, {before:.3g} before.{frozen}"
    )
