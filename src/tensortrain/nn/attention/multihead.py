"""Multi-head attention with factorized projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.errors import DTypeError, KindError, ShapeError
from tensortrain.formats import Rank
from tensortrain.nn.base import Implementation, Init
from tensortrain.nn.composite import CompositeLayer, Map, linear_of, weight_of
from tensortrain.nn.inputs import lengths_of, nest, traceable
from tensortrain.nn.linear import Linear
from tensortrain.system.tracing import sizes_of

__all__ = ["MultiheadAttention"]


class MultiheadAttention(CompositeLayer):
    r"""``torch.nn.MultiheadAttention`` with its four projections as ``tensortrain.nn.Linear``.

    Args:
        embed_dim .. batch_first: As ``torch.nn.MultiheadAttention``.
        format, rank, implementation: Of every projection, as ``Linear``.
        modes: Factors of ``embed_dim``; balanced ones when left out. Other sizes of keys and values are split
            into as many.
        init: Variance of the dense weights: ``"match"`` (torch's), ``"glorot"``, ``"he"``, a number; ``None``
            leaves everything unset.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: The projections.

    Shapes: query ``(L, b, E)``, key ``(S, b, kdim)``, value ``(S, b, vdim)``, with ``batch_first`` the batch in
    front, or all without a batch; output as the query, weights ``(b, L, S)`` or ``(b, n_heads, L, S)``.

    Raises:
        ShapeError: Sizes, inputs or masks that do not fit.

    Cost: the projections' plans, and ``O(b L S E)`` for the attention itself.
    Source: Vaswani et al., arXiv:1706.03762; the TT projections: Novikov et al., arXiv:1509.06569.

    Example:
        >>> layer = MultiheadAttention(64, 4, batch_first=True, rank=4)
        >>> x = torch.randn(2, 10, 64)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 10, 64])
    """

    dense_type = nn.MultiheadAttention
    torch_arguments: ClassVar[tuple[str, ...]] = (
        "embed_dim",
        "num_heads",
        "dropout",
        "add_zero_attn",
        "kdim",
        "vdim",
        "batch_first",
    )

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        format: str = "tt",
        rank: Rank = 8,
        modes: Sequence[int] | None = None,
        init: Init = "match",
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.add_zero_attn, self.batch_first = dropout, add_zero_attn, batch_first
        how: dict[str, Any] = {"format": format, "rank": rank, "out_modes": modes, "init": None}
        how |= {"implementation": implementation, "device": device, "dtype": dtype}

        def projection(size: int) -> Map:
            return Linear(size, embed_dim, bias, in_modes=modes if size == embed_dim else None, **how)

        self.q_proj, self.k_proj, self.v_proj = projection(embed_dim), projection(self.kdim), projection(self.vdim)
        self.out_proj = projection(embed_dim)
        for name in ("bias_k", "bias_v"):
            value = torch.empty(1, 1, embed_dim, device=device, dtype=dtype) if add_bias_kv else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        if init is not None:
            self.reset_parameters(init)

    def reset_parameters(self, init: Init = "match", generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew: biases zero, projections with the variance of torch's, or what ``init`` names."""
        together = self.kdim == self.vdim == self.embed_dim  # torch draws equal ones as one (3 E, E) matrix
        for name, one in self.named_maps():
            fan_out = 3 * self.embed_dim if together else self.embed_dim
            fans = one.in_features * 3 if name == "out_proj" else (one.in_features + fan_out) / 2
            if isinstance(one, Linear):
                one.reset_parameters(math.sqrt(1 / fans) if init == "match" else init, generator)
            else:
                nn.init.normal_(one.weight, std=math.sqrt(1 / fans), generator=generator)
            if one.bias is not None:
                nn.init.zeros_(one.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra, generator=generator)

    # -- forward -------------------------------------------------------------------------------------

    @traceable
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results as ``torch.nn.MultiheadAttention``.

        Without ``need_weights``, ``scaled_dot_product_attention`` does the work.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            _check_nested((query, key, value), (key_padding_mask, attn_mask), self.batch_first)
            return self._attend_nested(query, key, value, need_weights, average_attn_weights)
        batched, axis = query.ndim == 3, 0 if self.batch_first else 1
        if not batched:
            self._check_axes(query, key, value, 2)
            query, key, value = (x.unsqueeze(axis) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        self._check_inputs(query, key, value, axis)
        if is_causal and attn_mask is None:
            raise ShapeError(
                "is_causal only says that attn_mask is causal: found attn_mask=None. Pass the mask too, "
                "torch.nn.Transformer.generate_square_subsequent_mask(L)."
            )
        q = self._heads(self.q_proj(query))
        k = self._extended(self._heads(self.k_proj(key)), self.bias_k)
        v = self._extended(self._heads(self.v_proj(value)), self.bias_v)
        n_extra = sizes_of(k)[2] - sizes_of(key)[1 - axis]
        hinted = is_causal and key_padding_mask is None and not need_weights and n_extra == 0
        mask = None if hinted else self._merged_mask(attn_mask, key_padding_mask, q, k, n_extra)
        y, weights = self._attend(q, k, v, mask, need_weights, hinted)
        y = self.out_proj(y.transpose(1, 2).flatten(2) if self.batch_first else y.permute(2, 0, 1, 3).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(axis), None if weights is None else weights.squeeze(0)
        return y, weights

    def _attend_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences of several lengths: padded, with the padding masked, and cut out again."""
        q, k, v = (torch.nested.to_padded_tensor(x, 0.0) for x in (query, key, value))
        # A sequence without keys would give NaN; nothing of it comes back.
        padding = torch.arange(k.shape[1], device=k.device) >= lengths_of(key).clamp_min(1)[:, None]
        y, weights = self.forward(
            q, k, v, padding, need_weights=need_weights, average_attn_weights=average_attn_weights
        )
        return nest(y, query), weights

    def _heads(self, x: Tensor) -> Tensor:
        """``(b, L, E)`` or ``(L, b, E)`` as ``(b, n_heads, L, head_dim)``."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values ``(b, n_heads, S, head_dim)`` with the learned and the zero position at their end."""
        one = (x.shape[0], self.num_heads, 1, self.head_dim)
        parts = [x]
        if bias is not None:
            parts.append(bias.to(x.dtype).reshape(1, self.num_heads, 1, self.head_dim).expand(one))
        if self.add_zero_attn:
            parts.append(x.new_zeros(one))
        return x if len(parts) == 1 else torch.cat(parts, dim=2)

    def _merged_mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, n_extra: int
    ) -> Tensor | None:
        """What is added to the scores ``(b, n_heads, L, S)``, in a shape that broadcasts; extra positions stay."""
        b, heads, n_queries, n_keys = *sizes_of(q)[:3], sizes_of(k)[2] - n_extra
        masks = []
        if attn_mask is not None:
            shapes = ((n_queries, n_keys), (b * heads, n_queries, n_keys))
            _check_mask("attn_mask", attn_mask, shapes)
            masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, heads)))
        if padding is not None:
            _check_mask("key_padding_mask", padding, ((b, n_keys),))
            masks.append(padding[:, None, None, :])
        if not masks:
            return None
        return F.pad(sum(_additive(mask, q.dtype) for mask in masks), (0, n_extra))  # type: ignore[arg-type]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=is_causal), None
        scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), p)
        return weights.to(v.dtype) @ v, weights

    # -- checks --------------------------------------------------------------------------------------

    def _check_axes(self, query: Tensor, key: Tensor, value: Tensor, n_axes: int) -> None:
        found = [sizes_of(x) for x in (query, key, value)]
        sizes = (self.embed_dim, self.kdim, self.vdim)
        if any(len(shape) != n_axes or shape[-1] != size for shape, size in zip(found, sizes, strict=True)):
            raise ShapeError(
                f"query, key and value must all have a batch axis or none, and end with {sizes}: found {found}. "
                "Check the layers before."
            )

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, axis: int) -> None:
        self._check_axes(query, key, value, 3)
        q, k, v = sizes_of(query), sizes_of(key), sizes_of(value)
        if k[:2] != v[:2] or q[axis] != k[axis]:
            raise ShapeError(
                f"key and value must have one length, and one batch with the query: found {q}, {k} and {v}, "
                f"the batch in axis {axis}. Check batch_first."
            )

    # -- to and from torch's layer -------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        *,
        format: str = "tt",
        rank: Rank | None = None,
        eps: float | None = None,
        modes: Sequence[int] | None = None,
        implementation: Implementation = "auto",
    ) -> MultiheadAttention:
        """Approximate torch's layer; without ``rank`` and ``eps`` exact to dtype.

        Args:
            dense: The torch layer; it is not changed. Dtype, device, mode and ``requires_grad`` carry over.
            format, rank, eps, implementation: Of every projection, as ``Linear.from_dense``.
            modes: Factors of ``embed_dim``.

        Raises:
            KindError: ``dense`` is of another kind.
            ShapeError, RankError, NonFiniteError: As for ``Linear.from_dense``.
        """
        cls._check_dense_type(dense)
        layer = cls._meta_twin(dense, format=format, modes=modes)
        for name, (weight, bias) in _projections_of(dense).items():
            old: Any = layer.get_submodule(name)
            laid_out: Any = {"format": format, "in_modes": old.in_modes, "out_modes": old.out_modes}
            how: Any = {"rank": rank, "eps": eps, "implementation": implementation}
            setattr(layer, name, Linear.from_dense(linear_of(weight, bias), **laid_out, **how))
        return layer._take_rest(dense)

    @classmethod
    def _meta_twin(cls, dense: Any, **laid_out: Any) -> MultiheadAttention:
        """A layer of the same arguments without memory."""
        arguments = {name: getattr(dense, name) for name in cls.torch_arguments}
        arguments |= {"bias": dense.in_proj_bias is not None, "add_bias_kv": dense.bias_k is not None}
        return cls(**arguments, **laid_out, rank=1, init=None, device="meta")

    def _take_rest(self, dense: Any) -> MultiheadAttention:
        """What torch's layer has besides projections."""
        for name in ("bias_k", "bias_v"):
            value = getattr(dense, name)
            if value is not None:
                setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
        return self.train(dense.training)

    @classmethod
    def with_dense_maps(cls, dense: Any) -> MultiheadAttention:
        """The same layer with plain linear layers for projections, on copies of the weights."""
        cls._check_dense_type(dense)
        layer = cls._meta_twin(dense, format="low_rank")
        for name, (weight, bias) in _projections_of(dense).items():
            setattr(layer, name, linear_of(weight, bias))
        return layer._take_rest(dense)

    def to_dense(self) -> Any:
        """Torch's layer with the same weights.

        Raises:
            KindError: Some heads were taken out, and torch's layer has all that its size is made of.
        """
        if self.num_heads * self.head_dim != self.embed_dim:
            raise KindError(
                f"torch's attention has as many heads as make up its size: this one has {self.num_heads} of "
                f"{self.head_dim} numbers, expected {self.embed_dim} in all. Keep it as it is: its maps are dense."
            )
        weight = weight_of(self.out_proj)
        has = {"bias": self.out_proj.bias is not None, "add_bias_kv": self.bias_k is not None}
        arguments: Any = {name: getattr(self, name) for name in self.torch_arguments} | has
        dense = nn.MultiheadAttention(**arguments, device=weight.device, dtype=weight.dtype)
        self._fill(dense)
        return dense

    def _weights(self) -> dict[str, Tensor]:
        maps = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
        if self.kdim == self.vdim == self.embed_dim:
            found = {"in_proj_weight": torch.cat([weight_of(one) for one in maps.values()])}
        else:
            found = {f"{name}_proj_weight": weight_of(one) for name, one in maps.items()}
        found["out_proj.weight"] = weight_of(self.out_proj)
        if self.out_proj.bias is not None:
            found["in_proj_bias"] = torch.cat([one.bias for one in maps.values()])
            found["out_proj.bias"] = self.out_proj.bias
        extra = {"bias_k": self.bias_k, "bias_v": self.bias_v}
        return found | {name: value for name, value in extra.items() if value is not None}

    # What torch's own encoder layer reads of its attention, to choose how it runs.

    _qkv_same_embed_dim = False  # its fused kernel would pass by the projections: let it call the layer

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The dense weights of queries, keys and values, one under the other, to read; ``None`` for unlike sizes."""
        return self.dense_weights().get("in_proj_weight")

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Their biases, to read."""
        return self.dense_weights().get("in_proj_bias")

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, {self.num_heads}"]
        parts += [f"kdim={self.kdim}, vdim={self.vdim}"] if self.kdim != self.embed_dim != self.vdim else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["batch_first=True"] if self.batch_first else []
        return ", ".join([*parts, self._size_repr()])


