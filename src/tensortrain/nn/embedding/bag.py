"""Sums, means and maxima over bags of rows of a factorized table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tensortrain.contract.row_kernels import bags_of_cores, range_of, serve_rows
from tensortrain.errors import DTypeError, ShapeError
from tensortrain.formats import Rank
from tensortrain.nn.base import Implementation, Init, Self
from tensortrain.nn.cores import are_plain, list_cores
from tensortrain.nn.embedding.layers import Embedding, check_sparse, check_table, frequencies, scale_gradient
from tensortrain.nn.inputs import check_plain_layout, once, traceable
from tensortrain.nn.runner import trains
from tensortrain.system.parking import reuse_freed_memory
from tensortrain.system.tracing import is_traced, sizes_of

__all__ = ["EmbeddingBag"]

Mode = Literal["sum", "mean", "max"]
_MAX_ROW_BYTES = 2**26  # of rows held at once; more, and the bags are taken in parts
_REDUCED: dict[str, Any] = {  # rows (b, n, dim) of bags of one length
    "sum": lambda rows: rows.sum(1),
    "mean": lambda rows: rows.mean(1),
    "max": lambda rows: rows.amax(1),
}
_FEW_BYTES = 2**20  # of rows that stay in the cache, so that equal ones do no harm


class EmbeddingBag(Embedding):
    r"""``torch.nn.EmbeddingBag`` with the table as a product of small cores.

    Every distinct id of a batch is looked up once; torch's own kernel then reduces these few rows, bag by bag.

    Args:
        num_embeddings .. padding_idx: As ``torch.nn.EmbeddingBag``; ids of ``padding_idx`` take no part.
        scale_grad_by_freq: Gradients of a row are divided by how often its id occurs in the batch.
        format, rank, in_modes, out_modes, hot_rows: As ``Embedding``.

    Shapes: input ``(b, n)``, bags of one length, or ``(N,)`` with ``offsets`` ``(b,)`` (``(b + 1,)`` with
    ``include_last_offset``); ``per_sample_weights`` as the input; output ``(b, embedding_dim)``.

    Raises:
        ShapeError: A mode other than sum, mean and max; options that torch's layer refuses.

    Cost: that of ``Embedding`` for the distinct ids, and one add per id and dimension.
    Source: TT-Rec, Yin et al., MLSys 2021, arXiv:2101.11714.

    Example:
        >>> layer = EmbeddingBag(1000, 16, mode="sum", rank=4)
        >>> layer(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 3])).shape
        torch.Size([2, 16])
    """

    dense_type = nn.EmbeddingBag
    torch_arguments = (
        "num_embeddings",
        "embedding_dim",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "include_last_offset",
        "padding_idx",
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
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
        self.mode = _check_mode(mode, scale_grad_by_freq)
        self.include_last_offset = include_last_offset
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            format=format,
            rank=rank,
            in_modes=in_modes,
            out_modes=out_modes,
            has_padding_row=has_padding_row,
            hot_rows=hot_rows,
            init=init,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # torch's order of arguments
        cls: type[Self],
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **options: Any,
    ) -> Self:
        """Approximate a table ``(num_embeddings, embedding_dim)``; ``options`` are those of ``from_dense``.

        Args:
            embeddings: The table.
            freeze: Whether the layer does without gradients.
            max_norm .. padding_idx: As ``torch.nn.EmbeddingBag.from_pretrained``.
        """
        check_sparse(sparse)
        check_table(embeddings)
        dense = nn.EmbeddingBag.from_pretrained(
            embeddings,
            freeze,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )
        return cls.from_dense(dense, **options)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if not is_dynamo_compiling() and offsets is None and per_sample_weights is None:
            bags = self._bags_of_kept(input)
            if bags is not None:
                return bags
        return self._forward_bags(input, offsets, per_sample_weights)

    def _bags_of_kept(self, ids: Tensor) -> Tensor | None:
        """Bags of one length by what is kept already, or in training from rows of few ids: the short way."""
        if self.runner.way is None or type(ids) is not Tensor or ids.is_nested:
            return None
        if torch.is_grad_enabled() and (self.mode == "max" or self._runs_dense()):  # torch's maxima choose among equals
            return None
        if not ids.is_cpu or ids.ndim != 2 or ids.dtype != torch.int64 or is_traced():
            return None
        if self.max_norm is not None or self._parameters["hot_weight"] is not None or self.stand_ins is not None:
            return None
        if not self._runs_dense():
            rows = self._rows_by_way(ids)
            return None if rows is None else _REDUCED[self.mode](rows)
        extent = range_of(ids)
        if extent is None or extent[0] < 0 or extent[1] >= self.num_embeddings:  # the long way says what is wrong
            return None
        table = self.runner.cache.peek(list_cores(self.cores), "dense") if are_plain(self.cores) else None
        return None if table is None else F.embedding_bag(ids, table, mode=self.mode, padding_idx=self.padding_idx)

    @traceable
    @once
    def _forward_bags(self, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Tensor:
        ids, offsets, weights, last = self._as_bags(input, offsets, per_sample_weights)
        return self._pool(ids, offsets, weights, last)

    def _as_bags(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Flat ids, where each bag starts, flat weights, and whether the end of the last bag is among the starts."""
        last, is_known = self.include_last_offset, False
        if not ids.is_nested:
            check_plain_layout(ids, type(self).__name__)
        if weights is not None:
            _check_weights(weights, ids, self.mode, self.cores[0].dtype)
        if ids.ndim == 2 and offsets is not None:
            raise ShapeError(
                f"bags of one length need no offsets: found ids {tuple(ids.shape)} and offsets {tuple(offsets.shape)}. "
                "Pass ids of one axis, or leave the offsets out."
            )
        if ids.ndim == 2 and ids.is_nested:
            offsets, ids, last = ids.offsets(), ids.values(), True  # type: ignore[attr-defined]
            weights = None if weights is None else weights.values()
        elif ids.ndim == 2:
            offsets, last = torch.arange(ids.shape[0], device=ids.device) * ids.shape[1], False
            ids, weights = ids.reshape(-1), None if weights is None else weights.reshape(-1)
            is_known = True
        self._check_ids(ids)
        if not is_known:
            _check_offsets(ids, offsets, last)
        assert offsets is not None
        return ids.long(), offsets.long(), weights, last

    def _pool(self, ids: Tensor, offsets: Tensor, weights: Tensor | None, last: bool) -> Tensor:
        plain = self.max_norm is None and self.hot_weight is None and not self.scale_grad_by_freq
        if plain and self._runs_dense():
            table = self.runner.dense_weight(self)
            self._keep_way("dense")
            return self._reduce(ids, table, offsets, weights, last, self.padding_idx)
        bags = self._bags_by_kernels(ids, offsets, weights, last) if plain and not is_traced() else None
        if bags is not None:
            return bags
        rows = self._rows_by_way(ids) if plain and not is_traced() else None
        if rows is not None:
            places = torch.arange(ids.shape[0], device=ids.device)
            return self._reduce(places, rows, offsets, weights, last, None)
        places, distinct = self._distinct(ids)
        n_bags = offsets.shape[0] - int(last)
        row_bytes = self._bytes_of(distinct)
        # Frequencies are those of the whole batch, which its parts do not know.
        if not is_traced() and row_bytes > _MAX_ROW_BYTES and n_bags > 1 and not self.scale_grad_by_freq:
            return self._pool_by_halves(ids, offsets, weights, last, n_bags // 2)
        rows = self._limited_rows(distinct.clamp_min(0))
        if self.scale_grad_by_freq:
            rows = scale_gradient(rows, self._counts(ids, places, distinct))
        return self._reduce(places, rows, offsets, weights, last, None if self.padding_idx is None else 0)

    def _bags_by_kernels(self, ids: Tensor, offsets: Tensor, weights: Tensor | None, last: bool) -> Tensor | None:
        """In training, sums and means in one native call each way; ``None`` where the kernels do not serve them."""
        if self.mode == "max" or not trains(self) or not serve_rows(ids, self.cores[0]) or not self._lie_as_looked_up():
            return None
        reuse_freed_memory()
        return bags_of_cores(
            ids,
            offsets,
            weights,
            self.core_list(),
            has_end=last,
            is_mean=self.mode == "mean",
            padding_idx=self.padding_idx,
            max_bytes=_MAX_ROW_BYTES,
        )

    def _bytes_of(self, ids: Tensor) -> int:
        """Of the rows of so many ids."""
        return ids.numel() * self.embedding_dim * self.cores[0].element_size()

    def _rows_by_way(self, ids: Tensor) -> Tensor | None:
        """Rows of few ids, equal ones too: the kernels find those sooner than they are told apart here."""
        way = self.runner.way
        if way is None or self.padding_idx is not None or self._bytes_of(ids) > min(_FEW_BYTES, _MAX_ROW_BYTES):
            return None
        rows: Tensor | None = way(self, ids)
        return rows

    def _counts(self, ids: Tensor, places: Tensor, distinct: Tensor) -> Tensor:
        """How often each distinct id occurs; at least once, although the place for padding may be unused."""
        if is_traced():
            return frequencies(ids, self.num_embeddings)[distinct.clamp_min(0)].clamp_min(1)
        return torch.bincount(places, minlength=distinct.shape[0]).clamp_min(1)

    def _pool_by_halves(self, ids: Tensor, offsets: Tensor, weights: Tensor | None, last: bool, middle: int) -> Tensor:
        cut = int(offsets[middle])  # a host sync, small beside the lookup of so many rows
        first, second = (weights[:cut], weights[cut:]) if weights is not None else (None, None)
        return torch.cat(
            [
                self._pool(ids[:cut], offsets[: middle + int(last)], first, last),
                self._pool(ids[cut:], offsets[middle:] - cut, second, last),
            ]
        )

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each id stands among the distinct ones, and these; with a padding row, that one is -1 and first."""
        if self.padding_idx is not None:
            ids = torch.cat([ids.new_full((1,), -1), ids.masked_fill(ids == self.padding_idx, -1)])
        if is_traced():  # no sizes that depend on the ids
            places = torch.arange(ids.shape[0], device=ids.device).masked_fill(ids < 0, 0)
            distinct = ids
        else:
            distinct, places = torch.unique(ids, return_inverse=True)
        return (places if self.padding_idx is None else places[1:]), distinct

    def _reduce(
        self,
        places: Tensor,
        rows: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        last: bool,
        padding: int | None,
    ) -> Tensor:
        # Not with scale_grad_by_freq: on the CPU torch up to 2.13 divides by counts of other ids (pytorch #190063).
        return F.embedding_bag(
            places,
            rows.to(self.cores[0].dtype),  # autocast lowers products, torch's bag keeps its dtype
            offsets,
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=last,
            padding_idx=padding,
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode}, {super().extra_repr()}"


def _check_mode(mode: str, scale_grad_by_freq: bool) -> str:
    if mode not in get_args(Mode):
        raise ShapeError(f"mode must be one of {get_args(Mode)}: found {mode!r}. Pass 'mean'.")
    if mode == "max" and scale_grad_by_freq:
        raise ShapeError("mode 'max' does not scale gradients by frequency, in torch either. Leave the option out.")
    return mode


def _check_weights(weights: Tensor, ids: Tensor, mode: str, dtype: torch.dtype) -> None:
    if mode != "sum":
        raise ShapeError(
            f"per_sample_weights need mode 'sum': found mode {mode!r}. Divide the weights by their sum for a mean."
        )
    if sizes_of(weights) != sizes_of(ids):
        raise ShapeError(
            f"per_sample_weights must have the shape of the ids: found {tuple(weights.shape)}, expected "
            f"{tuple(ids.shape)}. Pass one weight per id."
        )
    if weights.dtype != dtype:
        raise DTypeError(
            f"per_sample_weights must have the dtype of the layer: found {weights.dtype}, expected {dtype}. "
            "Convert them."
        )


def _check_offsets(ids: Tensor, offsets: Tensor | None, last: bool) -> None:
    if ids.ndim != 1 or offsets is None or offsets.ndim != 1 or sizes_of(offsets)[0] < int(last):
        found = None if offsets is None else tuple(offsets.shape)
        raise ShapeError(
            "ids must be (b, n), or (N,) with offsets (b,), one more with include_last_offset: found ids "
            f"{tuple(ids.shape)} and offsets {found}. Pass where each bag starts."
        )
    if not is_traced() and offsets.is_cpu and offsets.shape[0]:  # cheap on the CPU
        first, final = offsets[0].item(), offsets[-1].item()
        if first != 0 or final > ids.shape[0] or not _rises(offsets):
            raise ShapeError(
                f"offsets must rise from 0 to at most the number of ids: found {first} to {final} for {ids.shape[0]} "
                "ids. Pass where each bag starts."
            )


def _rises(offsets: Tensor) -> bool:
    steps = offsets.diff()
    extent = range_of(steps)
    return extent[0] >= 0 if extent is not None else bool((steps >= 0).all())
