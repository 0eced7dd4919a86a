"""Orthogonal tensor trains: three notions, told apart by name.

========== ============================================================ =======================================
kind       constraint                                                   what it costs and buys
========== ============================================================ =======================================
slice      ``G_k[:, i, j, :]`` is a rotation for all ``1 < k < d``      weaker than a plain train of equal ranks;
                                                                        about half the parameters
left       the unfolding ``(r i j) x s`` of ``G_k`` is orthonormal,     nothing is lost: it only fixes the gauge;
           ``k < d``                                                    about 1 % fewer parameters
spectral   ``W = U diag(s) V^T``, U and V trains of such frames         another train than before;
                                                                        the spectral norm of W is ``max(s)``
========== ============================================================ =======================================

Sources: slice: Mehta et al., ICCV 2019; left: Holtz, Rohwedder, Schneider, Numer. Math. 120, 2012; spectral:
Obukhov et al., AISTATS 2021, arXiv:2103.04217.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tensortrain.cores.gram import chain_squared_norm
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import DTypeError, KindError, RankError, ShapeError
from tensortrain.formats import FactorSpec, Rank, get_format
from tensortrain.nn.base import FactorizedLayer
from tensortrain.nn.cores import Cores
from tensortrain.nn.linear import Linear
from tensortrain.nn.shaping.constraints import Frame, Rotations, ScaledFrame, logit, nearest_rotation
from tensortrain.nn.shaping.stand_ins import make_cores_once

__all__ = ["OrthogonalCores", "OrthogonalKind", "orthogonal"]

OrthogonalKind = Literal["slice", "left", "spectral"]
Layer = TypeVar("Layer", bound=FactorizedLayer)
CoreMap = Rotations | Frame | ScaledFrame
Free = list[tuple[Tensor, ...]]  # per core, the numbers that it is made from
_HEADROOM = 0.9  # of the norm that a spectral layer may reach, what its weight has at the start


def orthogonal(
    layer: Layer, kind: OrthogonalKind = "slice", *, rank: Rank | None = None, max_norm: float | None = None
) -> Layer:
    r"""Constrain the cores of a layer, in place, by ``torch.nn.utils.parametrize``.

    The layer keeps its interface: forward, ``weight``, ``to_dense``, ``plan``; ``n_params`` counts the numbers that
    are stored, and so does ``state_dict``. Make the optimizer afterwards: the parameters are new ones. To read a
    checkpoint, constrain a fresh layer in the same way first. ``reset_parameters`` draws a new weight.

    Args:
        layer: A layer whose cores form a train (format ``"tt"`` or ``"tt_naive"``); ``"spectral"`` takes a real
            ``Linear`` of any format.
        kind: ``"slice"`` replaces every slice of the interior cores by the nearest rotation (of a fresh layer: a
            uniformly random one) and scales the ends so that the mean square of the weight stays what it was;
            the interior ranks must be equal. ``"left"`` changes nothing but the gauge: the weight stays the same.
            ``"spectral"`` replaces the train by one over all output modes, then all input modes, the best
            approximation of the weight within ``rank``.
        rank: Spectral only: of the trains of U and V and between them, as ``Linear`` takes it; the layer's largest
            rank when left out.
        max_norm: Spectral only: largest spectral norm that the weight can take; singular values above it are cut
            down. When left out, the present norm is 90 % of it.

    Returns:
        The same layer.

    Raises:
        KindError: The layer's cores do not form a train, or ``"spectral"`` is asked of another layer than a Linear.
        RankError: ``"slice"``: interior ranks differ, or there is no interior core. ``"left"``: a rank is larger
            than what the modes before it can need.
        DTypeError: The cores are complex.
        ShapeError: An unknown kind, or an option that the kind does not take.

    Cost: one solve per slice, O(p r^3), or one Householder product per core, O(p r^3), in float64, per forward pass
    while training. ``"spectral"`` builds the dense weight once, here.
    Accuracy: ``||Q^T Q - I||`` is at rounding of the dtype for whatever the numbers become.
    Source: see the module's text.

    Example:
        >>> modes = dict(in_modes=(10, 18, 13, 30), out_modes=(12, 4, 4, 4), rank=8)
        >>> layer = Linear(70200, 768, bias=False, **modes)
        >>> layer.n_params, orthogonal(layer).n_params
        (9856, 5392)
    """
    _check_request(layer, kind, rank, max_norm)
    if kind == "spectral":
        assert isinstance(layer, Linear)
        _become_spectral(layer, rank, max_norm)
    else:
        _check_chain(layer, kind)
        _install(layer, kind, [core.detach() for core in layer.core_list()])
    return layer


class OrthogonalCores(Cores):
    """Constrained cores of a layer. Its entries read as tensors; the parameters are the numbers behind them."""

    kind: OrthogonalKind
    n_left: int  # spectral: how many cores belong to U
    max_norm: float | None  # spectral: the bound on the norm of the weight; None takes it from the weight

    def maps(self) -> list[CoreMap | None]:
        """What makes each core; None where it is free."""
        made: Any = getattr(self, "parametrizations", {})
        return [made[str(k)][0] if str(k) in made else None for k in range(len(self))]

    def free(self, k: int) -> tuple[Tensor, ...]:
        """The parameters that core ``k`` is made from."""
        if not parametrize.is_parametrized(self, str(k)):
            return (self[k],)
        made: Any = self.parametrizations
        one = made[str(k)]
        return (one.original,) if hasattr(one, "original") else (one.original0, one.original1)

    @torch.no_grad()
    def assign_(self, cores: Sequence[Tensor]) -> None:
        """Take over the weight of plain cores, as near as the constraint allows."""
        wide = [core.detach().to(compute_dtype(core.dtype)) for core in cores]
        for k, numbers in enumerate(_FITS[self.kind](self, wide)):
            for parameter, value in zip(self.free(k), numbers, strict=True):
                parameter.copy_(value)


# -- fitting: plain cores in float64 to the numbers of each ------------------------------------------------


def _fit_slices(cores: OrthogonalCores, given: list[Tensor]) -> Free:
    maps = cores.maps()
    moved = [
        core if one is None else nearest_rotation(core.movedim(-4, -2)).movedim(-2, -4)
        for core, one in zip(given, maps, strict=True)
    ]
    before, after = chain_squared_norm(given), chain_squared_norm(moved)
    scale = torch.where(after > 0, before / after, 1.0)[..., None, None, None, None] ** 0.25
    # The slices have a fixed size, so the ends carry that of the weight, each one half.
    moved[0], moved[-1] = moved[0] * scale, moved[-1] * scale
    return [(core,) if one is None else (one.right_inverse(core),) for core, one in zip(moved, maps, strict=True)]


def _fit_left(cores: OrthogonalCores, given: list[Tensor]) -> Free:
    frames, rest = _sweep(given, cores.maps()[:-1])
    return [*frames, (torch.einsum("...ab,...bijc->...aijc", rest, given[-1]),)]


def _fit_spectral(cores: OrthogonalCores, given: list[Tensor]) -> Free:
    """``(U P) diag(s) (V Q)^T``, where ``P diag(s) Q^T`` is the SVD of what the sweeps from both ends leave."""
    maps, n = cores.maps(), cores.n_left
    mirrored = [core.permute(3, 1, 2, 0) for core in reversed(given[n:])]
    middle, first_v = maps[n - 1], maps[n]
    assert isinstance(middle, ScaledFrame)
    assert isinstance(first_v, Frame)
    left, left_rest = _sweep(given[:n], maps[: n - 1])
    right, right_rest = _sweep(mirrored, list(reversed(maps[n + 1 :])), mirrored=True)
    u, u_rest = torch.linalg.qr(middle.to_matrix(torch.einsum("ab,bijc->aijc", left_rest, given[n - 1])))
    outermost = torch.einsum("ab,bijc->aijc", right_rest, mirrored[-1]).permute(3, 1, 2, 0)
    v, v_rest = torch.linalg.qr(first_v.to_matrix(outermost))
    p, s, qh = torch.linalg.svd(u_rest @ v_rest.mT)
    u, v = u @ p, v @ qh.mT
    u_numbers = Frame.right_inverse(middle, middle.from_matrix(u))
    v_numbers = first_v.right_inverse(first_v.from_matrix(v))
    signs = (middle.frame(u_numbers) * u).sum(-2) * (first_v.frame(v_numbers) * v).sum(-2)  # each +-1
    middle.signs.copy_(signs.round())
    largest = torch.where(s[0] > 0, s[0] / _HEADROOM, 1.0) if cores.max_norm is None else cores.max_norm
    middle.scale.fill_(largest)
    return [*left, (u_numbers, logit(s / middle.scale.to(s.dtype))), (v_numbers,), *reversed(right)]


def _sweep(cores: Sequence[Tensor], frames: Sequence[Any], *, mirrored: bool = False) -> tuple[Free, Tensor]:
    """Make cores orthonormal one after the other; each hands its square remainder to the next.

    ``mirrored`` cores have their ranks swapped (the train read backwards) and belong to right frames.
    """
    first = cores[0]
    rest = torch.eye(first.shape[-4], dtype=first.dtype, device=first.device).expand(*first.shape[:-4], -1, -1)
    found: Free = []
    for core, frame in zip(cores, frames, strict=False):
        core = torch.einsum("...ab,...bijc->...aijc", rest, core)
        stored = core.permute(3, 1, 2, 0) if mirrored else core
        numbers = frame.right_inverse(stored)
        found.append((numbers,))
        rest = frame.frame(numbers).mT @ frame.to_matrix(stored)
    return found, rest


_FITS: dict[OrthogonalKind, Callable[[OrthogonalCores, list[Tensor]], Free]] = {
    "slice": _fit_slices,
    "left": _fit_left,
    "spectral": _fit_spectral,
}


# -- building ----------------------------------------------------------------------------------------------


def _install(layer: FactorizedLayer, kind: OrthogonalKind, given: Sequence[Tensor], **attributes: Any) -> None:
    """Put constrained cores with the weight of ``given`` in the place of a layer's cores."""
    trains = [core.requires_grad for core in layer.core_list()]
    trains = trains if len(trains) == len(given) else [any(trains)] * len(given)
    cores = OrthogonalCores(nn.Parameter(core.clone(), requires_grad=t) for core, t in zip(given, trains, strict=True))
    cores.kind = kind
    for name, value in attributes.items():
        setattr(cores, name, value)
    for k, one in enumerate(_maps(kind, given, attributes.get("n_left", 0))):
        if one is not None:
            parametrize.register_parametrization(cores, str(k), one)
    cores.assign_(given)
    layer.cores = cores
    layer.clear_cache()
    make_cores_once(layer)


