"""Embedding with a factorized table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.contract import ContractionPlan, cost_model
from tensortrain.errors import DTypeError, ModeIndexError, ShapeError
from tensortrain.formats import FactorSpec, Rank, WeightShape, get_format

from .base import FactorizedLayer, Implementation, Init
from .conv_plan import LookupPlan

__all__ = ["Embedding"]


class Embedding(FactorizedLayer):
    r"""``torch.nn.Embedding`` with the table as a product of small cores.

    A token's row is the product of one slice per core, picked by the token's digits in the bases
    ``in_modes`` (first slowest). Rows past the vocabulary exist in the cores but are never asked for.

    Args:
        num_embeddings, embedding_dim: As ``torch.nn.Embedding``.
        padding_idx: The row is zero: masked on the way out, since no row of a train can be zeroed alone.
        max_norm, norm_type: Rows looked up are scaled down to this norm; the cores are not changed.
        scale_grad_by_freq: As torch; counts are those of the batch.
        format: ``"tt"`` or ``"low_rank"``.
        rank: Number, tuple, share, or ``"same"``.
        in_modes: Factors of the vocabulary; their product may exceed it.
        out_modes: Factors of the dimension, as many.

    Shapes: input any shape of integers, output ``(*, embedding_dim)``.

    Cost: about ``sum_k (J_1 .. J_k) r_{k-1} r_k`` multiply-adds per distinct token.
    Source: Khrulkov et al., arXiv:1901.10787.

    Example:
        >>> layer = Embedding(25000, 256, in_modes=(25, 30, 40), out_modes=(4, 8, 8), rank=16)
        >>> layer.n_params
        68160
    """

    dense_type = nn.Embedding
    torch_arguments = (
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
        *,
        format: str = "tt",
        rank: Rank = 16,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        init: Init = "match",
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight = WeightShape("embedding", embedding_dim, num_embeddings)
        spec = get_format(format).spec(weight, rank=rank, out_modes=out_modes, in_modes=in_modes)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = _check_padding_idx(padding_idx, num_embeddings)
        self.max_norm, self.norm_type, self.scale_grad_by_freq = max_norm, norm_type, scale_grad_by_freq
        super().__init__(spec, bias=None, init=init, implementation=implementation, device=device, dtype=dtype)

    @classmethod
    def weight_shape_of(cls, layer: Any) -> WeightShape:
        return WeightShape("embedding", layer.embedding_dim, layer.num_embeddings)

    @property
    def weight(self) -> Tensor:
        """The dense table, ``(num_embeddings, embedding_dim)``; the padding row is zero."""
        table = self._dense_weight()
        if self.padding_idx is None:
            return table
        rows = torch.arange(self.num_embeddings, device=table.device)
        return table.masked_fill((rows == self.padding_idx)[:, None], 0.0)

    def forward(self, ids: Tensor) -> Tensor:
        self._check_ids(ids)
        rows = self._rows(ids)
        if self.scale_grad_by_freq:
            rows = _scale_gradient(rows, ids)
        if self.max_norm is not None:
            norms = rows.norm(p=self.norm_type, dim=-1, keepdim=True)
            rows = torch.where(norms > self.max_norm, rows * (self.max_norm / (norms + 1e-7)), rows)
        if self.padding_idx is not None:
            rows = rows.masked_fill((ids == self.padding_idx)[..., None], 0.0)
        return rows

    def _rows(self, ids: Tensor) -> Tensor:
        if self._runs_dense():
            rows = F.embedding(ids, self._dense_weight())
        else:
            rows = self.format.lookup(ids, list(self.cores), self.spec)
        return rows.to(self.cores[0].dtype)  # autocast lowers products, torch's embedding keeps its dtype

    def _runs_dense(self) -> bool:
        if self.implementation == "dense":
            return True
        # While training, every step would rebuild the whole table for the few rows of a batch.
        return self._dense_allowed and not self._trains() and not torch.compiler.is_compiling()

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise DTypeError(
                f"an embedding's input must be whole numbers: found dtype {ids.dtype}, expected int64. Pass ids.long()."
            )
        # On the CPU a look at the range is cheap and prevents rows of the padded vocabulary being read.
        if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.num_embeddings:
                raise ModeIndexError(
                    f"ids must lie in the vocabulary: found {low} to {high}, expected 0 to "
                    f"{self.num_embeddings - 1}. Check the tokenizer."
                )

    def _matching_sigma(self) -> float:
        return 1.0  # torch draws tables from N(0, 1)

    def _chain(self) -> None:
        return None

    def _make_static_plan(self) -> ContractionPlan | None:
        return None

    def plan(self, batch: int = 1) -> LookupPlan:
        """How this many ids are looked up."""
        dense = self._runs_dense()
        products = _row_products(self.spec)
        size = self.cores[0].element_size()
        row_bytes = batch * self.embedding_dim * size
        model = cost_model(self._device_type)
        dense_s = model.copy_s(row_bytes)
        factorized_s = dense_s + model.gemm_s(
            batch, self.embedding_dim, max(1, products // self.embedding_dim), dtype=self.cores[0].dtype
        )
        flops = 0 if dense else 2 * batch * products
        return LookupPlan("dense" if dense else "factorized", batch, flops, row_bytes, factorized_s, dense_s)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"


def _check_padding_idx(index: int | None, size: int) -> int | None:
    if index is None:
        return None
    if not -size <= index < size:
        raise ShapeError(f"padding_idx must lie in the vocabulary: found {index}, expected within {size}. Check it.")
    return index % size


def _scale_gradient(rows: Tensor, ids: Tensor) -> Tensor:
    """The same rows, with gradients divided by how often their id occurs in the batch."""
    _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    share = (1.0 / counts[inverse]).to(rows.dtype)[..., None]
    return rows * share + (rows * (1 - share)).detach()


def _row_products(spec: FactorSpec) -> int:
    """Multiply-adds of one row, sweeping from the first core."""
    counted = get_format(spec.format).row_products(spec)
    if counted is not None:
        return counted
    modes, ranks = spec.out_modes, spec.ranks
    if len(modes) == 1:
        return ranks[1] * modes[0]
    return sum(math.prod(modes[: k + 1]) * ranks[k] * ranks[k + 1] for k in range(1, len(modes)))