@torch.enable_grad()  # else the parts of a parameter would not tell whether it is trained
def _projections_of(dense: nn.MultiheadAttention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights and biases of torch's four projections, with the ``requires_grad`` of what they are parts of."""
    if dense.in_proj_weight is not None:
        weights: Sequence[Any] = dense.in_proj_weight.chunk(3)
    else:
        weights = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
    biases: Sequence[Any] = [None] * 3 if dense.in_proj_bias is None else dense.in_proj_bias.chunk(3)
    names = ("q_proj", "k_proj", "v_proj")
    found = dict(zip(names, zip(weights, biases, strict=True), strict=True))
    return {**found, "out_proj": (dense.out_proj.weight, dense.out_proj.bias)}


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: minus infinity where a boolean one is True."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)


def _check_mask(name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DTypeError(
            f"{name} must be boolean (True blanks out) or floating-point (added to the scores): found {mask.dtype}. "
            "Convert it with mask.bool()."
        )
    if sizes_of(mask) not in shapes:
        raise ShapeError(
            f"{name} must fit queries and keys: found {sizes_of(mask)}, expected {' or '.join(map(str, shapes))}. "
            "Check the lengths, and True means blanked out."
        )


def _check_nested(inputs: Sequence[Tensor], masks: Sequence[Tensor | None], batch_first: bool) -> None:
    if not all(x.is_nested for x in inputs) or not batch_first or any(mask is not None for mask in masks):
        raise ShapeError(
            f"nested query, key and value come together, with batch_first and without masks: found nested "
            f"{[x.is_nested for x in inputs]}, batch_first={batch_first}, {sum(m is not None for m in masks)} masks. "
            "Pad them with torch.nested.to_padded_tensor(x, 0.0)."
        )


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise ShapeError(
            f"embed_dim must be a multiple of num_heads: found embed_dim={embed_dim}, num_heads={num_heads}. "
            "Choose a divisor."
        )
