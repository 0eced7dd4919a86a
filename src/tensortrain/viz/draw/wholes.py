"""Diagrams of models that are more than one chain: score networks, arithmetic circuits, forecasters, unitary trees."""

from __future__ import annotations

from typing import Any

from tensortrain.models import Forecaster, HOTTLSTMCell, HOTTRNNCell, RecurrentArithmeticCircuit, ScoreNetwork
from tensortrain.models.quantum import UnitaryClassifier
from tensortrain.viz.draw.layout import chain, in_rows, tree
from tensortrain.viz.draw.notation import Diagram, Line, Node

__all__ = ["arithmetic_diagram", "cell_diagram", "forecaster_diagram", "score_diagram", "unitary_diagram"]

_MOST_LEAVES = 16  # of a tree, or around one dot
_STEPS = 4  # of a recurrent network, unrolled


def score_diagram(model: ScoreNetwork) -> Diagram:
    """Feature vectors below, classes above or to the right."""
    d, m, r, n = model.n_inputs, model.n_features, model.rank, min(model.n_inputs, _MOST_LEAVES)
    if model.format == "tt":
        is_last, at = model.label == "last", d // 2
        up = [model.n_classes if model.label == "middle" and k == at else None for k in range(d)]
        ranks = [1, *[r] * (d - 1), model.n_classes if is_last else 1]
        drawn = chain(ranks, up=up, down=[m] * d)
    elif model.format == "cp":
        legs = [f"i{k}" for k in range(n)]
        sizes = {**dict.fromkeys(legs, m), "a": r, "o": model.n_classes}
        drawn = in_rows([*((leg, "a") for leg in legs), ("a", "o")], ("o",), legs, sizes)
    else:
        drawn = tree((model.n_classes, *_halves(n, r, m)[1:]))
    first = f", the first {n} drawn" if model.format != "tt" and n < d else ""
    each = f", one network for each of {model.n_classes} classes" if model.label == "per-class" else ""
    shared = ", inner cores are one" if model.shared else ""
    return drawn.named(f"Score network, {model.format}, {model.product}, {d} inputs{first}{each}{shared}")


def _halves(n: int, rank: int, size: int) -> tuple[Any, ...]:
    """A balanced tree over ``n`` leaves, each with a core of its own."""
    if n == 1:
        return (rank, (size, 0))
    return (rank, _halves((n + 1) // 2, rank, size), _halves(n // 2, rank, size))


def arithmetic_diagram(model: RecurrentArithmeticCircuit) -> Diagram:
    """Steps from left to right, layers from below; a circle multiplies entry by entry."""
    nodes, lines = [], []
    for x in range(_STEPS):
        is_last = x == _STEPS - 1
        lines.append(Line((x * 1.3, 0), (x * 1.3, -0.75), str(model.n_features), is_open=True))
        for layer in range(model.depth):
            at = (x * 1.3, layer * 1.0)
            nodes.append(Node(*at, "target", "×"))
            if layer + 1 < model.depth:
                lines.append(Line(at, (at[0], at[1] + 1.0), str(model.width)))
            if not is_last:
                lines.append(Line(at, (at[0] + 1.3, at[1]), str(model.width)))
    top = ((_STEPS - 1) * 1.3, model.depth - 1.0)
    lines.append(Line(top, (top[0], top[1] + 0.75), str(model.n_outputs), is_open=True))
    title = f"Recurrent arithmetic circuit, {model.depth} layers, {_STEPS} steps drawn"
    return Diagram(tuple(nodes), tuple(lines)).named(title)


def cell_diagram(cell: HOTTRNNCell | HOTTLSTMCell) -> Diagram:
    """The train over copies of the lags, with the gates at its end."""
    ranks = (1, *(core.shape[2] for core in cell.cores))
    drawn = chain(ranks, down=[core.shape[1] for core in cell.cores])
    return drawn.named(f"{type(cell).__name__}: products of {cell.degree} of 1 and {cell.n_lags} lags")


def forecaster_diagram(model: Forecaster) -> Diagram:
    """Its cell."""
    if isinstance(model.cell, (HOTTRNNCell, HOTTLSTMCell)):
        return cell_diagram(model.cell)
    return Diagram((Node(0, 0, "box", type(model.cell).__name__),)).named("Forecaster")


def unitary_diagram(model: UnitaryClassifier) -> Diagram:
    """Features as qubits below, registers above them, classes at the end."""
    d, register = model.n_features, 2**model.n_virtual
    name = f"Unitary {model.structure}, {d} features, {model.n_classes} classes"
    if model.structure == "chain":
        return chain([1, *[register] * (d - 1), model.n_classes], down=[2] * d).named(name)
    n = min(1 << max(d - 1, 1).bit_length(), _MOST_LEAVES)
    first = f", the first {n} drawn" if n < d else ""
    return tree((model.n_classes, *_pairs(n, register)[1:])).named(name + first)


def _pairs(n: int, register: int) -> tuple[Any, ...]:
    if n == 2:
        return (register, (2, 0), (2, 1))
    return (register, _pairs(n // 2, register), _pairs(n // 2, register))
