"""From a dense tensor to a train with a promised error: TT-SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from tensortrain._moved import names_of_before
from tensortrain.cores.decompose import unfolding_spectra
from tensortrain.cores.dense import SLAB_BYTES, cores_of_dense
from tensortrain.cores.ranks import RankLike
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.train import TensorTrain

__all__ = ["SvdMethod", "tt_svd", "unfolding_spectra"]

SvdMethod = Literal["auto", "svd", "qr", "gram", "randomized"]


def tt_svd(
    x: Tensor | Any,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: SvdMethod | str = "auto",
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    batch_dims: int = 0,
    slab_bytes: int = SLAB_BYTES,
) -> Approximation[Any]:
    r"""Decompose a dense tensor, or with modes a dense matrix.

    Computed in float64 or complex128, and stored in the dtype of ``x``. All cores but the last are
    left-orthogonal. Differentiable: the result carries the gradient of the cuts at the ranks that were found.

    Args:
        x: ``(n_1, .., n_d)``, or ``(M, N)`` where modes are given. What does not fit the memory may be a NumPy
            array (memory-mapped), a slice of a safetensors file (``safe_open(..).get_slice(name)``), or an iterable
            of slabs along the first mode with ``shape``.
        eps: Largest relative Frobenius error, a fraction in ``[0, 1)``. The default finds the numerical rank:
            1e-12 in float64, ``2 (d + 1)`` roundings in lower dtypes (about 1e-6 in float32).
        max_rank: Cap on the ranks, an int or a tuple (inner ranks, or with the boundary ones). It goes before
            ``eps``; the bound tells the error that is then promised.
        method: How bases of the unfoldings are found.

            - ``"svd"``: a singular value decomposition of each.
            - ``"qr"``: of the triangle of a blocked QR that forms no Q; as exact, and faster.
            - ``"gram"``: of the product with its own transpose, two passes over the data. It resolves errors down
              to 4e-7; below that ``"qr"`` takes over.
            - ``"randomized"``: a sketch shrinks the tensor first, and what it misses is measured, not estimated.
              Where no small sketch will do, each unfolding is sketched at the cap, or ``"qr"`` takes over.
            - ``"auto"``: a sketch if the tensor is large and its ranks turn out to be small; else ``"gram"`` or
              ``"qr"`` by ``eps``; ``"svd"`` for small tensors.
        out_modes, in_modes: Row and column modes, with products ``M`` and ``N``; the value is then
            a TTMatrix.
        shape: Shape of the whole where ``x`` is an iterable of slabs.
        batch_dims: 1 if the first axis of ``x`` counts trains: they get the same ranks, and ``eps`` holds for each.
        slab_bytes: How much of a stored array is read at a time.

    Returns:
        Approximation: ``value`` a TensorTrain or TTMatrix; ``rel_error_bound`` covers the cuts, the cast
        to the dtype of ``x`` and rounding. ``info``: ``method`` (the one that did it), ``eps``, ``bond_errors``
        (the relative cut at each bond) and, for a batch, ``rel_error_bounds``.

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
        ShapeError: ``x`` has no mode, or modes do not fit its shape.
        RankError: ``eps`` or ``max_rank`` lies outside its range.
        DTypeError: ``x`` is neither floating nor complex.
        KindError: ``x`` is no tensor, or the method has no such name.
        ConvergenceError: No factorization of an unfolding converged.

    Cost: O(N n r) flops for N entries; ``"auto"`` reads a tensor of low rank about three times.
    Accuracy: ``||x - value|| <= rel_error_bound ||x|| <= eps ||x||`` without a cap, as long as ``eps`` is
    above what the dtype can hold; within ``sqrt(d - 1)`` of the best error at the ranks found.
    Source: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, Algorithm 1; Roehrig-Zoellner et al., arXiv:2102.00104 (no Q);
    Huber, Schneider, Wolf, 2017 (sketches).

    Example:
        >>> i = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> tt_svd(i[:, None, None] + i[:, None] + i).value.ranks
        (1, 2, 2, 1)
    """
    done = cores_of_dense(
        x,
        eps=eps,
        max_rank=max_rank,
        method=method,
        out_modes=out_modes,
        in_modes=in_modes,
        shape=shape,
        batch_dims=batch_dims,
        slab_bytes=slab_bytes,
    )
    value: TensorTrain | TTMatrix
    if out_modes is None or in_modes is None:
        value = TensorTrain(done.cores, done.center)
    else:
        value = TTMatrix.from_merged(done.cores, out_modes, in_modes, done.center)
    return Approximation(value, done.bound, done.info)


__getattr__ = names_of_before(__name__, "tensor.decompose")
