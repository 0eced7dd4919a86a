"""Canonical form of lists of cores ``(.., r, n, s)``: where they are orthonormal, and where the norm sits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tensortrain.cores.algebra import dot_parts
from tensortrain.cores.scales import Exponents, Scale, common, guarded, plain_exponent
from tensortrain.cores.scaling import place_pow2, split_pow2, spread_pow2, times_pow2
from tensortrain.cores.unfold import absorb_left, absorb_right, as_left, as_right
from tensortrain.cores.walks import norm_walk, orthogonal_walk

__all__ = [
    "Gauged",
    "Span",
    "balanced",
    "left_qr",
    "norm_parts",
    "orthogonalize_cores",
    "right_qr",
    "singular_values_at",
    "symmetric",
]

Span = tuple[int, int]  # (lo, hi): cores before lo are left-orthogonal, cores after hi right-orthogonal


@dataclass
class Gauged:
    """A working copy of a train whose center moves: core ``center`` holds the norm, all others are orthonormal.

    What a sweep needs of a train: bring the center to a few neighbours, take the tensor that they make up, and put
    another one, or what it was split into, in its place. The center is kept near 1, times ``2**exponent``, so that
    thousands of cores neither overflow nor vanish. Modes of a matrix are joined to one before.

    Attributes:
        cores: ``(.., r, n, s)`` each: left-orthogonal before the center, right-orthogonal after it.
        center: Number of the core that holds the norm.
        exponent: The train is the chain of the cores times ``2**exponent``; integers, ``batch_shape``.
        n_labels: Axes of the center in front of all others, of labels or of several vectors with one basis.

    Example:
        >>> x = Gauged.of([torch.ones(1, 2, 1), torch.ones(1, 3, 1), torch.ones(1, 2, 1)])
        >>> pair = x.local(1, 2)  # of cores 1 and 2
        >>> x.put(1, [torch.ones(1, 3, 1), pair.sum(1)], center=2)
        >>> x.center, [tuple(core.shape) for core in x.cores]
        (2, [(1, 2, 1), (1, 3, 1), (1, 2, 1)])
    """

    cores: list[Tensor]
    center: int
    exponent: Tensor
    n_labels: int = 0

    @classmethod
    def of(cls, cores: Sequence[Tensor], span: Span | None = None, center: int = 0) -> Gauged:
        """A working copy of any cores.

        Args:
            cores: ``(.., r, n, s)`` each, of a dtype that LAPACK knows.
            span: Range outside which they are orthonormal already; left out, nothing is known.
            center: The core that shall hold the norm.
        """
        out, exponent = orthogonalize_cores(cores, span or (0, len(cores) - 1), center)
        return cls(out, center, exponent)

    @property
    def n_batch(self) -> int:
        """Number of batch axes."""
        return self.cores[self.center].ndim - 3 - self.n_labels

    def move(self, center: int) -> None:
        """Bring the center to a core, by one QR for each core on the way."""
        while self.center < center:
            k = self.center
            labels = self.cores[k].shape[: self.n_labels]
            self.cores[k], carry = left_qr(_labels_to(self.cores[k], self.n_labels, -1))
            self._settle(k + 1, absorb_left(_labels_from(carry, labels, -1), self.cores[k + 1]))
        while self.center > center:
            k = self.center
            labels = self.cores[k].shape[: self.n_labels]
            self.cores[k], carry = right_qr(_labels_to(self.cores[k], self.n_labels, -3))
            self._settle(k - 1, absorb_right(self.cores[k - 1], _labels_from(carry, labels, -2)))

    def local(self, k: int, n_sites: int = 1) -> Tensor:
        """The tensor of cores ``k .. k + n_sites - 1``, ``(.., r, n_k, .., s)``, with the center among them.

        All outside is orthonormal: its norm, times ``2**exponent``, is that of the train.
        """
        self.move(min(max(self.center, k), k + n_sites - 1))
        out = self.cores[k]
        for at, core in enumerate(self.cores[k + 1 : k + n_sites], start=2):
            sizes = out.shape[-at - 1 : -1]  # r n_k ..
            out = (out.flatten(-at - 1, -2) @ as_right(core)).unflatten(-1, core.shape[-2:]).unflatten(-3, sizes)
        return out

    def put(self, k: int, cores: Sequence[Tensor], center: int, exponent: Tensor | None = None) -> None:
        """Put cores in the place of cores ``k ..``.

        Args:
            k: The first of them; the center must be among those that are replaced.
            cores: ``(.., r, n, s)`` each, orthonormal but for the new center: a local tensor, or what it was split to.
            center: The core that holds the norm now.
            exponent: Of two, of the whole; left out, it stays as it is.
        """
        assert {self.center, center} <= set(range(k, k + len(cores)))
        self.cores[k : k + len(cores)] = cores
        self.exponent = self.exponent if exponent is None else exponent
        self._settle(center, self.cores[center])

    def stored(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Span]:
        """Cores in a dtype with the power of two multiplied in, and the range outside which they are orthonormal."""
        placed, single = place_pow2(self.cores, self.exponent, self.center, dtype)
        span = (self.center, self.center) if single else (0, len(placed) - 1)
        return tuple(core.to(dtype) for core in placed), span

    def _settle(self, k: int, core: Tensor) -> None:
        """Core k is the center, and gives its power of two away."""
        labels, n_batch = core.shape[: self.n_labels], core.ndim - 3 - self.n_labels
        scaled, step = split_pow2(_labels_to(core, self.n_labels, -1), n_batch)
        self.cores[k] = _labels_from(scaled, labels, -1)
        self.center, self.exponent = k, self.exponent + step


def _labels_to(core: Tensor, n_labels: int, bond: int) -> Tensor:
    """Axes of labels, the first ones, joined to a bond of a core."""
    if not n_labels:
        return core
    return core.flatten(0, n_labels - 1).movedim(0, bond - 1).flatten(bond - 1, bond)


def _labels_from(x: Tensor, labels: Sequence[int], bond: int) -> Tensor:
    """The opposite of ``_labels_to``."""
    if not labels:
        return x
    apart = x.unflatten(bond, (math.prod(labels), -1)).movedim(bond - 1, 0)
    return apart.unflatten(0, labels).contiguous()


def left_qr(core: Tensor) -> tuple[Tensor, Tensor]:
    """``core = q . carry`` with ``q`` ``(.., r, n, t)`` left-orthogonal and ``carry`` ``(.., t, s)``."""
    q, carry = _qr(as_left(core))
    return q.unflatten(-2, core.shape[-3:-1]), carry


def right_qr(core: Tensor) -> tuple[Tensor, Tensor]:
    """``core = carry . q`` with ``q`` ``(.., t, n, s)`` right-orthogonal and ``carry`` ``(.., r, t)``."""
    q, carry = _qr(as_right(core).mH)
    return q.mH.unflatten(-1, core.shape[-2:]), carry.mH


def _qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.qr``, with finite derivatives where a matrix is zero: its basis may be any, and stays."""
    if not a.requires_grad:
        q, r = torch.linalg.qr(a)
        return q, r
    gone = (a.detach() == 0).all(-1).all(-1)[..., None, None]
    eye = torch.eye(a.shape[-2], a.shape[-1], dtype=a.dtype, device=a.device)
    q, r = torch.linalg.qr(torch.where(gone, eye, a))
    return q, torch.where(gone, q.mH @ a, r)


