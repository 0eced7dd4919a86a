"""The sweeps of TT-SVD: how the bases of the unfoldings are found, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.linalg import (
    choose_rank,
    cut_basis,
    gram_basis,
    left_basis,
    orthonormal,
    randomized_basis,
    reorthonormalized,
    squared_norm,
)
from tensortrain.cores.tolerance import Sweep, compute_dtype

__all__ = ["METHODS", "SweepMethod", "Unfolded"]

# (unfolding, largest tail, largest rank) to (basis, kept singular values, tail); no basis means the identity
Cut = Callable[[Tensor, Tensor, int], tuple[Tensor | None, Tensor, Tensor]]

# The relative error that squares of singular values, or differences of squared norms, can still show. Rounding is some
# 1e-16 of the squared norm, so 2e-8 to 4e-8 of the norm; ten times that decides whether they are used at all.
_SQUARES = 4e-8
GRAM_FLOOR = 10 * _SQUARES

_SMALL = 1 << 14  # entries up to which a plain SVD is as fast as anything
_BLOCK_BYTES = 1 << 22  # of a tensor that is widened or subtracted from, block by block: fits the cache
_FIRST_SKETCH = 24  # columns of the first sketch: fewer would not be faster, memory bandwidth being the limit


@dataclass(frozen=True)
class Unfolded:
    """A dense tensor to decompose: ``2**exponent`` times ``x``, with its norm.

    Attributes:
        x: ``(.., n_1, .., n_d)``, contiguous, of any dtype.
        n_batch: Number of batch axes.
        norm: Of ``x``, float64, one for each member.
        exponent: Of two, taken out of ``x`` before, one for each member.
    """

    x: Tensor
    n_batch: int
    norm: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, x: Tensor, exponent: Tensor, n_batch: int) -> Unfolded:
        x = x.contiguous()
        return cls(x, n_batch, squared_norm(x, n_batch).sqrt(), exponent)

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(self.x.shape[self.n_batch :])

    @property
    def scale(self) -> Tensor:
        """The norm, 1 where it is 0."""
        return self.norm.where(self.norm > 0, 1.0)

    def wide(self) -> Tensor:
        """In the compute dtype."""
        return self.x.to(compute_dtype(self.x.dtype))


def _swept(problem: Unfolded, cut_share: float, caps: Sequence[int], cut: Cut) -> Sweep:
    """Left to right: cut every unfolding of what is left to a tail that its share of the tolerance allows."""
    x, d, scale = problem.wide(), len(problem.modes), problem.scale
    delta = cut_share * scale / math.sqrt(max(1, d - 1))
    cores, spectra, tails, rest = _cut_modes(x, problem.n_batch, 1, problem.modes[:-1], caps[1:], delta, cut)
    cores.append(rest.unflatten(-1, (problem.modes[-1], 1)))
    return _sweep(problem, cores, spectra, tails)


def _cut_modes(
    rest: Tensor, n_batch: int, rank: int, modes: Sequence[int], caps: Sequence[int], delta: Tensor, cut: Cut
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Split off the given modes one after the other; what follows them stays as it is.

    Args:
        rest: ``(.., rank * modes[0] .. * what follows)`` in any shape.
        rank: Left rank of the first mode.
        caps: Largest rank behind each mode.
        delta: Largest tail at each bond, one for each member.

    Returns:
        Cores, kept singular values, tails, and ``(.., last rank, what follows)``.
    """
    batch = rest.shape[:n_batch]
    cores, spectra, tails = [], [], []
    for n, cap in zip(modes, caps, strict=False):
        unfolding = rest.reshape(*batch, rank * n, -1)
        basis, s, tail = cut(unfolding, delta, cap)
        rest = unfolding if basis is None else basis.mH @ unfolding
        if basis is None:
            eye = torch.eye(rank * n, dtype=unfolding.dtype, device=unfolding.device)
            basis = eye.expand(*batch, *eye.shape)
        cores.append(basis.unflatten(-2, (rank, n)))
        spectra.append(s)
        tails.append(tail)
        rank = basis.shape[-1]
    return cores, spectra, tails, rest.reshape(*batch, rank, -1)


def _sweep(
    problem: Unfolded, cores: list[Tensor], spectra: list[Tensor], tails: list[Tensor], before: Tensor | float = 0.0
) -> Sweep:
    scale = problem.scale
    return Sweep(
        cores,
        [s / scale[..., None] for s in spectra],
        [tail / scale for tail in tails],
        problem.norm,
        problem.exponent,
        before,
    )


# -- one unfolding ----------------------------------------------------------------------------------------


