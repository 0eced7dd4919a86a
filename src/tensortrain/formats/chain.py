"""Formats that are chains: TT-matrices under another layout of the weight.

A linear weight, a convolution kernel and an embedding table each become one matrix ``(outputs, inputs)``
whose rows and columns are split into modes; the cores are those of a ``TTMatrix``. A subclass only says
which modes the matrix has. Everything else (decomposition, whitening, norms, execution) is shared.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import ChainShape, ContractionPlan, chain_lookup, chain_to_dense, merge_cores
from tensortrain.contract.hops import ConvNetwork
from tensortrain.cores.environments import value_parts
from tensortrain.cores.gram import chain_squared_norm
from tensortrain.cores.linalg import gram_singular_values
from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.tensor import resolve_ranks, tt_svd, unfolding_spectra

from .als import alternate, chain_network, sweep_flops
from .base import Format, Spatial
from .fit import Fit, best
from .layout import conv_network, matrix_to_weight, weight_to_matrix
from .ranks import clips
from .spec import Bond, FactorSpec, Rank, WeightShape
from .weighting import PLAIN, Weighting
from .whitening import DAMPING, KroneckerNorm, keep_promise

__all__ = ["ChainFormat", "balance_chain"]

Modes = tuple[int, ...]
_LARGEST_GRAM = 4096  # inputs up to which a weighted decomposition is refined by least squares
_MOST_REFINED_LEGS = 24  # twice as many must have letters in an einsum
_N_REFINING = 4
_LARGE_SIDE = 512  # of an unfolding, from which its singular values are found in float32 where the weight is


class ChainFormat(Format):
    """A format whose cores chain up to a TT-matrix."""

    refine_flops: ClassVar[float] = 2e10  # most that least squares after a weighted decomposition may cost; 0: none
    whitens_exactly: ClassVar[bool] = False  # whether the Kronecker fit over these modes is the moment itself

    @abstractmethod
    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        """Modes of one group, checked, with those left out filled in."""

    @abstractmethod
    def chain_modes(self, spec: FactorSpec) -> tuple[Modes, Modes]:
        """Output and input modes of the chain, spatial cores included."""

    def n_spatial(self, spec: FactorSpec) -> int:
        """How many leading cores carry kernel positions alone."""
        return 0

    # -- Format --------------------------------------------------------------------------------------

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
        outs, ins = self.default_modes(weight.one_group(), out_modes, in_modes)
        draft = FactorSpec(self.name, weight, outs, ins, ())
        chain_out, chain_in = self.chain_modes(draft)
        merged = [m * n for m, n in zip(chain_out, chain_in, strict=True)]
        return FactorSpec(self.name, weight, outs, ins, resolve_ranks(merged, rank, clip=clips(rank, clip)))

    def chain(self, spec: FactorSpec) -> ChainShape:
        """The shapes of the chain, for planning."""
        outs, ins = self.chain_modes(spec)
        return ChainShape(outs, ins, spec.ranks)

    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        return self.chain(spec).core_shapes

    def n_paths(self, spec: FactorSpec) -> int:
        return math.prod(spec.ranks)

    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        return spec.ranks[1:-1]

    def with_inner(self, spec: FactorSpec, inner: Sequence[int]) -> FactorSpec:
        return replace(spec, ranks=(1, *inner, 1))

    def param_counter(self, spec: FactorSpec) -> Callable[[Sequence[int]], int]:
        outs, ins = self.chain_modes(spec)
        sizes = [spec.weight.groups * m * n for m, n in zip(outs, ins, strict=True)]

        def count(inner: Sequence[int]) -> int:
            return sum(map(_product, (1, *inner), sizes, (*inner, 1)))

        probe = [2 + k for k in range(len(sizes) - 1)]
        # A format may store less than its chain.
        return count if count(probe) == self.with_inner(spec, probe).n_params else super().param_counter(spec)

    def bonds(self, spec: FactorSpec) -> tuple[Bond, ...]:
        if not self.stores_chain(spec):
            return super().bonds(spec)
        return tuple(((k, 3), (k + 1, 0)) for k in range(self.chain(spec).order - 1))

    def tied_ranks(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        """Two bonds with nothing but a mode of size one between them are one cut."""
        outs, ins = self.chain_modes(spec)
        tied = list(super().tied_ranks(spec))
        for k in reversed(range(1, len(tied))):
            if outs[k] * ins[k] == 1:
                tied[k - 1 : k + 1] = [tied[k - 1] + tied[k]]
        return tuple(tied)

    def most_rank(self, spec: FactorSpec, ranks: Sequence[int], tied: tuple[int, ...]) -> int:
        """A rank cannot exceed its neighbour's rank times the mode between them."""
        outs, ins = self.chain_modes(spec)
        full, first, last = (1, *ranks, 1), tied[0], tied[-1]
        left = full[first] * outs[first] * ins[first]
        right = full[last + 2] * outs[last + 1] * ins[last + 1]
        return min(left, right)

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        """The smallest cut that parts input legs from output legs, every core on one of the two sides.

        A generic chain reaches it (kernel positions count on neither side).
        """
        outs, ins = self.chain_modes(spec)
        with_inputs, with_outputs = 1, 1  # least cut so far, by the side of the last core
        for k, (m, n, rank) in enumerate(zip(outs, ins, spec.ranks[:-1], strict=True)):
            n = 1 if k < self.n_spatial(spec) else n
            with_inputs, with_outputs = (
                min(with_inputs, with_outputs * rank) * m,
                min(with_outputs, with_inputs * rank) * n,
            )
        return min(with_inputs, with_outputs, super().max_matrix_rank(spec))

    def factorize_group(self, dense: Tensor, spec: FactorSpec, *, eps: float | None, weighting: Weighting) -> Fit:
        matrix = self.to_matrix(dense.detach(), spec)
        if weighting.is_plain:
            return self._fit(*self._decompose(matrix, spec, eps), spec, dense.dtype)
        norm = self._norm(spec, weighting)
        wide = matrix.double()
        if eps is not None:
            return keep_promise(eps, spec.ranks, lambda cut: self._whitened(wide, spec, cut, norm, dense.dtype))
        found = self._whitened(wide, spec, None, norm, dense.dtype)
        return found if self.whitens_exactly else self._bettered(found, wide, spec, norm, dense.dtype)

    def _bettered(self, found: Fit, matrix: Tensor, spec: FactorSpec, norm: KroneckerNorm, dtype: torch.dtype) -> Fit:
        """The Kronecker fit of H is not H itself: keep the plain decomposition where it serves H better, and refine."""
        plain = self._measured(self._decompose(matrix, spec, None)[0], matrix, spec, norm, dtype)
        found = best(found, plain)
        begun = [core.double() for core in self.to_chain(found.cores, found.spec)]
        refined = self._refined(matrix, found.spec, begun, norm)
        return found if refined is None else best(found, self._measured(refined, matrix, spec, norm, dtype))

    def _refined(
        self, matrix: Tensor, spec: FactorSpec, cores: Sequence[Tensor], norm: KroneckerNorm
    ) -> list[Tensor] | None:
        """Chain cores after alternating least squares in the norm of the inputs' true second moment, if affordable.

        Outputs are weighted by the Kronecker fit of their moment. Damping keeps the directions that no sample saw.
        Source of the idea: DMRG sweeps in the norm of a quadratic form; each core is a linear least squares problem.
        """
        chain = self.chain(spec)
        network = chain_network(chain)
        too_large = chain.in_features > _LARGEST_GRAM or len(network.sizes) > _MOST_REFINED_LEGS
        if too_large or _N_REFINING * sweep_flops(network, weighted=True) > self.refine_flops:
            return None
        gram = torch.diag(norm.gram) if norm.gram.ndim == 1 else norm.gram
        gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        begun = [norm.apply(core, "out", k, axis=1) for k, core in enumerate(cores)]
        begun = [core.reshape(shape) for core, shape in zip(begun, network.core_shapes, strict=True)]
        target = norm.whiten(matrix, sides=("out",)).reshape(*chain.out_modes, *chain.in_modes)
        found, _ = alternate(network, target, begun, gram=gram, n_sweeps=_N_REFINING, tol=1e-3)
        found = [core.reshape(shape) for core, shape in zip(found, chain.core_shapes, strict=True)]
        return balance_chain([norm.undo(core, "out", k, axis=1) for k, core in enumerate(found)])

    def _whitened(
        self, matrix: Tensor, spec: FactorSpec, eps: float | None, norm: KroneckerNorm, dtype: torch.dtype
    ) -> Fit:
        """Cores from a decomposition in the fitted norm, with their error in the true one."""
        cores = _whitened(matrix, norm, lambda one: self._decompose(one, spec, eps)[0])
        return self._measured(cores, matrix, spec, norm, dtype)

    def _measured(
        self, cores: Sequence[Tensor], matrix: Tensor, spec: FactorSpec, norm: KroneckerNorm, dtype: torch.dtype
    ) -> Fit:
        kept = [core.to(dtype).double() for core in cores]  # the error is that of what is stored
        return self._fit(cores, norm.error(matrix - chain_to_dense(kept), matrix), spec, dtype)

    def probe(self, dense: Tensor, spec: FactorSpec, weighting: Weighting = PLAIN) -> float:
        if weighting.is_plain or spec.weight.groups > 1:
            return super().probe(dense, spec, weighting)
        # An error to some per cent needs no more digits than the weight has.
        is_single = dense.dtype == torch.float32 and max(self.rank_caps(spec)) >= _LARGE_SIDE
        matrix = self.to_matrix(dense.detach(), spec).to(torch.float32 if is_single else torch.float64)
        norm = self._norm(spec, weighting)
        cores = self._roughly(norm.whitened(dense, matrix), spec, norm)
        # Not refined: a candidate's errors at other ranks are inferred from a few probes, and what least squares
        # gains changes too much from rank to rank for that.
        return norm.sketched_error(matrix - chain_to_dense(cores), matrix)

    def roughly(self, matrix: Tensor, spec: FactorSpec, weighting: Weighting) -> Tensor:
        """What cores of these ranks make of a matrix ``(outputs, inputs)``, found as quickly as ``probe`` does."""
        if weighting.is_plain:
            return chain_to_dense(self._decompose(matrix, spec, None, method="randomized")[0])
        norm = self._norm(spec, weighting)
        return chain_to_dense(self._roughly(norm.whiten(matrix), spec, norm))

    def _roughly(self, white: Tensor, spec: FactorSpec, norm: KroneckerNorm) -> list[Tensor]:
        return _undone(self._decompose(white, spec, None, method="randomized")[0], norm)

    def _norm(self, spec: FactorSpec, weighting: Weighting) -> KroneckerNorm:
        outs, ins = self.chain_modes(spec)
        return KroneckerNorm.of(weighting, spec.weight, outs, ins, n_spatial=self.n_spatial(spec))

    def _decompose(
        self, matrix: Tensor, spec: FactorSpec, eps: float | None, *, method: str = "auto"
    ) -> tuple[list[Tensor], float]:
        outs, ins = self.chain_modes(spec)
        found = tt_svd(matrix, eps=eps, max_rank=spec.ranks, out_modes=outs, in_modes=ins, method=method)
        return balance_chain(found.value.cores), float(found.rel_error_bound or 0.0)

    def _fit(self, cores: Sequence[Tensor], rel_error: float, spec: FactorSpec, dtype: torch.dtype) -> Fit:
        """What is stored of the cores of a chain."""
        reached = replace(spec, ranks=(*(core.shape[0] for core in cores), 1))
        stored = tuple(core.to(dtype).contiguous() for core in self.from_chain(cores, reached))
        return Fit(reached, stored, rel_error)

    def dense_group(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        return self.from_matrix(chain_to_dense(self.to_chain(cores, spec)), spec)

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        is_single = dense.dtype != torch.float64 and not dense.is_complex()
        is_rough = is_single and max(self.rank_caps(spec)) >= _LARGE_SIDE
        # Roots are put on in single precision where the weight has no more; squares are made in double.
        matrix = self.to_matrix(dense.detach(), spec).to(torch.float32 if is_single else compute_dtype(dense.dtype))
        if not weighting.is_plain:
            matrix = self._norm(spec, weighting).whiten(matrix)
        matrix = matrix.to(torch.float32 if is_rough else compute_dtype(dense.dtype))
        outs, ins = self.chain_modes(spec)
        d = len(outs)
        paired = matrix.reshape(*outs, *ins).permute([axis for k in range(d) for axis in (k, d + k)])
        paired = paired.reshape([m * n for m, n in zip(outs, ins, strict=True)])
        del matrix  # of a large weight room for the copies to come
        return _rough_spectra(paired) if is_rough else unfolding_spectra(paired, method="gram")

    def squared_norm(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        weight, chain = spec.weight, self.to_chain(cores, spec)
        if weight.kind == "conv":
            return chain_squared_norm(chain)
        return chain_squared_norm(chain, weight.out_features, weight.in_features)  # padding does not count

    def fan_ins(self, spec: FactorSpec) -> tuple[int, ...]:
        return spec.ranks[:-1] if spec.weight.kind == "embedding" else super().fan_ins(spec)

    def mean_square(self, cores: Sequence[Tensor], spec: FactorSpec) -> float:
        is_padded = spec.weight.kind == "linear" and self.chain(spec).dense_numel > spec.weight.n_params
        if spec.weight.groups > 1 or is_padded:
            return super().mean_square(cores, spec)
        wide = compute_dtype(cores[0].dtype)
        merged = [core.to(wide).flatten(1, 2) for core in self.to_chain(cores, spec)]
        square, exponent = value_parts([merged, merged])
        return float(times_pow2(square.real, exponent)) / self.chain(spec).dense_numel

    # -- the weight as a matrix ----------------------------------------------------------------------

    def to_matrix(self, dense: Tensor, spec: FactorSpec) -> Tensor:
        """One group's weight as (outputs, inputs); kernel positions are the slowest input index."""
        outs, ins = self.chain_modes(spec)
        return weight_to_matrix(dense, spec.weight, math.prod(ins), math.prod(outs))

    def from_matrix(self, matrix: Tensor, spec: FactorSpec) -> Tensor:
        return matrix_to_weight(matrix, spec.weight)

    # -- convolution core by core --------------------------------------------------------------------

    def split_spatial(self, cores: Sequence[Tensor], spec: FactorSpec) -> tuple[Tensor, list[Tensor]]:
        """Spatial filters ``(r_0, 1, *kernel)`` and the channel chain, ``r_0`` merged into its first input mode.

        Feature maps filtered by the spatial core have channels ordered (r_0, C_1, .., C_d).
        """
        chain = self.to_chain(cores, spec)
        n = self.n_spatial(spec)
        channel = chain[n:]
        if n == 0:
            filters = channel[0].new_ones(1, 1, *spec.weight.kernel)
            return filters, channel
        spatial = merge_cores(chain[:n], [(0, n)])[0]  # 1 1 L r_0
        filters = spatial.reshape(-1, spatial.shape[-1]).T.reshape(-1, 1, *spec.weight.kernel)
        r, i, j, s = channel[0].shape
        first = channel[0].permute(1, 0, 2, 3).reshape(1, i, r * j, s)
        return filters, [first, *channel[1:]]

    def n_filters(self, spec: FactorSpec) -> int | None:
        return None if self.channel_chain(spec) is None else spec.ranks[self.n_spatial(spec)]

    def channel_chain(self, spec: FactorSpec) -> ChainShape | None:
        """Shapes of the channel chain that ``split_spatial`` returns."""
        outs, ins = self.chain_modes(spec)
        n = self.n_spatial(spec)
        r0 = spec.ranks[n]
        return ChainShape(outs[n:], (r0 * ins[n], *ins[n + 1 :]), (1, *spec.ranks[n + 1 :]))

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        assert plan is not None
        filters, channel = self.split_spatial(cores, spec)
        b, c = x.shape[:2]
        y = spatial(x.reshape(b * c, 1, *x.shape[2:]), filters)  # every channel through the same r_0 filters
        positions = y.shape[2:]
        y = y.reshape(b, c, y.shape[1], positions.numel()).permute(0, 3, 2, 1).flatten(2)  # b p (r_0 c)
        return plan.execute(y, channel).transpose(1, 2).reshape(b, spec.weight.out_features, *positions)

    def conv_network(self, spec: FactorSpec) -> ConvNetwork:
        weight, chain = spec.weight.one_group(), self.chain(spec)
        n, positions = self.n_spatial(spec), math.prod(weight.kernel)
        cores, sizes = [], dict[str, int]()
        for k, (r, m, size, s) in enumerate(chain.core_shapes):
            # Where no core is spatial alone, the positions are the slowest part of the first input mode.
            holds_all = k == 0 and n <= 1 and positions > 1
            own = range(len(weight.kernel)) if holds_all else range(k, k + 1) if n > 1 and k < n else ()
            spatial = [f"x{axis}" for axis in own]
            rest = 1 if k < n else size // positions if holds_all else size
            cores.append((f"b{k}", f"o{k}", *spatial, f"i{k}", f"b{k + 1}"))
            sizes |= {f"b{k}": r, f"o{k}": m, f"i{k}": rest, f"b{k + 1}": s}
        return conv_network(weight, cores, sizes)

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        r0 = spec.ranks[self.n_spatial(spec)]
        channels = spec.weight.in_features
        filtered = channels * r0 * out_positions
        flops = 2 * filtered * math.prod(spec.weight.kernel)
        return [
            (flops, channels * in_positions + filtered),
            (0, 2 * filtered),
        ]  # the filters, then a transpose

    def row_chain(self, spec: FactorSpec) -> ChainShape | None:
        return self.chain(spec)

    def lookup(self, ids: Tensor, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        return chain_lookup(ids, self.to_chain(cores, spec), self.chain_modes(spec)[1])


def _rough_spectra(x: Tensor) -> list[Tensor]:
    """``unfolding_spectra`` in float32, twice as fast: what is below 1e-3 of the largest value is noise."""
    spectra: list[Tensor] = []
    rows = 1
    scale = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    for k, n in enumerate(x.shape[:-1]):
        rows *= n
        if n == 1 and k > 0:
            spectra.append(spectra[-1])
            continue
        spectra.append(gram_singular_values((x / scale).reshape(rows, -1)).double() * scale.double())
    return spectra


def _product(r: int, n: int, s: int) -> int:
    return r * n * s


def _whitened(matrix: Tensor, norm: KroneckerNorm, decompose: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Decompose the whitened matrix and take the roots off again, core by core."""
    return _undone(decompose(norm.whiten(matrix)), norm)


def _undone(cores: list[Tensor], norm: KroneckerNorm) -> list[Tensor]:
    for k in range(len(cores)):
        cores[k] = norm.undo(cores[k], "in", k, axis=2)
        cores[k] = norm.undo(cores[k], "out", k, axis=1)
    return balance_chain(cores)


def balance_chain(cores: Sequence[Tensor], *, are_own: bool = False) -> list[Tensor]:
    """Share the scale of every bond index evenly between its two cores; the product stays the same.

    Gradients of a core grow with the norms of the others, so an unbalanced chain trains at unequal speeds.
    A diagonal gauge per bond suffices: for two cores it splits the singular values about as
    ``sqrt(s) sqrt(s)``. Gauges are powers of two, so that nothing is rounded and a promised error holds.

    Args:
        are_own: The cores are nobody else's, and written to: those of a large table would not be held twice.
    """
    cores = list(cores) if are_own else [core.clone() for core in cores]
    for _ in range(3):  # converges linearly; three sweeps leave a few per cent
        for k in range(len(cores) - 1):
            left = cores[k].flatten(0, -2).norm(dim=0)
            right = cores[k + 1].flatten(1).norm(dim=1)
            gauge = torch.where((left > 0) & (right > 0), _nearest_pow2((right / left).sqrt()), 1.0)
            below = gauge.reshape(-1, *[1] * (cores[k + 1].ndim - 1))
            # A gauge of another dtype would make torch compute, and hold, copies in that.
            cores[k].mul_(gauge.to(cores[k].dtype))
            cores[k + 1].div_(below.to(cores[k + 1].dtype))
    return cores


def _nearest_pow2(x: Tensor) -> Tensor:
    return torch.exp2(torch.log2(x).round())
