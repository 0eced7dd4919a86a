"""What a weight format is, and the registry: a new format is one new file.

A format turns a dense weight into a few cores and back. The layer kinds it serves, the shapes of its cores
and its error all follow from a ``FactorSpec``, which is plain data: it prints, it compares, it goes to JSON.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import Chain, ContractionPlan, Network
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import DTypeError, KindError, NonFiniteError, ShapeError
from tensortrain.tensor import Approximation, default_eps

from .registry import _FORMATS as _FORMATS
from .registry import format_names, get_format, register
from .spec import Bond, FactorSpec, Kind, Rank, WeightShape

__all__ = [
    "Bond",
    "FactorSpec",
    "Factorization",
    "Format",
    "Kind",
    "Rank",
    "WeightShape",
    "format_names",
    "get_format",
    "register",
]

Spatial = Callable[..., Tensor]  # (x, kernel, bias=None, groups=1)


@dataclass(frozen=True)
class Factorization:
    """Cores together with the spec that lays them out."""

    spec: FactorSpec
    cores: tuple[Tensor, ...]

    def to_dense(self) -> Tensor:
        """The dense weight in torch's layout."""
        return get_format(self.spec.format).to_dense(self.cores, self.spec)


class Format(ABC):
    """One way to write a weight as a product of small cores.

    A subclass says how a single group's weight is laid out, taken apart and put together; groups, checks
    and initialisation are the same for all and live here.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]]
    description: ClassVar[str] = ""

    # -- what a subclass provides -------------------------------------------------------------------

    @abstractmethod
    def spec(
        self,
        weight: WeightShape,
        *,
        rank: Rank,
        out_modes: Sequence[int] | None = None,
        in_modes: Sequence[int] | None = None,
        clip: bool | None = None,
    ) -> FactorSpec:
        """Fill in modes and ranks. ``clip=None`` clips a number or share, and takes a tuple as given."""

    @abstractmethod
    def group_core_shapes(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        """Core shapes of one group."""

    @abstractmethod
    def factorize_group(
        self,
        dense: Tensor,
        spec: FactorSpec,
        *,
        eps: float | None,
        gram: Tensor | None,
        output_gram: Tensor | None = None,
    ) -> tuple[tuple[int, ...], tuple[Tensor, ...], float]:
        """Best cores for one group's dense weight: ranks reached, cores, promised relative error.

        With ``eps`` the ranks follow from the tolerance, and ``spec.ranks`` are only caps.
        With ``gram`` the error is that of the layer's output, ``||(W - W') H^(1/2)|| / ||W H^(1/2)||``;
        ``output_gram`` weighs the outputs.
        """

    @abstractmethod
    def dense_group(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """The dense weight of one group in torch's layout, differentiable."""

    @abstractmethod
    def n_paths(self, spec: FactorSpec) -> int:
        """How many products of one entry per core are summed in an entry of the dense weight."""

    @abstractmethod
    def spectra(
        self, dense: Tensor, spec: FactorSpec, *, gram: Tensor | None, output_gram: Tensor | None = None
    ) -> list[Tensor]:
        """Singular values of every matricization that a rank of ``spec`` cuts (one group, float64)."""

    def rank_caps(self, spec: FactorSpec) -> tuple[int, ...]:
        """Largest useful ranks for these modes."""
        return self.spec(spec.weight, rank="full", out_modes=spec.out_modes, in_modes=spec.in_modes).ranks

    @abstractmethod
    def inner_ranks(self, spec: FactorSpec) -> tuple[int, ...]:
        """The ranks that can be chosen (without fixed boundary ones), one per entry of ``spectra``."""

    def with_inner(self, spec: FactorSpec, inner: Sequence[int]) -> FactorSpec:
        """The spec with other ``inner_ranks``."""
        return replace(spec, ranks=tuple(inner))

    def bonds(self, spec: FactorSpec) -> tuple[Bond, ...]:
        """Where the ranks are in the stored cores of one group.

        The weight is linear in every index of a bond: what is dropped in one of its cores is gone.
        """
        raise KindError(
            f"a format must tell which axes are ranks: {self.name!r} has no method bonds(spec). Give it one."
        )

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        """Largest rank of the map from one group's inputs to its outputs (channels, for a convolution).

        What no training of the cores can exceed: the width of the layer at its narrowest place.
        """
        return min(spec.weight.out_features // spec.weight.groups, spec.weight.in_features)

    def probe(self, dense: Tensor, spec: FactorSpec, gram: Tensor | None, output_gram: Tensor | None = None) -> float:
        """Relative error that a decomposition at these ranks reaches, perhaps estimated.

        For comparing candidates: cheaper than ``factorize`` where the format knows how.
        """
        found = self.factorize(
            dense,
            spec.weight,
            rank=spec.ranks,
            out_modes=spec.out_modes,
            in_modes=spec.in_modes,
            gram=gram,
            output_gram=output_gram,
        )
        return float(found.rel_error_bound or 0.0)

    # -- how it runs ---------------------------------------------------------------------------------

    def chain(self, spec: FactorSpec) -> Chain | None:
        """The chain that carries the layer's matrix-vector product, if there is one (one group)."""
        return None

    def contraction(self, spec: FactorSpec) -> Chain | Network | None:
        """What carries a linear layer's product: the chain, or the network of a format that is none (one group)."""
        return self.chain(spec)

    def to_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> list[Tensor]:
        """Stored cores as ``contraction`` takes them, those of a chain ``(r, i, j, s)``; views where possible."""
        return list(cores)

    def convolve(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        spatial: Spatial,
        plan: ContractionPlan | None,
    ) -> Tensor:
        """Apply one group core by core.

        Args:
            x: ``(b, C, *positions)``.
            spatial: ``spatial(x, kernel, bias=None, groups=1)`` convolves with the layer's stride, padding
                and dilation.
            plan: Plan of ``channel_chain``, where the format has one.

        Returns:
            Tensor: ``(b, S, *out_positions)``.
        """
        raise KindError(f"format {self.name!r} does not convolve core by core. Use implementation='dense'.")

    def channel_chain(self, spec: FactorSpec) -> Chain | None:
        """The chain that ``convolve`` runs over channels at every output position, if there is one."""
        return None

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        """Steps of ``convolve`` for one example and one group, as (flops, numbers moved)."""
        return []

    def lookup(self, ids: Tensor, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """Rows of an embedding: ``(*ids.shape, J)``."""
        raise KindError(f"format {self.name!r} does not look up rows. Choose another format.")

    def row_products(self, spec: FactorSpec) -> int | None:
        """Multiply-adds of one row of ``lookup``, where the format counts them itself."""
        return None

    # -- the same for every format ------------------------------------------------------------------

    def check_kind(self, weight: WeightShape) -> None:
        """Raise ``ShapeError`` where the format does not serve this kind of layer."""
        if weight.kind not in self.kinds:
            fitting = [name for name in format_names() if weight.kind in get_format(name).kinds]
            raise ShapeError(
                f"a format must serve the kind of layer: {self.name!r} serves {sorted(self.kinds)}, found "
                f"{weight.kind!r}. Choose one of {fitting}."
            )

    def factorize(
        self,
        dense: Tensor,
        weight: WeightShape,
        *,
        rank: Rank | None = None,
        eps: float | None = None,
        out_modes: Sequence[int] | None = None,
        in_modes: Sequence[int] | None = None,
        gram: Tensor | None = None,
        output_gram: Tensor | None = None,
    ) -> Approximation:
        """Approximate a dense weight.

        Args:
            dense: Weight in torch's layout, ``weight.dense_shape``.
            weight: What the weight belongs to.
            rank: Cap on the ranks (see ``TensorTrain``); ``None`` with ``eps=None`` is exact to dtype.
            eps: Relative Frobenius tolerance (in the norm of ``gram`` where given).
            out_modes, in_modes: Mode shapes, chosen when left out.
            gram: Second moment of the inputs, ``(N, N)`` or its diagonal ``(N,)``, with ``N`` the fan-in
                (convolutions: channel slowest, as ``torch.nn.functional.unfold`` orders a patch).
                Grouped convolutions do not use it.
            output_gram: Weights of the outputs beside ``gram``, ``(M, M)`` or its diagonal ``(M,)``, such as the
                second moment of the gradients that reach them.

        Returns:
            Approximation: ``value`` a ``Factorization``; ``rel_error_bound`` in the norm used.

        Raises:
            NonFiniteError: The weight holds NaN or Inf.
            DTypeError: ``gram`` is given for a complex weight.
            ShapeError: The weight does not have the shape announced, or the modes do not fit.
        """
        self.check_kind(weight)
        check_dense(dense, weight)
        if gram is not None and dense.is_complex():
            raise DTypeError(
                f"only real weights can be weighted by a second moment: found {dense.dtype}. Leave it out."
            )
        exact = rank is None and eps is None
        spec = self.spec(
            weight, rank="full" if rank is None else rank, out_modes=out_modes, in_modes=in_modes, clip=True
        )
        tolerance = default_eps(dense.dtype, 2 + len(spec.in_modes)) if exact else eps
        if weight.groups == 1:
            ranks, cores, bound = self.factorize_group(dense, spec, eps=tolerance, gram=gram, output_gram=output_gram)
            return Approximation(Factorization(replace(spec, ranks=ranks), cores), bound, {})
        return self._factorize_groups(dense, spec, tolerance)

    def _factorize_groups(self, dense: Tensor, spec: FactorSpec, eps: float | None) -> Approximation:
        # All groups share one rank profile so that their cores stack: the largest that any of them needs.
        one = spec.one_group()
        blocks = dense.chunk(spec.weight.groups)
        found = [self.factorize_group(block, one, eps=eps, gram=None) for block in blocks]
        ranks = tuple(max(column) for column in zip(*(ranks for ranks, _, _ in found), strict=True))
        padded = replace(one, ranks=ranks)
        shapes = self.group_core_shapes(padded)
        stacks: list[list[Tensor]] = [[] for _ in shapes]
        squared = 0.0
        for block, first in zip(blocks, found, strict=True):
            again = first if first[0] == ranks else self.factorize_group(block, padded, eps=None, gram=None)
            _, cores, bound = min(again, first, key=lambda one: one[2])  # more ranks need not mean less error
            squared += bound**2 * _energy(block)
            for stack, core, shape in zip(stacks, cores, shapes, strict=True):
                stack.append(zero_pad(core, shape))
        total = _energy(dense)
        relative = math.sqrt(squared / total) * (1 + 1e-12) if total > 0 else 0.0  # sums round differently
        cores_out = tuple(torch.stack(stack) for stack in stacks)
        return Approximation(Factorization(replace(spec, ranks=ranks), cores_out), relative, {})

    def to_dense(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """The dense weight in torch's layout, differentiable in the cores."""
        if spec.weight.groups == 1:
            return self.dense_group(cores, spec)
        one = spec.one_group()
        blocks = [self.dense_group([core[g] for core in cores], one) for g in range(spec.weight.groups)]
        return torch.cat(blocks)

    def init_std(self, spec: FactorSpec, sigma: float) -> float:
        r"""Standard deviation of every core entry that gives dense entries the variance ``sigma**2``.

        An entry is a sum over ``n_paths`` products of one independent entry per core, so
        ``std**(2 n_cores) * n_paths = sigma**2``. (The root ``4d - 2`` printed in arXiv:1901.10787 is that
        of a chain of ``2d - 1`` cores and misses the variance of a TT-matrix by orders of magnitude.)
        """
        n_cores = len(self.group_core_shapes(spec))
        return (sigma**2 / self.n_paths(spec)) ** (1 / (2 * n_cores))

    def core_fans(self, spec: FactorSpec) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs ``(f_in, f_out)`` of every core, seen as a dense layer that runs in batch.

        What a core sums over, and what it makes of it, when the cores are applied in their stored order. They set
        the scale of its entries (``init_structured_``) and, for an optimizer like Adam, its learning rate
        ``lr * (d_in / f_in) / n_cores``.

        Source: Qiu et al., ICML 2024, arXiv:2406.06248, section 3.
        """
        one = spec.one_group()
        shape = self.contraction(one)
        if isinstance(shape, Network):
            return shape.core_fans()
        if shape is None:
            raise KindError(f"format {self.name!r} does not know the fans of its cores. Override core_fans.")
        return tuple((r * n, m * s) for r, m, n, s in shape.core_shapes)

    @torch.no_grad()
    def init_structured_(
        self, cores: Sequence[Tensor], spec: FactorSpec, generator: torch.Generator | None = None
    ) -> None:
        """Fill every core with the standard deviation ``sqrt(1 / f_in) min(1, sqrt(f_out / f_in))``.

        Activations then keep their size whatever the width. Source: as ``core_fans``.
        """
        for core, (f_in, f_out) in zip(cores, self.core_fans(spec), strict=True):
            if not core.is_meta:
                core.normal_(0.0, min(1.0, math.sqrt(f_out / f_in)) / math.sqrt(f_in), generator=generator)

    @torch.no_grad()
    def init_(
        self,
        cores: Sequence[Tensor],
        spec: FactorSpec,
        sigma: float,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fill cores so that the dense weight has mean square ``sigma**2``.

        Gaussian cores have the right variance only on average, and their product has heavy tails
        (kurtosis ``3 prod(1 + 2 / r_k)``), so the draw at hand is scaled to the target as a whole.
        """
        std = self.init_std(spec, sigma)
        for core in cores:
            if core.is_meta:
                return
            core.normal_(0.0, std, generator=generator)
        mean_square = self.mean_square(cores, spec)
        if mean_square > 0:
            scale = (sigma**2 / mean_square) ** (1 / (2 * len(cores)))
            for core in cores:
                core.mul_(scale)

    def mean_square(self, cores: Sequence[Tensor], spec: FactorSpec) -> float:
        """Mean square of the entries of the dense weight."""
        dense = self.to_dense([core.to(compute_dtype(core.dtype)) for core in cores], spec)
        return float(dense.abs().square().mean())


def check_dense(dense: Tensor, weight: WeightShape) -> None:
    if tuple(dense.shape) != weight.dense_shape:
        raise ShapeError(
            f"a dense weight must have its layer's shape: found {tuple(dense.shape)}, expected "
            f"{weight.dense_shape}. Pass the layer's own weight."
        )
    if not bool(torch.isfinite(dense).all()):  # one host sync per decomposition
        raise NonFiniteError(
            f"a weight must be finite: found {int((~torch.isfinite(dense)).sum())} NaN or Inf among "
            f"{dense.numel()} entries. Repair or retrain the layer before it is compressed."
        )


def check_modes(
    modes: Sequence[int], size: int, what: str, *, pad: bool = False, most_padding: float | None = None
) -> tuple[int, ...]:
    """Modes as a tuple whose product is ``size``, or at least that with ``pad``, or within a share above it."""
    given = tuple(int(n) for n in modes)
    product = math.prod(given)
    limit = math.inf if pad else size * (1 + (most_padding or 0.0))
    if not given or min(given) < 1 or not size <= product <= limit:
        relation = "at least" if pad else "exactly"
        padded = f" (padded, up to {math.floor(limit)})" if most_padding else ""
        raise ShapeError(
            f"{what} must be positive and multiply to {relation} {size}{padded}: found {given} with product {product}. "
            f"Try tensortrain.nn.suggest_modes({size})."
        )
    return given


def pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """A 1x1 convolution: ``(b, C, *positions)`` with ``(S, C)`` to ``(b, S, *positions)``."""
    return torch.matmul(matrix, x.flatten(2)).reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


def equal_norms(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same product from cores of one Frobenius norm: gradients of a core grow with the norms of the others."""
    norms = [float(core.norm()) for core in cores]
    if min(norms) == 0:
        return list(cores)
    logs = [math.log(norm) for norm in norms]
    mean = sum(logs) / len(logs)
    return [core * math.exp(mean - log) for core, log in zip(cores, logs, strict=True)]


def zero_pad(core: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(core.shape) == tuple(shape):
        return core
    padded = core.new_zeros(tuple(shape))
    padded[tuple(slice(n) for n in core.shape)] = core
    return padded


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype))) ** 2
