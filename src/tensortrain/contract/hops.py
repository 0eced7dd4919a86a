"""A convolution in hops: which cores are applied together, before, with or after the kernel's positions.

The cores of a kernel are a network: legs of output channels, of input channels, of the axes of the kernel, and
bonds. A hop merges some of the cores into one weight and applies it to what the hops before it left: cores that
bear no axis are a product of channels at every position (a 1x1 convolution), the others a convolution along their
axes. A state leg that a hop's cores do not bear is carried along; one that they bear and that is wanted later still
is a group (as CP's rank, whose middle hop is depthwise). Channels first, space first, space in the middle and all
that lies in between are the ways to cut the cores into hops, and the cheapest are found by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from tensortrain.contract.cost import CostModel
from tensortrain.contract.products import Legs, Product, Sizes, contraction_flops
from tensortrain.contract.weights import Wanted

__all__ = ["ConvNetwork", "Hop", "Load", "hop_candidates"]

_ALL_SUBSETS = 4  # up to so many cores any of them may make a hop, beyond only those next to each other
_KEPT = 4  # partial ways kept for each set of cores that have been applied
_MOST_GROWTH = 2  # times the dense kernel: largest merged weight of a hop
_HOP_S = 4  # calls of small operations around a hop


@dataclass(frozen=True)
class ConvNetwork:
    """The cores of a kernel by the names of their legs; legs of size one are left out.

    Args:
        cores: Legs of every core.
        out_legs, in_legs: Legs of the channels, first slowest.
        axes: Leg of every axis of the kernel; of those of size one no core bears it.
        sizes: Size of every leg.
    """

    cores: tuple[Legs, ...]
    out_legs: Legs
    in_legs: Legs
    axes: Legs
    sizes: Sizes

    def size(self, legs: Sequence[str]) -> int:
        """Size of several legs together."""
        known = dict(self.sizes)
        return prod([known[leg] for leg in legs])

    def in_groups(self, groups: int) -> ConvNetwork:
        """The same for cores with the group of channels as leading axis."""
        if groups == 1:
            return self
        cores = tuple(("g", *legs) for legs in self.cores)
        return ConvNetwork(cores, ("g", *self.out_legs), ("g", *self.in_legs), self.axes, (*self.sizes, ("g", groups)))

    def dense(self, *, transposed: bool = False) -> Wanted:
        """The dense kernel of all cores, as torch's convolutions take it."""
        groups = tuple(leg for leg in self.out_legs if leg in self.in_legs)
        outs, ins = (tuple(leg for leg in legs if leg not in groups) for legs in (self.out_legs, self.in_legs))
        first, second = (ins, outs) if transposed else (outs, ins)
        known = dict(self.sizes)
        legs = (*groups, *first, *second, *(leg for leg in self.axes if leg in known))
        shape = self.size((*groups, *first)), self.size(second), *(known.get(leg, 1) for leg in self.axes)
        return Wanted(tuple(range(len(self.cores))), legs, shape)


@dataclass(frozen=True)
class Load:
    """What a convolution has to do, besides its channels.

    Args:
        batch: Examples.
        ins, outs: Positions along every axis, before and after.
        still: Axes whose kernel has size one and neither stride nor padding: nothing happens along them.
        transposed: Whether outputs are spread from inputs.
        training: Whether weights are merged in every call, and gradients taken.
        itemsize: Bytes of a number.
    """

    batch: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    still: frozenset[int] = frozenset()
    transposed: bool = False
    training: bool = False
    itemsize: int = 4


@dataclass(frozen=True)
class Hop:
    """Some cores, merged into one weight and applied.

    Args:
        cores: Which.
        permute: Order of the state's legs to bring them into first; empty where they lie well.
        sizes: Of the state then: ``(carried before, groups, summed, carried after)``.
        weight_legs: Groups, new ones, summed ones and axes of the weight.
        weight_sizes: ``(groups, new, summed)``.
        along: Numbers of the axes it convolves along; empty for a product at every position.
        legs: Of the state afterwards.
        flops: Of one call.
        moved: Numbers that it reads and writes.
        seconds: Predicted.
    """

    cores: tuple[int, ...]
    permute: tuple[int, ...]
    sizes: tuple[int, int, int, int]
    weight_legs: tuple[Legs, Legs, Legs, Legs]
    weight_sizes: tuple[int, int, int]
    along: tuple[int, ...]
    legs: Legs
    flops: int
    moved: int
    seconds: float

    @property
    def is_plain(self) -> bool:
        """Whether no leg of the state is carried along."""
        return self.sizes[0] == self.sizes[3] == 1 and not self.permute

    def weight(self, shape: tuple[int, ...], *, summed_first: bool = False) -> Wanted:
        """Its weight: groups, then new and summed legs in either order, then the axes."""
        groups, new, summed, axes = self.weight_legs
        both = (*summed, *new) if summed_first else (*new, *summed)
        return Wanted(self.cores, (*groups, *both, *axes), shape)


