"""What a weight format is, and the registry: a new format is one new file.

A format turns a dense weight into a few cores and back. The layer kinds it serves, the shapes of its cores
and its error all follow from a ``FactorSpec``, which is plain data: it prints, it compares, it goes to JSON.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.contract import ChainShape, ContractionPlan, Network
from tensortrain.contract.hops import ConvNetwork
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import KindError, ShapeError
from tensortrain.tensor import Approximation, default_eps

from .checks import check_dense
from .checks import check_modes as check_modes
from .fit import Factorization, Fit, fit_groups
from .fit import equal_norms as equal_norms
from .fit import zero_pad as zero_pad
from .init import draw_, draw_structured_, std_of_entries
from .registry import _FORMATS as _FORMATS
from .registry import format_names, get_format, register
from .spec import Bond, FactorSpec, Kind, Rank, WeightShape
from .weighting import PLAIN, Weighting

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


class Format(ABC):
    """One way to write a weight as a product of small cores.

    A subclass says how a single group's weight is laid out, taken apart and put together; groups, checks
    and initialisation are the same for all and live here.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]]
    description: ClassVar[str] = ""
    looks_up_by_product: ClassVar[bool] = False  # rows of the first core, times the second one

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
    def factorize_group(self, dense: Tensor, spec: FactorSpec, *, eps: float | None, weighting: Weighting) -> Fit:
        """Best cores for one group's dense weight, with the ranks reached and the error promised.

        With ``eps`` the ranks follow from the tolerance, and ``spec.ranks`` are only caps. Where ``weighting`` is not
        plain the error is that of the layer's output, ``||F^(1/2) (W - W') H^(1/2)|| / ||F^(1/2) W H^(1/2)||``.
        """

    @abstractmethod
    def dense_group(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """The dense weight of one group in torch's layout, differentiable."""

    @abstractmethod
    def n_paths(self, spec: FactorSpec) -> int:
        """How many products of one entry per core are summed in an entry of the dense weight."""

    @abstractmethod
    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
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

    def param_counter(self, spec: FactorSpec) -> Callable[[Sequence[int]], int]:
        """``inner_ranks -> n_params`` for these modes; a search over ranks asks it thousands of times."""
        return lambda inner: self.with_inner(spec, inner).n_params

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

    def tied_ranks(self, spec: FactorSpec) -> tuple[tuple[int, ...], ...]:
        """Which of the ``inner_ranks`` are one cut and rise together, whatever they are at present."""
        return tuple((k,) for k in range(len(self.inner_ranks(replace(spec, ranks=self.rank_caps(spec))))))

    def most_rank(self, spec: FactorSpec, ranks: Sequence[int], tied: tuple[int, ...]) -> int:
        """Largest useful rank of a cut beside the other ``inner_ranks`` as they are."""
        return max(spec.weight.n_params, 1)

    def probe(self, dense: Tensor, spec: FactorSpec, weighting: Weighting = PLAIN) -> float:
        """Relative error that a decomposition at these ranks reaches, perhaps estimated.

        For comparing candidates: cheaper than ``fit`` where the format knows how.
        """
        return self.fit(dense, spec, weighting=weighting).rel_error

    # -- how it runs ---------------------------------------------------------------------------------

    def chain(self, spec: FactorSpec) -> ChainShape | None:
        """The chain that carries the layer's matrix-vector product, if there is one (one group)."""
        return None

    def contraction(self, spec: FactorSpec) -> ChainShape | Network | None:
        """What carries a linear layer's product: the chain, or the network of a format that is none (one group)."""
        return self.chain(spec)

    def to_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> list[Tensor]:
        """Stored cores as ``contraction`` takes them, those of a chain ``(r, i, j, s)``; views where possible."""
        return list(cores)

    def from_chain(self, cores: Sequence[Tensor], spec: FactorSpec) -> tuple[Tensor, ...]:
        """The cores of a chain ``(r, i, j, s)`` as they are stored."""
        return tuple(cores)

    def stores_chain(self, spec: FactorSpec) -> bool:
        """Whether the stored cores are those of the chain."""
        chain = self.chain(spec.one_group())
        return chain is not None and chain.core_shapes == spec.one_group().core_shapes

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

    def channel_chain(self, spec: FactorSpec) -> ChainShape | None:
        """The chain that ``convolve`` runs over channels at every output position, if there is one."""
        return None

    def n_filters(self, spec: FactorSpec) -> int | None:
        """How many spatial filters ``convolve`` puts before the channel chain; None where it runs in another way."""
        return None

    def split_spatial(self, cores: Sequence[Tensor], spec: FactorSpec) -> tuple[Tensor, list[Tensor]]:
        """Spatial filters ``(r_0, 1, *kernel)`` and the cores of the channel chain, where there are ``n_filters``."""
        raise KindError(f"format {self.name!r} has no spatial filters. Use convolve.")

    def conv_work(self, spec: FactorSpec, in_positions: int, out_positions: int) -> list[tuple[int, int]]:
        """Steps of ``convolve`` for one example and one group, as (flops, numbers moved)."""
        return []

    def conv_network(self, spec: FactorSpec) -> ConvNetwork | None:
        """The stored cores of one group's kernel by the names of their legs; None where they are no network.

        Entries of a core lie in the order of its legs, so that ``ConvNetwork.views`` is all it takes.
        """
        return None

    def lookup(self, ids: Tensor, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """Rows of an embedding: ``(*ids.shape, J)``."""
        raise KindError(f"format {self.name!r} does not look up rows. Choose another format.")

    def row_chain(self, spec: FactorSpec) -> ChainShape | None:
        """The chain (of ``to_chain``) whose slices multiply to a row, where ``lookup`` reads rows so."""
        return None

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

    def asked(
        self,
        weight: WeightShape,
        dtype: torch.dtype,
        *,
        rank: Rank | None = None,
        eps: float | None = None,
        out_modes: Sequence[int] | None = None,
        in_modes: Sequence[int] | None = None,
    ) -> tuple[FactorSpec, float | None]:
        """The spec and the tolerance that a caller's words ask for; with neither rank nor eps exact to dtype."""
        spec = self.spec(
            weight, rank="full" if rank is None else rank, out_modes=out_modes, in_modes=in_modes, clip=True
        )
        exact = rank is None and eps is None
        return spec, default_eps(dtype, 2 + len(spec.in_modes)) if exact else eps

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
    ) -> Approximation[Fit]:
        """Approximate a dense weight as a caller's words ask for it; ``fit`` takes a spec.

        Args:
            dense: Weight in torch's layout, ``weight.dense_shape``.
            weight: What the weight belongs to.
            rank: Cap on the ranks (see ``TensorTrain``); ``None`` with ``eps=None`` is exact to dtype.
            eps: Relative Frobenius tolerance (in the norm of ``gram`` where given).
            out_modes, in_modes: Mode shapes, chosen when left out.
            gram, output_gram: Second moments of inputs and outputs, see ``Weighting``.

        Returns:
            Approximation: ``value`` a ``Fit``; ``rel_error_bound`` in the norm used.

        Raises:
            As ``fit``.
        """
        spec, eps = self.asked(weight, dense.dtype, rank=rank, eps=eps, out_modes=out_modes, in_modes=in_modes)
        found = self.fit(dense, spec, eps=eps, weighting=Weighting(gram, output_gram))
        return Approximation(found, found.rel_error, {})

    def fit(self, dense: Tensor, spec: FactorSpec, *, eps: float | None = None, weighting: Weighting = PLAIN) -> Fit:
        """Best cores for a dense weight.

        Args:
            dense: Weight in torch's layout, ``spec.weight.dense_shape``.
            spec: Format, modes and ranks; the ranks are caps, and what is not feasible of them is cut off.
            eps: Relative tolerance in the norm of ``weighting``; the smallest ranks found that keep it are taken.
            weighting: What an error counts. Grouped convolutions do not use it.

        Raises:
            NonFiniteError: The weight holds NaN or Inf.
            DTypeError: A complex weight is to be weighed.
            ShapeError: The weight or its second moments do not have the shape announced, or the modes do not fit.
        """
        self.check_kind(spec.weight)
        check_dense(dense, spec.weight)
        weighting = weighting.beside(dense)
        spec = self.spec(spec.weight, rank=spec.ranks, out_modes=spec.out_modes, in_modes=spec.in_modes, clip=True)
        if spec.weight.groups == 1:
            return self.factorize_group(dense, spec, eps=eps, weighting=weighting)
        return fit_groups(dense, spec, eps, self._fit_plain)

    def _fit_plain(self, block: Tensor, spec: FactorSpec, eps: float | None) -> Fit:
        return self.factorize_group(block, spec, eps=eps, weighting=PLAIN)

    def to_dense(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """The dense weight in torch's layout, differentiable in the cores."""
        if spec.weight.groups == 1:
            return self.dense_group(cores, spec)
        one = spec.one_group()
        blocks = [self.dense_group([core[g] for core in cores], one) for g in range(spec.weight.groups)]
        return torch.cat(blocks)

    def squared_norm(self, cores: Sequence[Tensor], spec: FactorSpec) -> Tensor:
        """``||W||_F^2`` of one group, differentiable in the cores."""
        return self.dense_group(cores, spec).abs().square().sum()

    def core_fans(self, spec: FactorSpec) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs ``(f_in, f_out)`` of every core, seen as a dense layer that runs in batch.

        What a core sums over, and what it makes of it, when the cores are applied in their stored order. They set
        the scale of its entries (``init_structured_``) and, for an optimizer like Adam, its learning rate
        ``lr * (d_in / f_in) / n_cores``.

        Source: Qiu et al., ICML 2024, arXiv:2406.06248, section 3.
        """
        chain = self.chain(spec.one_group())
        if chain is None:
            raise KindError(f"format {self.name!r} does not know the fans of its cores. Override core_fans.")
        return tuple((r * n, m * s) for r, m, n, s in chain.core_shapes)

    def fan_ins(self, spec: FactorSpec) -> tuple[int, ...]:
        """Numbers that every core sums over. An embedding's inputs are one-hot: its modes count 1."""
        if spec.weight.kind == "embedding":
            return (1,) * len(spec.core_shapes)  # only how many cores there are is known
        return tuple(f_in for f_in, _ in self.core_fans(spec))

    def init_std(self, spec: FactorSpec, sigma: float) -> float:
        """Standard deviation of every core entry that gives dense entries the variance ``sigma**2``."""
        return std_of_entries(sigma, self.n_paths(spec), len(self.group_core_shapes(spec)))

    def init_(
        self, cores: Sequence[Tensor], spec: FactorSpec, sigma: float, generator: torch.Generator | None = None
    ) -> None:
        """Fill cores so that the dense weight has mean square ``sigma**2``; see ``draw_``."""
        draw_(cores, sigma, self.init_std(spec, sigma), lambda drawn: self.mean_square(drawn, spec), generator)

    def init_structured_(
        self, cores: Sequence[Tensor], spec: FactorSpec, generator: torch.Generator | None = None
    ) -> None:
        """Fill every core according to its own fans; see ``draw_structured_``."""
        draw_structured_(cores, self.core_fans(spec), generator)

    def mean_square(self, cores: Sequence[Tensor], spec: FactorSpec) -> float:
        """Mean square of the entries of the dense weight."""
        dense = self.to_dense([core.to(compute_dtype(core.dtype)) for core in cores], spec)
        return float(dense.abs().square().mean())


def pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """A 1x1 convolution: ``(b, C, *positions)`` with ``(S, C)`` to ``(b, S, *positions)``."""
    # A compiler makes slow loops of torch.matmul with one matrix for all examples.
    y = torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2))
    return y.reshape(x.shape[0], matrix.shape[0], *x.shape[2:])