def _cut_svd(a: Tensor, delta: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    basis, s = left_basis(a)
    rank, tail = choose_rank(s, delta, cap)
    return basis[..., :rank], s[..., :rank], tail


def _cut_gram(a: Tensor, delta: Tensor, cap: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """From the eigenvectors of the smaller Gram matrix. The tail is measured on what the basis leaves."""
    p, q = a.shape[-2:]
    vectors, s = gram_basis(a if p <= q else a.mH)
    # the eigenvalues are wrong by roundings of the largest: the choice keeps clear of that
    rank, nothing = choose_rank(s, 0.9 * delta, cap)
    if rank == p <= q:
        return None, s, nothing
    s = s[..., :rank]
    basis = vectors[..., :rank]
    if p > q:
        basis = reorthonormalized(a @ (basis / s.clamp_min(1e-300).unsqueeze(-2)))
    if rank == min(p, q):
        return basis, s, nothing
    whole = squared_norm(a, a.ndim - 2)
    lost = whole - squared_norm(basis.mH @ a, a.ndim - 2)
    return basis, s, (lost.clamp_min(0.0) + _SQUARES**2 * whole).sqrt()


def _sketched_cut(a: Tensor, delta: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sketch of as many columns as the cap, wherever the cap decides the rank and is small."""
    if 4 * (cap + 10) > min(a.shape[-2:]) or a.ndim > 2:
        return cut_basis(a, delta, cap)
    basis, s = randomized_basis(a, cap)
    whole = squared_norm(a)
    # What the sketch missed is known to half the digits only: the difference of two squares.
    tail = ((whole - s.square().sum()).clamp_min(0.0) + _SQUARES**2 * whole).sqrt()
    # A tail within the tolerance means that a lower rank may do: that takes exact singular values.
    return cut_basis(a, delta, cap) if bool(tail <= delta) else (basis, s, tail)


def _cut_full_rank_first(cut: Cut) -> Cut:
    """Ask first, by a Cholesky factorization, whether anything can be cut at all.

    If ``a a^H - delta^2`` is positive definite, no singular value is within the tolerance: the rank is full, and the
    basis is the identity (or, for a tall matrix, that of any QR). That answer costs a product, an SVD costs much more.
    """

    def asked(a: Tensor, delta: Tensor, cap: int) -> tuple[Tensor | None, Tensor, Tensor]:
        p, q = a.shape[-2:]
        if a.ndim > 2 or min(p, q) > cap or min(p, q) < 64:
            return cut(a, delta, cap)
        gram = a @ a.mH if p <= q else a.mH @ a
        trace = torch.diagonal(gram).real.sum()
        shift = delta.square() + 1e-13 * trace  # squares are wrong by some roundings of the whole
        identity = torch.eye(len(gram), dtype=a.dtype, device=a.device)
        info = torch.linalg.cholesky_ex(gram - shift * identity).info
        if int(info) != 0:
            return cut(a, delta, cap)
        size = trace.sqrt().expand(min(p, q))
        nothing = torch.zeros_like(trace)
        return None if p <= q else orthonormal(a), size, nothing

    return asked


# -- the whole tensor -------------------------------------------------------------------------------------


def _svd_sweep(problem: Unfolded, share: float, caps: Sequence[int]) -> tuple[Sweep, str]:
    return _swept(problem, share, caps, _cut_svd), "svd"


def _qr_sweep(problem: Unfolded, share: float, caps: Sequence[int]) -> tuple[Sweep, str]:
    return _swept(problem, share, caps, _cut_full_rank_first(cut_basis)), "qr"


def _gram_sweep(problem: Unfolded, share: float, caps: Sequence[int]) -> tuple[Sweep, str]:
    if share / math.sqrt(max(1, len(problem.modes) - 1)) < GRAM_FLOOR:
        return _qr_sweep(problem, share, caps)
    return _swept(problem, share, caps, _cut_gram), "gram"


def _randomized_sweep(problem: Unfolded, share: float, caps: Sequence[int]) -> tuple[Sweep, str]:
    found = _sketch_sweep(problem, share, caps)
    if found is not None:
        return found, "randomized"
    if any(cap < most for cap, most in zip(caps, _unfolding_sides(problem.modes), strict=True)):
        return _swept(problem, share, caps, _sketched_cut), "randomized"
    return _qr_sweep(problem, share, caps)


def _auto_sweep(problem: Unfolded, share: float, caps: Sequence[int]) -> tuple[Sweep, str]:
    if problem.x.numel() <= _SMALL or problem.n_batch:
        return _svd_sweep(problem, share, caps)
    found = _sketch_sweep(problem, share, caps)
    return _gram_sweep(problem, share, caps) if found is None else (found, "randomized")


def _unfolding_sides(modes: Sequence[int]) -> list[int]:
    return [min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(len(modes) + 1)]


def _sketch_sweep(problem: Unfolded, share: float, caps: Sequence[int]) -> Sweep | None:
    """Shrink the tensor by one sketch in the middle, measure what it misses, and decompose what is left.

    With an orthonormal basis ``w`` of nearly the row space of the unfolding ``a`` there, ``a w w^H`` is decomposed
    from the left. Cuts right of the middle leave the space of ``w``, so their errors add to what the projection lost,
    not the squares. ``None`` where no small basis will do.
    """
    at = _sketch_bond(problem.modes)
    if at is None or problem.n_batch:
        return None
    modes = problem.modes
    rows, columns = math.prod(modes[:at]), math.prod(modes[at:])
    a = _Blocks(problem.x.reshape(rows, columns))
    # The sketch may use a quarter of what a bond gets of the tolerance.
    basis = _row_basis(a, float(problem.norm), share / 4.0 / math.sqrt(max(1, len(modes) - 1)), min(rows, columns) // 4)
    if basis is None:
        return None
    w, left, lost = basis
    scale = problem.scale
    delta = (share - lost) * scale / math.sqrt(max(1, len(modes) - 1))
    cores, spectra, tails, carry = _cut_modes(left, 0, 1, modes[:at], caps[1:], delta, cut_basis)
    rest = carry @ w.mH
    more = _cut_modes(rest, 0, rest.shape[0], modes[at:-1], caps[at + 1 :], delta, cut_basis)
    last = more[3].reshape(-1, modes[-1], 1)
    return _sweep(problem, [*cores, *more[0], last], [*spectra, *more[1]], [*tails, *more[2]], before=lost)


def _sketch_bond(modes: Sequence[int]) -> int | None:
    """The bond whose unfolding is closest to square: there a sketch and its basis are smallest."""
    d = len(modes)
    if d < 2:
        return None
    at = min(range(1, d), key=lambda k: math.prod(modes[:k]) + math.prod(modes[k:]))
    sides = math.prod(modes[:at]), math.prod(modes[at:])
    return at if min(sides) >= 4 * _FIRST_SKETCH else None


def _row_basis(a: _Blocks, norm: float, tolerance: float, most: int) -> tuple[Tensor, Tensor, float] | None:
    """``(w, a w, lost)`` with orthonormal ``w`` ``(q, l)``, ``||a - a w w^H|| = lost * norm`` within the tolerance."""
    w: Tensor | None = None
    left: Tensor | None = None
    width = min(_FIRST_SKETCH, most)
    generator = torch.Generator(a.x.device).manual_seed(0)
    while True:
        test = torch.randn(a.x.shape[0], width, dtype=a.dtype, device=a.x.device, generator=generator)
        seen = a.adjoint_times(test)
        if w is not None:
            assert left is not None
            seen = seen - w @ (left.mH @ test)
            seen = seen - w @ (w.mH @ seen)  # twice is enough
        new = orthonormal(seen)
        if w is not None:
            new = orthonormal(new - w @ (w.mH @ new))
        projected = a.times(new)
        w = new if w is None else torch.cat((w, new), dim=1)
        left = projected if left is None else torch.cat((left, projected), dim=1)
        missing = 1.0 - float(squared_norm(left)) / norm**2
        # The difference of squares decides where it can; else the residual itself is formed, block by block.
        lost = math.sqrt(max(missing, 0.0) + _SQUARES**2)
        if lost > tolerance and missing <= max(4.0 * tolerance**2, 4.0 * _SQUARES**2):
            lost = a.residual(left, w) / norm
        if lost <= tolerance:
            return w, left, lost
        total = w.shape[1]
        # A first sketch that misses most of what there is has met a spectrum that falls too slowly.
        if missing > 0.5 or total >= most:
            return None
        width = min(2 * total, most - total)


@dataclass(frozen=True)
class _Blocks:
    """A matrix ``(p, q)`` of any dtype that is multiplied in the compute dtype, widened block by block."""

    x: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.x.dtype)

    def _rows(self) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, _BLOCK_BYTES // (self.x.shape[1] * self.dtype.itemsize))
        for start in range(0, self.x.shape[0], step):
            at = slice(start, start + step)
            yield at, self.x[at].to(self.dtype)

    def times(self, w: Tensor) -> Tensor:
        if self.x.dtype == self.dtype:
            return self.x @ w
        return torch.cat([block @ w for _, block in self._rows()])

    def adjoint_times(self, test: Tensor) -> Tensor:
        if self.x.dtype == self.dtype:
            return self.x.mH @ test
        out = torch.zeros(self.x.shape[1], test.shape[1], dtype=self.dtype, device=self.x.device)
        for at, block in self._rows():
            out += block.mH @ test[at]
        return out

    def residual(self, left: Tensor, w: Tensor) -> float:
        """``||x - left w^H||``, formed: exact to rounding where a difference of squares would show nothing."""
        total = torch.zeros((), dtype=torch.float64, device=self.x.device)
        adjoint = w.mH
        for at, block in self._rows():
            total += torch.linalg.vector_norm(torch.addmm(block, left[at], adjoint, alpha=-1)).square()
        return math.sqrt(float(total))


SweepMethod = Callable[[Unfolded, float, Sequence[int]], tuple[Sweep, str]]

METHODS: dict[str, SweepMethod] = {
    "auto": _auto_sweep,
    "svd": _svd_sweep,
    "qr": _qr_sweep,
    "gram": _gram_sweep,
    "randomized": _randomized_sweep,
}
