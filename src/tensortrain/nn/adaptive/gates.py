"""Gates on rank indices, which training opens or shuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tensortrain.errors import KindError, RankError, ShapeError
from tensortrain.formats import Bond
from tensortrain.nn.adaptive.indices import (
    bond_ranks,
    bonds,
    check_can_resize,
    concentrate_,
    core_size,
    layers_with_bonds,
    sharing,
    slice_squares,
    spec_with,
)
from tensortrain.nn.base import FactorizedLayer
from tensortrain.nn.embedding.tied import TiedHead
from tensortrain.nn.shaping.stand_ins import Handle, transform_cores, transforms_of

__all__ = ["GateKind", "RankGates", "fold_gates_"]

GateKind = Literal["concrete", "l1"]
SHUT = 1e-2  # size of an "l1" gate, beside those at the start, below which it is shut for good
_OPEN_AT_FIRST = 3.0  # log-odds of a "concrete" gate
_LOG_ODDS = 10.0  # a step of 1 in the parameter: gates must go from open to shut at the step size of weights


class RankGates(nn.Module):
    r"""A gate on every rank index; what training shuts, ``prune_ranks_`` cuts.

    ``"concrete"``: each gate is a random variable near 0 or 1, drawn anew in every forward pass of training (relaxed
    Bernoulli of a ``temperature``), whose log-odds are learnt; in ``eval`` mode it is open or shut. The penalty is the
    expected share of the parameters that open gates leave. ``"l1"``: each gate is a number, 1 at first, and shut for
    good where what passes falls below a hundredth of what passed at first; the penalty is the mean of what passes
    the open gates, each beside its start. (What passes is the gate times the norms of its slices: of the gate alone
    cores would make up for any loss.)

    Use: give ``gates.parameters()`` to the optimizer too (without weight decay), add ``gates.loss()`` to the loss,
    and call ``prune_ranks_(model)`` at the end, which multiplies the gates into the cores and takes them off.

    Args:
        model: A module with factorized layers. Forward passes of these use gated cores from now on.
        kind: Of the gates.
        budget: Parameters of the cores to come down to, a number or a share in (0, 1) of those at present; the
            penalty ends there. None: none.
        weight: What the penalty is multiplied by; it lies in [0, 1] before. None: 1 with a budget, where the penalty
            ends by itself and only has to win before, else 0.01.
        temperature: Of "concrete" gates; set the attribute lower while training goes on.

    Raises:
        KindError: The model has no factorized layer, or one whose format does not tell where its ranks are, whose
            cores are constrained, shared in part or read by a tied head, or that has gates already.
        RankError: A budget or a temperature that is not positive.

    Source: "concrete": Kodryan, Kropotov and Vetrov, arXiv:2006.10859; "l1" and its late stage: Yang et al.,
    arXiv:2405.14377.

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, rank=8)
        >>> gates = RankGates(layer, budget=0.5)
        >>> (layer(torch.ones(2, 64)).square().mean() + gates.loss()).backward()
        >>> layer = tensortrain.nn.prune_ranks_(layer)
    """

    def __init__(
        self,
        model: nn.Module,
        kind: GateKind = "concrete",
        budget: float | None = None,
        *,
        weight: float | None = None,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        if kind not in get_args(GateKind):
            raise ShapeError(f"kind must be one of {get_args(GateKind)}: found {kind!r}. Pass 'concrete'.")
        for name, value in (("budget", budget), ("temperature", temperature)):
            if value is not None and value <= 0:
                raise RankError(f"{name} must be positive: found {value!r}. Leave it out for its default.")
        self.kind, self.temperature = kind, temperature
        self.weight = weight if weight is not None else 1e-2 if budget is None else 1.0
        self._layers = layers_with_bonds(model, "RankGates")
        for name, layer in self._layers:
            _check_can_gate(model, name, layer)
        self.gates = nn.ParameterList()
        self._first: list[int] = []
        for _, layer in self._layers:
            self._add_layer(model, layer)
        self._full = sum(core_size(bond_ranks(layer), layer.spec) for _, layer in self._layers)
        self.budget = None if budget is None else budget * self._full if budget < 1 else float(budget)
        users = [(k, one) for k, (_, layer) in enumerate(self._layers) for one in sharing(model, layer)]
        self._handle = Handle.join(transform_cores(one, _Gated(self, k)) for k, one in users)

    def _add_layer(self, model: nn.Module, layer: FactorizedLayer) -> None:
        """Gates for every bond of a layer, and what passed them at first."""
        self._first.append(len(self.gates))
        concentrate_(model, layer)
        cores = [core.detach() for core in layer.core_list()]
        for bond in bonds(layer.spec):
            size = torch.ones(cores[bond[0][0]].shape[bond[0][1]], device=cores[0].device)
            start = _passing(cores, bond, size).mean().clamp_min(torch.finfo(torch.float32).tiny)
            self.register_buffer(f"start_{len(self.gates)}", start)
            self.gates.append(nn.Parameter(size * (_OPEN_AT_FIRST / _LOG_ODDS if self.kind == "concrete" else 1.0)))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, budget={self.budget}, weight={self.weight}"

    # -- what users call -----------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """What to add to the loss: ``weight`` times the penalty."""
        return self.weight * self.size()

    def late_loss(self, loss: Tensor, *, target_loss: float, target_share: float) -> Tensor:
        """The whole loss of a late stage: whichever of loss and size is farther from its target counts most.

        Args:
            loss: Of the task, positive.
            target_loss: What it is to come down to.
            target_share: What ``share()`` is to come down to, in (0, 1].

        Source: Yang et al., arXiv:2405.14377, the achievement scalarisation.
        """
        size = self.size()
        missed_loss = (loss.detach() - target_loss) / loss.detach()
        share = self.share().detach()
        is_larger = (share - target_share) / share > missed_loss.to(share.device)
        return (size if bool(is_larger) else loss) + 0.1 * loss + 0.01 * size

    def size(self) -> Tensor:
        """The penalty before ``weight``: differentiable, in [0, 1] while nothing grows."""
        size = self.share() if self.kind == "concrete" else self._mean_passing()
        if self.budget is None:
            return size
        goal = self.budget / self._full
        over = (self.share() - goal).clamp_min(0.0) / (1 - goal if goal < 1 else 1.0)
        # Gates of numbers have a share without a slope: it tells whether the penalty ends.
        return over if self.kind == "concrete" else size * float(over > 0)

    def share(self) -> Tensor:
        """Expected parameters that open gates leave, over those of all cores now; "l1" gates count if not shut."""
        total = torch.zeros((), device=self.gates[0].device) if len(self.gates) else torch.zeros(())
        for index, (_, layer) in enumerate(self._layers):
            counts = [self._open(index, number).sum() for number in range(len(bonds(layer.spec)))]
            total = total + _expected_size(layer, counts).to(total.device)
        return total / self._full

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """By layer, the ranks that open gates leave."""
        with torch.no_grad():
            return {
                name: spec_with(layer.spec, [max(1, int(keep.sum())) for keep in self._kept(index)]).ranks
                for index, (name, layer) in enumerate(self._layers)
            }

    @torch.no_grad()
    def fold_(self) -> None:
        """Multiply the gates into the cores, those that are shut as zeros, and take them off."""
        for index, (_, layer) in enumerate(self._layers):
            cores = layer.core_list()
            for core, value in zip(cores, self.gated(index, cores, decided=True), strict=True):
                core.copy_(value)
        self.remove()

    def remove(self) -> None:
        """Take the gates off again; the cores are what they are without them."""
        self._handle.remove()

    # -- the gates -----------------------------------------------------------------------------------

    def _of(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Gates and starts of a layer's bonds."""
        first, n = self._first[index], len(bonds(self._layers[index][1].spec))
        return [(self.gates[k], getattr(self, f"start_{k}")) for k in range(first, first + n)]

    def _open(self, index: int, number: int) -> Tensor:
        """Probability that each gate of a bond is open; of numbers 1 or 0."""
        gate, _ = self._of(index)[number]
        return (_LOG_ODDS * gate).sigmoid() if self.kind == "concrete" else self._kept(index)[number].to(gate.dtype)

    def _kept(self, index: int) -> list[Tensor]:
        """Which gates of a layer are open, bond by bond."""
        layer, found = self._layers[index][1], []
        cores = [core.detach() for core in layer.core_list()]
        for (gate, start), bond in zip(self._of(index), bonds(layer.spec), strict=True):
            found.append(gate > 0 if self.kind == "concrete" else _passing(cores, bond, gate.detach()) > SHUT * start)
        return found

    def _mean_passing(self) -> Tensor:
        """Mean over the open gates of what passes, beside the start."""
        parts, n_open = [], 0
        for index, (_, layer) in enumerate(self._layers):
            cores, kept = layer.core_list(), self._kept(index)
            for (gate, start), bond, keep in zip(self._of(index), bonds(layer.spec), kept, strict=True):
                parts.append((_passing(cores, bond, gate) / start * keep).sum().to(self.gates[0].device))
                n_open += len(gate)
        return torch.stack(parts).sum() / n_open if parts else torch.zeros(())

    def gated(self, index: int, cores: Sequence[Tensor], *, decided: bool = False) -> list[Tensor]:
        """The cores of a layer behind its gates.

        Args:
            index: Of the layer.
            cores: As they are without gates.
            decided: Whether "concrete" gates are open or shut, rather than drawn.
        """
        layer, cores = self._layers[index][1], list(cores)
        kept = self._kept(index)
        for (gate, _), bond, keep in zip(self._of(index), bonds(layer.spec), kept, strict=True):
            core, axis = bond[0]
            factor = self._factor(gate, keep, drawn=layer.training and not decided)
            cores[core] = cores[core] * factor.to(cores[core].dtype).reshape(-1, *[1] * (cores[core].ndim - axis - 1))
        return cores

    def _factor(self, gate: Tensor, keep: Tensor, *, drawn: bool) -> Tensor:
        if self.kind == "l1":
            return gate * keep
        if not drawn:
            return keep.to(gate.dtype)
        noise = torch.rand_like(gate).clamp(1e-6, 1 - 1e-6)
        return ((noise.log() - (-noise).log1p() + _LOG_ODDS * gate) / self.temperature).sigmoid()


