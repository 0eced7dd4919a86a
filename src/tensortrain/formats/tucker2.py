"""Tucker-2: a small convolution between two channel maps (1x1, k x k, 1x1).

Stored as (R_in, C), (R_out, R_in, *kernel), (S, R_out). Factors by higher-order orthogonal iteration started
at the HOSVD. Source: Kim et al., ICLR 2016, arXiv:1511.06530; used by MUSCO, arXiv:1903.09973.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import ContractionPlan
from tensortrain.contract.hops import ConvNetwork
from tensortrain.cores.tolerance import checked_eps
from tensortrain.errors import DTypeError

from .base import Format, Spatial, pointwise
from .checks import check_modes
from .fit import Fit, best, equal_norms
from .layout import conv_network
from .ranks import clips, resolve_rank_tuple
from .registry import register
from .spec import Bond, FactorSpec, Kind, Rank, WeightShape
from .weighting import PLAIN, Weighting, apply_root
from .whitening import factor_and_inverse, keep_promise, root_and_inverse, same_traces, sketch

__all__ = ["Tucker2"]

N_SWEEPS = 5  # HOOI gains little after a few sweeps; each is two small eigenproblems
_TINY = 1e-150  # what a vanishing weight is divided by
_GAIN = 1e-3  # of the squared error: a sweep that gains less is the last


@register
class Tucker2(Format):
    """``K[s, c, x] = sum_{o, i} outer[s, o] core[o, i, x] inner[i, c]``; ranks ``(R_in, R_out)``.

    Source: Kim et al., ICLR 2016, arXiv:1511.06530.

    Example:
        >>> Tucker2().spec(WeightShape("conv", 128, 64, (3, 3)), rank=(20, 30)).core_shapes
        ((20, 64), (30, 20, 3, 3), (128, 30))
    """

    name: ClassVar[str] = "tucker2"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"conv"})
    description: ClassVar[str] = "channel map, small convolution, channel map"

    def spec(
        self,
        weight: WeightShape,
        *,
        rank: Rank,
        out_modes: Sequence[int] | None = None,
        in_modes: Sequence[int] | None = None,
        clip: bool | None = None,
    ) -> FactorSpec:
        self.check_kind(weight)
        one = weight.one_group()
        outs = check_modes((math.prod(out_modes or (one.out_features,)),), one.out_features, "out_modes")
        ins = check_modes((math.prod(in_modes or (one.in_features,)),), one.in_features, "in_modes")
        return FactorSpec(self.name, weight, outs, ins, _resolve(one, rank, clips(rank, clip)))

    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        weight = spec.weight.one_group()
        r_in, r_out = spec.ranks
        return (r_in, weight.in_features), (r_out, r_in, *weight.kernel), (weight.out_features, r_out)

    def bonds(self, spec: FactorSpec) -> tuple[Bond, ...]:
        return ((0, 0), (1, 1)), ((1, 0), (2, 1))

    def n_paths(self, spec: FactorSpec) -> int:
        return math.prod(spec.ranks)

    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        return spec.ranks

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        return min(spec.ranks)

    def core_fans(self, spec: FactorSpec) -> tuple[tuple[int, int], ...]:
        weight, (r_in, r_out) = spec.weight.one_group(), spec.ranks
        return (weight.in_features, r_in), (r_in * math.prod(weight.kernel), r_out), (r_out, weight.out_features)

    def dense_group(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        inner, core, outer = cores
        kernel = torch.einsum("oix,ic->ocx", core.flatten(2), inner)
        kernel = torch.einsum("so,ocx->scx", outer, kernel)
        return kernel.reshape(outer.shape[0], inner.shape[1], *spec.weight.kernel)

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        kernel, _ = _whitened(dense, spec.weight, weighting)
        return [torch.linalg.eigvalsh(g).flip(0).clamp_min(0).sqrt() for g in _channel_grams(kernel)]

    def factorize_group(self, dense: Tensor, spec: FactorSpec, *, eps: float | None, weighting: Weighting) -> Fit:
        weighting = weighting.checked(spec.weight)
        matrix = dense.detach().flatten(1)
        matrix = matrix if eps is None else matrix.double()  # what is promised is measured to the last digit
        size = max(weighting.size(matrix), _TINY)

        def attempt(cut: float | None, fitted_in: Weighting = weighting) -> Fit:
            ranks, cores = self._fitted(dense, spec, cut, fitted_in)
            stored = tuple(core.to(dense.dtype).contiguous() for core in equal_norms(cores))
            reached = replace(spec, ranks=ranks)
            difference = self._difference(stored, reached, matrix)
            return Fit(reached, stored, weighting.size(difference) / size)

        if eps is not None:
            return keep_promise(checked_eps(eps, dense.dtype, 3), spec.ranks, attempt)
        # The Kronecker fit of the second moment is not the moment itself: unweighted cores may serve it better.
        return attempt(None) if weighting.is_plain else best(attempt(None), attempt(None, PLAIN))

    def probe(self, dense: Tensor, spec: FactorSpec, weighting: Weighting = PLAIN) -> float:
        if weighting.is_plain or spec.weight.groups > 1:
            return super().probe(dense, spec, weighting)
        weighting = weighting.checked(spec.weight)
        ranks, cores = self._fitted(dense, spec, None, weighting, n_sweeps=1)
        matrix = dense.detach().flatten(1)
        difference = self._difference(cores, replace(spec, ranks=ranks), matrix)
        mix = sketch(weighting, matrix)
        inputs = Weighting(weighting.inputs)
        return inputs.size(mix @ difference) / max(inputs.size(mix @ matrix.to(mix.dtype)), _TINY)

    def _difference(self, cores: Sequence[Tensor], spec: FactorSpec, matrix: Tensor) -> Tensor:
        """What cores leave of the weight; at least of float32."""
        kept = self.dense_group([core.double() for core in cores], spec).flatten(1)
        return (kept - matrix.double()).to(torch.promote_types(matrix.dtype, torch.float32))

    def _fitted(
        self, dense: Tensor, spec: FactorSpec, eps: float | None, weighting: Weighting, *, n_sweeps: int = N_SWEEPS
    ) -> tuple[tuple[int, ...], list[Tensor]]:
        kernel, inverses = _whitened(dense, spec.weight, weighting)
        ranks = spec.ranks if eps is None else _ranks_for(kernel, eps, spec.ranks)
        # With a tolerance to keep, or a weight of float64, to the last digit.
        wide = eps is not None or dense.dtype == torch.float64
        inner, outer = (factor.double() for factor in _hooi(kernel if wide else kernel.float(), ranks, n_sweeps))
        core = _project(kernel, inner, outer)
        if inverses is not None:
            core = apply_root(core, inverses[0])
            inner, outer = inverses[1] @ inner, inverses[2] @ outer
        return ranks, [inner.T, core.reshape(*core.shape[:2], *spec.weight.kernel), outer]

    def squared_norm(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        inner, core, outer = cores
        moved = torch.einsum("oix,oO,iI->OIx", core.flatten(2), outer.T @ outer, inner @ inner.T)
        return (moved * core.flatten(2)).sum()

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        inner, core, outer = cores
        return pointwise(spatial(pointwise(x, inner), core), outer)

    def conv_network(self, spec: FactorSpec) -> ConvNetwork:
        weight, (r_in, r_out) = spec.weight.one_group(), spec.ranks
        axes = (f"x{axis}" for axis in range(len(weight.kernel)))
        sizes = {"o1": weight.out_features, "i1": weight.in_features, "a": r_in, "b": r_out}
        return conv_network(weight, [("a", "i1"), ("b", "a", *axes), ("o1", "b")], sizes)

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        weight, (r_in, r_out) = spec.weight.one_group(), spec.ranks
        c, s, k = weight.in_features, weight.out_features, math.prod(weight.kernel)
        return [
            (2 * c * r_in * in_positions, (c + r_in) * in_positions),
            (2 * r_in * r_out * k * out_positions, r_in * in_positions + r_out * out_positions),
            (2 * r_out * s * out_positions, (r_out + s) * out_positions),
        ]


def _whitened(
    dense: Tensor, weight: WeightShape, weighting: Weighting
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The kernel as (S, C, positions), weighted by a Kronecker fit of the patches' second moment."""
    if dense.is_complex():
        raise DTypeError(f"tucker2 takes real kernels: found {dense.dtype}. Choose format='low_rank'.")
    kernel = dense.detach().double().flatten(2)
    found = weighting.checked(weight)
    if found.inputs is None:
        return kernel, None
    of_channels, of_positions = same_traces(found.of_channels(weight))
    c_root, c_inverse = _known_roots(found, "channels", of_channels)
    x_root, x_inverse = root_and_inverse(of_positions)
    kernel = apply_root(torch.einsum("scx,cd->sdx", kernel, c_root), x_root)
    if found.outputs is None:
        return kernel, (x_inverse, c_inverse, torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
    o_root, o_inverse = _known_roots(found, "outputs", found.outputs)
    return torch.einsum("os,ocx->scx", o_root, kernel), (x_inverse, c_inverse, o_inverse)


def _known_roots(weighting: Weighting, side: str, gram: Tensor) -> tuple[Tensor, Tensor]:
    """``C`` with ``C C^T`` the damped moment of a side, and ``C^-T``; both full. Found once for a weighting."""
    key = ("tucker2", side, len(gram))
    if key not in weighting._derived:
        root, inverse = factor_and_inverse(gram)
        full = (torch.diag(root), torch.diag(inverse)) if root.ndim == 1 else (root, inverse.T)
        weighting._derived[key] = full
    found: tuple[Tensor, Tensor] = weighting._derived[key]
    return found


def _resolve(weight: WeightShape, rank: Rank, clip: bool) -> tuple[int, ...]:
    caps = (weight.in_features, weight.out_features)

    def count(pair: tuple[int, ...]) -> int:
        return pair[0] * caps[0] + math.prod(pair) * math.prod(weight.kernel) + pair[1] * caps[1]

    what = "tucker2 takes two ranks (R_in, R_out)"
    return resolve_rank_tuple(rank, caps, clip=clip, what=what, dense_params=weight.n_params, count=count)


def _channel_grams(kernel: Tensor) -> tuple[Tensor, Tensor]:
    by_input = kernel.transpose(0, 1).flatten(1)
    by_output = kernel.flatten(1)
    return by_input @ by_input.T, by_output @ by_output.T


def _leading(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram)[1][:, -rank:].flip(1)


def _project(kernel: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """Core (R_out, R_in, positions) for orthonormal factors (C, R_in) and (S, R_out)."""
    return torch.einsum("so,sdx->odx", outer, torch.einsum("scx,cd->sdx", kernel, inner))


def _hooi(kernel: Tensor, ranks: tuple[int, ...], n_sweeps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal channel factors (C, R_in), (S, R_out) by alternating eigenproblems, until they gain no more."""
    r_in, r_out = ranks
    grams = _channel_grams(kernel)
    total = grams[0].diagonal().sum()
    inner, outer = _leading(grams[0], r_in), _leading(grams[1], r_out)
    lost = torch.full_like(total, torch.inf)
    for _ in range(n_sweeps):
        inner = _leading(_channel_grams(torch.einsum("scx,so->ocx", kernel, outer))[0], r_in)
        projected = torch.einsum("scx,cd->sdx", kernel, inner)
        outer = _leading(_channel_grams(projected)[1], r_out)
        left = total - torch.einsum("sdx,so->odx", projected, outer).square().sum()
        if bool(lost - left <= _GAIN * left.abs()):  # one look per sweep at whether to go on
            break
        lost = left
    return inner, outer


def _ranks_for(kernel: Tensor, eps: float, caps: tuple[int, ...]) -> tuple[int, int]:
    """Smallest ranks whose discarded tails add up to at most ``eps**2`` of the energy, half for each side.

    The factors come from Gram matrices, which resolve singular values only down to about 1e-8 of the largest:
    a tighter tolerance keeps every direction.
    """
    found = []
    for gram, cap in zip(_channel_grams(kernel), caps, strict=True):
        if eps < 1e-7:
            found.append(cap)
            continue
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        tails = values.flip(0).cumsum(0).flip(0)  # tails[r] is what rank r discards
        kept = int((tails > eps**2 / 2 * values.sum()).sum())
        found.append(max(1, min(kept, cap)))
    return found[0], found[1]
