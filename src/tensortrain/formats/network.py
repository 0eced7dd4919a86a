"""Formats given by a tensor network that is no chain.

A subclass names the legs of its cores and says how they are fitted to a dense tensor. Everything else follows
from the names: the dense weight, norms, execution on a batch, convolution of patches, lookup of rows.

Output legs are ``o1 .. od``, input legs ``i1 .. id``; a kernel with more than one position adds the input leg
``x``, slowest of all, as in the chains.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensortrain.contract import ContractionPlan, CostModel, Network, plan_network
from tensortrain.contract.hops import ConvNetwork
from tensortrain.contract.products import Product, contraction, contraction_flops, run
from tensortrain.cores.linalg import singular_values
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.errors import DTypeError, ModeIndexError
from tensortrain.system.tracing import constant_when_traced, is_traced

from .base import Format, Spatial
from .fit import Fit, best, equal_norms
from .layout import conv_network, matrix_to_weight, weight_to_matrix
from .ranks import clips, resolve_rank_tuple
from .registry import get_format
from .spec import Bond, FactorSpec, Rank, WeightShape
from .weighting import PLAIN, Weighting
from .whitening import KroneckerNorm, keep_promise

__all__ = ["Modes", "NetworkFormat"]

Modes = tuple[int, ...]
_TRACED_ROWS = 1024  # a traced graph cannot choose by size, so it is planned for this one
_LOOKUP_BYTES = 64 * 2**20
_IDS = "ids"


class NetworkFormat(Format):
    """A format whose cores form a network of named legs."""

    # -- what a subclass provides -------------------------------------------------------------------

    @abstractmethod
    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        """Modes of one group, checked, with those left out filled in."""

    @abstractmethod
    def caps(self, draft: FactorSpec) -> tuple[int, ...]:
        """Largest useful ranks for the modes of a spec whose ranks are not known yet."""

    @abstractmethod
    def core_legs(self, spec: FactorSpec) -> tuple[tuple[str, ...], ...]:
        """Legs of every core, in the order in which inputs meet them; ranks have names of their own."""

    @abstractmethod
    def rank_legs(self, spec: FactorSpec) -> dict[str, int]:
        """Sizes of the inner legs."""

    @abstractmethod
    def fit_tensor(self, tensor: Tensor, spec: FactorSpec) -> list[Tensor]:
        """Best cores found at ``spec.ranks`` for ``(*out_legs, *in_legs)`` in float64."""

    @abstractmethod
    def ranks_within(self, tensor: Tensor, spec: FactorSpec, eps: float) -> tuple[int, ...]:
        """Ranks, at most ``spec.ranks``, whose ``fit_tensor`` is expected to err by at most ``eps``."""

    rank_words: str = "this format takes one rank"

    def expand_rank(self, rank: int, caps: tuple[int, ...]) -> tuple[int, ...]:
        """All ranks from one number."""
        return tuple(min(rank, cap) for cap in caps)

    def full_ranks(self, draft: FactorSpec) -> tuple[int, ...]:
        """Ranks at which every weight is exact, as far as the format can."""
        return self.caps(draft)

    # -- legs ----------------------------------------------------------------------------------------

    def out_legs(self, spec: FactorSpec) -> dict[str, int]:
        """Output legs and their sizes, first slowest."""
        return {f"o{k}": n for k, n in enumerate(spec.out_modes, start=1)}

    def in_legs(self, spec: FactorSpec) -> dict[str, int]:
        """Input legs and their sizes, first slowest."""
        positions = math.prod(spec.weight.kernel)
        spatial = {"x": positions} if positions > 1 else {}
        return {**spatial, **{f"i{k}": n for k, n in enumerate(spec.in_modes, start=1)}}

    def network(self, spec: FactorSpec) -> Network:
        """The network of one group."""
        return _network(_plain(spec), spec.ranks)

    def _build_network(self, spec: FactorSpec) -> Network:
        outs, ins = self.out_legs(spec), self.in_legs(spec)
        sizes = {**outs, **ins, **self.rank_legs(spec)}
        return Network(self.core_legs(spec), tuple(outs), tuple(ins), tuple(sizes.items()))

    def contraction(self, spec: FactorSpec) -> Network:
        return self.network(spec)

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
        draft = FactorSpec(self.name, weight.one_group(), outs, ins, ())
        caps = self.caps(draft)
        ranks = resolve_rank_tuple(
            rank,
            caps,
            clip=clips(rank, clip),
            what=self.rank_words,
            dense_params=draft.weight.n_params,
            count=lambda some: replace(draft, ranks=some).n_params,
            full=self.full_ranks(draft),
            expand=lambda r: self.expand_rank(r, caps),
        )
        return FactorSpec(self.name, weight, outs, ins, ranks)

    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        return self.network(spec.one_group()).core_shapes

    def n_paths(self, spec: FactorSpec) -> int:
        return self.network(spec.one_group()).n_paths

    def bonds(self, spec: FactorSpec) -> tuple[Bond, ...]:
        cores = self.network(spec).cores
        return tuple(
            tuple((k, legs.index(leg)) for k, legs in enumerate(cores) if leg in legs) for leg in self.rank_legs(spec)
        )

    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        return spec.ranks

    def dense_group(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        network = self.network(spec)
        tensor = run(contraction(network.cores, (*network.out_legs, *network.in_legs), network.sizes), cores)
        return matrix_to_weight(tensor.flatten(0, len(spec.out_modes) - 1).flatten(1), spec.weight)

    def mean_square(self, cores: Sequence[Tensor], spec: FactorSpec) -> float:
        one = spec.one_group()
        network, wide = self.network(one), compute_dtype(cores[0].dtype)
        cores = [core.to(wide) for core in cores]
        groups = range(spec.weight.groups)
        members = [cores] if spec.weight.groups == 1 else [[core[g] for core in cores] for g in groups]
        total = sum(float(network.squared_norm(some)) for some in members)
        return total / (len(members) * network.dense_numel)

    def core_fans(self, spec: FactorSpec) -> tuple[tuple[int, int], ...]:
        return self.network(spec.one_group()).core_fans()

    def factorize_group(self, dense: Tensor, spec: FactorSpec, *, eps: float | None, weighting: Weighting) -> Fit:
        if dense.is_complex():
            raise DTypeError(f"{self.name} fits real weights: found {dense.dtype}. Choose format='tt' or 'low_rank'.")
        eps = None if eps is None else checked_eps(eps, dense.dtype, 2 + len(spec.in_modes))
        matrix = self._matrix(dense, spec)
        norm = None if weighting.is_plain else self._norm(spec, weighting)

        def attempt(cut: float | None, fitted_in: KroneckerNorm | None = norm) -> Fit:
            ranks, cores = self._fitted(matrix, spec, cut, fitted_in)
            return self._measured(cores, matrix, replace(spec, ranks=ranks), norm, dense.dtype)

        if eps is not None:
            return keep_promise(eps, spec.ranks, attempt)
        # The Kronecker fit of the second moment is not the moment itself: unweighted cores may serve it better.
        return attempt(None) if norm is None else best(attempt(None), attempt(None, None))

    def _measured(
        self, cores: list[Tensor], matrix: Tensor, spec: FactorSpec, norm: KroneckerNorm | None, dtype: torch.dtype
    ) -> Fit:
        """What is stored of the cores, with its error in the true norm."""
        stored = tuple(core.to(dtype).contiguous() for core in equal_norms(cores))
        difference = self.network(spec).to_dense([core.double() for core in stored]) - matrix
        if norm is not None:
            return Fit(spec, stored, norm.error(difference, matrix))
        return Fit(spec, stored, PLAIN.rel_error(difference, matrix) * (1 + 1e-12))

    def _fitted(
        self, matrix: Tensor, spec: FactorSpec, eps: float | None, norm: KroneckerNorm | None
    ) -> tuple[tuple[int, ...], list[Tensor]]:
        """Ranks and cores in the plain norm, or in one that is undone mode by mode afterwards."""
        tensor = self._tensor(matrix if norm is None else norm.whiten(matrix), spec)
        if eps is not None:
            spec = replace(spec, ranks=self.ranks_within(tensor, spec, eps))
        cores = self.fit_tensor(tensor, spec)
        if norm is None:
            return spec.ranks, cores
        network = self.network(spec)
        for k, legs in enumerate(network.cores):
            for axis, leg in enumerate(legs):
                if leg in network.in_legs:
                    cores[k] = norm.undo(cores[k], "in", network.in_legs.index(leg), axis)
                elif leg in network.out_legs:
                    cores[k] = norm.undo(cores[k], "out", network.out_legs.index(leg), axis)
        return spec.ranks, cores

    def _matrix(self, dense: Tensor, spec: FactorSpec) -> Tensor:
        return weight_to_matrix(dense.detach(), spec.weight, math.prod(self.in_legs(spec).values())).double()

    def _tensor(self, matrix: Tensor, spec: FactorSpec) -> Tensor:
        return matrix.reshape(*self.out_legs(spec).values(), *self.in_legs(spec).values())

    def _norm(self, spec: FactorSpec, weighting: Weighting) -> KroneckerNorm:
        outs, ins = tuple(self.out_legs(spec).values()), tuple(self.in_legs(spec).values())
        return KroneckerNorm.of(weighting, spec.weight, outs, ins)

    def whitened_tensor(self, dense: Tensor, spec: FactorSpec, weighting: Weighting) -> Tensor:
        """``(*out_legs, *in_legs)`` in float64, weighted by the fitted second moments."""
        matrix = self._matrix(dense, spec)
        if not weighting.is_plain:
            matrix = self._norm(spec, weighting).whiten(matrix)
        return self._tensor(matrix, spec)

    # -- how it runs ---------------------------------------------------------------------------------

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        """The network applied to the patch at every output position; no kernel is built."""
        positions = math.prod(spec.weight.kernel)
        b, c = x.shape[:2]
        shifts = torch.eye(positions, dtype=x.dtype, device=x.device).reshape(positions, 1, *spec.weight.kernel)
        y = spatial(x.reshape(b * c, 1, *x.shape[2:]), shifts)  # (b c) x *p
        places = y.shape[2:]
        y = y.reshape(b, c, positions, places.numel()).permute(0, 3, 2, 1)  # b p x c
        rows = _TRACED_ROWS if is_traced() else y.shape[0] * y.shape[1]
        steps = _row_steps(_plain(spec), spec.ranks, rows)
        y = run(steps, [y.reshape(-1, *self.in_legs(spec).values()), *cores])
        y = y.reshape(b, places.numel(), spec.weight.out_features).transpose(1, 2)
        return y.reshape(b, spec.weight.out_features, *places)

    def conv_network(self, spec: FactorSpec) -> ConvNetwork:
        network, n_axes = self.network(spec), len(spec.weight.kernel)
        axes = tuple(f"x{axis}" for axis in range(n_axes))
        cores = [[name for leg in legs for name in (axes if leg == "x" else (leg,))] for legs in network.cores]
        return conv_network(spec.weight.one_group(), cores, {leg: n for leg, n in network.sizes if leg != "x"})

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        weight, positions = spec.weight.one_group(), math.prod(spec.weight.kernel)
        patches = weight.in_features * positions * out_positions
        network = self.network(spec)
        plan = plan_network(network, batch=out_positions, force="factorized", cost_model=CostModel.reference())
        steps = [(step.flops, 2 * step.numel) for step in plan.steps]
        return [(2 * positions * patches, weight.in_features * in_positions + patches), (0, 2 * patches), *steps]

    def lookup(self, ids: Tensor, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """Rows of an embedding: every core that bears input legs gives the slices that an id's digits pick."""
        flat, inverse = ids.reshape(-1).long(), None
        traced = is_traced()
        if not traced:
            flat, inverse = torch.unique(flat, return_inverse=True)
            _check_range(flat, math.prod(spec.in_modes))
        network, n_out = self.network(spec), math.prod(spec.out_modes)
        legs = tuple(_picked_legs(some, network.in_legs) for some in network.cores)
        n_ids = _TRACED_ROWS if traced else max(1, flat.shape[0])
        steps = _lookup_steps(legs, network, n_ids)
        size = n_ids if traced else max(1, _LOOKUP_BYTES // _bytes_per_id(steps, n_ids, cores[0].element_size()))
        digits = dict(zip(network.in_legs, _digits(flat, spec.in_modes), strict=True))
        pieces = []
        for start in range(0, 1 if traced else max(1, flat.shape[0]), size):
            part = digits if traced else {leg: digit[start : start + size] for leg, digit in digits.items()}
            picked = [_pick(core, some, part) for core, some in zip(cores, network.cores, strict=True)]
            pieces.append(run(steps, picked).reshape(-1, n_out))
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if inverse is not None:
            rows = rows.index_select(0, inverse.reshape(-1))
        return rows.reshape(*ids.shape, n_out)

    def row_products(self, spec: FactorSpec) -> int:
        network = self.network(spec)
        legs = tuple(_picked_legs(some, network.in_legs) for some in network.cores)
        return max(1, contraction_flops(_lookup_steps(legs, network, 1024)) // 2048)


# A traced program takes networks and plans as constants. What it passes for them may only be plain data, since
# dataclasses made while tracing cannot be turned into constants.


def _plain(spec: FactorSpec) -> tuple[Any, ...]:
    w = spec.weight
    return spec.format, (w.kind, w.out_features, w.in_features, w.kernel, w.groups), spec.out_modes, spec.in_modes


@constant_when_traced
def _network(plain: tuple[Any, ...], ranks: tuple[int, ...]) -> Network:
    return _remembered_network(plain, ranks)


@lru_cache(maxsize=4096)
def _remembered_network(plain: tuple[Any, ...], ranks: tuple[int, ...]) -> Network:
    name, weight, outs, ins = plain
    fmt: Any = get_format(name)  # a NetworkFormat: no other asks here
    return fmt._build_network(FactorSpec(name, WeightShape(*weight), outs, ins, ranks))


@constant_when_traced
def _row_steps(plain: tuple[Any, ...], ranks: tuple[int, ...], rows: int) -> tuple[Product, ...]:
    """Products that multiply about so many rows; which order is best hardly depends on device and dtype."""
    bucket = 1 << max(0, rows - 1).bit_length()
    plan = plan_network(_network(plain, ranks), batch=bucket, force="factorized", cost_model=CostModel.reference())
    return plan.steps


def balanced_spectrum(tensor: Tensor, n_out: int) -> Tensor:
    """Singular values of the unfolding (outputs, inputs), the most balanced one that a rank cuts."""
    return singular_values(tensor.reshape(math.prod(tensor.shape[:n_out]), -1))


def _picked_legs(legs: tuple[str, ...], in_legs: tuple[str, ...]) -> tuple[str, ...]:
    """Legs of a core once its input legs have been indexed."""
    if not any(leg in in_legs for leg in legs):
        return legs
    return (_IDS, *(leg for leg in legs if leg not in in_legs))


def _pick(core: Tensor, legs: tuple[str, ...], digits: dict[str, Tensor]) -> Tensor:
    """``(ids, other legs)``: the slices of a core at the digits of its input legs."""
    axes = [axis for axis, leg in enumerate(legs) if leg in digits]
    if not axes:
        return core
    others = [axis for axis in range(core.ndim) if axis not in axes]
    table = core.permute(*axes, *others)
    flat = torch.zeros_like(digits[legs[axes[0]]])
    for axis in axes:
        flat = flat * core.shape[axis] + digits[legs[axis]]
    return table.reshape(-1, *(core.shape[axis] for axis in others)).index_select(0, flat)


def _digits(ids: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Digits of every id in the mixed radix of the modes, first slowest."""
    digits = []
    for mode in reversed(modes):
        digits.append(ids % mode)
        ids = torch.div(ids, mode, rounding_mode="floor")
    return digits[::-1]


def _lookup_steps(legs: tuple[tuple[str, ...], ...], network: Network, n_ids: int) -> tuple[Product, ...]:
    bucket = 1 << max(0, n_ids - 1).bit_length()
    return contraction(legs, (_IDS, *network.out_legs), (*network.sizes, (_IDS, bucket)))


def _bytes_per_id(steps: Sequence[Product], n_ids: int, item: int) -> int:
    bucket = 1 << max(0, n_ids - 1).bit_length()
    return item * max(1, -(-max(step.numel for step in steps) // bucket))


def _check_range(distinct: Tensor, n_rows: int) -> None:
    """``distinct`` is sorted, so its ends tell; looking for equal ids has waited for the device already."""
    if distinct.shape[0] and (int(distinct[0]) < 0 or int(distinct[-1]) >= n_rows):
        raise ModeIndexError(
            f"ids must be rows of the table: ids has values from {int(distinct[0])} to {int(distinct[-1])}, "
            f"expected 0 to {n_rows - 1}. Check the vocabulary that made the ids."
        )
