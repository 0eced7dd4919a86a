"""Dense linear algebra that does not give up: orthonormal bases with the error of cutting them.

Every function takes batch axes in front of the two of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tensortrain.errors import ConvergenceError

__all__ = [
    "choose_rank",
    "cut",
    "cut_along",
    "cut_basis",
    "gram_basis",
    "gram_root",
    "gram_singular_values",
    "left_basis",
    "orthonormal",
    "randomized_basis",
    "reorthonormalized",
    "robust_svd",
    "singular_values",
    "squared_norm",
    "triangle",
]


def left_basis(a: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the columns of a matrix, most important direction first.

    Args:
        a: ``(.., p, q)``, float64 or complex128.

    Returns:
        ``(u, s)``: ``u`` is ``(.., p, t)`` with orthonormal columns, ``t = min(p, q)``; ``s`` is ``(.., t)``, real
        and descending. Keeping ``t' < t`` columns leaves the error ``||s[t':]||``. ``s`` holds the singular
        values, except after a failed SVD: then the row norms of ``u^H a``, for which that is as true.

    Raises:
        ConvergenceError: Neither an SVD nor the eigenvalues of the Gram matrix converged.

    Cost: O(p q min(p, q)) flops; a wide matrix is first reduced by a QR that forms no Q.
    """
    small = a if a.shape[-1] <= a.shape[-2] else triangle(a.mH).mH
    found = robust_svd(small)
    return _rotated_basis(small) if found is None else found[:2]


