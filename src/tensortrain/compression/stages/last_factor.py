"""The last factor of a layer, which its output is linear in: what it is given, and a ridge regression for it.

With all other factors fixed, ``y[p] = A f[p] + b[p]``: ``f`` is what the other factors make of the layer's input and
``p`` counts output blocks that share ``A`` (of a train, the output modes but the last; else there is one). A and b are
fitted to wanted outputs by least squares, with a pull of A towards what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tensortrain.compression.survey.summaries import padded, patches_of
from tensortrain.formats import FactorSpec, get_format
from tensortrain.formats.chain import ChainFormat
from tensortrain.formats.channel_order import NATURAL, ChannelOrder
from tensortrain.formats.tucker2 import Tucker2
from tensortrain.nn import Conv1d, Conv2d, FactorizedLayer, Linear, is_transformers_conv1d
from tensortrain.system.processes import added_up, gathered, n_processes

__all__ = ["Equations", "LastFactor", "is_plain_layer", "last_factor", "why_no_last_factor"]

_MOST_FEATURES = 4096  # numbers that one output depends on: a matrix of their products has 128 MiB
_MOST_ROWS = 4096  # of one call: neighbouring places of an image say nearly the same
_CHUNK = 1 << 22  # numbers at once
_SUMS = ("gram", "cross", "features", "wanted", "square")  # of ``Equations``


def is_plain_layer(layer: nn.Module | None) -> bool:
    """Whether it is a dense layer of a kind whose weight can be fitted."""
    return type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d) or is_transformers_conv1d(layer)


def why_no_last_factor(layer: nn.Module) -> str:
    """Why a layer's last factor cannot be fitted by itself; ``""`` where it can."""
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "hooks or a forward of its own change what goes in or out"
    if not isinstance(layer, FactorizedLayer):
        plain = is_plain_layer(layer)
        wide = plain and (math.prod(_weight_of(layer).shape[1:]) > _MOST_FEATURES or getattr(layer, "groups", 1) > 1)
        return "" if plain and not wide else "it is of a kind whose weight is not fitted"
    if type(layer) not in (Linear, Conv1d, Conv2d) or layer.spec.weight.groups > 1:
        return f"layers of its kind ({type(layer).__name__}) are not fitted"
    fmt, spec = layer.format, layer.spec
    if isinstance(fmt, Tucker2):
        return ""
    if not isinstance(fmt, ChainFormat):
        return f"the format {spec.format} is not fitted"
    outs, ins = fmt.chain_modes(spec)
    if math.prod(outs) != spec.weight.out_features:
        return "its output modes are padded"
    if spec.ranks[-2] * ins[-1] > _MOST_FEATURES:
        return f"its outputs depend on more than {_MOST_FEATURES} numbers each"
    # what is stored must be able to hold any last core
    return "" if fmt.stores_chain(spec) or spec.format == "low_rank" else f"the format {spec.format} is not fitted"


def last_factor(layer: nn.Module) -> LastFactor:
    """The last factor of a layer that :func:`why_no_last_factor` has nothing against."""
    if not isinstance(layer, FactorizedLayer):
        return LastFactor(layer)
    return TuckerFactor(layer) if isinstance(layer.format, Tucker2) else ChainFactor(layer)