def _maps(kind: OrthogonalKind, given: Sequence[Tensor], n_left: int) -> list[CoreMap | None]:
    shapes = [tuple(core.shape) for core in given]
    device, last = given[0].device, len(given) - 1
    if kind == "slice":
        return [Rotations(shape[-1], device) if 0 < k < last else None for k, shape in enumerate(shapes)]
    if kind == "left":
        return [Frame(shape, "left", device) if k < last else None for k, shape in enumerate(shapes)]
    maps: list[CoreMap | None] = [Frame(shape, "left", device) for shape in shapes[: n_left - 1]]
    maps += [ScaledFrame(shapes[n_left - 1], device)]
    return maps + [Frame(shape, "right", device) for shape in shapes[n_left:]]


def _become_spectral(layer: Linear, rank: Rank | None, max_norm: float | None) -> None:
    """Replace a linear layer's train by one over all output modes, then all input modes."""
    outs = tuple(m for m in layer.out_modes if m > 1) or (1,)
    ins = tuple(n for n in layer.in_modes if n > 1) or (1,)
    tt, weight = get_format("tt"), layer.spec.weight
    modes: dict[str, Any] = {"out_modes": (*outs, *(1 for _ in ins)), "in_modes": (*(1 for _ in outs), *ins)}
    spec = tt.spec(weight, rank=max(layer.ranks) if rank is None else rank, clip=True, **modes)
    frames = _maps("spectral", [torch.empty(shape, device="meta") for shape in spec.core_shapes], len(outs))
    _check_frames(spec, frames)
    dense = layer.format.to_dense(layer.core_list(), layer.spec).detach()  # in the order that the cores have
    found = tt.factorize(dense, weight, rank=spec.ranks, **modes).value
    # A weight of lower rank is filled up with zeros: shapes follow from the request alone, as checkpoints need.
    given = [_padded(core, shape) for core, shape in zip(found.cores, spec.core_shapes, strict=True)]
    if not any(core.requires_grad for core in layer.cores.parameters()):
        given = [core.requires_grad_(False) for core in given]
    _install(layer, "spectral", given, n_left=len(outs), max_norm=max_norm)
    layer.take_spec(spec)