@lru_cache(maxsize=1024)
def hop_candidates(network: ConvNetwork, load: Load, model: CostModel) -> tuple[tuple[Hop, ...], ...]:
    """The likeliest ways to cut the cores into hops, best first; the whole kernel in one hop is not among them.

    Cost: milliseconds; remembered.
    """
    planner = _Planner(network, load, model)
    everything = frozenset(range(len(network.cores)))
    best: dict[frozenset[int], list[_Partial]] = {frozenset(): [_Partial((), network.in_legs, 0.0)]}
    order = sorted(_reachable(len(everything)), key=len)
    for done in order:
        partials = sorted(best.pop(done, []), key=lambda partial: partial.seconds)[:_KEPT]
        if done == everything:
            return tuple(partial.hops for partial in partials)
        for partial, which in product(partials, _moves(done, len(everything))):
            if not done and len(which) == len(everything) > 1:
                continue
            for after in planner.extended(partial, which):
                best.setdefault(done | which, []).append(after)
    return ()


@dataclass(frozen=True)
class _Partial:
    hops: tuple[Hop, ...]
    legs: Legs
    seconds: float


def _reachable(n: int) -> Iterator[frozenset[int]]:
    """Sets of cores that may have been applied together."""
    if n <= _ALL_SUBSETS:
        for bits in range(1 << n):
            yield frozenset(k for k in range(n) if bits >> k & 1)
        return
    for start, length in product(range(n), range(n + 1)):
        left = {(start + k) % n for k in range(length)}  # those left, next to each other in a ring
        if start == 0 or 0 < length < n:
            yield frozenset(k for k in range(n) if k not in left)


def _moves(done: frozenset[int], n: int) -> list[frozenset[int]]:
    """Sets of cores that may come next."""
    left = [k for k in range(n) if k not in done]
    if n <= _ALL_SUBSETS:
        picks = product((False, True), repeat=len(left))
        return [frozenset(k for k, taken in zip(left, pick, strict=True) if taken) for pick in picks if any(pick)]
    turned = _as_run(left, n)
    m = len(turned)
    return list({frozenset((*turned[:a], *turned[m - b :])) for a in range(m + 1) for b in range(m + 1 - a) if a + b})


def _as_run(left: list[int], n: int) -> list[int]:
    """Neighbours in a ring, in their order."""
    for k, one in enumerate(left):
        if (one - 1) % n not in left:
            return left[k:] + left[:k]
    return left


