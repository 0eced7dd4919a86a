"""One driver for every algorithm that improves a chain one or two sites at a time.

An algorithm brings ``update(local, at, k) -> local``: a solve, a few steps of Lanczos, an exponential, a step along a
gradient. The driver brings all else: the center that moves, environments, truncation, schedules, the history, and
files by which a run that was killed goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.split import Split, split
from tensortrain.cores.unfold import absorb_left, absorb_right
from tensortrain.errors import DTypeError, NonFiniteError, RankError, ShapeError
from tensortrain.system.checkpoint import RunFile, start_signature, unusable
from tensortrain.system.history import History

__all__ = ["Cuts", "Moving", "sweep"]

Update = Callable[[Tensor, Any, int], Tensor]


class Moving(Protocol):
    """What moves with the center: ``Environments``, several of them ``Together``, or an algorithm's own."""

    def at(self, k: int, n_sites: int = 1) -> Any:
        """What the sites ``k .. k + n_sites - 1`` meet, as it is handed to ``update``."""
        ...

    def advance(self, k: int, core: Tensor) -> None:
        """Core k has changed."""
        ...


@dataclass(frozen=True)
class Cuts:
    """How one sweep splits local tensors: see ``split``.

    Attributes:
        tol: Largest root-sum-square of what one split cuts, a share of the norm.
        max_rank: Cap on every rank; it goes before ``tol``.
    """

    tol: float = 0.0
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if not self.tol >= 0 or (self.max_rank is not None and self.max_rank < 1):
            raise RankError(
                f"cuts must keep something: they have {self}, expected tol of 0 or more and max_rank of 1 or more. "
                "Leave max_rank out for no cap."
            )


def sweep(
    state: Gauged,
    environments: Moving,
    update: Update,
    *,
    n_sites: int = 2,
    schedule: Sequence[Cuts],
    back: Update | None = None,
    enrich: Callable[[Tensor, int, bool], Tensor | None] | None = None,
    metric: Callable[[Any, int], tuple[Tensor, Tensor]] | None = None,
    figures: Callable[[Gauged], Mapping[str, Any]] | None = None,
    stop: Callable[[History], str | None] | None = None,
    observer: Callable[[History], object] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 20.0,
    inputs: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
) -> History:
    """Sweep there and back over a chain, in place, as often as the schedule says.

    A sweep brings ``update`` the sites ``0 .. n_sites - 1``, moves by one to the right end, and comes back; its last
    places are visited in both directions. With ``checkpoint`` the run can be killed at any site: the same call on the
    same starting state goes on from the file, and ends with the same bits.

    Args:
        state: The chain; its center comes to core 0, and stays there after every sweep.
        environments: Made from ``state.cores``; ``advance`` tells them of every core that changes.
        update: From the local tensor, with all powers of two in it, ``(labels .., batch .., r, n_k, .., s)``, what
            ``environments.at(k, n_sites)`` gives, and k, to another one.
        n_sites: 1 or 2.
        schedule: How each sweep cuts; its length is the number of sweeps.
        back: Like ``update``, for what is left of a split and goes on: ``n_sites - 1`` sites, for one site the matrix
            at bond k. It is not called where the direction turns. (A time step goes back there.)
        enrich: From the local tensor after its update, k and the direction (``True``: to the right) to more columns
            for the basis, as ``split`` takes them, or ``None``.
        metric: From what ``environments.at(k, n_sites)`` gives and k to the metric by which ``split`` cuts.
        figures: More figures for the history after each sweep; it has ``ranks`` and ``largest_cut`` already.
        stop: Called with the history after each sweep: why to stop, or ``None`` to go on.
        observer: Called with the history after each sweep. What it raises passes through, and the file is written
            first, so that the run can go on.
        checkpoint: File to keep the state in.
        checkpoint_every_s: Least time between two writes, in seconds; 0 writes after every site.
        inputs: What the answer depends on beside the start (cores of a target or a matrix, data): a file of other
            inputs is refused.
        generator: One that ``update`` draws from; its state goes into the file.

    Returns:
        History: an entry for each sweep; ``stop`` tells why it ended: what ``stop`` said, or ``"max_sweeps"``.

    Raises:
        CheckpointError: The file is damaged, or of another start, other inputs, or other cuts so far.
        NonFiniteError, ShapeError, DTypeError: ``update`` gave NaN, infinite numbers, another shape or dtype; the state
            and the file are those before it.

    Source of the idea: ITensorMPS.jl, ``alternating_update``: one driver for eigenvectors, time steps, solves and fits.
    """
    if n_sites not in (1, 2) or not schedule:
        raise RankError(
            f"a sweep must have sites and a schedule: n_sites is {n_sites} and schedule has {len(schedule)} entries, "
            "expected 1 or 2 sites and at least one entry. Pass schedule=[Cuts()]."
        )
    n_sites = min(n_sites, len(state.cores))
    places = _places(len(state.cores), n_sites)
    mover = _Mover(state, environments, update, n_sites, back, enrich, metric)
    path = None if checkpoint is None else Path(checkpoint)
    keeper = _Keeper(path, checkpoint_every_s, generator, n_sites, state, schedule, inputs)
    run = keeper.resumed() or _Run()
    if run.history.stop == "max_sweeps" and run.n_sweeps < len(schedule):
        run.history.stop = None  # the schedule has grown since
    mover.begin(is_fresh=run.n_places == 0)
    while run.history.stop is None and run.n_sweeps < len(schedule):
        while run.n_places < len(places):
            tail = mover.step(*places[run.n_places], schedule[run.n_sweeps])
            run.note(tail)
            if run.n_places < len(places):
                keeper.keep(run)
        run.end_sweep(state, {} if figures is None else figures(state))
        is_last = run.n_sweeps == len(schedule)
        run.history.stop = (stop(run.history) if stop else None) or ("max_sweeps" if is_last else None)
        keeper.keep(run, at_once=run.history.stop is not None)
        _tell(observer, run, keeper)
    return run.history


