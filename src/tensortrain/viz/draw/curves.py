"""Plots of what stands on the bonds of a train: singular values, ranks, entropies."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch

from tensortrain.cores.ranks import max_ranks
from tensortrain.errors import KindError, NonFiniteError, ShapeError
from tensortrain.models import MPSClassifier
from tensortrain.nn.base import FactorizedLayer
from tensortrain.tensor import TensorTrain, TTMatrix
from tensortrain.viz.draw.door import saved
from tensortrain.viz.draw.models import state_of
from tensortrain.viz.report.figures import COMPRESSED, DENSE, GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_entropy", "plot_ranks", "plot_spectrum"]

_MOST_CURVES = 12
Path = str | os.PathLike[str]


def plot_spectrum(obj: Any, *, path: Path | None = None) -> Figure:
    """Plot the singular values at the bonds, relative to the largest, on a log axis.

    Args:
        obj: A train, a TT-matrix, a matrix or tensor (2-D: its own singular values), a layer whose cores are a chain,
            or a model that is a train. Of more than 12 bonds, 12 are drawn.
        path: File to write, by its ending svg, png or pdf.

    Raises:
        KindError: There is no train behind the object, or the ending is not known.
        NonFiniteError: It is empty, or has NaN or Inf.
        ShapeError: It is a batch.
    """
    train = _train_of(obj)
    figure, axes = _axes("number of the singular value", "size, relative to the largest")
    step = math.ceil((train.order - 1) / _MOST_CURVES) if train.order > 1 else 1
    bonds = range(1, train.order, step)
    for bond in bonds:
        values = train.singular_values(bond).detach().double()
        values = (values / values[:1].clamp_min(torch.finfo(values.dtype).tiny)).cpu()
        values = values[values > 0]
        shade = 1.0 - 0.65 * (bond - 1) / max(1, train.order - 1)
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values.tolist(), "o-", ms=3, color=COMPRESSED, alpha=shade, label=f"bond {bond}")
    axes.set_yscale("log")
    _whole_numbers(axes)
    if len(bonds):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2 if len(bonds) > 6 else 1)
    return saved(figure, path)


def plot_ranks(obj: Any, *, path: Path | None = None) -> Figure:
    """Plot the ranks along the chain, and the largest that its modes allow; arguments as for ``plot_spectrum``."""
    train = _train_of(obj)
    figure, axes = _axes("bond", "rank")
    bonds, modes = range(1, train.order), [core.numel() // (core.shape[0] * core.shape[-1]) for core in train.cores]
    axes.plot(bonds, train.ranks[1:-1], "o-", ms=4, color=COMPRESSED, label="rank")
    most = [min(rank, 10**300) for rank in max_ranks(modes)[1:-1]]
    axes.plot(bonds, most, "--", color=DENSE, label="largest of these modes")
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.8, 2.5 * max((1, *train.ranks)))
    axes.yaxis.set_major_formatter("{x:g}")
    _whole_numbers(axes)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return saved(figure, path)


def plot_entropy(obj: Any, *, path: Path | None = None) -> Figure:
    """Plot the entropy across each bond, in nats, and ``ln(rank)``, its bound; arguments as for ``plot_spectrum``."""
    train = _train_of(obj)
    figure, axes = _axes("bond", "entropy, nats")
    bonds = range(1, train.order)
    axes.plot(bonds, [float(train.entropy(k)) for k in bonds], "o-", ms=4, color=COMPRESSED, label="entropy")
    axes.plot(bonds, [math.log(rank) for rank in train.ranks[1:-1]], "--", color=DENSE, label="ln(rank)")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return saved(figure, path)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, length=0, which="both")
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(DENSE)
    return figure, axes


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


@torch.no_grad()
def _train_of(obj: Any) -> TensorTrain | TTMatrix:
    """The train behind an object.

    Raises:
        KindError: There is none.
        ShapeError: It is a batch.
    """
    found = obj if isinstance(obj, (TensorTrain, TTMatrix)) else state_of(obj)
    if isinstance(obj, torch.Tensor):
        found = TensorTrain.from_dense(obj)
    elif isinstance(obj, FactorizedLayer) and obj.format.chain(obj.spec.one_group()) and obj.spec.weight.groups == 1:
        found = TTMatrix(tuple(core.detach() for core in obj.format.to_chain(obj.core_list(), obj.spec)))
    elif isinstance(obj, MPSClassifier) and obj.label is not None:
        cores = [core.detach() for core in obj.cores]
        cores[obj.label] = cores[obj.label].movedim(0, 1).flatten(1, 2)
        found = TensorTrain(tuple(cores))
    if found is None:
        raise KindError(
            f"a plot of bonds needs a train: found {type(obj).__name__}, expected a train, a layer whose cores are a "
            "chain, or a model that is one. Take tensortrain.draw for the others."
        )
    if 0 in found.shape or not all(bool(torch.isfinite(core).all()) for core in found.cores):
        raise NonFiniteError(
            f"a plot is that of numbers: found a train of shape {found.shape} that is empty, or has NaN or Inf. Build "
            "it anew."
        )
    if found.batch_shape:
        raise ShapeError(
            f"a plot is that of one train: found a batch of {tuple(found.batch_shape)}. Take one after the other."
        )
    return found
