"""What keeps factorized layers in check while they train: dropout and a penalty on ranks, the norm of the dense
weight, balanced cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from tensortrain.errors import RankError
from tensortrain.formats import Bond, FactorSpec, get_format
from tensortrain.nn.base import FactorizedLayer
from tensortrain.nn.embedding.layers import Embedding
from tensortrain.nn.shaping.orthogonal import OrthogonalCores
from tensortrain.nn.shaping.stand_ins import Handle, check_has_factorized, distinct_layers, transform_cores

__all__ = ["balance_", "bonds", "dense_norm", "rank_lasso", "tensor_dropout"]

Model = TypeVar("Model", bound=nn.Module)


def bonds(spec: FactorSpec) -> tuple[Bond, ...]:
    """Where the ranks are: per bond, the (core, axis) pairs that share its index, in the stored cores.

    Raises:
        KindError: The format does not tell.
    """
    lead = 1 if spec.weight.groups > 1 else 0
    found = get_format(spec.format).bonds(spec.one_group())
    return tuple(tuple((core, axis + lead) for core, axis in bond) for bond in found)


def tensor_dropout(module: nn.Module, p: float) -> Handle:
    r"""Drop rank indices of a layer at random while it trains.

    Every index of every bond is dropped with probability ``p`` and the others are scaled by ``1 / (1 - p)``,
    independently, once per forward pass; the weight is linear in each bond, so its expectation stays what it is.
    Bonds of rank 1 are left alone: to drop one is to drop the layer. In eval mode nothing happens.

    Args:
        module: A factorized layer, or any module: then each factorized layer in it.
        p: Probability in [0, 1).

    Returns:
        Handle: ``remove()`` takes it off again. Parameters and ``state_dict`` are not touched.

    Raises:
        RankError: ``p`` lies outside [0, 1).
        KindError: There is no factorized layer, or one whose format does not tell where its ranks are.

    Cost: one product per core entry.
    Source: Kolbeinsson et al., arXiv:1902.10758.

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, rank=8)
        >>> handle = tensor_dropout(layer, 0.2)
        >>> handle.remove()
    """
    if not 0 <= p < 1:
        raise RankError(f"a probability of dropping must lie in [0, 1): found p={p!r}. Pass for example 0.1.")
    check_has_factorized(module, "tensor_dropout")
    layers = [one for one in module.modules() if isinstance(one, FactorizedLayer)]
    for layer in layers:
        bonds(layer.spec)  # raises before any hook is set
    return Handle.join(transform_cores(layer, partial(_drop, p)) for layer in layers)


def _drop(p: float, layer: FactorizedLayer, cores: list[Tensor]) -> list[Tensor]:
    if not layer.training or p == 0:
        return cores
    cores = list(cores)
    for (k, axis), *_ in bonds(layer.spec):
        core = cores[k]
        rank = core.shape[axis]
        if rank > 1:
            kept = (torch.rand(rank, device=core.device) >= p) / (1 - p)
            cores[k] = core * kept.to(core.dtype).reshape(-1, *[1] * (core.ndim - axis - 1))
    return cores


def rank_lasso(model: nn.Module) -> Tensor:
    r"""Group penalty that pulls whole rank indices to zero.

    ``sum over layers, bonds, indices r of sqrt(||G_k[.., r]||^2 + ||G_{k+1}[r, ..]||^2)``: one group is all that
    dies with a rank index. Where both slices are of one size, which is where training takes them, this is
    ``sqrt(2 ||G_k[.., r]|| ||G_{k+1}[r, ..]||)``, the scale-free score of that index. Add a multiple of it to the
    loss; round the layer afterwards.

    Returns:
        Tensor: A scalar, differentiable (with gradient zero at slices that are zero); zero for a model without
        factorized layers. Slices of grouped convolutions are those of all groups together.

    Raises:
        KindError: A layer's format does not tell where its ranks are.

    Source: shrinkage of rank indices: Hawkins and Zhang, arXiv:1905.10478; the group norm: Yuan and Lin,
    J. R. Stat. Soc. B 68(1), 2006.

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, rank=8)
        >>> rank_lasso(layer).backward()
    """
    return _total(model, [_layer_lasso(layer) for layer in distinct_layers(model)])


def _layer_lasso(layer: FactorizedLayer) -> Tensor:
    cores = [_at_least_single(core) for core in layer.core_list()]
    found = []
    for bond in bonds(layer.spec):
        slices = [torch.linalg.vector_norm(cores[k].movedim(axis, 0).flatten(1), dim=1) for k, axis in bond]
        found.append(torch.linalg.vector_norm(torch.stack(slices), dim=0).sum())
    return _total(layer, found)


def dense_norm(model: nn.Module) -> Tensor:
    r"""Sum of ``||W||_F^2`` over the factorized layers, from the cores.

    Weight decay on cores is not weight decay on weights: it shrinks ``W`` by the d-th power and its fixed points
    depend on the gauge. Add ``0.5 * decay * dense_norm(model)`` to the loss instead and leave the cores out of the
    optimizer's own decay.

    Returns:
        Tensor: A scalar, differentiable; zero for a model without factorized layers. Rows of an embedding past its
        vocabulary and its padding row do not count.

    Cost: O(d r^3 m^2) flops for a train of mode pairs of size m^2; no dense weight is built, except for formats
    without such a sweep.
    Accuracy: rounding of the cores' dtype (float32 for lower ones).
    Source: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, section 4.2.

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, rank=8)
        >>> torch.allclose(dense_norm(layer), layer.weight.square().sum())
        True
    """
    return _total(model, [_layer_norm(layer) for layer in distinct_layers(model)])


def _layer_norm(layer: FactorizedLayer) -> Tensor:
    cores = [_at_least_single(core) for core in layer.core_list()]
    spec, one, groups = layer.spec, layer.spec.one_group(), layer.spec.weight.groups
    per_group = [cores] if groups == 1 else [[core[g] for core in cores] for g in range(groups)]
    total = _total(layer, [layer.format.squared_norm(group, one) for group in per_group])
    if isinstance(layer, Embedding) and layer.padding_idx is not None:
        row = layer.format.lookup(torch.tensor([layer.padding_idx], device=cores[0].device), cores, spec)
        total = total - row.abs().square().sum()
    return total


@torch.no_grad()
def balance_(model: Model) -> Model:
    r"""Scale the cores of every factorized layer, in place, to equal Frobenius norms; the weights stay the same.

    The gradient of a core grows with the norms of the others, so cores of unequal norm learn at unequal speeds.
    Worth a call after cores were set by hand, rounded, or trained for long. Moments that an optimizer keeps belong
    to the old scale. Left alone are layers with a core that is zero or not finite, those with orthogonal cores,
    whose scale is fixed, and those that share some of their cores, but not all, with another layer.

    Returns:
        The same model.

    Accuracy: one rounding per core entry.

    Example:
        >>> layer = balance_(tensortrain.nn.Linear(64, 64, rank=8))
    """
    layers = list(distinct_layers(model))
    uses = Counter(id(core) for layer in layers for core in layer.cores.parameters())
    for layer in layers:
        shared = any(uses[id(core)] > 1 for core in layer.cores.parameters())
        if not shared and not isinstance(layer.cores, OrthogonalCores):
            _equalise(layer)
    return model


def _equalise(layer: FactorizedLayer) -> None:
    lead = 1 if layer.spec.weight.groups > 1 else 0  # every group is a weight of its own
    cores = layer.core_list()
    norms = torch.stack([torch.linalg.vector_norm(core.flatten(lead), dim=-1, dtype=_wide(core)) for core in cores])
    factors = torch.exp(norms.log().mean(dim=0) - norms.log())
    factors = torch.where(torch.isfinite(factors).all(dim=0), factors, 1.0)
    for core, factor in zip(cores, factors, strict=True):
        core.mul_(factor.reshape(factor.shape + (1,) * (core.ndim - lead)))


def _wide(core: Tensor) -> torch.dtype:
    return torch.complex128 if core.is_complex() else torch.float64


def _at_least_single(core: Tensor) -> Tensor:
    return core.to(torch.promote_types(core.dtype, torch.float32))


def _total(model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """Sum on one device; of nothing, a zero where the model lives."""
    if not parts:
        first = next(model.parameters(), torch.zeros(()))
        return torch.zeros((), device=first.device, dtype=_at_least_single(first.detach()).real.dtype)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
