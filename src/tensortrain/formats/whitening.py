"""Error measured where it matters: in the layer's output on its own inputs.

For a linear map ``y = W x`` with input second moment ``H = E[x x^T]`` the mean squared output error of a
replacement ``W'`` is ``||(W - W') S||_F^2`` with ``H = S S^T``. Truncating ``W S`` is therefore optimal
(Wang et al., SVD-LLM, ICLR 2025, arXiv:2403.07378). A dense ``S`` destroys the tensor-train structure, so
trains use a Kronecker fit ``H ~ H_1 x .. x H_d``, whose factors act on one mode each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

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
    "factor_and_inverse",
    "keep_promise",
    "kronecker_factors",
    "output_error",
    "root_and_inverse",
    "same_traces",
    "sketch",
]

Side = Literal["in", "out"]
Modes = tuple[int, ...]
_SKETCH = 96
_BARELY = 1e-10  # damping that no error shows
_HARDLY = 1e-6, 1e-4, 1e-3  # that errors known to some per cent do not show
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


def factor_and_inverse(gram: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """``C`` with ``C C^T`` the damped second moment, and its inverse: triangular where that is positive, else a root.

    For norms it is as good as the symmetric root, and costs a tenth.
    """
    factor, inverse = _factor_of(gram, damping=damping)
    return factor, _inverse_of(factor) if inverse is None else inverse


def _factor_of(gram: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor | None]:
    """``C`` of ``factor_and_inverse``, and its inverse where that comes with it; where not, ``C`` is triangular."""
    if gram.ndim == 1:
        return root_and_inverse(gram, damping=damping)
    damped = (gram + gram.T) / 2
    damped.diagonal().add_(damping * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    factor, failed = torch.linalg.cholesky_ex(damped)
    return root_and_inverse(gram, damping=damping) if bool(failed) else (factor, None)


def _nearly_factor_of(gram: Tensor) -> Tensor:
    """``C`` with ``C C^T`` about the second moment: of few samples that is singular, and damped as little as it needs.

    A triangle costs a hundredth of a root, which is left for moments that are indefinite.
    """
    if gram.ndim == 1:
        return _factor_of(gram, damping=_BARELY)[0]
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    damped, added = (gram + gram.T) / 2, 0.0
    for damping in (_BARELY, *_HARDLY):
        damped.diagonal().add_((damping - added) * mean)
        added = damping
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return factor
    return root_and_inverse(gram, damping=_BARELY)[0]


def _inverse_of(factor: Tensor) -> Tensor:
    """Of a lower triangle."""
    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, one, upper=False)


def kronecker_factors(gram: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Second moments of single modes whose Kronecker product fits ``gram``.

    Partial traces, scaled so that the product has the trace of ``gram``; exact when ``gram`` is a
    Kronecker product. A diagonal gives diagonals.
    """
    if _trace(gram) <= 0:
        return [gram.new_ones(n) for n in modes]
    return same_traces([_partial_trace(gram, modes, k) for k in range(len(modes))])


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
        in_roots, out_roots: Factors ``C`` of the moments ``C C^T`` and inverses, one pair per mode; no ``out_roots``
            where outputs are not weighed.
        in_modes, out_modes: Sizes of the modes.
    """

    ordered: Callable[[], Weighting]
    in_roots: list[_Root]
    out_roots: list[_Root]
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
        """Fit Kronecker products to second moments, of which there are those of the inputs; known moments fit once.

        Args:
            n_spatial: How many of the leading modes are positions of a kernel alone.
        """
        known = weighting.checked(weight)._derived
        key = ("norm", weight, tuple(out_modes), tuple(in_modes), n_spatial)
        if key not in known:
            known[key] = cls._fitted(weighting.checked(weight), weight, tuple(out_modes), tuple(in_modes), n_spatial)
        found: KroneckerNorm = known[key]
        return found

    @classmethod
    def _fitted(
        cls, weighting: Weighting, weight: WeightShape, out_modes: Modes, in_modes: Modes, n_spatial: int
    ) -> KroneckerNorm:
        sizes = math.prod(out_modes), math.prod(in_modes)
        ordered = partial(weighting.of_matrix, weight, *sizes)
        roots = _Roots(weighting._derived)
        if weight.kernel and math.prod(in_modes[:n_spatial]) * weight.in_features == weight.fan_in:
            # The moment need not be brought into order, which takes longer than all the rest.
            channels, positions = weighting.of_channels(weight)
            parts = [("positions", positions, in_modes[:n_spatial]), ("channels", channels, in_modes[n_spatial:])]
        else:
            inputs = ordered().inputs
            assert inputs is not None
            parts = [("in", inputs, in_modes)]
        in_roots = roots.of(parts)
        outputs = weighting.outputs
        out_roots = [] if outputs is None else roots.of([("out", pad_gram(outputs, sizes[0]), out_modes)])
        return cls(ordered, in_roots, out_roots, in_modes, out_modes)

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
        """``C_F^T W C_H`` with factors of the fitted moments, or one side of it; singular as ``F^(1/2) W H^(1/2)``."""
        if "in" in sides:
            matrix = _apply_by_mode(matrix, [root.factor for root in self.in_roots], self.in_modes)
        if "out" in sides and self.out_roots:
            roots = [root.factor for root in self.out_roots]
            matrix = _apply_by_mode(matrix, roots, self.out_modes, beyond=matrix.shape[1])
        return matrix

    def whitened(self, dense: Tensor, matrix: Tensor) -> Tensor:
        """``whiten(matrix)`` for a weight that is asked for several times in a row; not to be written to."""
        last = self.__dict__.get("_last")
        if last is None or last[0] is not dense or last[1] != dense._version:
            last = dense, dense._version, self.whiten(matrix)
            self.__dict__["_last"] = last
        white: Tensor = last[2]
        return white

    def apply(self, core: Tensor, side: Side, k: int, axis: int) -> Tensor:
        """Put the root of one mode on: ``axis`` of ``core`` is mode ``k`` of that side."""
        return self._multiplied(core, side, k, axis, lambda root: root.factor)

    def undo(self, core: Tensor, side: Side, k: int, axis: int) -> Tensor:
        """Take the root of one mode off again."""
        return self._multiplied(core, side, k, axis, lambda root: root.inverse)

    def _multiplied(self, core: Tensor, side: Side, k: int, axis: int, which: Callable[[_Root], Tensor]) -> Tensor:
        roots = self.in_roots if side == "in" else self.out_roots
        return apply_root(core.movedim(axis, -1), which(roots[k])).movedim(-1, axis) if roots else core

    def error(self, difference: Tensor, matrix: Tensor) -> float:
        """Relative error in the true norm, not in the fitted one."""
        return self.weighting.rel_error(difference, matrix)

    def sketched_error(self, difference: Tensor, matrix: Tensor) -> float:
        """The same to some per cent, from a few random combinations of the outputs."""
        mix = sketch(self.weighting, matrix)
        return Weighting(self.gram).rel_error(mix @ difference, mix @ matrix)


def _random_rows(matrix: Tensor) -> Tensor:
    """``(96, M)`` random combinations of the rows of a matrix, float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_SKETCH, len(matrix), dtype=torch.float64, generator=generator).to(matrix.device)