def orthogonalize_cores(cores: Sequence[Tensor], center: Span, k: int) -> tuple[list[Tensor], Tensor]:
    """Cores with all but core ``k`` orthonormal, and the power of two taken out of core ``k``.

    Args:
        cores: ``(.., r, n, s)`` each.
        center: Range outside which the cores are orthonormal already.
        k: The core that keeps the norm.
    """
    n_batch = cores[0].ndim - 3
    lo, hi = min(center[0], k), max(center[1], k)
    if (found := orthogonal_walk(cores[lo : hi + 1], k - lo)) is not None:
        return [*cores[:lo], *found[0], *cores[hi + 1 :]], found[1]
    out, exponent = guarded(cores, partial(_orthogonalized, cores, center, k, n_batch), n_batch)
    out[k], step = split_pow2(out[k], n_batch)
    return out, exponent + step


def _orthogonalized(
    cores: Sequence[Tensor], center: Span, k: int, n_batch: int, scale: Scale
) -> tuple[list[Tensor], Tensor]:
    before, left, of_rows = _bases(cores[center[0] : k], scale)
    after, right, of_columns = _bases([_mirrored(core) for core in reversed(cores[k + 1 : center[1] + 1])], scale)
    core, waiting = scale.weigh(cores[k], of_rows)
    core, exponent = common(core, waiting + of_columns, n_batch)
    core = core if left is None else absorb_left(left, core)
    core = core if right is None else absorb_right(core, right.mT)
    inner = [*before, core, *(_mirrored(basis) for basis in reversed(after))]
    return [*cores[: min(k, center[0])], *inner, *cores[max(k, center[1]) + 1 :]], exponent


def _bases(cores: Sequence[Tensor], scale: Scale) -> tuple[list[Tensor], Tensor | None, Exponents]:
    """Left-orthogonal cores, the carry ``(.., t, s)`` that is left over, and the exponents of its columns."""
    out: list[Tensor] = []
    carry: Tensor | None = None
    waiting: Exponents = 0
    for core in cores:
        core, waiting = scale.weigh(core, waiting)
        state, step = _passed(carry, core, scale)
        waiting = waiting + step
        basis, carry = left_qr(state)
        out.append(basis)
    return out, carry, waiting


def _passed(carry: Tensor | None, core: Tensor, scale: Scale) -> tuple[Tensor, Exponents]:
    """A core behind what is carried, and the exponents taken out of its columns."""
    return scale.split(core if carry is None else absorb_left(carry, core))