class _Planner:
    """Prices hops of one network under one load."""

    def __init__(self, network: ConvNetwork, load: Load, model: CostModel) -> None:
        self.network, self.load, self.model = network, load, model
        self.sizes = dict(network.sizes)
        self.bearers: dict[str, set[int]] = {}
        for k, legs in enumerate(network.cores):
            for leg in legs:
                self.bearers.setdefault(leg, set()).add(k)
        self.spatial = {leg for leg in network.axes if leg in self.bearers}
        self.dense = self._size((*network.out_legs, *network.in_legs, *sorted(self.spatial)))

    def _size(self, legs: Sequence[str]) -> int:
        sizes = self.sizes
        return prod([sizes[leg] for leg in legs])

    def extended(self, partial: _Partial, which: frozenset[int]) -> list[_Partial]:
        """A partial way with these cores as its next hop; new legs may come in either order."""
        done = {k for hop in partial.hops for k in hop.cores}
        later = set(range(len(self.network.cores))) - done - which
        borne = dict.fromkeys(leg for k in sorted(which) for leg in self.network.cores[k])
        wanted = {leg for leg in borne if self.bearers[leg] & later or leg in self.network.out_legs}
        known = [leg for leg in partial.legs if leg in borne]
        groups = [leg for leg in known if leg in wanted]
        summed = [leg for leg in known if leg not in wanted]
        new = [leg for leg in borne if leg in wanted and leg not in known]
        axes = [leg for leg in borne if leg in self.spatial]
        if self._size((*groups, *new, *summed, *axes)) > _MOST_GROWTH * self.dense:
            return []
        bonds = [leg for leg in new if leg not in self.network.out_legs]
        outs = self._ordered([leg for leg in new if leg in self.network.out_legs])
        orders = [(*outs, *bonds), (*bonds, *outs)] if bonds and outs else [tuple(new if bonds else outs)]
        made = [self._hop(partial, which, groups, summed, order, axes, last=not later) for order in orders]
        return [_Partial((*partial.hops, hop), hop.legs, partial.seconds + hop.seconds) for hop in made]

    def _ordered(self, outs: list[str]) -> list[str]:
        return [leg for leg in self.network.out_legs if leg in outs]

    def _hop(
        self,
        partial: _Partial,
        which: frozenset[int],
        groups: list[str],
        summed: list[str],
        new: Sequence[str],
        axes: list[str],
        *,
        last: bool,
    ) -> Hop:
        along = self._along(partial, which, axes)
        state = partial.legs
        before, after, permute = self._arranged(state, groups, summed, keeps_after=not along)
        legs = (*before, *groups, *new, *after)
        a, g, i, b = (self._size(some) for some in (before, groups, summed, after))
        n = self._size(new)
        ins, outs = self._positions(partial, along)
        k = self._size(axes)
        flops = 2 * self.load.batch * a * b * g * n * i * k * (ins if self.load.transposed else outs)
        moved = self.load.batch * a * b * g * (i * ins + n * outs) + g * n * i * k
        borne = tuple(self.network.axes[axis] for axis in along if self._is_borne(axis))
        weight_legs = tuple(groups), tuple(new), tuple(summed), borne
        seconds = self._seconds((a, g, i, b), n, flops, ins, outs, k, convolves=bool(along))
        if permute:
            seconds += (3 if self.load.training else 1) * self._copy_s(self.load.batch * a * g * i * b * ins)
        if last and legs != self.network.out_legs:
            seconds += self._copy_s(self.load.batch * self._size(legs) * outs)
        cores = tuple(sorted(which))
        if self.load.training:
            seconds += self._merge_s(cores, tuple(leg for legs in weight_legs for leg in legs), g * n * i)
        return Hop(cores, permute, (a, g, i, b), weight_legs, (g, n, i), along, legs, flops, moved, seconds)

    def _is_borne(self, axis: int) -> bool:
        return self.network.axes[axis] in self.spatial

    def _along(self, partial: _Partial, which: frozenset[int], axes: list[str]) -> tuple[int, ...]:
        """Axes that a hop convolves along; those without a leg go with the first hop that convolves at all."""
        free = [
            axis for axis in range(len(self.network.axes)) if not self._is_borne(axis) and axis not in self.load.still
        ]
        if not self.spatial:  # strides and padding of a 1x1 kernel: at the narrow end
            first = not partial.hops
            return tuple(free) if first else ()
        if not axes:
            return ()
        own = [axis for axis, leg in enumerate(self.network.axes) if leg in axes]
        taken = any(hop.along for hop in partial.hops)
        return tuple(sorted(own if taken else own + free))

    def _arranged(
        self, state: Legs, groups: list[str], summed: list[str], *, keeps_after: bool
    ) -> tuple[Legs, Legs, tuple[int, ...]]:
        """Legs carried before and after those that the hop takes, and the order to bring the state into."""
        taken = (*groups, *summed)
        places = [state.index(leg) for leg in taken]
        if not taken:
            return state, (), ()
        lies_well = places == list(range(places[0], places[0] + len(taken)))
        after = state[places[-1] + 1 :]
        if lies_well and (keeps_after or not after):
            return state[: places[0]], after, ()
        carried = tuple(leg for leg in state if leg not in taken)
        return carried, (), tuple(state.index(leg) for leg in (*carried, *taken))

    def _positions(self, partial: _Partial, along: tuple[int, ...]) -> tuple[int, int]:
        passed = {axis for hop in partial.hops for axis in hop.along}
        now = [self.load.outs[k] if k in passed else n for k, n in enumerate(self.load.ins)]
        then = [self.load.outs[k] if k in passed or k in along else n for k, n in enumerate(self.load.ins)]
        return prod(now), prod(then)

    def _seconds(
        self, sizes: tuple[int, int, int, int], new: int, flops: int, ins: int, outs: int, k: int, *, convolves: bool
    ) -> float:
        """Seconds of the product or the convolution of a hop."""
        before, groups, summed, after = sizes
        rows, model = self.load.batch * before, self.model
        if convolves:
            channels = rows, groups, summed, new
            work = model.convolution_s(flops, channels, k, ins, outs, itemsize=self.load.itemsize)
        else:
            work = model.gemm_s(new, after * ins, summed, batch=rows * groups)
        return (3 if self.load.training else 1) * (work + _HOP_S * model.overhead_s)

    def _copy_s(self, numel: int) -> float:
        return self.model.copy_s(2.0 * numel * self.load.itemsize)

    def _merge_s(self, cores: tuple[int, ...], legs: Legs, numel: int) -> float:
        """Merging the weight in every call, and the gradients through that."""
        steps: tuple[Product, ...] = Wanted(cores, legs, ()).products(self.network.cores, self.network.sizes)
        flops = contraction_flops(steps) if len(cores) > 1 else 0
        copied = numel * self.load.itemsize
        calls = 3 * len(steps) * _HOP_S * self.model.overhead_s
        return 3 * (flops / self.model.gemm_flops_s + copied / self.model.permute_bytes_s) + calls
