"""Inputs that are no plain tensors: proxies of ``torch.fx``, nested tensors, sparse and oneDNN layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from tensortrain.errors import KindError

from .cores import holding_cores, is_watched

__all__ = ["check_plain_layout", "is_plain_input", "lengths_of", "map_nested", "nest", "once", "traceable"]

Forward = TypeVar("Forward", bound=Callable[..., Any])


# -- torch.fx ----------------------------------------------------------------------------------------------------


def traceable(forward: Forward) -> Forward:
    """Decorator of a ``forward``: ``torch.fx`` records the layer as a leaf, as it does with torch's own."""

    @wraps(forward)
    def run(self: nn.Module, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            tracer = _tracer_of(args, options)
            if tracer is not None:
                return _leaf(tracer, self, args, options)
        return forward(self, *args, **options)

    return run  # type: ignore[return-value]


def _tracer_of(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The tracer of the first proxy among the arguments, in tuples too."""
    for value in (*args, *options.values()):
        if isinstance(value, fx.Proxy):
            return value.tracer
        if type(value) is tuple:
            found = _tracer_of(value, {})
            if found is not None:
                return found
    return None


def _leaf(tracer: Any, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    # A layer that is traced by itself is found in the graph's module under the name of a property.
    name = "itself" if tracer.root is layer else tracer.path_of_module(layer)
    return tracer.create_proxy("call_module", name, args, options)


class Traced(nn.Module):
    """Base of layers whose forward is ``traceable``."""

    @property
    def itself(self) -> nn.Module:
        """The layer: what a graph of ``torch.fx`` calls that was traced from the layer itself."""
        return self


# -- cores that are called ---------------------------------------------------------------------------------------


def once(forward: Forward) -> Forward:
    """Decorator of a ``forward``: hooks on ``layer.cores`` run once in it, however often it reads the cores."""

    @wraps(forward)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not is_watched(self.cores):
            return forward(self, *args, **options)
        with holding_cores(self, self.cores):
            return forward(self, *args, **options)

    return run  # type: ignore[return-value]


# -- layouts -----------------------------------------------------------------------------------------------------


def is_plain_input(x: Tensor) -> bool:
    """Whether a tensor lies in memory as strides say."""
    return x.layout is torch.strided and not x.is_nested


def check_plain_layout(x: Tensor, kind: str) -> None:
    """Raise ``KindError`` for what only some layers take: sparse and nested tensors."""
    if isinstance(x, Tensor) and not is_plain_input(x):
        found = "a nested tensor" if x.is_nested else f"one of layout {str(x.layout).removeprefix('torch.')}"
        raise KindError(
            f"the input of {kind} must be a plain tensor: found {found}. Pass x.to_dense(), or "
            "torch.nested.to_padded_tensor(x, 0.0) of a nested one."
        )


def map_nested(x: Any, function: Callable[[Tensor], Tensor], *, n_last: int) -> Any:
    """Apply a function of rows to a nested tensor, all parts at once; the result is nested alike.

    Args:
        x: Of either layout.
        function: Of a tensor with one or more leading axes and the last ``n_last`` axes of ``x``.
        n_last: How many axes belong to one row.
    """
    if x.layout is torch.jagged:
        return _jagged_like(x, function(x.values()))
    parts = x.unbind()
    if not parts:
        return x
    tails = [part.shape[part.ndim - n_last :] for part in parts]
    rows = [part.reshape(-1, *tail) for part, tail in zip(parts, tails, strict=True)]
    found = function(torch.cat(rows)).split([len(row) for row in rows])
    heads = [part.shape[: part.ndim - n_last] for part in parts]
    shaped = [one.reshape(*head, *one.shape[1:]) for one, head in zip(found, heads, strict=True)]
    return torch.nested.as_nested_tensor(shaped)


def _jagged_like(x: Any, values: Tensor) -> Any:
    return torch.nested.nested_tensor_from_jagged(
        values,
        offsets=x.offsets(),
        lengths=x.lengths(),
        jagged_dim=x._ragged_idx,
        min_seqlen=getattr(x, "_maybe_min_seqlen", None),
        max_seqlen=getattr(x, "_maybe_max_seqlen", None),
    )


def lengths_of(x: Any) -> Tensor:
    """How many rows each part of a nested ``(b, *, features)`` has."""
    if x.layout is not torch.jagged:
        return torch.tensor([part.shape[0] for part in x.unbind()], device=x.device)
    lengths = x.lengths()
    return x.offsets().diff() if lengths is None else lengths


def nest(padded: Tensor, like: Any) -> Any:
    """A padded ``(b, L, features)`` with the parts of a nested tensor."""
    lengths = lengths_of(like)
    if like.layout is torch.jagged and like.lengths() is None:
        is_there = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return _jagged_like(like, padded[is_there])
    sizes: Sequence[int] = lengths.tolist()
    parts = [row[:size] for row, size in zip(padded, sizes, strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=like.layout)
