"""A Transformer encoder layer with factorized attention and feed-forward maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.errors import ShapeError
from tensortrain.formats import Rank
from tensortrain.nn.attention.multihead import MultiheadAttention
from tensortrain.nn.base import Implementation, Init
from tensortrain.nn.composite import CompositeLayer, Map, weight_of
from tensortrain.nn.inputs import traceable
from tensortrain.nn.linear import Linear

__all__ = ["TransformerEncoderLayer"]

Activation = str | Callable[[Tensor], Tensor]
Self = TypeVar("Self", bound="TransformerEncoderLayer")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class TransformerEncoderLayer(CompositeLayer):
    r"""``torch.nn.TransformerEncoderLayer`` with factorized attention and feed-forward maps.

    Stands inside ``torch.nn.TransformerEncoder(layer, n, enable_nested_tensor=False)``.

    Args:
        d_model .. bias: As ``torch.nn.TransformerEncoderLayer``.
        format, rank, implementation, init: Of every map, as ``Linear``.
        modes: Factors of ``d_model``; balanced ones when left out.
        ff_modes: Factors of ``dim_feedforward``, as many.

    Attributes:
        self_attn: A ``MultiheadAttention``; ``linear1``, ``linear2``: the feed-forward maps.

    Shapes: ``(L, b, E)``, ``(b, L, E)`` with ``batch_first``, or ``(L, E)``; output as input.

    Source: Vaswani et al., arXiv:1706.03762; ``norm_first``: Xiong et al., arXiv:2002.04745.

    Example:
        >>> layer = TransformerEncoderLayer(64, 4, 256, batch_first=True, rank=4)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    dense_type = nn.TransformerEncoderLayer

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        *,
        format: str = "tt",
        rank: Rank = 8,
        modes: Sequence[int] | None = None,
        ff_modes: Sequence[int] | None = None,
        init: Init = "match",
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        how: dict[str, Any] = {"format": format, "rank": rank, "init": init, "implementation": implementation}
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, modes=modes, **how, **place
        )
        self.linear1: Map = Linear(d_model, dim_feedforward, bias, in_modes=modes, out_modes=ff_modes, **how, **place)
        self.linear2: Map = Linear(dim_feedforward, d_model, bias, in_modes=ff_modes, out_modes=modes, **how, **place)
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **place)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **place)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))
        self.activation = _activation(activation)
        self.norm_first = norm_first

    @traceable
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer; arguments as ``torch.nn.TransformerEncoderLayer``."""

        def attend(x: Tensor) -> Tensor:
            found, _ = self.self_attn(
                x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask, is_causal=is_causal
            )
            return self.dropout1(found)

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(src + attend(src))
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: Any,
        *,
        format: str = "tt",
        rank: Rank | None = None,
        eps: float | None = None,
        modes: Sequence[int] | None = None,
        ff_modes: Sequence[int] | None = None,
        implementation: Implementation = "auto",
    ) -> Self:
        """Approximate torch's layer; without ``rank`` and ``eps`` exact to dtype.

        Args:
            dense: The torch layer; it is not changed. Dtype, device, mode and ``requires_grad`` carry over.
            format, rank, eps, implementation: Of every map, as ``Linear.from_dense``.
            modes, ff_modes: Factors of ``d_model`` and of ``dim_feedforward``.

        Raises:
            KindError: ``dense`` is of another kind.
            ShapeError, RankError, NonFiniteError: As for ``Linear.from_dense``.
        """
        cls._check_dense_type(dense)
        how: dict[str, Any] = {"format": format, "implementation": implementation}
        layer = cls(**cls._arguments_of(dense), rank=1, init=None, device="meta", **how)
        how |= {"rank": rank, "eps": eps}
        layer.self_attn = MultiheadAttention.from_dense(dense.self_attn, modes=modes, **how)
        layer.linear1 = Linear.from_dense(dense.linear1, in_modes=modes, out_modes=ff_modes, **how)
        layer.linear2 = Linear.from_dense(dense.linear2, in_modes=ff_modes, out_modes=modes, **how)
        for name in _UNTOUCHED:
            setattr(layer, name, copy.deepcopy(getattr(dense, name)))
        return layer.train(dense.training)

    def to_dense(self) -> Any:
        """Torch's layer with the same weights."""
        weight = self.norm1.weight
        dense = nn.TransformerEncoderLayer(**self._arguments_of(self), device=weight.device, dtype=weight.dtype)
        dense.self_attn.dropout = self.self_attn.dropout
        for name in _UNTOUCHED:
            setattr(dense, name, copy.deepcopy(getattr(self, name)))
        self._fill(dense)
        return dense

    def _weights(self) -> dict[str, Tensor]:
        found = {f"self_attn.{name}": weight for name, weight in self.self_attn._weights().items()}
        for name in ("linear1", "linear2", "norm1", "norm2"):
            one: Any = self.get_submodule(name)
            found |= {f"{name}.weight": weight_of(one), f"{name}.bias": one.bias}
        return {name: weight for name, weight in found.items() if weight is not None}

    @staticmethod
    def _arguments_of(layer: Any) -> dict[str, Any]:
        return {
            "d_model": layer.self_attn.embed_dim,
            "nhead": layer.self_attn.num_heads,
            "dim_feedforward": layer.linear1.out_features,
            "activation": copy.deepcopy(layer.activation),  # a module would be shared
            "batch_first": layer.self_attn.batch_first,
            "norm_first": layer.norm_first,
            "bias": layer.linear1.bias is not None,
        }

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}, {self._size_repr()}"


_UNTOUCHED = ("norm1", "norm2", "dropout", "dropout1", "dropout2")  # the same modules in torch's layer and ours


def _activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    if not isinstance(activation, str):
        return activation
    if activation not in _ACTIVATIONS:
        raise ShapeError(
            f"activation must be one of {tuple(_ACTIVATIONS)} or a function: found {activation!r}. Pass 'relu'."
        )
    return _ACTIVATIONS[activation]
