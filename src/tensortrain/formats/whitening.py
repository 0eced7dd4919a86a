"""Error measured where it matters: in the layer's output on its own inputs.

For a linear map ``y = W x`` with input second moment ``H = E[x x^T]`` the mean squared output error of a
replacement ``W'`` is ``||(W - W') S||_F^2`` with ``H = S S^T``. Truncating ``W S`` is therefore optimal
(Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378). A dense ``S`` destroys the tensor-train structure, so
trains use a Kronecker fit ``H ~ H_1 x .. x H_d``, whose factors act on one mode each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .fit import Fit
from .layout import pad_gram
from .spec import WeightShape
from .weighting import Weighting, apply_root, check_gram, energy, output_error

__all__ = [
    "KroneckerNorm",
    "apply_root",
    "check_gram",
    "energy",
    "keep_promise",
    "kronecker_factors",
    "output_error",
    "root_and_inverse",
    "same_traces",
    "sketch",
]

Side = Literal["in", "out"]
_SKETCH = 96
DAMPING = 1e-2  # of the mean diagonal: keeps directions that few calibration samples saw (paper's advice)


def root_and_inverse(gram: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Symmetric square root of the damped second moment, and its inverse.

    Cost: O(N^3) for a full matrix, O(N) for a diagonal.
    """
    mean = (gram if gram.ndim == 1 else gram.diagonal()).mean().clamp_min(torch.finfo(gram.dtype).tiny)
    if gram.ndim == 1:
        root = (gram.clamp_min(0) + damping * mean).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    root_values = (values.clamp_min(0) + damping * mean).sqrt()
    return (vectors * root_values) @ vectors.T, (vectors / root_values) @ vectors.T


