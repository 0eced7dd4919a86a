"""Functions on lists of cores ``(.., r, n, s)``, on which both types are built.

A TTMatrix joins its two modes to one before it calls these, and splits it again. All axes before the last three
are batch axes, the same for every core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.tensor.scaling import split_pow2, times_pow2

__all__ = [
    "absorb_left",
    "absorb_right",
    "add_cores",
    "as_left",
    "as_right",
    "constant_cores",
    "contract",
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
    """The full array ``(.., n_1, .., n_d)`` of a list of cores."""
    state = as_left(cores[0])
    for core in cores[1:]:
        state = as_left(absorb_left(state, core))  # rows: all modes so far, slowest first
    return state.reshape(*cores[0].shape[:-3], *(core.shape[-2] for core in cores))


def join_pieces(pieces: Sequence[Tensor], n_batch: int = 0) -> list[Tensor]:
    """Multiply matrices ``(.., r, s)`` into neighbouring cores ``(.., r, n, s)``, to the right where there is one.

    Without any core the result is the single matrix that the chain stands for.
    """
    cores: list[Tensor] = []
    carry: Tensor | None = None
    for piece in pieces:
        is_matrix = piece.ndim == n_batch + 2
        if carry is not None:
            piece = carry @ piece if is_matrix else absorb_left(carry, piece)
        if is_matrix:
            carry = piece
        else:
            cores.append(piece)
            carry = None
    if carry is None:
        return cores
    if not cores:
        return [carry]
    cores[-1] = absorb_right(cores[-1], carry)
    return cores


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
    core = left[0]
    # To look at what came out would be a sync on a GPU, and in a batch the members differ.
    can_look = core.ndim == 3 and not (core.is_cuda or torch.compiler.is_compiling() or _is_transformed())
    # At small ranks scaling takes most of the time: it is left out as long as nothing nears the ends of the range.
    stride = int(math.log2(torch.finfo(core.dtype).max)) // 64 if can_look else 1
    env, exponent, sizes = _dot_steps(left, right, stride)
    if stride > 1:
        worst = float(torch.stack(torch._foreach_norm(sizes)).log2().abs().amax())
        if not worst < 0.4 * math.log2(torch.finfo(core.dtype).max):
            env, exponent, _ = _dot_steps(left, right, 1)
    return env[..., 0, 0], exponent


def _dot_steps(left: Sequence[Tensor], right: Sequence[Tensor], stride: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The inner product, scaled every so many steps, and what there was after each of the steps."""
    batch, n_batch = left[0].shape[:-3], left[0].ndim - 3
    env = left[0].new_ones((*batch, 1, 1))
    exponent = torch.zeros((), dtype=torch.int32, device=env.device)
    times = torch.matmul if n_batch else torch.mm  # at small ranks what surrounds a product takes most of the time
    seen = []
    for k, (a, b) in enumerate(zip(left, right, strict=True), start=1):
        # two products, never r^4
        env = times(as_left(a).mH, times(env, as_right(b)).reshape(*batch, -1, b.shape[-1]))
        seen.append(env.detach())
        if k % stride == 0 or k == len(left):
            env, step = split_pow2(env, n_batch)
            exponent = exponent + step
    return env, exponent, seen


def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


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


def orthogonalize_cores(cores: Sequence[Tensor], center: Span, k: int) -> tuple[list[Tensor], Tensor]:
    """Cores with all but core ``k`` orthonormal, and the power of two taken out of core ``k``.

    Args:
        cores: ``(.., r, n, s)`` each.
        center: Range outside which the cores are orthonormal already.
        k: The core that keeps the norm.
    """
    out, n_batch = list(cores), cores[0].ndim - 3
    exponent = torch.zeros((), dtype=torch.int32, device=out[0].device)
    for at in range(center[0], k):
        out[at], carry = left_qr(out[at])
        carry, step = split_pow2(carry, n_batch)
        out[at + 1] = absorb_left(carry, out[at + 1])
        exponent = exponent + step
    for at in range(center[1], k, -1):
        out[at], carry = right_qr(out[at])
        carry, step = split_pow2(carry, n_batch)
        out[at - 1] = absorb_right(out[at - 1], carry)
        exponent = exponent + step
    out[k], step = split_pow2(out[k], n_batch)
    return out, exponent + step


def singular_values_at(cores: Sequence[Tensor], center: Span, bond: int) -> tuple[Tensor, Tensor]:
    """``(s, e)`` with the singular values ``s * 2**e`` of the unfolding at a bond ``1 .. d - 1``, descending."""
    out, exponent = orthogonalize_cores(cores, center, bond)
    small = torch.linalg.qr(as_right(out[bond]).mH, mode="r").R  # right of the core all is orthonormal
    return torch.linalg.svdvals(small), exponent


def left_qr(core: Tensor) -> tuple[Tensor, Tensor]:
    """``core = q . carry`` with ``q`` ``(.., r, n, t)`` left-orthogonal and ``carry`` ``(.., t, s)``."""
    q, carry = torch.linalg.qr(as_left(core))
    return q.unflatten(-2, core.shape[-3:-1]), carry


def right_qr(core: Tensor) -> tuple[Tensor, Tensor]:
    """``core = carry . q`` with ``q`` ``(.., t, n, s)`` right-orthogonal and ``carry`` ``(.., r, t)``."""
    q, carry = torch.linalg.qr(as_right(core).mH)
    return q.mH.unflatten(-1, core.shape[-2:]), carry.mH


def _block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    top = torch.cat((a, a.new_zeros((*a.shape[:-1], b.shape[-1]))), dim=-1)
    bottom = torch.cat((b.new_zeros((*b.shape[:-1], a.shape[-1])), b), dim=-1)
    return torch.cat((top, bottom), dim=-3)


def _norm_by_qr(cores: Sequence[Tensor], center: Span) -> tuple[Tensor, Tensor]:
    lo, hi = center
    n_batch = cores[0].ndim - 3
    state, exponent = split_pow2(cores[lo], n_batch)
    for core in cores[lo + 1 : hi + 1]:
        carry = torch.linalg.qr(as_left(state), mode="r").R
        state, step = split_pow2(absorb_left(carry, core), n_batch)
        exponent = exponent + step
    return torch.linalg.vector_norm(state, dim=(-3, -2, -1)), exponent


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
