"""Maps from free numbers to constrained cores, as ``torch.nn.utils.parametrize`` wants them.

All compute in float64 and cast at the end: near half turns the Cayley transform amplifies rounding by the size of
its argument, which in float32 leaves ``Q^T Q`` off by 1e-4. Without gradients a core is kept while its numbers
stay as they are, so that a layer's own derived weights stay valid, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensortrain.contract import WeightCache
from tensortrain.cores.tolerance import compute_dtype

__all__ = ["Frame", "Rotations", "ScaledFrame", "logit", "nearest_rotation"]

_LARGEST_CAYLEY = 1e6
_NUDGE = 1e-3


class _CoreMap(nn.Module):
    """A core as a function of one or two tensors of free numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = WeightCache()

    def forward(self, *free: Tensor) -> Tensor:
        return self._cache.get(free, lambda: self._in_full_precision(*free))

    def _in_full_precision(self, *free: Tensor) -> Tensor:
        with torch.autocast(free[0].device.type, enabled=False):
            core = self._core(*(x.to(compute_dtype(x.dtype)) for x in free))
            return core.to(free[0].dtype).contiguous()

    def _core(self, *free: Tensor) -> Tensor:
        raise NotImplementedError


class Rotations(_CoreMap):
    r"""Core ``(.., r, i, j, r)`` whose slices are rotations, from ``(.., i, j, r (r - 1) / 2)`` numbers.

    The numbers are the upper triangle of a skew matrix ``A``; the slice is its Cayley transform
    ``(I - A) (I + A)^{-1}``, which is its own inverse. Half turns (eigenvalues -1) are its only blind spot.
    """

    upper: Tensor

    def __init__(self, rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.rank = rank
        rows, columns = torch.triu_indices(rank, rank, 1, device=device)
        self.register_buffer("upper", rows * rank + columns, persistent=False)

    def _core(self, *free: Tensor) -> Tensor:
        numbers, r = free[0], self.rank
        flat = numbers.new_zeros(*numbers.shape[:-1], r * r).index_copy(-1, self.upper, numbers)
        triangle = flat.unflatten(-1, (r, r))
        return _cayley(triangle - triangle.mT).movedim(-2, -4)

    def right_inverse(self, core: Tensor) -> Tensor:
        """The numbers of the rotations nearest to the slices of ``core``."""
        rotations = nearest_rotation(core.movedim(-4, -2).to(compute_dtype(core.dtype)))
        skew = _cayley(_off_half_turns(rotations))
        return skew.flatten(-2)[..., self.upper].to(core.dtype)


def _cayley(x: Tensor) -> Tensor:
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(identity + x, identity - x)


def nearest_rotation(x: Tensor) -> Tensor:
    """The matrix of SO(r) nearest to each of ``(.., r, r)``; of Gaussian matrices it is a uniformly random one."""
    u, _, vh = torch.linalg.svd(x)
    sign = torch.linalg.det(u @ vh).sign()
    return torch.cat((u[..., :-1], u[..., -1:] * sign[..., None, None]), dim=-1) @ vh


def _off_half_turns(rotations: Tensor) -> Tensor:
    """The same rotations, turned a little where one of their angles is so near to pi that no Cayley argument fits."""
    r = rotations.shape[-1]
    identity = torch.eye(r, dtype=rotations.dtype, device=rotations.device)
    smallest = torch.linalg.svdvals(identity + rotations)[..., -1]
    draw = torch.randn(r, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rotations)
    turned = rotations @ _cayley(_NUDGE * (draw - draw.mT))
    return torch.where((smallest > 1 / _LARGEST_CAYLEY)[..., None, None], rotations, turned)


class Frame(_CoreMap):
    r"""Core ``(.., r, i, j, s)`` with orthonormal columns, from Householder vectors.

    ``side="left"``: the unfolding ``(r i j) x s`` is orthonormal, which takes ``n s - s (s + 1) / 2`` numbers for
    ``n = r i j``; ``"right"``: the transpose of ``r x (i j s)`` is. Any unfolding of full rank is one such frame
    times a square matrix, so this takes nothing away from a train.
    """

    lower: Tensor

    def __init__(self, shape: tuple[int, ...], side: str = "left", device: torch.device | None = None) -> None:
        super().__init__()
        self.shape, self.side = tuple(shape), side
        *_, r, i, j, s = shape
        self.n_rows, self.n_columns = (r * i * j, s) if side == "left" else (i * j * s, r)
        rows, columns = torch.tril_indices(self.n_rows, self.n_columns, -1, device=device)
        self.register_buffer("lower", rows * self.n_columns + columns, persistent=False)

    def to_matrix(self, core: Tensor) -> Tensor:
        """The unfolding that is orthonormal, ``(.., n_rows, n_columns)``."""
        return core.flatten(-4, -2) if self.side == "left" else core.flatten(-3).mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The core of such an unfolding."""
        return (matrix if self.side == "left" else matrix.mT).reshape(self.shape)

    def frame(self, numbers: Tensor) -> Tensor:
        """The orthonormal unfolding of these numbers."""
        flat = numbers.new_zeros(*numbers.shape[:-1], self.n_rows * self.n_columns)
        vectors = flat.index_copy(-1, self.lower, numbers).unflatten(-1, (self.n_rows, self.n_columns))
        return torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(-2)))

    def _core(self, *free: Tensor) -> Tensor:
        return self.from_matrix(self.frame(free[0]))

    def right_inverse(self, core: Tensor) -> Tensor:
        """The numbers of the frame that spans the columns of the core's unfolding (signs of columns may differ)."""
        matrix = self.to_matrix(core.to(compute_dtype(core.dtype)))
        return torch.geqrf(matrix.contiguous())[0].flatten(-2)[..., self.lower].to(core.dtype)


class ScaledFrame(Frame):
    r"""A left frame times ``diag(scale * s)``, ``s = sigmoid(logits)`` in (0, 1]: the core that carries the
    singular values of a weight whose other cores are frames.

    ``signs`` is there because Householder vectors give the columns of a frame up to their signs.
    """

    scale: Tensor
    signs: Tensor

    def __init__(self, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__(shape, "left", device)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64, device=device))
        self.register_buffer("signs", torch.ones(shape[-1], dtype=torch.int8, device=device))

    def _core(self, *free: Tensor) -> Tensor:
        numbers, logits = free
        lengths = self.scale.to(logits.dtype) * torch.sigmoid(logits)
        return self.from_matrix(self.frame(numbers) * (self.signs * lengths))

    def right_inverse(self, core: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The frame of the columns, and their lengths over ``scale``."""
        lengths = self.to_matrix(core).norm(dim=-2)
        return super().right_inverse(core), logit(lengths / self.scale.to(lengths.dtype))


def logit(s: Tensor) -> Tensor:
    """Inverse of the sigmoid; arguments near 1 are lowered to where its gradient is alive."""
    return torch.logit(s.clamp(1e-13, 1 - 1e-3))