def kronecker_factors(gram: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Second moments of single modes whose Kronecker product fits ``gram``.

    Partial traces, scaled so that the product has the trace of ``gram``; exact when ``gram`` is a
    Kronecker product. A diagonal gives diagonals.
    """
    if _trace(gram) <= 0:
        return [gram.new_ones(n) for n in modes]
    return same_traces([_partial_trace(gram, modes, k) for k in range(len(modes))])


def _of_modes(gram: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Partial traces of a second moment, one for each mode."""
    if len(modes) == 1:
        return [gram]
    return [_partial_trace(gram, modes, k) for k in range(len(modes))]


def same_traces(factors: Sequence[Tensor]) -> list[Tensor]:
    """Partial traces scaled so that their Kronecker product has the trace of the whole."""
    trace = _trace(factors[0])
    if trace <= 0:
        return [factor.new_ones(len(factor)) for factor in factors]
    scale = trace ** (1 / len(factors))
    return [factor * (scale / _trace(factor)) for factor in factors]


def _trace(gram: Tensor) -> float:
    return float((gram if gram.ndim == 1 else gram.diagonal()).sum())


def _partial_trace(gram: Tensor, modes: Sequence[int], k: int) -> Tensor:
    left, n, right = math.prod(modes[:k]), modes[k], math.prod(modes[k + 1 :])
    if gram.ndim == 1:
        return gram.reshape(left, n, right).sum(dim=(0, 2))
    blocks = gram.reshape(left, n, right, left, n, right)
    return torch.einsum("anbamb->nm", blocks)


def keep_promise(eps: float, caps: tuple[int, ...], attempt: Callable[[float], Fit]) -> Fit:
    """Tighten the cut until the error measured is within ``eps``, or the ranks cannot grow.

    A Kronecker fit only resembles the second moment, so a cut in its norm may miss the tolerance in the true one.
    """
    cut = eps
    while True:
        found = attempt(cut)
        error = found.rel_error
        if error <= eps or cut < 1e-3 * eps or all(r >= c for r, c in zip(found.ranks, caps, strict=True)):
            return found
        cut *= max(0.2, min(0.8, 0.9 * eps / error))


@dataclass(frozen=True)
class KroneckerNorm:
    """The error norm of one weight: its second moments, and roots that act mode by mode.

    Args:
        ordered: Gives the second moments in the order of the weight's rows and columns.
        in_roots, out_roots: Roots and inverses, one pair per mode; no ``out_roots`` where outputs are not weighed.
        in_modes, out_modes: Sizes of the modes.
    """

    ordered: Callable[[], Weighting]
    in_roots: list[tuple[Tensor, Tensor]]
    out_roots: list[tuple[Tensor, Tensor]]
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        weighting: Weighting,
        weight: WeightShape,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        *,
        n_spatial: int = 0,
    ) -> KroneckerNorm:
        """Fit Kronecker products to second moments, of which there are those of the inputs.

        Args:
            n_spatial: How many of the leading modes are positions of a kernel alone.
        """
        sizes = math.prod(out_modes), math.prod(in_modes)
        ordered = partial(weighting.of_matrix, weight, *sizes)
        if weight.kernel and math.prod(in_modes[:n_spatial]) * weight.in_features == weight.fan_in:
            # The moment need not be brought into order, which takes longer than all the rest.
            channels, positions = weighting.of_channels(weight)
            factors = [*_of_modes(positions, in_modes[:n_spatial]), *_of_modes(channels, in_modes[n_spatial:])]
            in_roots = [root_and_inverse(factor) for factor in same_traces(factors)]
        else:
            in_roots = _roots(ordered().inputs, in_modes)
        outputs = weighting.checked(weight).outputs
        out_roots = _roots(None if outputs is None else pad_gram(outputs, sizes[0]), out_modes)
        return cls(ordered, in_roots, out_roots, tuple(in_modes), tuple(out_modes))

    @property
    def weighting(self) -> Weighting:
        """Second moments in the order of the weight's rows and columns."""
        return self.ordered()

    @property
    def gram(self) -> Tensor:
        """Second moment of the inputs."""
        assert self.weighting.inputs is not None
        return self.weighting.inputs

    def whiten(self, matrix: Tensor, sides: Sequence[Side] = ("in", "out")) -> Tensor:
        """``F^(1/2) W H^(1/2)`` with the fitted moments, or one side of it."""
        if "in" in sides:
            matrix = _apply_by_mode(matrix, [root for root, _ in self.in_roots], self.in_modes)
        if "out" in sides and self.out_roots:
            matrix = _apply_by_mode(matrix.T, [root for root, _ in self.out_roots], self.out_modes).T
        return matrix

    def apply(self, core: Tensor, side: Side, k: int, axis: int) -> Tensor:
        """Put the root of one mode on: ``axis`` of ``core`` is mode ``k`` of that side."""
        return self._multiplied(core, side, k, axis, 0)

    def undo(self, core: Tensor, side: Side, k: int, axis: int) -> Tensor:
        """Take the root of one mode off again."""
        return self._multiplied(core, side, k, axis, 1)

    def _multiplied(self, core: Tensor, side: Side, k: int, axis: int, which: int) -> Tensor:
        roots = self.in_roots if side == "in" else self.out_roots
        return apply_root(core.movedim(axis, -1), roots[k][which]).movedim(-1, axis) if roots else core

    def error(self, difference: Tensor, matrix: Tensor) -> float:
        """Relative error in the true norm, not in the fitted one."""
        return self.weighting.rel_error(difference, matrix)

    def sketched_error(self, difference: Tensor, matrix: Tensor) -> float:
        """The same to some per cent, from a few random combinations of the outputs."""
        mix = _random_rows(matrix)
        if self.out_roots:
            mix = _apply_by_mode(mix, [root for root, _ in self.out_roots], self.out_modes)
        return Weighting(self.gram).rel_error(mix @ difference, mix @ matrix)


def _random_rows(matrix: Tensor) -> Tensor:
    """``(96, M)`` random combinations of the rows of a matrix, float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_SKETCH, len(matrix), dtype=torch.float64, generator=generator).to(matrix.device)


def sketch(outputs: Tensor | None, matrix: Tensor) -> Tensor:
    """Random combinations of the outputs that weigh them by their moment, in float32 at least."""
    mix = _random_rows(matrix)
    if outputs is not None:
        mix = mix * outputs.clamp_min(0).sqrt() if outputs.ndim == 1 else mix @ root_and_inverse(outputs)[0]
    return mix.to(torch.promote_types(matrix.dtype, torch.float32))


def _roots(gram: Tensor | None, modes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Roots of the Kronecker factors of a second moment, and their inverses."""
    return [] if gram is None else [root_and_inverse(factor) for factor in kronecker_factors(gram, modes)]


def _apply_by_mode(matrix: Tensor, roots: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """``matrix`` (rows, n_1 .. n_d) times the Kronecker product of one root per mode."""
    for k, root in enumerate(roots):
        if modes[k] == 1:
            matrix = matrix * root.reshape(())
            continue
        right = math.prod(modes[k + 1 :])
        moved = matrix.reshape(-1, modes[k], right).transpose(1, 2)
        matrix = apply_root(moved, root).transpose(1, 2).reshape(matrix.shape)
    return matrix
