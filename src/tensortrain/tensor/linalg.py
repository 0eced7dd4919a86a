"""Dense linear algebra that does not give up: orthonormal bases with the error of cutting them."""

from __future__ import annotations

import torch
from torch import Tensor

from tensortrain.errors import ConvergenceError

__all__ = ["choose_rank", "gram_singular_values", "left_basis", "randomized_basis", "singular_values"]


def left_basis(a: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the columns of a matrix, most important direction first.

    Args:
        a: ``(p, q)``, float64 or complex128.

    Returns:
        ``(u, s)``: ``u`` is ``(p, t)`` with orthonormal columns, ``t = min(p, q)``; ``s`` is ``(t,)``, real
        and descending. Keeping ``t' < t`` columns leaves the error ``||s[t':]||``. ``s`` holds the singular
        values, except after a failed SVD: then the row norms of ``u^H a``, for which that is as true.

    Raises:
        ConvergenceError: Neither an SVD nor the eigenvalues of the Gram matrix converged.

    Cost: O(p q min(p, q)) flops; a wide matrix is first reduced by a QR that forms no Q.
    """
    small = _wide_to_square(a)
    try:
        u, s = _svd(small)
        if bool(torch.isfinite(s).all()):  # a driver may also fail without a word
            return u, s
    except torch.linalg.LinAlgError:
        pass
    return _gram_basis(small)


def singular_values(a: Tensor) -> Tensor:
    """Singular values of a matrix, descending, ``(min(p, q),)``, with the fallback of ``left_basis``."""
    small = _wide_to_square(a if a.shape[0] <= a.shape[1] else a.mH)
    try:
        values = torch.linalg.svdvals(small)
        if bool(torch.isfinite(values).all()):
            return values
    except torch.linalg.LinAlgError:
        pass
    return _gram_basis(small)[1]


def gram_singular_values(a: Tensor) -> Tensor:
    """Singular values from the eigenvalues of the smaller Gram matrix: those below 1e-8 of the largest are noise.

    Cost: one product and a symmetric eigenproblem of the smaller side, several times cheaper than an SVD.
    """
    gram = a @ a.mH if a.shape[0] <= a.shape[1] else a.mH @ a
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


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
    sketch = torch.randn(a.shape[1], rank + 10, dtype=a.dtype, device=a.device, generator=generator)
    basis = torch.linalg.qr(a @ sketch).Q
    for _ in range(2):
        basis = torch.linalg.qr(a @ torch.linalg.qr(a.mH @ basis).Q).Q
    u, s, _ = torch.linalg.svd(basis.mH @ a, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank]


def choose_rank(s: Tensor, delta: float, cap: int) -> tuple[int, Tensor]:
    """Smallest rank whose discarded tail is at most ``delta``, at least 1 and at most ``cap``.

    Args:
        s: ``(t,)``, descending, not negative.
        delta: Largest root-sum-square of what is discarded, in the unit of ``s``.
        cap: Largest rank, which goes before ``delta``.

    Returns:
        The rank, and the root-sum-square of ``s[rank:]`` (0-d).
    """
    # Summed from the small end: the other way round the small values would drown.
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = int((tails > delta).sum())  # the one host sync of this decision
    rank = max(1, min(rank, cap, s.numel()))
    return rank, tails[rank] if rank < s.numel() else s.new_zeros(())


def _wide_to_square(a: Tensor) -> Tensor:
    """A matrix with the same ``a a^H`` and no more columns than rows."""
    if a.shape[1] <= a.shape[0]:
        return a
    return torch.linalg.qr(a.mH, mode="r").R.mH


def _svd(a: Tensor) -> tuple[Tensor, Tensor]:
    try:
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
    except torch.linalg.LinAlgError:
        if not a.is_cuda:
            raise
        u, s, _ = torch.linalg.svd(a, full_matrices=False, driver="gesvd")  # slower, and more robust
    return u, s


def _gram_basis(a: Tensor) -> tuple[Tensor, Tensor]:
    # Small eigenvalues of the Gram matrix are wrong by up to 1e-16 ||a||^2, but its eigenvectors are
    # orthonormal: what they miss of `a` is read off `a` itself, so a tolerance is kept all the same.
    try:
        basis = torch.linalg.eigh(a @ a.mH).eigenvectors
    except torch.linalg.LinAlgError as error:
        raise ConvergenceError(
            f"a factorization must converge: both the SVD and the eigenvalues of a {tuple(a.shape)} matrix "
            f"did not. "
            "Rescale the data, or look for entries of wildly different size."
        ) from error
    norms = torch.linalg.vector_norm(basis.mH @ a, dim=1)
    order = norms.argsort(descending=True)
    return basis[:, order], norms[order]
