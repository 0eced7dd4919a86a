"""One door to all diagrams."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tensortrain.errors import KindError
from tensortrain.formats import FactorSpec
from tensortrain.models import (
    BornMachine,
    Forecaster,
    HOTTLSTMCell,
    HOTTRNNCell,
    MPSClassifier,
    NonlinearTT,
    RecurrentArithmeticCircuit,
    ScoreNetwork,
)
from tensortrain.models.quantum import UnitaryClassifier
from tensortrain.nn.base import FactorizedLayer
from tensortrain.tensor import TensorTrain, TTMatrix
from tensortrain.viz.draw import models, networks, trains, wholes
from tensortrain.viz.draw.layout import tree
from tensortrain.viz.draw.notation import Diagram, paint
from tensortrain.viz.report.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "saved"]

_SUFFIXES = (".svg", ".png", ".pdf")
_KINDS: tuple[tuple[Any, Any], ...] = (
    ((TensorTrain, TTMatrix), trains.train_diagram),
    (FactorSpec, networks.spec_diagram),
    (FactorizedLayer, networks.layer_diagram),
    (BornMachine, models.born_diagram),
    (MPSClassifier, models.classifier_diagram),
    (NonlinearTT, models.nonlinear_diagram),
    (ScoreNetwork, wholes.score_diagram),
    (RecurrentArithmeticCircuit, wholes.arithmetic_diagram),
    ((HOTTRNNCell, HOTTLSTMCell), wholes.cell_diagram),
    (Forecaster, wholes.forecaster_diagram),
    (UnitaryClassifier, wholes.unitary_diagram),
    (tuple, lambda root: tree(root).named("Tree")),
)


def draw(obj: Any, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw an object as a tensor network: dots are cores, lines are indices with their sizes.

    Args:
        obj: A train or a TT-matrix; the spec of a format (``layer.spec``), a factorized layer, or a model that has
            some; a model of ``tensortrain.models``; a circuit; a tree of nested tuples, where a node is (bond to its
            parent, child, ..) and a leaf (size, site).
        path: File to write, by its ending svg, png or pdf.

    Returns:
        Figure: Of matplotlib, without pyplot. Of chains of more than 14 cores both ends are drawn, with dots between.

    Raises:
        KindError: There is no picture of such an object, or of such a file.

    Example:
        >>> import tensortrain
        >>> figure = draw(tensortrain.ones((4, 5, 6)))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1', '4', '1', '5', '6', 'TensorTrain 4·5·6, 15 numbers']
    """
    return saved(paint(_diagram(obj)), path)


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, written where there is a path.

    Raises:
        KindError: The ending of the path is not known.
    """
    if path is not None:
        if Path(path).suffix.lower() not in _SUFFIXES:
            raise KindError(
                f"a picture must be of a known kind: path has {Path(path).name!r}, expected it to end with one of "
                f"{', '.join(_SUFFIXES)}. Take '.svg'."
            )
        save_figure(figure, path)
    return figure


def _diagram(obj: Any) -> Diagram:
    for kind, diagram in _KINDS:
        if isinstance(obj, kind):
            made: Diagram = diagram(obj)
            return made
    operations = models.operations_of(obj)
    if operations is not None:
        return models.circuit_diagram(obj, operations)
    name = type(obj).__name__
    train = models.state_of(obj)
    if train is not None:
        return trains.train_diagram(train, name)
    if not isinstance(obj, nn.Module):
        raise KindError(
            f"a picture needs cores: draw has {name}, expected a train, a layer, a spec, a model or a circuit. Make a "
            "train of an array with tensortrain.TensorTrain.from_dense."
        )
    chain = models.cores_diagram(list(getattr(obj, "cores", ())), name)
    return chain if chain is not None else networks.module_diagram(obj)