def cut_basis(a: Tensor, delta: Tensor | float, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading left singular vectors of a matrix that leave a tail of at most ``delta``.

    Args:
        a: ``(.., p, q)``, float64 or complex128.
        delta: Largest root-sum-square of the singular values that are cut, one or one for each member.
        cap: Largest rank, which goes before ``delta``.

    Returns:
        ``(u, s, tail)``: ``(.., p, r)`` orthonormal, the kept values ``(.., r)``, and the tail.

    Cost: 2 p q^2 flops for a tall matrix: the basis comes from the triangle of a QR that forms no Q,
        ``u = a v / s``, and a second such step makes it orthonormal to rounding. That is 2 to 3 times faster than
        an SVD of the whole.
    """
    if a.shape[-2] < 2 * a.shape[-1]:
        return _kept(*left_basis(a), delta, cap)
    found = robust_svd(triangle(a))
    if found is None:
        return _kept(*left_basis(a), delta, cap)
    _, s, vh = found
    rank, tail = choose_rank(s, delta, cap)
    s, v = s[..., :rank], vh[..., :rank, :].mH
    # One step leaves u orthonormal to 1e-16 s_1 / s_r: beyond this ratio the second step would not converge.
    if not bool((s[..., -1] > 1e-12 * s[..., 0]).all()):
        u, values = left_basis(a)
        return u[..., :rank], values[..., :rank], tail
    return reorthonormalized(a @ (v / s.unsqueeze(-2))), s, tail


def reorthonormalized(u: Tensor) -> Tensor:
    """A basis that is orthonormal to rounding from one that nearly is, without turning its vectors."""
    if u.ndim == 2 and not u.is_cuda:
        gram = u.mH @ u
        factor, info = torch.linalg.cholesky_ex(gram, upper=True)
        deviation = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=u.dtype, device=u.device))
        if bool((info == 0) & (deviation < 0.5)):
            return torch.linalg.solve_triangular(factor, u, upper=True, left=False)
    q, r = torch.linalg.qr(u)
    signs = torch.diagonal(r, dim1=-2, dim2=-1).sgn()  # with these the triangle is close to the identity
    return q * signs.where(signs != 0, 1.0).unsqueeze(-2)


def _kept(u: Tensor, s: Tensor, delta: Tensor | float, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    rank, tail = choose_rank(s, delta, cap)
    return u[..., :rank], s[..., :rank], tail


def singular_values(a: Tensor) -> Tensor:
    """Singular values of a matrix, descending, ``(.., min(p, q))``, with the fallback of ``left_basis``."""
    small = triangle(a if a.shape[-2] > a.shape[-1] else a.mH)
    try:
        values = torch.linalg.svdvals(small)
        if bool(torch.isfinite(values).all()):
            return values
    except torch.linalg.LinAlgError:
        pass
    found = robust_svd(small)
    return _rotated_basis(small.mH)[1] if found is None else found[1]


def gram_basis(a: Tensor) -> tuple[Tensor, Tensor]:
    """As ``left_basis`` from the eigenvalues of ``a a^H``: values below 1e-8 of the largest are noise.

    Cost: one product and a symmetric eigenproblem of side p.
    """
    try:
        values, vectors = torch.linalg.eigh(a @ a.mH)
    except torch.linalg.LinAlgError:
        return left_basis(a)
    return vectors.flip(-1), values.flip(-1).clamp_min(0).sqrt()


def gram_root(gram: Tensor) -> Tensor:
    """``c`` ``(.., q, t)`` with ``c c^H = gram``, ``t`` its rank to rounding.

    Entries are right to some roundings of ``c_i c_j``, the norms of their two rows: small rows beside large ones are
    as good as alone, since the matrix is scaled to a diagonal of ones first.

    Args:
        gram: ``(.., q, q)``, positive semidefinite, float64 or complex128.

    Cost: O(q t^2) by a pivoted Cholesky factorization on the CPU; elsewhere a symmetric eigenproblem.
    Source: Higham, "Analysis of the Cholesky decomposition of a semi-definite matrix", 1990.
    """
    sizes = gram.diagonal(dim1=-2, dim2=-1).real.clamp_min(0.0).sqrt()
    safe = sizes.where(sizes > 0, 1.0)
    return sizes.unsqueeze(-1) * _scaled_root(gram / safe.unsqueeze(-1) / safe.unsqueeze(-2))


def _scaled_root(gram: Tensor) -> Tensor:
    """``gram_root`` where the diagonal holds ones, and zeros where all is zero."""
    if gram.ndim > 2 or gram.is_cuda or gram.numel() == 0:
        values, vectors = torch.linalg.eigh(gram)
        return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    from scipy.linalg.lapack import dpstrf, zpstrf  # torch has no pivoted Cholesky, SciPy has

    factorize = zpstrf if gram.is_complex() else dpstrf
    factor, pivots, rank, _ = factorize(gram.resolve_conj().numpy(), lower=True, tol=4 * _UNIT)
    rank = max(1, int(rank))
    root = torch.zeros(len(gram), rank, dtype=gram.dtype)
    root[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(factor[:, :rank]).tril()
    return root


_UNIT = 1.2e-16  # of rounding in float64


def gram_singular_values(a: Tensor) -> Tensor:
    """Singular values from the eigenvalues of the smaller Gram matrix: those below 1e-8 of the largest are noise.

    Cost: one product and a symmetric eigenproblem of the smaller side, several times cheaper than an SVD.
    """
    gram = a @ a.mH if a.shape[-2] <= a.shape[-1] else a.mH @ a
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt()


def triangle(a: Tensor) -> Tensor:
    """The triangular factor of a QR that forms no Q: ``r^H r = a^H a``, ``(.., min(p, q), q)``.

    A tall matrix is taken in blocks of rows that fit the cache, and the triangles of two blocks make the next.

    Cost: 2 p q^2 flops.
    Source: Demmel et al., SIAM J. Sci. Comput. 34(1), 2012 (TSQR).
    """
    p, q = a.shape[-2:]
    block = max(8 * q, 8192)
    if a.ndim > 2 or p <= 4 * block or a.is_cuda:
        return torch.linalg.qr(a, mode="r").R
    triangles = [torch.linalg.qr(rows, mode="r").R for rows in a.split(block)]
    return triangle(torch.cat(triangles))


def orthonormal(a: Tensor) -> Tensor:
    """Orthonormal basis ``(.., p, min(p, q))`` of the columns of a matrix."""
    return torch.linalg.qr(a).Q


def randomized_basis(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Nearly the leading left singular vectors, by a Gaussian sketch and two power iterations.

    Args:
        a: ``(p, q)``.
        rank: Columns wanted.

    Returns:
        ``(u, s)``: ``(p, rank)`` orthonormal, and the ``rank`` singular values of the projected matrix.

    Cost: O(p q (rank + 10)) flops.
    Source: Halko, Martinsson, Tropp, SIAM Review 53(2), 2011, algorithms 4.4 and 5.1.
    """
    generator = torch.Generator(a.device).manual_seed(0)
    sketch = torch.randn(a.shape[-1], rank + 10, dtype=a.dtype, device=a.device, generator=generator)
    basis = orthonormal(a @ sketch)
    for _ in range(2):
        basis = orthonormal(a @ orthonormal(a.mH @ basis))
    u, s = left_basis(basis.mH @ a)
    return (basis @ u)[..., :rank], s[..., :rank]


def squared_norm(x: Tensor, n_batch: int = 0) -> Tensor:
    """Sum of the squared moduli of all entries, of each member of a batch, accurate to some roundings.

    Torch's norm adds up one after the other: over millions of entries its square is wrong by 1e-13, and differences
    of two squares need better. So norms of short rows are squared and summed pairwise.
    """
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    flat = real.flatten(n_batch) if real.ndim > n_batch else real.unsqueeze(-1)
    if flat.dtype == torch.float64:
        return _row_energy(flat)
    # widened block by block: a block stays in the cache
    blocks = [_row_energy(block.double()) for block in flat.split(_ROW << 8, dim=-1)]
    return torch.stack(blocks).sum(0) if blocks else flat.new_zeros(flat.shape[:-1], dtype=torch.float64)


def _row_energy(flat: Tensor) -> Tensor:
    n = flat.shape[-1] // _ROW * _ROW
    head = torch.linalg.vector_norm(flat[..., :n].unflatten(-1, (-1, _ROW)), dim=-1) if n else flat[..., :0]
    return head.square().sum(-1) + torch.linalg.vector_norm(flat[..., n:], dim=-1).square()


_ROW = 1024


def choose_rank(s: Tensor, delta: Tensor | float, cap: int) -> tuple[int, Tensor]:
    """Smallest rank whose discarded tail is at most ``delta``, at least 1 and at most ``cap``.

    Args:
        s: ``(.., t)``, descending, not negative.
        delta: Largest root-sum-square of what is discarded, in the unit of ``s``; one, or one for each member.
        cap: Largest rank, which goes before ``delta``.

    Returns:
        The rank, the largest that a member of the batch needs, and the root-sum-squares of ``s[.., rank:]``.
    """
    # Summed from the small end: the other way round the small values would drown.
    tails = s.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    limit = delta[..., None] if isinstance(delta, Tensor) else delta
    needed = (tails > limit).sum(-1)
    rank = int(needed.amax()) if needed.numel() else 1  # the one host sync of this decision
    rank = max(1, min(rank, cap, s.shape[-1]))
    return rank, tails[..., rank] if rank < s.shape[-1] else torch.zeros_like(tails[..., 0])


def robust_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The reduced SVD ``(u, s, v^H)`` by the fastest driver that converges, or ``None`` if none does.

    After divide and conquer (gesdd) comes the QR iteration (gesvd), slower and more robust; after that both again
    in double precision. A driver may also fail without a word: then it returns NaN.
    """
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}.get(a.dtype)
    for dtype in (a.dtype,) if wider is None else (a.dtype, wider):
        for driver in (_gesdd, _gesvd):
            try:
                u, s, vh = driver(a.to(dtype))
            except (torch.linalg.LinAlgError, ArithmeticError, ValueError):
                continue
            if bool(torch.isfinite(s).all()):
                return u.to(a.dtype), s.to(a.real.dtype), vh.to(a.dtype)
    return None


def _gesdd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(a, full_matrices=False)


def _gesvd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.is_cuda:
        return torch.linalg.svd(a, full_matrices=False, driver="gesvd")
    from scipy.linalg import LinAlgError, svd  # torch has no such driver on the CPU, SciPy has

    try:
        members = a.resolve_conj().reshape(-1, *a.shape[-2:])
        flat = [svd(m.numpy(), full_matrices=False, lapack_driver="gesvd") for m in members]
    except LinAlgError as error:
        raise ArithmeticError(str(error)) from error
    u, s, vh = (torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*flat, strict=True))
    batch = a.shape[:-2]
    return u.reshape(*batch, *u.shape[-2:]), s.reshape(*batch, -1), vh.reshape(*batch, *vh.shape[-2:])


def _rotated_basis(a: Tensor) -> tuple[Tensor, Tensor]:
    # Small eigenvalues of the Gram matrix are wrong by up to 1e-16 ||a||^2, but its eigenvectors are
    # orthonormal: what they miss of `a` is read off `a` itself, so a tolerance is kept all the same.
    try:
        basis = torch.linalg.eigh(a @ a.mH).eigenvectors
    except torch.linalg.LinAlgError as error:
        raise ConvergenceError(
            f"a factorization must converge: both the SVD and the eigenvalues of a {tuple(a.shape)} matrix did not. "
            "Rescale the data, or look for entries of wildly different size."
        ) from error
    norms = torch.linalg.vector_norm(basis.mH @ a, dim=-1)
    order = norms.argsort(dim=-1, descending=True)
    return basis.gather(-1, order.unsqueeze(-2).expand_as(basis)), norms.gather(-1, order)


def cut(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(u, b)``: the leading left singular vectors and ``b = u^H a``, so that ``u b`` is the best rank-r matrix.

    Differentiable where ``u b`` is: singular values may repeat among those kept, and vanish among those cut. Of
    the many bases of one space the derivative follows the one that does not turn within it (``u^H du = 0``).
    Where the cut separates equal values no derivative exists; the terms that would be infinite are left out.

    Args:
        a: ``(.., p, q)``, float64 or complex128.
        rank: At most ``min(p, q)``.

    Returns:
        ``(.., p, rank)`` and ``(.., rank, q)``.
    """
    return _Cut.apply(a, rank)


def cut_along(a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """As ``cut``, with a basis that is known: it comes back as it is, with the derivative that ``cut`` has.

    Args:
        a: ``(.., p, q)``, float64 or complex128.
        basis: ``(.., p, r)``, orthonormal, of the space of leading left singular vectors or one close to it.
    """
    return _CutAlong.apply(a, basis)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, vh = _svd_with_derivative(a)
        ctx.rank = rank
        ctx.save_for_backward(u, s, vh)
        return u[..., :rank].contiguous(), s[..., :rank, None] * vh[..., :rank, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_u: Tensor, grad_b: Tensor) -> tuple[Tensor, None]:
        u, s, vh = ctx.saved_tensors
        r = ctx.rank
        kept, rest = (u[..., :r], s[..., :r], vh[..., :r, :]), (u[..., r:], s[..., r:], vh[..., r:, :])
        return _pulled_back(kept, rest, grad_u, grad_b), None


class _CutAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, basis)
        return basis.clone(), basis.mH @ a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_u: Tensor, grad_b: Tensor) -> tuple[Tensor, None]:
        a, basis = ctx.saved_tensors
        b = basis.mH @ a
        turn, s, vh = _svd_with_derivative(b)
        u2, s2, v2h = _svd_with_derivative(a - basis @ b)
        # Where nothing but rounding is left, the vectors mean nothing.
        is_there = s2 > 1e-14 * s[..., :1]
        rest = u2 * is_there.unsqueeze(-2), s2 * is_there, v2h
        return _pulled_back((basis @ turn, s, vh), rest, grad_u @ turn, turn.mH @ grad_b), None


