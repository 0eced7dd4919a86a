"""Ranks that grow: more indices without a change of the outputs, or pairs of cores trained together and split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from tensortrain.cores.canonical import orthogonalize_cores
from tensortrain.cores.rounding import round_cores
from tensortrain.errors import KindError, RankError
from tensortrain.formats import FactorSpec
from tensortrain.nn.adaptive.gates import fold_gates_
from tensortrain.nn.adaptive.indices import (
    bond_ranks,
    bonds,
    check_can_resize,
    from_train,
    is_train,
    layers_with_bonds,
    set_cores_,
    spec_with,
    to_train,
)
from tensortrain.nn.base import FactorizedLayer

__all__ = ["grow_ranks_"]

Model = TypeVar("Model", bound=nn.Module)


def grow_ranks_(
    model: Model,
    by: int = 1,
    *,
    loss: Callable[[], Tensor] | None = None,
    rel_error: float = 1e-2,
    max_rank: int | None = None,
    n_steps: int = 40,
    lr: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Model:
    r"""Raise the ranks of every factorized layer, in place.

    Without a ``loss`` every bond gets ``by`` new indices whose slices are zero on one side and random on the other:
    no output changes, and the next steps of training can use them.

    With a ``loss`` each pair of neighbouring cores of every train becomes one core, takes ``n_steps`` of Adam on the
    loss, all else held (orthonormal, so that the pair holds the norm of the weight), and is split again: the bond keeps
    as many indices as the weight needs to ``rel_error``. One call is one sweep over the bonds; the ranks find
    themselves, up or down. Layers with frozen cores are passed over. Gates are multiplied into the cores first, and
    taken off.

    Args:
        model: Any module with factorized layers, or one of them.
        by: New indices of every bond, as far as the modes have room for them.
        loss: Called without arguments: the loss of the model as it is, such as that of the next batch.
        rel_error: Relative Frobenius error of a layer's weight in each split.
        max_rank: Cap of every bond.
        n_steps, lr: Of Adam, for each pair; the step size falls to zero along a cosine.
        generator: Of the random slices.

    Returns:
        The same model. The cores are new parameters: an optimizer must be made anew.

    Raises:
        KindError: There is no factorized layer, one whose format does not tell where its ranks are, one with
            constrained cores, or, with a loss, one that is no train.
        RankError: ``by`` below zero.

    Source: two-site updates as in DMRG: Schollwoeck, Annals of Physics 326, 2011, section 6; growth with zeros on one
    side: Chen, Goodfellow and Shlens, arXiv:1511.05641 (layers that widen without a change).

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, rank=2)
        >>> x = torch.ones(2, 64)
        >>> before = layer(x)
        >>> torch.allclose(grow_ranks_(layer, by=3)(x), before), max(layer.ranks)
        (True, 5)
    """
    named = layers_with_bonds(model, "grow_ranks_")
    if by < 0 or int(by) != by:
        raise RankError(f"by must be a whole number of at least 0: found {by!r}. Pass how many indices each bond gets.")
    for name, layer in named:
        check_can_resize(model, name, layer)
        if loss is not None and not is_train(layer):
            raise KindError(
                f"pairs of cores can be trained in trains of one group: {name or 'the layer'} is of format "
                f"{layer.spec.format!r}. Leave loss out, which grows every format."
            )
    fold_gates_(model)
    for _, layer in named:
        if loss is None:
            _widen_(model, layer, by, max_rank, generator)
        elif all(core.requires_grad for core in layer.core_list()):
            for bond in range(len(bond_ranks(layer))):
                try:
                    _train_pair_(model, layer, bond, loss, n_steps, lr)
                finally:  # a loss that fails leaves a layer like any other
                    _round_(model, layer, rel_error, max_rank)
    return model


# -- more indices ------------------------------------------------------------------------------------------


@torch.no_grad()
def _widen_(
    model: nn.Module, layer: FactorizedLayer, by: int, max_rank: int | None, generator: torch.Generator | None
) -> None:
    here = bond_ranks(layer)
    caps = [max_rank or n + by for n in here]
    sizes = [max(n, min(n + by, cap)) for n, cap in zip(here, caps, strict=True)]
    spec = _feasible(layer, spec_with(layer.spec, sizes))
    old = layer.core_list()
    cores = [_filled(core, shape, generator) for core, shape in zip(old, spec.core_shapes, strict=True)]
    for bond, n in zip(bonds(spec), here, strict=True):
        core, axis = bond[-1]
        cores[core].narrow(axis, n, cores[core].shape[axis] - n).zero_()
    set_cores_(model, layer, spec, cores)


def _feasible(layer: FactorizedLayer, spec: FactorSpec) -> FactorSpec:
    """No new rank above what the modes have room for; ranks that are there stay."""
    room = layer.format.spec(spec.weight, rank=spec.ranks, out_modes=spec.out_modes, in_modes=spec.in_modes, clip=True)
    return replace(spec, ranks=tuple(map(max, layer.ranks, map(min, spec.ranks, room.ranks))))


def _filled(core: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """A larger core with the old one in its corner, the rest drawn with the old one's spread."""
    std = core.detach().abs().square().mean().sqrt()
    drawn = torch.randn(shape, generator=generator, dtype=core.dtype, device=generator.device if generator else None)
    larger = drawn.to(core.device) * std
    larger[tuple(slice(n) for n in core.shape)] = core.detach()
    return larger


# -- pairs of cores ----------------------------------------------------------------------------------------


def _train_pair_(
    model: nn.Module, layer: FactorizedLayer, bond: int, loss: Callable[[], Tensor], n_steps: int, lr: float
) -> None:
    """A few steps on two neighbours as one core: one becomes the identity on its side, the other holds all."""
    spec, cores, moving = _as_one(layer, bond)
    set_cores_(model, layer, spec, cores)
    core = layer.core_list()[moving]
    optimizer = torch.optim.Adam([core], lr=lr)
    # Steps that end small: the noise of the last ones spreads over all directions, and the split would count them.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(loss(), [core], allow_unused=True, materialize_grads=True)
        core.grad = grad
        optimizer.step()
        schedule.step()
    core.grad = None


@torch.no_grad()
def _as_one(layer: FactorizedLayer, bond: int) -> tuple[FactorSpec, Sequence[Tensor], int]:
    train = to_train(layer, layer.spec, layer.core_list())
    train, exponent = orthogonalize_cores(train, (0, len(train) - 1), bond)
    train[bond] = train[bond] * 2.0 ** float(exponent)
    left, right = train[bond : bond + 2]
    rows, columns = left.shape[:2].numel(), right.shape[1:].numel()
    pair = left.reshape(rows, -1) @ right.reshape(-1, columns)
    eye = torch.eye(min(rows, columns), dtype=pair.dtype, device=pair.device)
    is_left = rows <= columns  # which side the identity takes
    first, second = (eye, pair) if is_left else (pair, eye)
    train[bond], train[bond + 1] = first.reshape(*left.shape[:2], -1), second.reshape(-1, *right.shape[1:])
    spec, cores = from_train(layer, layer.spec, train)
    return spec, cores, bond + 1 if is_left else bond


@torch.no_grad()
def _round_(model: nn.Module, layer: FactorizedLayer, rel_error: float, max_rank: int | None) -> None:
    train = to_train(layer, layer.spec, layer.core_list())
    done = round_cores(train, (0, len(train) - 1), eps=rel_error, max_rank=max_rank)
    set_cores_(model, layer, *from_train(layer, layer.spec, done.cores))
