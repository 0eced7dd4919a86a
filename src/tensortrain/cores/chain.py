"""Functions on lists of cores ``(.., r, n, s)``, on which both types are built.

A TTMatrix joins its two modes to one before it calls these, and splits it again. All axes before the last three
are batch axes, the same for every core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tensortrain.cores.scales import Exponents, Kept, Scale, common, guarded, plain_exponent
from tensortrain.cores.scaling import split_pow2, spread_pow2, times_pow2, work_dtype

__all__ = [
    "absorb_left",
    "absorb_right",
    "add_cores",
    "as_left",
    "as_right",
    "balanced",
    "constant_cores",
    "contract",
    "deviation_parts",
    "dot_parts",
    "hadamard_cores",
    "join_pieces",
    "left_qr",
    "multiplied_pow2",
    "norm_parts",
    "orthogonalize_cores",
    "over_core",
    "place_pow2",
    "right_qr",
    "shares_pow2",
    "singular_values_at",
]

Span = tuple[int, int]


def as_left(core: Tensor) -> Tensor:
    """The left unfolding ``(.., r n, s)``."""
    return core.flatten(-3, -2)


def as_right(core: Tensor) -> Tensor:
    """The right unfolding ``(.., r, n s)``."""
    return core.flatten(-2, -1)


def absorb_left(carry: Tensor, core: Tensor) -> Tensor:
    """``(.., t, r) . (.., r, n, s) -> (.., t, n, s)``."""
    return (carry @ as_right(core)).unflatten(-1, core.shape[-2:])


def absorb_right(core: Tensor, carry: Tensor) -> Tensor:
    """``(.., r, n, s) . (.., s, t) -> (.., r, n, t)``."""
    return (as_left(core) @ carry).unflatten(-2, core.shape[-3:-1])


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The full array ``(.., n_1, .., n_d)`` of a list of cores. Overflows only where an entry itself does."""
    dtype, n_batch = cores[0].dtype, cores[0].ndim - 3
    wide = [core.to(work_dtype(dtype)) for core in cores]
    state = guarded(wide, partial(_contracted, wide, n_batch), n_batch).to(dtype)
    return state.reshape(*cores[0].shape[:-3], *(core.shape[-2] for core in cores))


def _contracted(cores: Sequence[Tensor], n_batch: int, scale: Scale) -> Tensor:
    """``(.., n_1 .. n_d, 1)``: rows are all modes so far, slowest first, and each has an exponent of its own."""
    core, waiting = scale.weigh(cores[0], 0)
    state = as_left(core)
    of_rows: Exponents = 0
    for core in cores[1:]:
        state, step = scale.split(state, axis=-2)
        of_rows = plain_exponent(of_rows + step)
        state, step = scale.split(state)
        core, waiting = scale.weigh(core, waiting + step)
        state = as_left(absorb_left(state, core))
        of_rows = of_rows.repeat_interleave(core.shape[-2], -1) if isinstance(of_rows, Tensor) else of_rows
    return times_pow2(state, plain_exponent(of_rows + waiting))


def join_pieces(
    pieces: Sequence[Tensor],
    n_batch: int = 0,
    *,
    dtype: torch.dtype | None = None,
    waiting: Mapping[int, Exponents] | None = None,
) -> list[Tensor]:
    """Multiply matrices ``(.., r, s)`` into neighbouring cores ``(.., r, n, s)``, to the right where there is one.

    Args:
        pieces: Matrices and cores. Without any core the result is the single matrix that the chain stands for.
        n_batch: Number of batch axes.
        dtype: Of the result, if it is another one.
        waiting: Exponents ``(.., s)`` at the right bond of some pieces.
    """
    dtype = dtype or pieces[0].dtype
    kept = {at: exponents for at, exponents in (waiting or {}).items() if isinstance(exponents, Tensor)}
    if not kept and not any(piece.ndim == n_batch + 2 for piece in pieces):
        return [piece.to(dtype) for piece in pieces]
    wide = [piece.to(work_dtype(dtype)) for piece in pieces]
    run = partial(_joined, wide, n_batch, kept)
    joined = run(Kept(n_batch)) if kept else guarded(wide, run, n_batch, storage=dtype)
    return [core.to(dtype) for core in joined]