def sketch(weighting: Weighting, matrix: Tensor) -> Tensor:
    """Random combinations of the outputs that weigh them by their moment, in float32 at least; found once."""
    key = ("sketch", len(matrix))
    if key not in weighting._derived:
        mix = _random_rows(matrix)
        if weighting.outputs is not None:
            factor = _nearly_factor_of(weighting.outputs)
            mix = mix * factor if factor.ndim == 1 else mix @ factor.T
        weighting._derived[key] = mix
    found: Tensor = weighting._derived[key]
    return found.to(torch.promote_types(matrix.dtype, torch.float32))


class _Root:
    """``C`` with ``C C^T`` a damped second moment times a square; its inverse is made when it is asked for."""

    def __init__(self, unscaled: Tensor, inverse: Tensor | None, scale: float = 1.0) -> None:
        self._unscaled, self._inverse, self._scale = unscaled, inverse, scale

    @classmethod
    def of(cls, gram: Tensor) -> _Root:
        return cls(*_factor_of(gram))

    def times(self, scale: float) -> _Root:
        """The same moment times the square of a number."""
        return _Root(self._unscaled, self._inverse, self._scale * scale)

    def __iter__(self) -> Iterator[Tensor]:
        """``C`` and its inverse."""
        yield from (self.factor, self.inverse)

    @cached_property
    def factor(self) -> Tensor:
        return self._unscaled if self._scale == 1.0 else self._unscaled * self._scale

    @cached_property
    def inverse(self) -> Tensor:
        found = _inverse_of(self._unscaled) if self._inverse is None else self._inverse
        return found / self._scale


@dataclass(frozen=True)
class _Roots:
    """Factors of partial traces: those of a moment's modes are found once, also for mode shapes that share them."""

    known: dict[Any, Any]

    def of(self, parts: Sequence[tuple[str, Tensor, Modes]]) -> list[_Root]:
        """One per mode of moments whose Kronecker product is the whole, up to order.

        Scaled so that the product has the trace of the whole, as ``kronecker_factors``.
        """
        trace = _trace(parts[0][1])
        found = [self._one(name, gram, modes, k, trace > 0) for name, gram, modes in parts for k in range(len(modes))]
        scale = math.sqrt(trace ** (1 / len(found)) / trace) if trace > 0 else 1.0
        return [root.times(scale) for root in found]

    def _one(self, name: str, gram: Tensor, modes: Modes, k: int, is_known: bool) -> _Root:
        key = ("root", name, len(gram), math.prod(modes[:k]), modes[k])
        if key not in self.known:
            factor = _partial_trace(gram, modes, k) if is_known else gram.new_ones(modes[k])
            self.known[key] = _Root.of(factor)
        root: _Root = self.known[key]
        return root


def _apply_by_mode(matrix: Tensor, roots: Sequence[Tensor], modes: Sequence[int], *, beyond: int = 1) -> Tensor:
    """Numbers with axes ``(.., n_1 .. n_d, beyond)`` times the Kronecker product of one root per mode.

    No axis is moved: that would take several times as long as the products.
    """
    flat = matrix
    for k, root in enumerate(roots):
        n, right, root = modes[k], math.prod(modes[k + 1 :]) * beyond, root.to(matrix.dtype)
        if n == 1 or root.ndim == 1:
            flat = flat.reshape(-1, n, right) * root.reshape(n, 1)
        elif right == 1:
            flat = flat.reshape(-1, n) @ root
        else:
            flat = root.mT @ flat.reshape(-1, n, right)
    return flat.reshape(matrix.shape)
