"""How a Born machine learns: two sites at a time with ranks that choose themselves, or all cores at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments, Local
from tensortrain.cores.scaling import in_dtype, times_pow2, work_dtype
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.data.rows import RowBatches
from tensortrain.models.base import adam, only_figures, seed_from
from tensortrain.models.checks import check_cap, checked_sizes
from tensortrain.system.history import History
from tensortrain.train.loop import fit

if TYPE_CHECKING:
    from tensortrain.models.born import BornMachine

__all__ = ["BornFit"]


@dataclass
class BornFit:
    """One call of ``BornMachine.fit``, its arguments checked."""

    model: BornMachine
    x: Tensor
    validation: Tensor | None
    max_bond: int | None
    n_sweeps: int
    patience: int | None
    checkpoint: Path | None
    observer: Callable[[History], object] | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        (self.n_sweeps,) = checked_sizes(n_sweeps=self.n_sweeps)
        for name in ("max_bond", "patience"):
            if getattr(self, name) is not None:
                setattr(self, name, *checked_sizes(**{name: getattr(self, name)}))

    # -- all cores at once

    def by_adam(self, lr: float, batch_size: int | None) -> History:
        """Steps of Adam along the gradient of all cores."""
        history = History()

        def evaluate(model: nn.Module) -> dict[str, Any]:
            figures = self._figures()
            history.append(**figures)
            if self.observer is not None:
                self.observer(history)
            return figures

        check_cap(self.model.ranks, self.max_bond)
        batches = RowBatches(self.x, batch_size=batch_size, seed=seed_from(self.generator))
        done = fit(
            self.model,
            batches,
            loss=_nll_of_batch,
            epochs=self.n_sweeps,
            optimizer=adam,
            lr=lr,
            warmup=0.0,
            evaluate=evaluate,
            checkpoint=self.checkpoint,
            label="Born machine",
        )
        return only_figures(done.figures, ("nll", "validation_nll", "ranks"))

    def _figures(self) -> dict[str, Any]:
        with torch.no_grad():
            figures: dict[str, Any] = {"nll": float(self.model.nll(self.x)), "ranks": self.model.ranks}
            if self.validation is not None:
                figures["validation_nll"] = float(self.model.nll(self.validation))
        return figures

    # -- two sites at a time

    def by_sweeps(self, cutoff: float, n_steps: int, lr: float) -> History:
        """Sweeps of two sites."""
        model = self.model
        kept = model.cores[0].dtype
        cores = in_dtype([core.detach() for core in model.cores], work_dtype(kept))
        state = Gauged.of(cores)
        state.exponent = torch.zeros_like(state.exponent)  # laws have no scale, and that of long chains has no number
        dtype = state.cores[0].dtype
        rows = Data.of_values(self.x, [model._n_symbols] * model.n_sites, dtype)

        def update(local: Tensor, at: Local, k: int) -> Tensor:
            return _climbed(local, at, n_steps, lr)

        def figures(state: Gauged) -> dict[str, Any]:
            model._take([core.to(kept, copy=True) for core in state.cores])
            found = self._figures()
            del found["ranks"]
            return found

        if len(cores) == 1:
            cuts = [Cuts()] * self.n_sweeps
        else:
            cuts = [Cuts(cutoff, self.max_bond)] * self.n_sweeps
        with torch.no_grad():
            history = sweep(
                state,
                Environments(rows, state.cores),
                update,
                n_sites=min(2, len(cores)),
                schedule=cuts,
                figures=figures,
                stop=self._stop,
                observer=self.observer,
                checkpoint=self.checkpoint,
                inputs=(self.x,),
            )
        model._take([core.to(kept, copy=True) for core in state.cores])
        return history

    def _stop(self, history: History) -> str | None:
        if self.patience is None or self.validation is None:
            return None
        seen = history.validation_nll
        best = min(range(len(seen)), key=seen.__getitem__)
        return "validation" if len(seen) - 1 - best >= self.patience else None


def _climbed(local: Tensor, at: Local, n_steps: int, lr: float) -> Tensor:
    """A local tensor of norm 1 after some steps uphill in likelihood, all else being orthonormal.

    The gradient of ``ln |B|^2 - 2 mean ln |psi|`` at norm 1 is ``2 (B - g)``, with ``g`` the mean over the samples of
    what each of them sees, over the conjugate of its amplitude. Steps are short on purpose: with the best length on
    every line the first sweeps give all weight to a few strings, and what was cut from the bonds then does not return.
    """
    local = local / torch.linalg.vector_norm(local)
    for _ in range(n_steps):
        psi, exponent = at.parts(local)
        seen, power = at.adjoint_parts(1 / _away_from_zero(psi).conj(), -exponent)
        local = local + 2 * lr * (times_pow2(seen, power) / psi.shape[0] - local)
        local = local / torch.linalg.vector_norm(local)
    return local


def _away_from_zero(psi: Tensor) -> Tensor:
    """Amplitudes with the smallest ones lifted: a sample of amplitude zero would have an infinite gradient."""
    size = psi.abs()
    least = torch.finfo(size.dtype).eps * size.amax().clamp_min(torch.finfo(size.dtype).tiny)
    return torch.where(size > least, psi, least.to(psi.dtype))


def _nll_of_batch(model: Any, batch: Any) -> Tensor:
    found: Tensor = model.nll(batch[0])
    return found
