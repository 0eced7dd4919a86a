"""An output layer that shares the table of an embedding: logits over a vocabulary from the embedding's own cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.contract import ChainShape, Plan
from tensortrain.errors import KindError, ShapeError
from tensortrain.nn.cores import holding_cores, is_watched
from tensortrain.nn.embedding.layers import Embedding
from tensortrain.nn.inputs import Traced, is_plain_input, map_nested, traceable
from tensortrain.nn.runner import Runner
from tensortrain.system.tracing import is_traced, sizes_of

__all__ = ["TiedHead", "tied_head"]


def tied_head(embedding: nn.Module, *, bias: bool = False) -> TiedHead:
    r"""Return the layer ``logits = h E^T (+ b)`` on the table ``E`` of an embedding, whose parameters it shares.

    Args:
        embedding: A factorized embedding (or torch's, which stays tied when it is compressed later).
        bias: Whether a bias, zero at first, is added.

    Raises:
        KindError: ``embedding`` is no embedding.

    Example:
        >>> embedding = Embedding(1000, 16, rank=4)
        >>> head = tied_head(embedding)
        >>> head(torch.randn(2, 5, 16)).shape, sum(p.numel() for p in head.parameters()) == embedding.n_params
        (torch.Size([2, 5, 1000]), True)
    """
    return TiedHead(embedding, bias=bias)


class TiedHead(Traced):
    """Logits through the TT-matrix product with the cores of an embedding, transposed; see ``tied_head``.

    Rows past the vocabulary are cut off, the padding row gives its own logit (of zero, before the bias, where the row
    is zero) and gets no gradient, hot rows are those of the embedding. ``max_norm`` acts on lookups alone.

    Shapes: input ``(..., embedding_dim)``, output ``(..., num_embeddings)``.

    Cost: as ``plan`` says: O(d r^2 m max(I, J)) flops per row core by core, or 2 I J with the dense table.
    Source: weight tying of a TT-embedding: Khrulkov et al., arXiv:1901.10787.
    """

    made_from: str | None = None  # a kind of dense layer to go back to

    def __init__(self, embedding: nn.Module, *, bias: bool = False) -> None:
        super().__init__()
        if not isinstance(embedding, (Embedding, nn.Embedding)):
            raise KindError(
                f"a tied head shares the table of an embedding: found {type(embedding).__name__}. Pass the model's "
                "tensortrain.nn.Embedding."
            )
        self.embedding = embedding
        if bias:
            like = next(embedding.parameters())
            self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings, device=like.device, dtype=like.dtype))
        else:
            self.register_parameter("bias", None)
        self._runner = self._make_runner()

    @property
    def in_features(self) -> int:
        """Width of the input, the embedding's dimension."""
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        """Number of logits, the embedding's vocabulary."""
        return self.embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        """The dense table, ``(num_embeddings, embedding_dim)``."""
        return self.embedding.weight

    @traceable
    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            found: Tensor = map_nested(input, self._logits, n_last=1)
            return found
        return self._logits(input if is_plain_input(input) else input.to_dense())

    def _logits(self, h: Tensor) -> Tensor:
        sizes, table = sizes_of(h), self.embedding
        if not sizes or sizes[-1] != self.in_features:
            raise ShapeError(
                f"a tied head's input must end with the embedding's dimension: found {sizes}, expected (..., "
                f"{self.in_features}). Check the layer before."
            )
        if not isinstance(table, Embedding):
            return F.linear(h, table.weight, self.bias)
        if is_watched(table.cores) and not is_traced():
            with holding_cores(table, table.cores):
                return self._logits_of(table, h)
        return self._logits_of(table, h)

    def _logits_of(self, table: Embedding, h: Tensor) -> Tensor:
        logits = self._with_hot_rows(self._core_logits(table, h), table, h)
        if table.padding_idx is not None:
            is_padding = torch.arange(self.out_features, device=h.device) == table.padding_idx
            row = table.padding_row
            of_padding = logits.new_zeros(()) if row is None else F.linear(h, row[None]).to(logits.dtype)
            logits = torch.where(is_padding, of_padding, logits)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def _core_logits(self, table: Embedding, h: Tensor) -> Tensor:
        plan = self._plan_for(table, h)
        if plan is None or plan.uses_dense:
            return F.linear(h, table.runner.dense_weight(table))
        key = ("tied head", plan.prepared_key)
        prepared = table.runner.cached(table, key, lambda: plan.prepare(_transposed_cores(table)))
        return plan.execute(h, (), prepared)[..., : self.out_features]

    def _with_hot_rows(self, logits: Tensor, table: Embedding, h: Tensor) -> Tensor:
        if table.hot_weight is None:
            return logits
        assert table.hot_ids is not None
        # Rows not in use have the id -1: they go to a column past the vocabulary, which is cut off again.
        columns = table.hot_ids.masked_fill(table.hot_ids < 0, self.out_features)
        of_hot_rows = F.linear(h, table.hot_weight).to(logits.dtype)
        logits = F.pad(logits, (0, 1))  # of long texts they take more than the layers: no third copy
        return logits.index_copy_(-1, columns, of_hot_rows)[..., : self.out_features]

    def plan(self, batch: int = 1, *, force: str | None = None) -> Plan:
        """How the logits of this many rows are computed.

        Args:
            force: Another plan than the one that is used, as ``Linear.plan`` takes it.

        Raises:
            KindError: The embedding is torch's, or its format is no chain: the dense table is used.
        """
        table, runner = self.embedding, self._current_runner()
        if runner.shape is None:
            raise KindError(
                "only a chain of cores has a contraction plan: found a dense table. Call the head without a plan."
            )
        assert isinstance(table, Embedding)
        return runner.plan(table, batch, force=force)

    def _plan_for(self, table: Embedding, h: Tensor) -> Plan | None:
        # A traced graph takes the plan made before: it cannot choose by batch size, nor time this machine.
        if is_traced():
            return None if self._runner.shape is None else self._runner.plan_when_traced(table, None)
        runner = self._current_runner()
        return None if runner.shape is None else runner.plan(table, h.numel() // max(1, self.in_features))

    def _current_runner(self) -> Runner:
        """The runner of the transposed table, made anew where the embedding was replaced or moved."""
        if self._planned != self._to_plan():
            self._runner = self._make_runner()
        return self._runner

    def _make_runner(self) -> Runner:
        self._planned = self._to_plan()
        return Runner(self._planned[0], may_time=False)

    def _to_plan(self) -> tuple[Any, ...]:
        weight = next(self.embedding.parameters())
        return _transposed_chain(self.embedding), weight.dtype, weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedHead:
        super()._apply(fn, recurse)
        self._runner = self._make_runner()  # another device or dtype: other plans
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_runner" not in self.__dict__:  # pickled when plans lay in the head
            for name in ("_plans", "_static_plan"):
                self.__dict__.pop(name, None)
            self._runner = self._make_runner()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _transposed_chain(table: nn.Module) -> ChainShape | None:
    """The chain from the dimension to the padded vocabulary, if the table is one."""
    chain = table.format.chain(table.spec) if isinstance(table, Embedding) else None
    return None if chain is None else ChainShape(chain.in_modes, chain.out_modes, chain.ranks)


def _transposed_cores(table: Embedding) -> list[Tensor]:
    return [core.transpose(1, 2) for core in table.format.to_chain(table.core_list(), table.spec)]