class LastFactor:
    """Of a dense layer: its whole weight."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._order: ChannelOrder = layer.channel_order if isinstance(layer, Linear) else NATURAL

    @property
    def n_blocks(self) -> int:
        """Output blocks that share the factor."""
        return 1

    def rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's input as rows in torch's order, or that of its cores, ``(n, N)``; of images, at some places."""
        if not _is_conv(self.layer):
            rows = _counted(x, mask)
            return rows if self._order.inputs is None else rows[:, list(self._order.inputs)]
        patches = patches_of(self.layer, *padded(self.layer, _with_examples(self.layer, x)))
        return _some(patches.transpose(1, 2).reshape(-1, patches.shape[1]))

    def wanted(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """The outputs wanted at the same rows, ``(n, n_blocks, m)``."""
        if _is_conv(self.layer):
            y = _with_examples(self.layer, y)
            rows = _some(y.movedim(1, -1).reshape(-1, y.shape[1]))
        else:
            rows = _counted(y, mask)
        rows = rows if self._order.outputs is None else rows[:, list(self._order.outputs)]
        return rows.reshape(len(rows), self.n_blocks, -1)

    def features(self, rows: Tensor) -> Tensor:
        """What the factor is given, ``(n, n_blocks, k)``."""
        return rows[:, None, :]

    def matrix(self) -> Tensor:
        """The factor, ``(m, k)``."""
        return _weight_of(self.layer).detach().flatten(1)

    def bias(self) -> Tensor | None:
        """The layer's bias at the factor's outputs, ``(n_blocks, m)``, float64; None where it has none."""
        if self.layer.bias is None:
            return None
        own = self.layer.bias.detach().double()
        own = own if self._order.outputs is None else own[list(self._order.outputs)]
        return own.reshape(self.n_blocks, -1)

    def tensors(self) -> list[Tensor]:
        """The parameters that a fit changes."""
        own = [self.layer.weight] if not isinstance(self.layer, FactorizedLayer) else [list(self.layer.cores)[-1]]
        return own if self.layer.bias is None else [*own, self.layer.bias]

    @torch.no_grad()
    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Put a fitted factor, and the bias with it, in place."""
        self._write_factor(matrix)
        if self.layer.bias is not None and bias is not None:
            given, places = bias.reshape(-1), getattr(self.layer, "out_places", None)
            self.layer.bias.copy_(given if places is None else given[places.long()])

    def _write_factor(self, matrix: Tensor) -> None:
        weight = _weight_of(self.layer)
        weight.copy_(matrix.reshape(weight.shape))


class TuckerFactor(LastFactor):
    """The outer channel map of a Tucker-2 convolution."""

    def features(self, rows: Tensor) -> Tensor:
        inner, core, _ = self.layer.core_list()
        kernel = torch.einsum("oi...,ic->oc...", core, inner).flatten(1)
        return (rows @ kernel.T.to(rows.dtype))[:, None, :]

    def matrix(self) -> Tensor:
        found: Tensor = self.layer.core_list()[-1].detach()
        return found

    def _write_factor(self, matrix: Tensor) -> None:
        list(self.layer.cores)[-1].copy_(matrix)


class ChainFactor(LastFactor):
    """The last core of a chain."""

    @property
    def _spec(self) -> FactorSpec:
        spec: FactorSpec = self.layer.spec
        return spec

    @property
    def _modes(self) -> tuple[Sequence[int], Sequence[int]]:
        found: tuple[Sequence[int], Sequence[int]] = self.layer.format.chain_modes(self._spec)
        return found

    def _chain(self) -> list[Tensor]:
        fmt: Any = get_format(self._spec.format)
        found: list[Tensor] = fmt.to_chain([core.detach() for core in self.layer.core_list()], self._spec)
        return found

    @property
    def n_blocks(self) -> int:
        return math.prod(self._modes[0][:-1])

    def features(self, rows: Tensor) -> Tensor:
        ins, kernel = self._modes[1], math.prod(self._spec.weight.kernel)
        if kernel > 1:  # a chain has positions slowest
            rows = rows.unflatten(1, (-1, kernel)).transpose(1, 2).flatten(1)
        rows = F.pad(rows, (0, math.prod(ins) - rows.shape[1]))
        state = rows.reshape(len(rows), 1, 1, -1)  # n p r j_k..j_d
        for core, size in zip(self._chain()[:-1], ins, strict=False):
            state = state.unflatten(3, (size, -1))
            state = torch.einsum("nprjq,rijs->npisq", state, core.to(state.dtype)).flatten(1, 2)
        return state.flatten(2)

    def matrix(self) -> Tensor:
        return self._chain()[-1][..., 0].transpose(0, 1).flatten(1)  # i (r j)

    def _write_factor(self, matrix: Tensor) -> None:
        cores, fmt = self._chain(), self.layer.format
        rank, size = cores[-1].shape[0], cores[-1].shape[2]
        cores[-1] = matrix.unflatten(1, (rank, size)).transpose(0, 1)[..., None].to(cores[0].dtype)
        stored = fmt.from_chain(cores, self._spec)
        list(self.layer.cores)[-1].copy_(stored[-1])


def _weight_of(layer: Any) -> Tensor:
    """Of a dense layer, outputs first; a view."""
    weight: Tensor = layer.weight
    return weight.T if is_transformers_conv1d(layer) else weight


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, (_ConvNd, Conv1d, Conv2d))


def _with_examples(conv: Any, x: Tensor) -> Tensor:
    """With an axis of examples, which a single image lacks."""
    return x if x.ndim == len(conv.kernel_size) + 2 else x.unsqueeze(0)


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that no mask takes out."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[mask.reshape(-1).to(x.device).bool()] if mask is not None and mask.shape == x.shape[:-1] else rows


def _some(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // _MOST_ROWS)]


@dataclass
class Equations:
    """Sums over rows of what the normal equations of a factor need, in float64."""

    n_rows: int = 0
    gram: Tensor | None = None  # (k, k)
    cross: Tensor | None = None  # (m, k)
    features: Tensor | None = None  # (p, k)
    wanted: Tensor | None = None  # (p, m)
    square: Tensor | None = None  # (p, m), of the outputs wanted

    @torch.no_grad()
    def add(self, factor: LastFactor, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Take in one call of the layer: its input now, and the output wanted."""
        rows, wanted = factor.rows(x, mask), factor.wanted(y, mask)
        if len(rows) != len(wanted):
            raise ValueError(f"{len(rows)} rows of inputs, {len(wanted)} of outputs")
        step = max(1, _CHUNK // max(1, rows.shape[1] * factor.n_blocks))
        for one, other in zip(rows.split(step), wanted.split(step), strict=True):
            good = torch.isfinite(one).all(dim=1) & torch.isfinite(other).flatten(1).all(dim=1)
            self._add(factor.features(one[good].double()), other[good].double())

    def _add(self, f: Tensor, t: Tensor) -> None:
        flat, targets = f.flatten(0, 1), t.flatten(0, 1)
        sums = (flat.T @ flat, targets.T @ flat, f.sum(dim=0), t.sum(dim=0), t.square().sum(dim=0))
        for name, more in zip(_SUMS, sums, strict=True):
            known = getattr(self, name)
            setattr(self, name, more if known is None else known + more)
        self.n_rows += len(f)

    def join_(self, device: torch.device) -> None:
        """Add up those of several processes."""
        if n_processes() == 1:
            return
        for name, total in zip(_SUMS, added_up([getattr(self, name) for name in _SUMS], device), strict=True):
            setattr(self, name, total)
        self.n_rows = sum(gathered(self.n_rows))

    def about_means(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Gram matrix and cross moment; about the means where a bias takes these up."""
        assert self.gram is not None
        assert self.cross is not None
        assert self.features is not None
        assert self.wanted is not None
        if not centred:
            return self.gram, self.cross
        means = self.features / self.n_rows
        return self.gram - self.features.T @ means, self.cross - self.wanted.T @ means

    def solved(self, old: Tensor, *, damping: float, centred: bool) -> Tensor:
        """The factor of least squares, drawn towards the old one: ``damping`` is a share of the mean square."""
        gram, cross = self.about_means(centred=centred)
        pull = damping * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        lower = torch.linalg.cholesky(gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        return old + torch.cholesky_solve((cross - old @ gram).T, lower).T

    def bias(self, matrix: Tensor) -> Tensor:
        """What makes the mean output right, ``(p, m)``."""
        assert self.features is not None
        assert self.wanted is not None
        return (self.wanted - self.features @ matrix.T) / self.n_rows

    def error(self, matrix: Tensor, bias: Tensor | None) -> float:
        """Sum of the squared distances of the outputs."""
        assert self.gram is not None
        assert self.cross is not None
        assert self.square is not None
        total = (matrix @ self.gram * matrix).sum() - 2 * (matrix * self.cross).sum() + self.square.sum()
        if bias is not None:
            assert self.features is not None
            assert self.wanted is not None
            total += (2 * bias * (self.features @ matrix.T - self.wanted)).sum() + self.n_rows * bias.square().sum()
        return max(0.0, float(total))