def _joined(pieces: Sequence[Tensor], n_batch: int, extra: Mapping[int, Exponents], scale: Scale) -> list[Tensor]:
    cores: list[Tensor] = []
    carry: Tensor | None = None
    waiting: Exponents = 0
    for at, piece in enumerate(pieces):
        piece, waiting = scale.weigh(piece, waiting)
        is_matrix = piece.ndim == n_batch + 2
        if carry is not None:
            piece = carry @ piece if is_matrix else absorb_left(carry, piece)
        if at + 1 < len(pieces) or not is_matrix:
            piece, step = scale.split(piece)
            waiting = waiting + step
        waiting = waiting + extra.get(at, 0)
        carry = piece if is_matrix else None
        if carry is None:
            cores.append(piece)
    if carry is not None and cores:
        cores[-1] = absorb_right(cores[-1], carry)
    elif carry is not None:
        cores = [carry]
    exponent = plain_exponent(waiting)
    return spread_pow2(cores, exponent[..., 0] if isinstance(exponent, Tensor) else exponent)


def constant_cores(modes: Sequence[int], value: int | float | complex | Tensor, like: Tensor) -> list[Tensor]:
    """Rank-1 cores whose every entry is ``value``, a number or one for each member of the batch of ``like``."""
    batch = like.shape[:-3]
    cores = [like.new_ones((*batch, 1, n, 1)) for n in modes]
    cores[0] = cores[0] * over_core(value)
    return cores


def over_core(scalar: int | float | complex | Tensor) -> int | float | complex | Tensor:
    """A scalar, or one for each member of a batch, shaped to multiply a core of three axes."""
    return scalar[..., None, None, None] if isinstance(scalar, Tensor) and scalar.ndim else scalar


def add_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the sum: ranks add."""
    if len(left) == 1:
        return [left[0] + right[0]]
    first = torch.cat((left[0], right[0]), dim=-1)
    last = torch.cat((left[-1], right[-1]), dim=-3)
    return [first, *map(_block_diagonal, left[1:-1], right[1:-1]), last]


def hadamard_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the elementwise product: ranks multiply."""
    return [hadamard_core(a, b) for a, b in zip(left, right, strict=True)]


def hadamard_core(a: Tensor, b: Tensor) -> Tensor:
    """``(.., r, n, s)`` and ``(.., t, n, u)`` to ``(.., r t, n, s u)``."""
    product = a[..., :, None, :, :, None] * b[..., None, :, :, None, :]  # r t n s u
    return product.flatten(-2, -1).flatten(-4, -3)