def _places(order: int, n_sites: int) -> list[tuple[int, bool]]:
    """First sites there and back, and whether the center moves on to the right."""
    there = range(order - n_sites + 1)
    return [*((k, True) for k in there), *((k, False) for k in reversed(there))]


def _tell(observer: Callable[[History], object] | None, run: _Run, keeper: _Keeper) -> None:
    try:
        if observer is not None:
            observer(run.history)
    except BaseException:
        keeper.keep(run, at_once=True)
        raise


@dataclass
class _Mover:
    """Brings an algorithm its sites and puts away what it makes of them."""

    state: Gauged
    environments: Moving
    update: Update
    n_sites: int
    back: Update | None
    enrich: Callable[[Tensor, int, bool], Tensor | None] | None
    metric: Callable[[Any, int], tuple[Tensor, Tensor]] | None

    def begin(self, *, is_fresh: bool) -> None:
        if is_fresh:
            self.state.move(0)
        for k, core in enumerate(self.state.cores):
            self.environments.advance(k, core)

    def step(self, k: int, to_right: bool, cuts: Cuts) -> Tensor:
        """Update the sites from k on, split them, and move the center by one; returns the tail of the split."""
        n_sites, last = self.n_sites, len(self.state.cores) - self.n_sites
        turns = k == (last if to_right else 0)
        before = self._local(k)
        local = _checked(self.update(before, self.environments.at(k, n_sites), k), before, k)
        if turns and n_sites == 1:
            self._put(k, [local], k)
            return torch.zeros((), dtype=torch.float64, device=local.device)
        found = split(
            local,
            n_sites=n_sites,
            to_right=to_right,
            tol=cuts.tol,
            max_rank=cuts.max_rank,
            enrich=None if self.enrich is None else self.enrich(local, k, to_right),
            n_labels=self.state.n_labels,
            metric=None if self.metric is None else self.metric(self.environments.at(k, n_sites), k),
        )
        (self._go_right if to_right else self._go_left)(found, k, None if turns else self.back)
        return found.tail

    def _local(self, k: int) -> Tensor:
        local, exponent = self.state.local(k, self.n_sites), self.state.exponent
        return times_pow2(local, exponent.reshape((1,) * self.state.n_labels + exponent.shape))

    def _go_right(self, found: Split, k: int, back: Update | None) -> None:
        self.environments.advance(k, found.left)
        rest = found.right
        if back is not None:
            rest = back(rest, self.environments.at(k + 1, self.n_sites - 1), k + 1)
        if self.n_sites == 1:
            rest = absorb_left(rest, self.state.cores[k + 1])
        self._put(k, [found.left, rest], k + 1)

    def _go_left(self, found: Split, k: int, back: Update | None) -> None:
        self.environments.advance(k + self.n_sites - 1, found.right)
        rest, first = found.left, k + self.n_sites - 2
        if back is not None:
            rest = back(rest, self.environments.at(k, self.n_sites - 1), k)
        if self.n_sites == 1:
            rest = absorb_right(self.state.cores[first], rest)
        self._put(first, [rest, found.right], first)

    def _put(self, k: int, cores: list[Tensor], center: int) -> None:
        self.state.put(k, cores, center, torch.zeros_like(self.state.exponent))
        self.environments.advance(center, self.state.cores[center])