def _mirrored(core: Tensor) -> Tensor:
    return core.transpose(-3, -1)


def singular_values_at(cores: Sequence[Tensor], center: Span, bond: int) -> tuple[Tensor, Tensor]:
    """``(s, e)`` with the singular values ``s * 2**e`` of the unfolding at a bond ``1 .. d - 1``, descending."""
    out, exponent = orthogonalize_cores(cores, center, bond)
    last = as_right(out[bond]).mH  # right of the core all is orthonormal
    small = torch.linalg.qr(last, mode="reduced" if last.requires_grad else "r").R
    return torch.linalg.svdvals(small), exponent


def symmetric(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same train with singular directions as rank indices, largest first, each side with half of their weight.

    Core k is ``l_{k-1}^{-1/2} U_k l_k^{1/2}``, with the left singular vectors ``U_k`` and singular values ``l_k`` of
    the unfolding at bond k. Directions below rounding become zeros; ranks that the modes have no room for go.

    Args:
        cores: ``(r, n, s)`` each, of a dtype that LAPACK knows.

    Source: Vidal, Phys. Rev. Lett. 91, 147902 (2003), with the weights divided evenly.
    """
    train, found = Gauged.of(cores), []
    carried = torch.ones_like(cores[0].real[0, 0, :1])  # square roots of the singular values at the bond before
    for k in range(len(cores) - 1):
        here = train.cores[k]
        u, s, vh = torch.linalg.svd(as_left(here), full_matrices=False)
        rest = absorb_left(s.to(vh.dtype)[:, None] * vh, train.cores[k + 1])
        train.put(k, [u.reshape(*here.shape[:-1], -1), rest], center=k + 1)
        root = torch.where(s > 16 * torch.finfo(s.dtype).eps * s.max(), s.sqrt(), 0.0)
        found.append(_over(train.cores[k], carried) * root)
        carried = root
    found.append(_over(train.cores[-1], carried))
    return spread_pow2(found, train.exponent)


def _over(core: Tensor, weights: Tensor) -> Tensor:
    """Rows of a core over the weights of its left index; zeros where these are zero."""
    return core * torch.where(weights > 0, 1 / weights, 0.0)[:, None, None]


def norm_parts(cores: Sequence[Tensor], center: Span) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with the Frobenius norm ``m * 2**e``, real, differentiable to any order.

    The value comes from orthogonalization, exact to rounding even where a sum cancels. Its derivative comes
    from the inner product, since that of a QR does not exist for cores of deficient rank.
    """
    mantissa, exponent = _norm_by_qr([core.detach() for core in cores], center)
    if torch.is_grad_enabled() and any(core.requires_grad for core in cores):
        square = dot_parts(cores, cores)[0]
        square = square.real if square.is_complex() else square
        root = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        mantissa = mantissa * (root / root.detach())
    return mantissa, exponent


def _norm_by_qr(cores: Sequence[Tensor], center: Span) -> tuple[Tensor, Tensor]:
    n_batch, span = cores[0].ndim - 3, cores[center[0] : center[1] + 1]
    if (found := norm_walk(span)) is not None:
        return found
    state, exponent = guarded(span, partial(_triangular, span, n_batch), n_batch)
    state, step = split_pow2(state, n_batch)
    return torch.linalg.vector_norm(state, dim=(-3, -2, -1)), exponent + step


def _triangular(cores: Sequence[Tensor], n_batch: int, scale: Scale) -> tuple[Tensor, Tensor]:
    """A core ``(.., t, n, s)`` of the norm of the chain, up to a power of two."""
    state, waiting = scale.weigh(cores[0], 0)
    for core in cores[1:]:
        state, step = scale.split(state)
        carry = torch.linalg.qr(as_left(state), mode="r").R
        core, waiting = scale.weigh(core, waiting + step)
        state = absorb_left(carry, core)
    return common(state, waiting, n_batch)


def balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same train, with its bonds scaled by powers of two if terms go through sizes that lie far apart.

    Then what lies left of a bond has columns of like size, and one exponent will do for what lies right of it.
    """
    return guarded(cores, partial(_balanced, cores), cores[0].ndim - 3)


def _balanced(cores: Sequence[Tensor], scale: Scale) -> list[Tensor]:
    out: list[Tensor] = []
    carry: Tensor | None = None
    waiting: Exponents = 0
    for core in cores:
        core, waiting = scale.weigh(core, waiting)
        state, step = _passed(carry, core, scale)
        waiting, step = plain_exponent(waiting + step), plain_exponent(step)
        out.append(times_pow2(core, -step[..., None, None, :]) if isinstance(step, Tensor) else core)
        carry = torch.linalg.qr(as_left(state), mode="r").R
    return spread_pow2(out, waiting[..., 0] if isinstance(waiting, Tensor) else waiting)