_Svd = tuple[Tensor, Tensor, Tensor]


def _svd_with_derivative(a: Tensor) -> _Svd:
    found = robust_svd(a)
    if found is None:
        raise ConvergenceError(
            f"a factorization must converge: the SVD of a {tuple(a.shape)} matrix did not, and its derivative "
            "needs one. Rescale the data, or work under torch.no_grad()."
        )
    return found


def _pulled_back(kept: _Svd, rest: _Svd, grad_u: Tensor, grad_b: Tensor) -> Tensor:
    """The gradient of what was cut, from those of the kept vectors ``u`` and of ``b = u^H a``."""
    # A change dA turns the basis by du = (rest of the space) X with X_ji = [s_i (U2' dA V1)_ji + s_j
    # (U1' dA V2)_ij^*] / (s_i^2 - s_j^2), i kept and j cut; b follows as db = du' A + u' dA.
    (u1, s1, v1h), (u2, s2, v2h) = kept, rest
    a_b = (u1 * s1[..., None, :]) @ (v1h @ grad_b.mH) + (u2 * s2[..., None, :]) @ (v2h @ grad_b.mH)
    pull = grad_u + a_b
    unit = torch.finfo(s1.dtype).eps
    largest = s1[..., :1]
    inside = u2.mH @ pull
    gap = s1[..., None, :].square() - s2[..., :, None].square()
    inside = inside * gap / (gap.square() + (unit * largest.square())[..., None].square()).clamp_min(1e-300)
    outside = pull - u1 @ (u1.mH @ pull) - u2 @ (u2.mH @ pull)
    inverse = s1 / (s1.square() + (unit * largest).square()).clamp_min(1e-300)
    through = (u2 @ (inside * s1[..., None, :]) + outside * inverse[..., None, :]) @ v1h
    return u1 @ (grad_b + (inside.mH * s2[..., None, :]) @ v2h) + through