def dot_parts(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with ``<left, right> = m * 2**e``; the left one is conjugated. Cost: O(d n r^3)."""
    n_batch = left[0].ndim - 3
    env, waiting = guarded([*left, *right], partial(_dotted, left, right, n_batch), n_batch, factors=2)
    env, exponent = split_pow2(env, n_batch)
    return env[..., 0, 0], exponent + waiting


def _dotted(left: Sequence[Tensor], right: Sequence[Tensor], n_batch: int, scale: Scale) -> tuple[Tensor, Tensor | int]:
    batch = left[0].shape[:-3]
    env = left[0].new_ones((*batch, 1, 1))
    mine: Exponents = 0
    theirs: Exponents = 0
    times = torch.matmul if n_batch else torch.mm  # at small ranks what surrounds a product takes most of the time
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        if k:
            env, step = scale.split(env, axis=-2)
            mine = mine + step
            env, step = scale.split(env)
            theirs = theirs + step
        a, mine = scale.weigh(a, mine)
        b, theirs = scale.weigh(b, theirs)
        # two products, never r^4
        env = times(as_left(a).mH, times(env, as_right(b)).reshape(*batch, -1, b.shape[-1]))
    total = plain_exponent(mine) + plain_exponent(theirs)
    return env, total[..., 0] if isinstance(total, Tensor) else total


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


def deviation_parts(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with the root-mean-square ``m * 2**e`` of the entries less their mean.

    What an index adds to the spread is what its core differs from its own mean, seen through the mean of all before it:
    nothing of the size of the mean is ever subtracted, so that a constant has no spread at all.
    """
    n_batch = cores[0].ndim - 3
    rows, exponent = guarded(cores, partial(_deviation, cores, n_batch), n_batch)
    rows, step = split_pow2(rows, n_batch)
    return torch.linalg.vector_norm(rows, dim=(-2, -1)), exponent + step


def _deviation(cores: Sequence[Tensor], n_batch: int, scale: Scale) -> tuple[Tensor, Tensor]:
    mean = cores[0].new_ones((*cores[0].shape[:-3], 1, 1))
    rows = mean[..., :0, :]  # their products with themselves are the covariance of all so far
    waiting: Exponents = 0
    for k, core in enumerate(cores):
        if k:
            state, step = scale.split(torch.cat((mean, rows), dim=-2))
            mean, rows, waiting = state[..., :1, :], state[..., 1:, :], waiting + step
        core, waiting = scale.weigh(core, waiting)
        middle = core.mean(-2, keepdim=True)
        spread = torch.cat((absorb_left(rows, core), absorb_left(mean, core - middle)), dim=-3)
        rows = torch.linalg.qr(as_left(spread) / math.sqrt(max(1, core.shape[-2])), mode="r").R
        mean = mean @ middle.squeeze(-2)
    return common(rows, waiting, n_batch)


def orthogonalize_cores(cores: Sequence[Tensor], center: Span, k: int) -> tuple[list[Tensor], Tensor]:
    """Cores with all but core ``k`` orthonormal, and the power of two taken out of core ``k``.

    Args:
        cores: ``(.., r, n, s)`` each.
        center: Range outside which the cores are orthonormal already.
        k: The core that keeps the norm.
    """
    n_batch = cores[0].ndim - 3
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
        core, step = scale.split(core if carry is None else absorb_left(carry, core))
        waiting = waiting + step
        basis, carry = left_qr(core)
        out.append(basis)
    return out, carry, waiting


def _mirrored(core: Tensor) -> Tensor:
    return core.transpose(-3, -1)


def singular_values_at(cores: Sequence[Tensor], center: Span, bond: int) -> tuple[Tensor, Tensor]:
    """``(s, e)`` with the singular values ``s * 2**e`` of the unfolding at a bond ``1 .. d - 1``, descending."""
    out, exponent = orthogonalize_cores(cores, center, bond)
    last = as_right(out[bond]).mH  # right of the core all is orthonormal
    small = torch.linalg.qr(last, mode="reduced" if last.requires_grad else "r").R
    return torch.linalg.svdvals(small), exponent


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


def _block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    top = torch.cat((a, a.new_zeros((*a.shape[:-1], b.shape[-1]))), dim=-1)
    bottom = torch.cat((b.new_zeros((*b.shape[:-1], a.shape[-1])), b), dim=-1)
    return torch.cat((top, bottom), dim=-3)


def _norm_by_qr(cores: Sequence[Tensor], center: Span) -> tuple[Tensor, Tensor]:
    n_batch, span = cores[0].ndim - 3, cores[center[0] : center[1] + 1]
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
        state, step = scale.split(core if carry is None else absorb_left(carry, core))
        waiting, step = plain_exponent(waiting + step), plain_exponent(step)
        out.append(times_pow2(core, -step[..., None, None, :]) if isinstance(step, Tensor) else core)
        carry = torch.linalg.qr(as_left(state), mode="r").R
    return spread_pow2(out, waiting[..., 0] if isinstance(waiting, Tensor) else waiting)


def place_pow2(
    cores: Sequence[Tensor], exponent: Tensor | int, at: int, dtype: torch.dtype
) -> tuple[list[Tensor], bool]:
    """Multiply by ``2**exponent``: core ``at`` where ``dtype`` can hold that, else every core alike.

    Returns:
        The cores, and whether core ``at`` took it all.
    """
    shares, single = shares_pow2(cores, exponent, at, dtype)
    return multiplied_pow2(cores, shares), single


def shares_pow2(
    cores: Sequence[Tensor], exponent: Tensor | int, at: int, dtype: torch.dtype
) -> tuple[list[Tensor | int], bool]:
    """How ``2**exponent`` is shared out among the cores, so that ``dtype`` can hold their entries.

    Entries of core ``at`` may be of any size, those of the others are taken to be at most about 1.

    Returns:
        An exponent for each core, and whether core ``at`` gets it all.
    """
    top = math.floor(math.log2(torch.finfo(dtype).max)) - 2
    size = _exponent_of(cores[at])
    total = torch.where(size.isfinite(), exponent + size, 0).to(torch.int32)
    lowest, highest = (int(e) for e in torch.aminmax(total)) if total.numel() else (0, 0)  # the one host sync
    if -top // 2 <= lowest and highest <= top:
        return [exponent if k == at else 0 for k in range(len(cores))], True
    each, extra = total // len(cores), total % len(cores)
    shares = [each + (extra > k) for k in range(len(cores))]
    shares[at] = shares[at] - torch.where(size.isfinite(), size, 0).to(torch.int32)
    return list(shares), False


def multiplied_pow2(cores: Sequence[Tensor], shares: Sequence[Tensor | int]) -> list[Tensor]:
    """Every core times its own power of two."""
    pairs = zip(cores, shares, strict=True)
    return [core if isinstance(share, int) and share == 0 else times_pow2(core, share) for core, share in pairs]


def _exponent_of(core: Tensor) -> Tensor:
    """Of two, of the largest entry of each member; minus infinity for zeros."""
    if core.numel() == 0:
        return core.new_full(core.shape[:-3], -math.inf, dtype=torch.float64)
    largest = core.detach().abs().amax(dim=(-3, -2, -1))
    return torch.where(largest > 0, torch.frexp(largest).exponent.to(torch.float64), -math.inf)
