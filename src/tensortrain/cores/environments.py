"""What a chain meets on both sides of a site: the one recursion under products, fits, solvers and models.

A chain, the *state*, is one row of a network without loops; the other rows stay as they are:

    Overlap(target)       <target, state>: fits, projections, right-hand sides
    Sandwich(matrix)      <bra, A state>: bilinear forms, eigenproblems, linear systems, time steps
    Data(x)               <x_1 o .. o x_d, state> of every sample: classifiers, completion, amplitudes of Born machines
    SquaredData(x)        sum |<x, state>|^2 of every sample, over the values left free: probabilities

``Environments(rows, cores)`` knows all that lies left and right of each bond, and forgets what a new core makes
stale. With all but a few neighbouring sites fixed, a row is a linear map of their tensor: ``at(k, n_sites)``.
Numbers are kept beside powers of two: 2,000 cores neither overflow nor vanish.

Axes: batch axes in front, then samples ``b``, then bonds. A local tensor ``(.., r, n_1 .., s)`` may have more axes in
front of all others (labels, several vectors), for which the map is applied to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from tensortrain.cores.scales import Exponents, Scale, guarded, plain_exponent
from tensortrain.cores.scaling import split_pow2, times_pow2
from tensortrain.cores.unfold import absorb_left, absorb_right, as_left, as_right
from tensortrain.cores.walks import dot_walk

__all__ = [
    "Data",
    "Env",
    "Environments",
    "Local",
    "Overlap",
    "Rows",
    "Sandwich",
    "SquaredData",
    "Target",
    "Together",
    "past_pair",
    "value_parts",
]


_ROWS_AT_ONCE = 256  # samples whose products with all labels stay in the cache


# -- one site further ----------------------------------------------------------------------------------


def past_pair(env: Tensor, bra: Tensor, ket: Tensor) -> Tensor:
    """``(.., t, r)`` past ``bra`` ``(.., t, n, u)``, conjugated, and ``ket`` ``(.., r, n, s)`` to ``(.., u, s)``."""
    if env.ndim == 2 and bra.ndim == ket.ndim == 3:  # at small ranks what surrounds a product takes most of the time
        return torch.mm(as_left(bra).mH, torch.mm(env, as_right(ket)).reshape(-1, ket.shape[-1]))
    half = env @ as_right(ket)  # two products, never r^4
    return as_left(bra).mH @ half.unflatten(-1, ket.shape[-2:]).flatten(-3, -2)


def past_triple(env: Tensor, bra: Tensor, matrix: Tensor, ket: Tensor) -> Tensor:
    """``(.., t, r, u)`` past ``(.., t, i, n)``, conjugated, ``(.., r, i, j, s)`` and ``(.., u, j, v)``."""
    half = torch.einsum("...tru,...ujv->...trjv", env, ket)
    half = torch.einsum("...trjv,...rijs->...tisv", half, matrix)
    return torch.einsum("...tin,...tisv->...nsv", bra.conj(), half)


def before_triple(env: Tensor, bra: Tensor, matrix: Tensor, ket: Tensor) -> Tensor:
    """``past_triple`` from the right: ``(.., n, s, v)`` to ``(.., t, r, u)``."""
    half = torch.einsum("...nsv,...ujv->...nsuj", env, ket)
    half = torch.einsum("...nsuj,...rijs->...niru", half, matrix)
    return torch.einsum("...tin,...niru->...tru", bra.conj(), half)


# -- the whole network at once -------------------------------------------------------------------------


def value_parts(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with ``<x, y> = m * 2**e`` of two rows of cores, ``<x, A y>`` of three; the first is conjugated.

    Every index of a bond may be of another size: see ``cores.scales``. Differentiable.

    Args:
        rows: Cores ``(.., r, n, s)``, those of a matrix ``(.., r, i, j, s)``; equal numbers of batch axes.

    Cost: O(d n r^3) flops for two rows.
    """
    n_batch = rows[0][0].ndim - 3
    if len(rows) == 2 and (found := dot_walk(*rows)) is not None:
        return found
    every = [core for row in rows for core in row]
    env, exponent = guarded(every, partial(_walked, rows, n_batch), n_batch, factors=len(rows))
    env, step = split_pow2(env, n_batch)
    return env.flatten(n_batch)[..., 0], step + exponent