def _checked(local: Tensor, before: Tensor, k: int) -> Tensor:
    """What an update gave, if it can be put in the place of what it was given."""
    if local.shape != before.shape:
        raise ShapeError(
            f"an update must keep the shape: at core {k} it gave {tuple(local.shape)}, expected {tuple(before.shape)}. "
            "Return a tensor of the shape of local."
        )
    if local.dtype != before.dtype:
        raise DTypeError(
            f"an update must keep the dtype: at core {k} it gave {local.dtype}, expected {before.dtype}. Start from a "
            "chain of the dtype of the answer."
        )
    if not torch.isfinite(local).all():  # split would cut all ranks, and the file would keep it for good
        raise NonFiniteError(
            f"an update must give finite numbers: at core {k} it gave NaN or Inf, expected none. Take smaller steps."
        )
    return local


@dataclass
class _Run:
    """Where a run is."""

    n_sweeps: int = 0  # that are done
    n_places: int = 0  # of the present one that are done
    largest_cut: Tensor | None = None  # in the present one
    history: History = field(default_factory=History)

    def note(self, tail: Tensor) -> None:
        """One place is done."""
        worst = tail.detach().amax() if tail.numel() else tail.new_zeros(())  # of a batch without members
        self.largest_cut = worst if self.largest_cut is None else torch.maximum(self.largest_cut, worst)
        self.n_places += 1

    def end_sweep(self, state: Gauged, more: Mapping[str, Any]) -> None:
        """All places are done."""
        ranks = (1, *(core.shape[-1] for core in state.cores))
        self.history.append(ranks=ranks, largest_cut=float(self.largest_cut or 0.0), **more)
        self.n_sweeps, self.n_places, self.largest_cut = self.n_sweeps + 1, 0, None


class _Keeper:
    """Writes the state of a run to its file, and reads it back."""

    def __init__(
        self,
        path: Path | None,
        every_s: float,
        generator: torch.Generator | None,
        n_sites: int,
        state: Gauged,
        schedule: Sequence[Cuts],
        inputs: Sequence[Tensor],
    ) -> None:
        self.generator, self.state = generator, state
        self.cuts = [(cuts.tol, cuts.max_rank) for cuts in schedule]
        self.file: RunFile | None = None
        if path is not None:
            # Two starts may differ by a power of two alone, which their cores do not show.
            scale, draws = state.exponent.tolist(), generator is not None
            settings = {"kind": "sweep", "n_sites": n_sites, "scale": scale, "draws": draws}
            self.file = RunFile(path, every_s, settings, start_signature([*state.cores, *inputs]))

    def keep(self, run: _Run, *, at_once: bool = False) -> None:
        """Write the file, if there is one and it is time to."""
        if self.file is None or not (at_once or self.file.due()):
            return
        content = {
            "n_sweeps": run.n_sweeps,
            "n_places": run.n_places,
            "largest_cut": run.largest_cut,
            "cuts": self.cuts[: run.n_sweeps + (run.n_places > 0)],
            "history": run.history.to_state(),
            "cores": list(self.state.cores),
            "center": self.state.center,
            "exponent": self.state.exponent,
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        self.file.write(content)

    def resumed(self) -> _Run | None:
        """What the file holds, put into the state; ``None`` where there is no file."""
        if self.file is None or not self.file.path.exists():
            return None
        content = self.file.read()
        cuts = content["cuts"]
        if cuts != self.cuts[: len(cuts)]:
            raise unusable(self.file.path, f"the cuts {cuts} so far, expected the first of schedule")
        device = self.state.cores[0].device
        self.state.cores[:] = [core.to(device) for core in content["cores"]]
        self.state.center, self.state.exponent = content["center"], content["exponent"].to(device)
        if self.generator is not None and content["generator"] is not None:
            self.generator.set_state(content["generator"])
        cut = content["largest_cut"]
        history = History.from_state(content["history"])
        return _Run(content["n_sweeps"], content["n_places"], None if cut is None else cut.to(device), history)
