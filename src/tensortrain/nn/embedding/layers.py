"""Embedding with a factorized table, and beside it, if asked for, exact rows of the most frequent ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tensortrain.contract import ChainShape, CostModel, cost_model
from tensortrain.contract.lookup import lookup_s
from tensortrain.contract.row_kernels import (
    kept_groups,
    kept_rows_s,
    merged_shapes,
    packed_tables,
    picked_rows_s,
    range_of,
    rows_of_cores,
    rows_of_packed,
    serve_rows,
)
from tensortrain.errors import DTypeError, KindError, ModeIndexError, NonFiniteError, ShapeError
from tensortrain.formats import FactorSpec, Fit, Format, Rank, WeightShape, get_format
from tensortrain.nn.base import FactorizedLayer, Implementation, Init, Self
from tensortrain.nn.conv.plan import LookupPlan
from tensortrain.nn.cores import are_plain, held_cores, list_cores
from tensortrain.nn.inputs import check_plain_layout, map_nested, once, traceable
from tensortrain.nn.kept import rows_of_kept_tables, runs_by_kept, what_stands_in
from tensortrain.nn.runner import (
    DENSE_LIMIT_BYTES,
    SMALL_WEIGHT_BYTES,
    Runner,
    device_type_of,
    may_be_dense,
    trains,
)
from tensortrain.system.native import library
from tensortrain.system.parking import reuse_freed_memory
from tensortrain.system.tracing import is_traced

__all__ = ["Embedding", "hottest"]

_MAX_BYTES = 2**26  # between the steps of a lookup
_CALLS, _PYTHON_CALLS = (
    1.6,
    5.0,
)  # small operations that the call of a layer takes, by the kernels' short way and without


@what_stands_in("embedding")
class Embedding(FactorizedLayer):
    r"""``torch.nn.Embedding`` with the table as a product of small cores.

    A token's row is the product of one slice per core, picked by the token's digits in the bases
    ``in_modes`` (first slowest). Rows past the vocabulary exist in the cores but are never asked for.

    Args:
        num_embeddings, embedding_dim: As ``torch.nn.Embedding``.
        padding_idx: An id whose row gets no gradient. The row is kept beside the cores: zero in a new layer, and what
            it was in a layer made from torch's.
        max_norm, norm_type: Rows looked up are scaled down to this norm; the cores are not changed.
        scale_grad_by_freq: As torch; counts are those of the batch.
        sparse: False; gradients of cores are small and dense.
        format: ``"tt"`` or ``"low_rank"``.
        rank: Number, tuple, share, or ``"same"``.
        in_modes: Factors of the vocabulary; their product may exceed it.
        out_modes: Factors of the dimension, as many.
        has_padding_row: Whether there is room for a row of ``padding_idx`` that is not zero, ``padding_row``.
        hot_rows: How many ids get an exact row of their own, trained beside the cores; chosen and filled by
            ``populate_hot_rows_``. None by default.

    Shapes: input any shape of integers, output ``(*, embedding_dim)``.

    Raises:
        ShapeError: Modes that do not fit, ``sparse``, more hot rows than ids.

    Cost: about ``sum_k (J_1 .. J_k) r_{k-1} r_k`` multiply-adds per distinct token.
    Source: Khrulkov et al., arXiv:1901.10787; hot rows: TT-Rec, Yin et al., arXiv:2101.11714.

    Example:
        >>> layer = Embedding(25000, 256, in_modes=(25, 30, 40), out_modes=(4, 8, 8), rank=16)
        >>> layer.n_params
        68160
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Embedding
    torch_arguments: ClassVar[tuple[str, ...]] = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
    )
    has_bias = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        format: str = "tt",
        rank: Rank = 16,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        has_padding_row: bool = False,
        hot_rows: int = 0,
        init: Init = "match",
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sparse(sparse)
        weight = WeightShape("embedding", embedding_dim, num_embeddings)
        spec = get_format(format).spec(weight, rank=rank, out_modes=out_modes, in_modes=in_modes)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = _check_padding_idx(padding_idx, num_embeddings)
        self.max_norm, self.norm_type, self.scale_grad_by_freq = max_norm, norm_type, scale_grad_by_freq
        self.sparse = False
        super().__init__(spec, bias=None, init=init, implementation=implementation, device=device, dtype=dtype)
        self.padding_row: Tensor | None
        self.register_buffer("padding_row", None)
        if has_padding_row:
            self._set_padding_row(torch.zeros(embedding_dim))
        self._add_hot_rows(hot_rows)

    # -- to and from torch's layer -------------------------------------------------------------------

    @classmethod
    def weight_shape_of(cls, layer: Any) -> WeightShape:
        return WeightShape("embedding", layer.embedding_dim, layer.num_embeddings)

    @classmethod
    def kernel_of(cls, layer: Any) -> Tensor:
        table = super().kernel_of(layer)
        index = layer.padding_idx
        if index is None or not bool(table[index].any()):  # one host sync
            return table
        return table.index_fill(0, torch.tensor(index, device=table.device), 0)  # its row is kept beside the cores

    def _adopt(self: Self, found: Fit, dense: Any) -> Self:
        layer: Any = super()._adopt(found, dense)
        if layer.padding_idx is not None:
            row = dense.weight.detach()[layer.padding_idx]
            layer._set_padding_row(row if bool(row.any()) else None)
        return self

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: Any,
        *,
        hot_rows: int = 0,
        counts: Tensor | None = None,
        input_gram: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Approximate a trained torch layer; see ``FactorizedLayer.from_dense`` for the other options.

        A layer with ``sparse=True`` comes back with dense gradients, since those of cores are.

        Args:
            hot_rows: Ids that keep the row they have in ``dense``.
            counts: How often each id is met, ``(num_embeddings,)``; ``input_gram`` where left out. With neither,
                no row is hot before ``populate_hot_rows_``.
            input_gram: Token counts that weigh the decomposition; those of hot ids do not, as their rows are exact.

        Raises:
            ShapeError: Counts of another size, more hot rows than ids.
        """
        counts = input_gram if counts is None else counts
        hot = None
        if hot_rows and counts is not None:
            hot = hottest(_check_counts(counts, dense.num_embeddings), hot_rows, dense.padding_idx)
            if input_gram is not None and input_gram.ndim == 1:
                input_gram = input_gram.index_fill(0, hot[hot >= 0], 0)
        layer: Any = super().from_dense(dense, input_gram=input_gram, **options)
        layer._add_hot_rows(hot_rows)
        if hot is not None:
            layer._set_hot_rows(hot, dense.weight)
        if hot_rows:
            layer.hot_weight.requires_grad_(dense.weight.requires_grad)
        return layer

    @classmethod
    def from_spec(
        cls: type[Self], dense: Any, spec: FactorSpec, *, hot_ids: Sequence[int] = (), **options: Any
    ) -> Self:
        """As ``FactorizedLayer.from_spec``.

        Args:
            hot_ids: Ids that keep the row they have in ``dense``.
        """
        layer: Any = super().from_spec(dense, spec, **options)
        if hot_ids:
            layer.keep_rows_(hot_ids, dense.weight)
            layer.hot_weight.requires_grad_(dense.weight.requires_grad)
        return layer

    def keep_rows_(self: Self, ids: Sequence[int], table: Tensor) -> Self:
        """Give some ids a row of their own, that of a dense table; no other id has one then."""
        layer: Any = self
        layer._add_hot_rows(len(ids))
        layer._set_hot_rows(torch.tensor(sorted(ids)), table)
        return self

    @classmethod
    def from_pretrained(
        cls: type[Self],
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **options: Any,
    ) -> Self:
        """Approximate a table ``(num_embeddings, embedding_dim)``; ``options`` are those of ``from_dense``.

        Args:
            embeddings: The table.
            freeze: Whether the layer does without gradients.
            padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: As ``torch.nn.Embedding.from_pretrained``.
        """
        check_sparse(sparse)
        check_table(embeddings)
        dense = nn.Embedding.from_pretrained(embeddings, freeze, padding_idx, max_norm, norm_type, scale_grad_by_freq)
        return cls.from_dense(dense, **options)

    @property
    def weight(self) -> Tensor:
        """The dense table, ``(num_embeddings, embedding_dim)``, hot rows and the padding row in it, to read."""
        return super().weight

    def full_weight(self) -> Tensor:
        table = self.runner.dense_weight(self)
        if self.hot_weight is None and self.padding_idx is None:
            return table
        ids = torch.arange(self.num_embeddings, device=table.device)
        return self._with_padding(self._with_hot_rows(table, ids), ids)

    def config(self) -> dict[str, Any]:
        padding = {"has_padding_row": True} if self.padding_row is not None else {}
        hot = {"hot_rows": self.hot_rows} if self.hot_rows else {}
        return {**super().config(), **padding, **hot}

    def _matching_sigma(self) -> float:
        return 1.0  # torch draws tables from N(0, 1)

    # -- the padding row -----------------------------------------------------------------------------

    @torch.no_grad()
    def _set_padding_row(self, row: Tensor | None) -> None:
        """Keep a row for ``padding_idx``; ``None`` where it is zero, so that nothing is stored."""
        if self.padding_idx is None:
            raise ShapeError("a padding row needs an id: found has_padding_row with padding_idx=None. Pass the index.")
        core = self.cores[0]
        self.padding_row = None if row is None else row.to(core.device, core.dtype, copy=True)

    def _with_padding(self, rows: Tensor, ids: Tensor) -> Tensor:
        if self.padding_idx is None:
            return rows
        is_padding = (ids == self.padding_idx)[..., None]
        if self.padding_row is None:
            return rows.masked_fill(is_padding, 0.0)
        return torch.where(is_padding, self.padding_row.to(rows.dtype), rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A zero row is not stored, by older releases none at all: it may come and go with what is loaded.
        given = state_dict.get(f"{prefix}padding_row")
        if self.padding_idx is not None and (given is None) != (self.padding_row is None):
            self._set_padding_row(None if given is None else torch.zeros(self.embedding_dim))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- hot rows ------------------------------------------------------------------------------------

    def populate_hot_rows_(
        self: Self, counts: Tensor | None = None, *, ids: Tensor | None = None, table: Tensor | None = None
    ) -> Self:
        """Give the most frequent ids a row of their own, equal to the row that they have now.

        From then on these rows are trained as free parameters, and the cores no longer by these ids. Ids that
        were hot and no longer are go back to the row of the cores.

        Args:
            counts: How often each id is met, ``(num_embeddings,)``.
            ids: Or the ids themselves as they are met, any shape.
            table: Dense table to take the rows from instead.

        Returns:
            Embedding: The layer.

        Raises:
            ShapeError: The layer was made without ``hot_rows``, neither or both of ``counts`` and ``ids`` are given,
                or a size does not fit.

        Source: Yin et al., MLSys 2021, arXiv:2101.11714, section 4.3.

        Example:
            >>> layer = Embedding(1000, 16, rank=4, hot_rows=10)
            >>> layer.populate_hot_rows_(ids=torch.randint(1000, (5000,))).hot_ids.shape
            torch.Size([10])
        """
        layer: Any = self
        if layer.hot_weight is None:
            raise ShapeError("a layer must have hot rows to fill: found hot_rows=0. Make it with hot_rows=k.")
        if (counts is None) == (ids is None):
            raise ShapeError("hot rows follow either from counts or from ids: found both or neither. Pass one of them.")
        if ids is not None:
            layer._check_ids(ids)
            counts = torch.bincount(ids.reshape(-1).long(), minlength=layer.num_embeddings)
        assert counts is not None
        counts = _check_counts(counts, layer.num_embeddings).to(layer.hot_ids.device)
        if table is not None and tuple(table.shape) != layer.spec.weight.dense_shape:
            raise ShapeError(
                f"a table must have a row per id: found {tuple(table.shape)}, expected "
                f"{layer.spec.weight.dense_shape}. Pass the dense layer's weight."
            )
        layer._set_hot_rows(hottest(counts, layer.hot_rows, layer.padding_idx), table)
        return self

    def _add_hot_rows(self, n: int) -> None:
        """Room for the rows; ids of -1 are those of rows not in use, in front of the sorted others."""
        if n < 0 or n > self.num_embeddings:
            raise ShapeError(
                f"hot_rows must not exceed the vocabulary: found {n}, expected 0 to {self.num_embeddings}. Pass fewer."
            )
        self.hot_rows = n
        core = self.cores[0]
        self.hot_ids: Tensor | None
        if n == 0:
            self.register_parameter("hot_weight", None)
            self.register_buffer("hot_ids", None)
            return
        self.hot_weight = nn.Parameter(torch.zeros(n, self.embedding_dim, device=core.device, dtype=core.dtype))
        self.register_buffer("hot_ids", torch.full((n,), -1, device=core.device))

    @torch.no_grad()
    def _set_hot_rows(self, ids: Tensor, table: Tensor | None) -> None:
        assert self.hot_weight is not None
        assert self.hot_ids is not None
        ids = ids.to(self.hot_ids.device)
        known = ids.clamp_min(0)
        rows = self._rows(known) if table is None else table.detach().to(self.hot_weight)[known]
        self.hot_weight.copy_(rows.masked_fill((ids < 0)[:, None], 0.0))
        self.hot_ids.copy_(ids)

    def reset_parameters(self, init: Init = "match", generator: torch.Generator | None = None) -> None:
        """Draw cores anew (see ``FactorizedLayer``); no row is hot any more, and that of padding is zero."""
        super().reset_parameters(init, generator)
        if getattr(self, "padding_row", None) is not None:
            self.padding_row.zero_()  # type: ignore[union-attr]
        if getattr(self, "hot_weight", None) is not None:
            with torch.no_grad():
                self.hot_weight.zero_()
                self.hot_ids.fill_(-1)  # type: ignore[union-attr]

    def _hot_places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each id a place among the hot rows, and whether its row is there."""
        assert self.hot_ids is not None
        places = torch.searchsorted(self.hot_ids, ids.long()).clamp_max(self.hot_rows - 1)
        return places, self.hot_ids[places] == ids

    def _with_hot_rows(self, rows: Tensor, ids: Tensor) -> Tensor:
        if self.hot_weight is None:
            return rows
        places, is_hot = self._hot_places(ids)
        return torch.where(is_hot[..., None], F.embedding(places, self.hot_weight), rows)

    # -- lookup --------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if not is_dynamo_compiling():  # first: a compiler would look at the way, and compile anew when there is one
            way = self.runner.way
            rows = None if way is None else way(self, input)
            if rows is not None:
                return rows
        return self._forward(input)

    @traceable
    @once
    def _forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            found: Tensor = map_nested(input, self._look_up, n_last=0)
            return found
        return self._look_up(input)

    def _look_up(self, ids: Tensor) -> Tensor:
        self._check_ids(ids)
        rows = self._limited_rows(ids)
        return scale_gradient(rows, self._met(ids)) if self.scale_grad_by_freq else rows

    def _limited_rows(self, ids: Tensor) -> Tensor:
        """Rows, scaled down to ``max_norm``."""
        rows = self._with_padding(self._rows(ids), ids)
        if self.max_norm is None:
            return rows
        norms = rows.norm(p=self.norm_type, dim=-1, keepdim=True)
        return torch.where(norms > self.max_norm, rows * (self.max_norm / (norms + 1e-7)), rows)

    def _met(self, ids: Tensor) -> Tensor:
        """How often the id at each place occurs among all."""
        if is_traced():
            return frequencies(ids, self.num_embeddings)[ids]
        _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        return counts[inverse]

    def _rows(self, ids: Tensor) -> Tensor:
        if self.hot_weight is None or is_traced():  # no sizes that depend on the ids
            return self._with_hot_rows(self._core_rows(ids), ids)
        flat = ids.reshape(-1)
        places, is_hot = self._hot_places(flat)
        cold = (~is_hot).nonzero().squeeze(1)
        rows = F.embedding(places, self.hot_weight).index_copy(0, cold, self._core_rows(flat[cold]))
        return rows.reshape(*ids.shape, self.embedding_dim)

    def _core_rows(self, ids: Tensor) -> Tensor:
        if runs_by_kept(self, ()) and ids.device.type == "cpu":
            return rows_of_kept_tables(self, ids)
        if self._runs_dense():
            rows = F.embedding(ids, self.runner.dense_weight(self))
            self._keep_way("dense")
        else:
            kept = self._rows_of_kept(ids)
            rows = self.format.lookup(ids, self.core_list(), self.spec) if kept is None else kept
        return rows.to(self.cores[0].dtype)  # autocast lowers products, torch's embedding keeps its dtype

    def _rows_of_kept(self, ids: Tensor) -> Tensor | None:
        """Rows from merged cores that are kept between calls, by the kernels; ``None`` where nothing may be kept."""
        core = self.core_list()[0]
        if not serve_rows(ids, core) or core.is_inference() or held_cores(self) is not None:
            return None
        chain = _row_chain(self.spec)
        if chain is None or chain.order < 2:
            return self._rows_by_product(ids) if self.format.looks_up_by_product else None
        if trains(self):
            self._keep_way(None)
            return None
        groups = kept_groups(chain, core.dtype, self.kept_limit_bytes, cost_model(core.device))
        tables = self.runner.cached(self, ("rows", groups), lambda: packed_tables(self.plan_cores(), groups))
        rows = rows_of_packed(ids.reshape(-1).long(), tables, chain, groups)
        self._keep_way(("rows", groups), merged_shapes(chain, groups))
        return None if rows is None else rows.reshape(*ids.shape, self.embedding_dim)

    def _rows_by_product(self, ids: Tensor) -> Tensor | None:
        """In training, rows of two matrices as the short way takes them, so that every call gives the same bits."""
        self._keep_way(None)
        if not trains(self):
            return None
        rows = rows_of_cores(ids.reshape(-1).long(), self.core_list(), _MAX_BYTES)
        return None if rows is None else rows.reshape(*ids.shape, self.embedding_dim)

    def _lie_as_looked_up(self) -> bool:
        """Whether the kernels read the parameters as they are: cores of a chain, or the two matrices of low rank."""
        if self.format.looks_up_by_product:
            return True
        chain = _row_chain(self.spec)
        if chain is None or chain.order < 2:
            return False
        return all(one is other for one, other in zip(self.plan_cores(), self.core_list(), strict=True))

    def _keep_way(self, kept: Any, shapes: Sequence[Sequence[int]] = ()) -> None:
        """Let the next call read what is kept under this tag, or the cores where it is None, without a look around."""
        runner, cores, kernels = self.runner, self.core_list(), library()
        if is_traced() or not cores[0].is_cpu or not are_plain(self.cores) or self.stand_ins is not None:
            return
        if kernels is None:
            runner.way = by_kept_table
            return
        way = runner.current_way(kernels.RowsWay, (self.implementation, self.dense_limit_bytes))
        if self.format.looks_up_by_product and self.implementation != "dense" and not may_be_dense(self):
            way.keep_product(self.num_embeddings)
        if kept is not None:
            found = runner.cache.peek(cores, kept)
            if found is not None:
                tables = [found] if isinstance(found, Tensor) else list(found)
                way.keep_tables(tables, [list(shape) for shape in shapes], self.num_embeddings, _MAX_BYTES, cores)
        elif self._lie_as_looked_up():
            reuse_freed_memory()  # rows and states of a step are as large as all else
            way.keep_training(self.num_embeddings, _MAX_BYTES)

    def _runs_dense(self) -> bool:
        if self.implementation == "dense" or type(self.format).lookup is Format.lookup:
            return True
        # While training, every step would rebuild the whole table for the few rows of a batch.
        return may_be_dense(self) and not trains(self) and not is_traced()

    @property
    def kept_limit_bytes(self) -> int:
        # A table is looked up in a few places of many: kept whole, it would take the memory that was saved.
        limit = self.dense_limit_bytes
        return SMALL_WEIGHT_BYTES if limit == DENSE_LIMIT_BYTES else limit

    def _check_ids(self, ids: Tensor) -> None:
        check_plain_layout(ids, type(self).__name__)
        if ids.dtype not in (torch.int64, torch.int32):
            raise DTypeError(
                f"an embedding's input must be whole numbers: found dtype {ids.dtype}, expected int64. Pass ids.long()."
            )
        # On the CPU a look at the range is cheap and prevents rows of the padded vocabulary being read.
        if not is_traced() and ids.is_cpu and ids.numel():
            low, high = range_of(ids) or (int(ids.min()), int(ids.max()))
            if low < 0 or high >= self.num_embeddings:
                raise ModeIndexError(
                    f"ids must lie in the vocabulary: found {low} to {high}, expected 0 to "
                    f"{self.num_embeddings - 1}. Check the tokenizer."
                )

    # -- plan ----------------------------------------------------------------------------------------

    def _make_runner(self) -> Runner:
        return Runner(None)  # rows are looked up, see ``LookupPlan``

    def plan(self, batch: int = 1) -> LookupPlan:
        """How this many ids are looked up, drawn as words of a text are: the k-th with probability 1/k."""
        dense = self._runs_dense()
        row_bytes = self.embedding_dim * self.cores[0].element_size()
        model = cost_model(device_type_of(self))
        call_s = (_CALLS if library() is not None else _PYTHON_CALLS) * model.overhead_s
        dense_s = call_s + picked_rows_s(batch, row_bytes, model)
        factorized_s = call_s + self._factorized_s(batch, model)
        flops = 0 if dense else 2 * batch * _row_products(self.spec)
        return LookupPlan("dense" if dense else "factorized", batch, flops, batch * row_bytes, factorized_s, dense_s)

    def _factorized_s(self, batch: int, model: CostModel) -> float:
        """Predicted seconds of rows from cores, without the call of the layer."""
        core, chain = self.cores[0], _row_chain(self.spec)
        if chain is not None and chain.order > 1:
            if library() is None or not core.is_cpu:
                return lookup_s(chain, batch, core.dtype, model, on_cpu=core.is_cpu)
            groups = kept_groups(chain, core.dtype, self.kept_limit_bytes, model)
            return kept_rows_s(chain, groups, batch, core.dtype, model)
        rank = max(1, _row_products(self.spec) // self.embedding_dim)
        picked_s = picked_rows_s(batch, rank * core.element_size(), model)
        return picked_s + model.gemm_s(batch, self.embedding_dim, rank, dtype=core.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        hot = f", hot_rows={self.hot_rows}" if self.hot_rows else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{hot}, {self._format_repr()}"


def by_kept_table(layer: Embedding, ids: Tensor) -> Tensor | None:
    """Without kernels: rows of the dense table where it is kept already."""
    if torch.is_grad_enabled() or type(ids) is not Tensor or layer.padding_idx is not None or not ids.is_cpu:
        return None
    if layer.max_norm is not None or layer._parameters["hot_weight"] is not None or layer.stand_ins is not None:
        return None
    if is_traced() or not are_plain(layer.cores) or not layer._runs_dense():
        return None
    table = layer.runner.cache.peek(list_cores(layer.cores), "dense")
    try:
        return None if table is None else F.embedding(ids, table)
    except (IndexError, RuntimeError):  # the long way says what is wrong
        return None


@lru_cache(maxsize=1024)
def _row_chain(spec: FactorSpec) -> ChainShape | None:
    return get_format(spec.format).row_chain(spec)


def check_sparse(sparse: bool) -> None:
    if sparse:
        raise ShapeError(
            "a factorized embedding has dense gradients, small as its cores: found sparse=True. Leave it out, and take "
            "a dense optimizer in place of SparseAdam."
        )


def check_table(embeddings: Any) -> None:
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise KindError(
            f"a pretrained table must be a floating-point tensor: found {type(embeddings).__name__}. Pass layer.weight."
        )
    if embeddings.ndim != 2:
        raise ShapeError(
            f"a pretrained table must be (num_embeddings, embedding_dim): found {tuple(embeddings.shape)}. Reshape it."
        )


def _check_padding_idx(index: int | None, size: int) -> int | None:
    if index is None:
        return None
    if not -size <= index < size:
        raise ShapeError(f"padding_idx must lie in the vocabulary: found {index}, expected within {size}. Check it.")
    return index % size


def _check_counts(counts: Tensor, n_ids: int) -> Tensor:
    if tuple(counts.shape) != (n_ids,):
        raise ShapeError(
            f"counts must have one number per id: found {tuple(counts.shape)}, expected ({n_ids},). Pass ids= for the "
            "ids themselves."
        )
    if not bool((counts >= 0).all() & torch.isfinite(counts).all()):  # one host sync
        raise NonFiniteError("counts must be finite and not negative: found others. Pass how often each id is met.")
    return counts


def hottest(counts: Tensor, n: int, padding_idx: int | None) -> Tensor:
    """The ``n`` most frequent ids, sorted; -1 in front where fewer occur at all. Ties go to the lower id."""
    if padding_idx is not None:
        counts = counts.index_fill(0, torch.tensor(padding_idx, device=counts.device), 0)  # its row is zero anyway
    most, ids = counts.sort(descending=True, stable=True)
    return ids[:n].masked_fill(most[:n] <= 0, -1).sort().values


def frequencies(ids: Tensor, n_ids: int) -> Tensor:
    """How often each id of the vocabulary occurs; its size does not depend on the ids, as a traced program needs."""
    flat = ids.reshape(-1).long()
    return torch.zeros(n_ids, dtype=torch.int64, device=ids.device).scatter_add(0, flat, torch.ones_like(flat))


def scale_gradient(rows: Tensor, counts: Tensor) -> Tensor:
    """The same rows, with gradients divided by one count per row."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    share = counts.to(wide).reciprocal().to(rows.dtype)[..., None]
    fixed = rows.detach()
    return fixed + (rows - fixed) * share  # the same to the bit


def _row_products(spec: FactorSpec) -> int:
    """Multiply-adds of one row, sweeping from the first core; about so many where the format is no chain."""
    counted = get_format(spec.format).row_products(spec)
    if counted is not None:
        return counted
    chain = get_format(spec.format).chain(spec)
    if chain is None:
        return spec.weight.out_features * max(spec.ranks)
    modes, ranks = chain.out_modes, chain.ranks
    if len(modes) == 1:
        return ranks[1] * modes[0]
    return sum(math.prod(modes[: k + 1]) * ranks[k] * ranks[k + 1] for k in range(1, len(modes)))