class _Gated:
    """The hook of one layer."""

    def __init__(self, gates: RankGates, index: int) -> None:
        self.gates, self.index = gates, index

    def __call__(self, layer: FactorizedLayer, cores: list[Tensor]) -> list[Tensor]:
        return self.gates.gated(self.index, cores)


@torch.no_grad()
def fold_gates_(model: nn.Module) -> None:
    """Multiply the gates of all layers into their cores, those that are shut as zeros, and take them off.

    Where gates reach beyond the model, so does this: their other layers would be without gates.
    """
    gated = (hook for _, layer in layers_with_bonds(model, "fold_gates_") for hook in transforms_of(layer))
    for gates in {id(hook.gates): hook.gates for hook in gated if isinstance(hook, _Gated)}.values():
        gates.fold_()


def _check_can_gate(model: nn.Module, name: str, layer: FactorizedLayer) -> None:
    """Raise ``KindError`` where gates could not be multiplied into the cores, or would not reach all who use them."""
    check_can_resize(model, name, layer)
    if any(isinstance(one, _Gated) for one in transforms_of(layer)):
        raise KindError(f"a layer takes one set of gates: {name or 'the layer'} has some. Call prune_ranks_ first.")
    if any(isinstance(one, TiedHead) and one.embedding is layer for one in model.modules()):
        raise KindError(
            f"gates act where a layer is called: the cores of {name or 'the layer'} are read by a tied head, too. Use "
            "a RankPrior instead."
        )


def _passing(cores: Sequence[Tensor], bond: Bond, gate: Tensor) -> Tensor:
    """What passes each gate of a bond: the gate times the geometric mean of the norms of its slices."""
    norms = torch.stack([_norm(slice_squares(cores[core], axis)) for core, axis in bond])
    return gate.abs() * norms.log().mean(dim=0).exp()


def _norm(squares: Tensor) -> Tensor:
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _expected_size(layer: FactorizedLayer, counts: Sequence[Tensor]) -> Tensor:
    """Entries of all cores at expected ranks, a polynomial in them."""
    rank_of = {place: n for places, n in zip(bonds(layer.spec), counts, strict=True) for place in places}
    total = counts[0].new_zeros(()) if counts else torch.zeros(())
    for core, shape in enumerate(layer.spec.core_shapes):
        sizes = [rank_of.get((core, axis), n) for axis, n in enumerate(shape)]
        total = total + math.prod(sizes)
    return total