def _padded(core: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = core.new_zeros(shape)
    padded[tuple(slice(n) for n in core.shape)] = core
    return padded


# -- checks ------------------------------------------------------------------------------------------------


def _check_request(layer: object, kind: str, rank: object, max_norm: float | None) -> None:
    if kind not in get_args(OrthogonalKind):
        raise ShapeError(f"kind must be one of {get_args(OrthogonalKind)}: found {kind!r}. Pass one of these.")
    if kind != "spectral" and (rank is not None or max_norm is not None):
        raise ShapeError(
            f"rank and max_norm belong to kind='spectral': found kind={kind!r}, rank={rank!r}, max_norm={max_norm!r}. "
            "Leave them out."
        )
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise ShapeError(f"max_norm must be a positive number: found {max_norm!r}. Pass for example 1.0.")
    if not isinstance(layer, FactorizedLayer):
        raise KindError(
            f"orthogonal cores need a factorized layer: found {type(layer).__name__}. Make one with "
            "tensortrain.nn.Linear.from_dense, or pass a part of a composite layer."
        )
    if kind == "spectral" and not isinstance(layer, Linear):
        raise KindError(
            f"kind='spectral' needs a Linear: found {type(layer).__name__}. Use kind='left' or 'slice' for its train."
        )
    if layer.cores[0].is_complex():
        raise DTypeError(f"orthogonal cores must be real: found {layer.cores[0].dtype}. Use real cores.")


def _check_chain(layer: FactorizedLayer, kind: str) -> None:
    spec = layer.spec
    if not layer.format.stores_chain(spec):
        raise KindError(
            f"kind={kind!r} needs cores that are stored as those of a train: found format {spec.format!r}. Use "
            "format='tt', or kind='spectral' for a Linear."
        )
    if kind == "slice":
        _check_interior_ranks(spec)
    else:
        cores = [torch.empty(shape, device="meta") for shape in spec.one_group().core_shapes]
        _check_frames(spec, _maps("left", cores, 0))


def _check_interior_ranks(spec: FactorSpec) -> None:
    interior = spec.ranks[1:-1]
    if len(interior) < 2 or len(set(interior)) > 1:
        raise RankError(
            f"kind='slice' needs square slices, that is two inner ranks or more, all equal: found ranks {spec.ranks}. "
            f"Build the layer with rank=(1, {', '.join([str(min(interior, default=1))] * max(2, len(interior)))}, 1)."
        )


def _check_frames(spec: FactorSpec, frames: Sequence[CoreMap | None]) -> None:
    for k, frame in enumerate(frames):
        if isinstance(frame, Frame) and frame.n_rows < frame.n_columns:
            raise RankError(
                f"an orthonormal core must have no more columns than rows: core {k} has {frame.n_rows} x "
                f"{frame.n_columns} at ranks {spec.ranks}. Lower the ranks, for example to one number for all."
            )