def _walked(rows: Sequence[Sequence[Tensor]], n_batch: int, scale: Scale) -> tuple[Tensor, Exponents]:
    """What all cores come to, ``(.., 1, 1)``, up to a power of two; an axis and exponents for each row."""
    past = past_pair if len(rows) == 2 else past_triple
    batch = torch.broadcast_shapes(*(row[0].shape[:n_batch] for row in rows))
    env = rows[0][0].new_ones((*batch, *(1,) * len(rows)))
    waiting: list[Exponents] = [0] * len(rows)
    weighed: list[Tensor] = [env] * len(rows)
    for k, cores in enumerate(zip(*rows, strict=True)):
        for row, core in enumerate(cores):
            if k:
                env, step = scale.split(env, row - len(rows))
                waiting[row] = waiting[row] + step
            weighed[row], waiting[row] = scale.weigh(core, waiting[row])
        env = past(env, *weighed)
    total: Exponents = sum(plain_exponent(exponents) for exponents in waiting)
    return env, total[..., 0] if isinstance(total, Tensor) else total


# -- what the state meets ------------------------------------------------------------------------------


class Env(NamedTuple):
    """``value * 2**exponent``: what lies on one side of a bond, and a power of two for each member."""

    value: Tensor
    exponent: Tensor


class Rows(Protocol):
    """The rows of a network beside the state. Environments are scaled: the largest entry of each is near 1."""

    n_bonds: ClassVar[int]  # axes of an environment, behind those of its members
    has_samples: ClassVar[bool]  # whether the last axis of members is one of samples, over which the adjoint sums
    makes_tensors: ClassVar[bool]  # whether a local tensor becomes one again, or a number

    def start(self) -> Tensor:
        """The environment beyond an end, all of size 1."""
        ...

    def past_left(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        """From the left of core k to its right."""
        ...

    def past_right(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        """From the right of core k to its left."""
        ...

    def apply(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        """The map of the local tensor ``x`` of the sites ``k .. k + n_sites - 1``."""
        ...

    def adjoint(self, k: int, left: Tensor, right: Tensor, y: Tensor, n_sites: int) -> Tensor:
        """The adjoint map, to a local tensor."""
        ...


class Target(Protocol):
    """A chain that need not exist as cores: see ``cores.sketch``."""

    @property
    def like(self) -> Tensor: ...

    def pass_left(self, k: int, carry: Tensor) -> Tensor: ...

    def pass_right(self, k: int, carry: Tensor) -> Tensor: ...


class Overlap:
    """``<target, state>``: the map of a local tensor is a number, its adjoint (of 1) the target seen from there.

    An environment is ``(.., state, target)`` on the left and ``(.., target, state)`` on the right. A target with batch
    axes and a state without are members that share one basis.
    """

    n_bonds: ClassVar[int] = 2
    has_samples: ClassVar[bool] = False
    makes_tensors: ClassVar[bool] = False

    def __init__(self, target: Target) -> None:
        self.target = target
        self._passed: tuple[int, Tensor, Tensor] | None = None

    def start(self) -> Tensor:
        like = self.target.like
        return like.new_ones((*like.shape[:-3], 1, 1))

    def past_left(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        return as_left(core).mH @ as_left(self._pass_left(k, env))

    def past_right(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        return as_right(self.target.pass_right(k, env)) @ as_right(core).mH

    def apply(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        seen = self._seen(k, left, right, n_sites)
        return (seen.conj() * x).flatten(-n_sites - 2).sum(-1)

    def adjoint(self, k: int, left: Tensor, right: Tensor, y: Tensor, n_sites: int) -> Tensor:
        return self._seen(k, left, right, n_sites) * y[(..., *(None,) * (n_sites + 2))]

    def _seen(self, k: int, left: Tensor, right: Tensor, n_sites: int) -> Tensor:
        modes, rows = [], left
        for site in range(k, k + n_sites):
            full = self._pass_left(site, rows)
            modes.append(full.shape[-2])
            rows = as_left(full)
        return (rows @ right).unflatten(-2, (left.shape[-2], *modes))

    def _pass_left(self, k: int, carry: Tensor) -> Tensor:
        """Kept until the next one: a sweep asks for it before it has a new core, and once more after."""
        if self._passed is None or self._passed[0] != k or self._passed[1] is not carry:
            self._passed = (k, carry, self.target.pass_left(k, carry))
        return self._passed[2]


@dataclass(frozen=True)
class Sandwich:
    """``<bra, A state>``: the map of a local tensor is ``A`` seen from there; ``bra`` is the state unless it is given.

    An environment is ``(.., bra, A, state)``.

    Attributes:
        matrix: Cores ``(.., r, i, j, s)``; ``i`` goes with the bra, ``j`` with the state.
    """

    matrix: Sequence[Tensor]
    n_bonds: ClassVar[int] = 3
    has_samples: ClassVar[bool] = False
    makes_tensors: ClassVar[bool] = True

    def start(self) -> Tensor:
        return self.matrix[0].new_ones((*self.matrix[0].shape[:-4], 1, 1, 1))

    def past_left(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        return past_triple(env, bra, self.matrix[k], core)

    def past_right(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        return before_triple(env, bra, self.matrix[k], core)

    def apply(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        return _sandwiched(left, self.matrix[k : k + n_sites], right, x)

    def adjoint(self, k: int, left: Tensor, right: Tensor, y: Tensor, n_sites: int) -> Tensor:
        matrix = [core.transpose(-3, -2).conj() for core in self.matrix[k : k + n_sites]]
        return _sandwiched(left.transpose(-3, -1).conj(), matrix, right.transpose(-3, -1).conj(), y)


def _sandwiched(left: Tensor, matrix: Sequence[Tensor], right: Tensor, x: Tensor) -> Tensor:
    """``(.., t, r, u)``, cores ``(.., r, i, j, s)``, ``(.., n, s, v)`` and ``x`` ``(.., u, j_1 .., v)``."""
    flat = x.flatten(-len(matrix) - 1)
    state = torch.einsum("...tru,...ux->...trx", left, flat)  # t r (j_1 .. v)
    modes = []
    for core in matrix:
        split = state.unflatten(-1, (core.shape[-2], -1))
        state = torch.einsum("...trjx,...rijs->...tisx", split, core).flatten(-4, -3)
        modes.append(core.shape[-3])
    out = torch.einsum("...tsv,...nsv->...tn", state, right)
    return out.unflatten(-2, (left.shape[-3], *modes))


@dataclass(frozen=True)
class Data:
    """``<x_1 o .. o x_d, state>`` of every sample, without conjugation: the map of a local tensor is ``(.., b)``.

    An environment is ``(.., b, bond)``; every sample has a power of two of its own.

    Attributes:
        vectors: For each site ``(b, n)``.
    """

    vectors: Sequence[Tensor]
    n_bonds: ClassVar[int] = 1
    has_samples: ClassVar[bool] = True
    makes_tensors: ClassVar[bool] = False

    @classmethod
    def of_values(cls, x: Tensor, modes: Sequence[int], dtype: torch.dtype) -> Data:
        """Samples ``(b, d)`` of values ``0 .. n - 1``; -1 sums a site out."""
        return cls(_Indicators(x, modes, dtype))

    def start(self) -> Tensor:
        first = self.vectors[0]
        return first.new_ones((*first.shape[:-1], 1))

    def past_left(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        return _outer(env, self.vectors[k]) @ as_left(core)

    def past_right(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        return _outer(self.vectors[k], env) @ as_right(core).mT

    def apply(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        if left.ndim == right.ndim == 2 and x.ndim > n_sites + 2:
            return self._apply_labelled(k, left, right, x, n_sites)
        before, after = self._halves(k, left, right, n_sites)
        matrix = x.flatten(-n_sites - 2).unflatten(-1, (before.shape[-1], after.shape[-1]))
        return ((before @ matrix) * after).sum(-1)

    def adjoint(self, k: int, left: Tensor, right: Tensor, y: Tensor, n_sites: int) -> Tensor:
        modes = [self.vectors[site].shape[-1] for site in range(k, k + n_sites)]
        if left.ndim == right.ndim == 2 and y.ndim > 1:
            total = self._adjoint_labelled(k, left, right, y, n_sites)
        else:
            before, after = self._halves(k, left, right, n_sites)
            total = (before.conj() * y[..., None]).mT @ after.conj()
        return total.flatten(-2).unflatten(-1, (left.shape[-1], *modes, right.shape[-1]))

    def grams(self, k: int, left: Tensor, right: Tensor, n_sites: int) -> tuple[Tensor, Tensor]:
        """Second moments ``(r n_1 .., r n_1 ..)`` and ``(.. s, .. s)`` of both factors of what a local tensor sees.

        Every sample counts alike, whatever its power of two: of long products a few would be all there is.
        """
        total: list[Tensor] = []
        for rows in _chunks(left.shape[0]):
            halves = self._halves(k, left[rows], right[rows], n_sites, rows)
            parts = [half.mH @ half for half in halves]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total[0], total[1]

    def _apply_labelled(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        """All labels in one product, for as many samples at a time as stay in the cache."""
        labels = x.shape[: -n_sites - 2]
        found = []
        for rows in _chunks(left.shape[0]):
            before, after = self._halves(k, left[rows], right[rows], n_sites, rows)
            matrix = x.reshape(-1, before.shape[-1], after.shape[-1]).movedim(0, 1).flatten(1)  # p (labels q)
            seen = (before @ matrix).unflatten(-1, (-1, after.shape[-1]))
            found.append((seen * after.unsqueeze(1)).sum(-1))
        return torch.cat(found).T.reshape(*labels, left.shape[0])

    def _adjoint_labelled(self, k: int, left: Tensor, right: Tensor, y: Tensor, n_sites: int) -> Tensor:
        flat = y.flatten(0, -2).T
        total: Tensor | None = None
        for rows in _chunks(left.shape[0]):
            before, after = self._halves(k, left[rows], right[rows], n_sites, rows)
            given = (flat[rows].unsqueeze(-1) * after.conj().unsqueeze(1)).flatten(1)  # b (labels q)
            part = before.mH @ given
            total = part if total is None else total.add_(part) if not part.requires_grad else total + part
        assert total is not None
        return total.unflatten(-1, (flat.shape[-1], -1)).movedim(1, 0).unflatten(0, y.shape[:-1])

    def _halves(
        self, k: int, left: Tensor, right: Tensor, n_sites: int, rows: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tensor by which a local one is seen is of rank one: ``(.., b, r n_1 ..)`` and ``(.., b, .. s)``."""
        middle = k + (n_sites + 1) // 2
        for site in range(k, middle):
            left = _outer(left, self._vectors(site, rows))
        for site in reversed(range(middle, k + n_sites)):
            right = _outer(self._vectors(site, rows), right)
        return left, right

    def _vectors(self, site: int, rows: slice | None) -> Tensor:
        found = self.vectors[site]
        return found if rows is None else found[rows]


@dataclass(frozen=True)
class SquaredData:
    """``sum_z |<z, state>|^2`` over the values z that a sample allows; the map gives ``(.., b, r, n, s)``.

    An environment is ``(.., b, conjugated, plain)`` on the left and ``(.., b, plain, conjugated)`` on the right.

    Attributes:
        weights: For each site ``(b, n)``: 1 for the values that count.
    """

    weights: Sequence[Tensor]
    n_bonds: ClassVar[int] = 2
    has_samples: ClassVar[bool] = True
    makes_tensors: ClassVar[bool] = True

    @classmethod
    def of_values(cls, x: Tensor, modes: Sequence[int], dtype: torch.dtype) -> SquaredData:
        """Samples ``(b, d)`` of values ``0 .. n - 1``; -1 sums a site out."""
        return cls(_Indicators(x, modes, dtype))

    def start(self) -> Tensor:
        first = self.weights[0]
        return first.new_ones((*first.shape[:-1], 1, 1))

    def past_left(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        core = core.unsqueeze(-4)
        return as_left(core).mH @ as_left(absorb_left(env, core) * self.weights[k][..., None, :, None])

    def past_right(self, k: int, env: Tensor, core: Tensor, bra: Tensor) -> Tensor:
        core = core.unsqueeze(-4)
        return as_right(absorb_right(core, env) * self.weights[k][..., None, :, None]) @ as_right(core).mH

    def apply(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        return self._seen(k, left, right, x.unsqueeze(-n_sites - 3), n_sites)

    def adjoint(self, k: int, left: Tensor, right: Tensor, y: Tensor, n_sites: int) -> Tensor:
        return self._seen(k, left, right, y, n_sites).sum(-n_sites - 3)  # each map is Hermitian

    def _seen(self, k: int, left: Tensor, right: Tensor, x: Tensor, n_sites: int) -> Tensor:
        weights = left.new_ones((*left.shape[:-2], 1))
        for site in range(k, k + n_sites):
            weights = _outer(weights, self.weights[site])
        modes = x.shape[-n_sites - 1 : -1]
        full = (left @ x.flatten(-n_sites - 1)).unflatten(-1, (-1, x.shape[-1]))  # b r (n_1 ..) s
        out = absorb_right(full * weights[..., None, :, None], right)
        return out.reshape(*out.shape[:-2], *modes, out.shape[-1])


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, max(n, 1), _ROWS_AT_ONCE)]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``(.., p)`` and ``(.., q)`` to ``(.., p q)``."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


@dataclass(frozen=True)
class _Indicators(Sequence[Tensor]):
    """For each site ``(b, n)`` with a 1 at the value of each sample, or ones where it is -1; made when asked for."""

    x: Tensor
    modes: Sequence[int]
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.modes)

    def __getitem__(self, k: Any) -> Any:
        values = self.x[..., k, None]
        is_on = (values == torch.arange(self.modes[k], device=self.x.device)) | (values < 0)
        return is_on.to(self.dtype)


# -- both sides of every bond --------------------------------------------------------------------------


class Environments:
    """What lies left and right of every bond, made when it is asked for and kept until a core changes.

    Bond k is left of core k: ``left(k)`` holds the cores ``0 .. k - 1``, ``right(k)`` the cores ``k .. d - 1``.

    Args:
        rows: What the state meets.
        cores: The state, ``(.., r, n, s)`` each.
        bra: Cores of the bra of a sandwich, if it is not the state.
        split: Takes powers of two out of an environment, for each member of so many leading axes.

    Example:
        >>> from tensortrain.cores.sketch import Plain
        >>> a, b = ([torch.ones(1, 2, 1)] * 3 for _ in range(2))
        >>> env = Environments(Overlap(Plain(a)), b)
        >>> float(env.apply(1, b[1]))
        8.0
    """

    def __init__(
        self,
        rows: Rows,
        cores: Sequence[Tensor],
        *,
        bra: Sequence[Tensor] | None = None,
        split: Callable[[Tensor, int], tuple[Tensor, Tensor]] = split_pow2,
    ) -> None:
        self.rows, self._split = rows, split
        self._cores = list(cores)
        self._bra = self._cores if bra is None else list(bra)
        start = rows.start()
        end = Env(start, torch.zeros(start.shape[: start.ndim - rows.n_bonds], dtype=torch.int32, device=start.device))
        self._left = [end]  # of bonds 0, 1, ..
        self._right = [end]  # of bonds d, d - 1, ..

    def left(self, bond: int) -> Env:
        """What lies left of a bond, scaled."""
        while len(self._left) <= bond:
            k = len(self._left) - 1
            env = self.rows.past_left(k, self._left[-1].value, self._cores[k], self._bra[k])
            self._left.append(self._scaled(env, self._left[-1].exponent))
        return self._left[bond]

    def right(self, bond: int) -> Env:
        """What lies right of a bond, scaled."""
        d = len(self._cores)
        while len(self._right) <= d - bond:
            k = d - len(self._right)
            env = self.rows.past_right(k, self._right[-1].value, self._cores[k], self._bra[k])
            self._right.append(self._scaled(env, self._right[-1].exponent))
        return self._right[d - bond]

    def advance(self, k: int, core: Tensor, bra: Tensor | None = None) -> None:
        """Core k has changed: a sweep that goes on, either way, needs one step more and no other."""
        self._cores[k] = core
        if self._bra is not self._cores:
            self._bra[k] = self._bra[k] if bra is None else bra
        del self._left[k + 1 :]
        del self._right[len(self._cores) - k :]

    def at(self, k: int, n_sites: int = 1) -> Local:
        """The map of the tensor of the sites ``k .. k + n_sites - 1``; with none of the matrix at bond k."""
        left, right = self.left(k), self.right(k + n_sites)
        return Local(self.rows, k, n_sites, left.value, right.value, left.exponent + right.exponent)

    def apply(self, k: int, local: Tensor, n_sites: int = 1) -> Tensor:
        """``at(k, n_sites)(local)``."""
        return self.at(k, n_sites)(local)

    def _scaled(self, env: Tensor, exponent: Tensor) -> Env:
        value, step = self._split(env, env.ndim - self.rows.n_bonds)
        return Env(value, exponent + step)


@dataclass(frozen=True)
class Local:
    """The linear map that a row of a network is of the tensor at some sites, all other sites fixed.

    ``local(x)`` and ``local.adjoint(y)`` are its values; the ``_parts`` keep the power of two apart, for numbers that
    would leave the range: the amplitude of one sample of 2,000 sites is one.
    """

    rows: Rows
    k: int
    n_sites: int
    left: Tensor
    right: Tensor
    exponent: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return _times_pow2(*self.parts(x), self._behind)

    def grams(self) -> tuple[Tensor, Tensor]:
        """Second moments of both factors of what the samples see; see ``Data.grams``."""
        assert isinstance(self.rows, Data)
        return self.rows.grams(self.k, self.left, self.right, self.n_sites)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(m, e)`` with the value ``m * 2**e``, an exponent for each member (and sample)."""
        return self.rows.apply(self.k, self.left, self.right, x, self.n_sites), self.exponent

    def adjoint(self, y: Tensor | None = None) -> Tensor:
        """The adjoint map of ``y`` (of ones, if left out and the map gives numbers), summed over samples."""
        return _times_pow2(*self.adjoint_parts(y), self.n_sites + 2)

    def adjoint_parts(self, y: Tensor | None = None, exponent: Tensor | int = 0) -> tuple[Tensor, Tensor]:
        """``(m, e)`` with the adjoint map of ``y * 2**exponent``, an exponent for each member."""
        y = self.left.new_ones(self.exponent.shape) if y is None else y
        total = self.exponent + exponent
        if self.rows.has_samples:
            top = total.amax(-1) if total.numel() else total.sum(-1)
            y, total = _times_pow2(y, total - top.unsqueeze(-1), self._behind), top
        return self.rows.adjoint(self.k, self.left, self.right, y, self.n_sites), total

    @property
    def _behind(self) -> int:
        return self.n_sites + 2 if self.rows.makes_tensors else 0


class Together:
    """Several environments of one state, as one: ``at`` gives a tuple, and a core that changes changes in all."""

    def __init__(self, *parts: Environments) -> None:
        self.parts = parts

    def at(self, k: int, n_sites: int = 1) -> tuple[Local, ...]:
        """The maps of all parts."""
        return tuple(part.at(k, n_sites) for part in self.parts)

    def advance(self, k: int, core: Tensor) -> None:
        """Core k has changed."""
        for part in self.parts:
            part.advance(k, core)


def _times_pow2(x: Tensor, exponent: Tensor, behind: int) -> Tensor:
    """``x * 2**exponent`` for members in front of ``behind`` axes; ``x`` may have more axes in front of these."""
    before = x.ndim - exponent.ndim - behind
    return times_pow2(x, exponent.reshape((1,) * before + exponent.shape + (1,) * behind))
