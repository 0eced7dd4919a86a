"""Diagrams of tensor-network models, and of circuits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tensortrain.models import BornMachine, MPSClassifier, NonlinearTT
from tensortrain.tensor import TensorTrain
from tensortrain.viz.draw.layout import chain, places
from tensortrain.viz.draw.notation import Diagram, Line, Node, sizes_text

__all__ = ["born_diagram", "circuit_diagram", "classifier_diagram", "nonlinear_diagram", "operations_of"]

_MOST_STEPS = 60  # of a circuit


def born_diagram(model: BornMachine) -> Diagram:
    """The state; probabilities are its entries, or their squares."""
    law = "its entries" if model.kind == "positive" else "its squared entries"
    if model.kind == "purified":
        law += ", summed over half of each mode"
    return chain(model.ranks, down=model.state.shape).named(
        f"Born machine, {model.kind}, {model.n_sites} sites: probabilities are {law}"
    )


def classifier_diagram(model: MPSClassifier) -> Diagram:
    """Cores above, vectors of features below, the label's leg up."""
    n, size, shown = model.n_features, model.features.size, places(model.n_features)
    up = [model.n_classes if k == model.label else None for k in range(n)]
    shapes = ["label" if k == model.label else "core" for k in range(n)]
    if model.label is not None and model.label not in shown:  # the label is never among the dots
        kept = [0, 1, 2, 3, model.label, n - 4, n - 3, n - 2, n - 1]
        return _with_gaps(model, kept)
    drawn = chain(model.ranks, up=up, shapes=shapes)
    drawn = drawn + _features(len(shown), [x for x, k in enumerate(shown) if k is not None], size)
    return drawn.named(_classifier_title(model))


def _with_gaps(model: MPSClassifier, kept: Sequence[int]) -> Diagram:
    """Cores in a row, dots where their numbers are not neighbours."""
    nodes, lines, marked, x = [], [], [], 0
    for before, k in zip((None, *kept), kept, strict=False):
        if before is not None:
            lines.append(Line((x - 1, 0), (x, 0), str(model.ranks[before + 1])))
            if k != before + 1:
                nodes.append(Node(x, 0, "words", "···"))
                lines.append(Line((x, 0), (x + 1, 0), str(model.ranks[k])))
                x += 1
        nodes.append(Node(x, 0, "label" if k == model.label else "core"))
        if k == model.label:
            lines.append(Line((x, 0), (x, 0.75), str(model.n_classes), is_open=True))
        marked.append(x)
        x += 1
    drawn = Diagram(tuple(nodes), tuple(lines)) + _features(x, marked, model.features.size)
    return drawn.named(_classifier_title(model))


def _features(width: int, marked: Sequence[int], size: int) -> Diagram:
    nodes = tuple(Node(x, -0.95, "data") for x in marked)
    return Diagram(nodes, tuple(Line((x, 0), (x, -0.95), str(size)) for x in marked))


def _classifier_title(model: MPSClassifier) -> str:
    each = f", one train for each of {model.n_classes} classes" if model.label is None else ""
    return f"MPS classifier, {model.n_features} features ({model.features.kind}), {model.n_classes} classes{each}"


def nonlinear_diagram(model: NonlinearTT) -> Diagram:
    """Cores with the activation between them; chunks or modes of the input come from below."""
    d, shown = len(model.in_modes), places(len(model.in_modes))
    has_function = model.activation != "identity"
    nodes, lines, x = [], [], 0.0
    for at, k in enumerate(shown):
        if k is None:
            nodes.append(Node(x, 0, "words", "···"))
        else:
            nodes += [Node(x, 0), *([Node(x, -0.95, "data")] if model.reading == "chunks" else [])]
            lines.append(Line((x, 0), (x, -0.95), str(model.in_modes[k])))
        if k == d - 1:
            break
        following = d - (len(shown) - at - 1)  # number of the core that comes next
        is_wide = has_function and k is not None
        step = 1.6 if is_wide else 1.0
        lines.append(Line((x, 0), (x + step, 0)))
        nodes += [Node(x + 0.8, 0, "box", model.activation)] if is_wide else []
        rank = model.ranks[following if k is None else k + 1]
        nodes.append(Node(x + step / 2, 0.42 if is_wide else 0.2, "words", str(rank)))
        x += step
    lines.append(Line((x, 0), (x + 0.75, 0), str(model.out_features), is_open=True))
    if model.reading == "modes":
        lines.append(Line((-0.3, -0.95), (x + 0.3, -0.95)))
        nodes.append(Node(x / 2, -1.2, "words", f"x, reshaped to {sizes_text(model.in_modes)}"))
    residual = ", residual" if model.residual else ""
    return Diagram(tuple(nodes), tuple(lines)).named(f"Nonlinear TT by {model.reading}{residual}, {model.activation}")


def cores_diagram(cores: Sequence[Any], name: str) -> Diagram | None:
    """A chain of cores ``(r, n, s)``, if that is what they are."""
    if any(core.ndim != 3 for core in cores) or not cores:
        return None
    if any(a.shape[2] != b.shape[0] for a, b in itertools.pairwise(cores)):
        return None
    ranks = (cores[0].shape[0], *(core.shape[2] for core in cores))
    return chain(ranks, down=[core.shape[1] for core in cores]).named(name)


def state_of(model: Any) -> TensorTrain | None:
    """The train behind a model, under one of the names that models give it."""
    for name in ("state", "tensor"):
        found = getattr(model, name, None)
        if isinstance(found, TensorTrain):
            return found
    return None


def operations_of(circuit: Any) -> list[tuple[str, tuple[int, ...]]] | None:
    """Names and qubits of what a circuit does, of any object with ``gates`` or ``operations``; else None."""
    found = getattr(circuit, "operations", getattr(circuit, "gates", None))
    if found is None or isinstance(found, str) or not hasattr(circuit, "n_qubits"):
        return None
    return [(one.name, tuple(one.qubits)) if hasattr(one, "qubits") else (one[0], tuple(one[1])) for one in found]


def circuit_diagram(circuit: Any, operations: Sequence[tuple[str, tuple[int, ...]]]) -> Diagram:
    """Qubits as lines from left to right, qubit 0 on top; gates as boxes, a controlled not as a dot and a circle."""
    n, ends = int(circuit.n_qubits), [0.0] * int(circuit.n_qubits)
    nodes, lines = [], []
    shown = operations[:_MOST_STEPS]
    for name, qubits in shown:
        low, high = min(qubits, default=0), max(qubits, default=n - 1)
        x = max(ends[low : high + 1]) + 1.0
        ends[low : high + 1] = [x] * (high + 1 - low)
        if name == "barrier":
            continue
        if len(qubits) > 1:
            lines.append(Line((x, -low * 0.8), (x, -high * 0.8), colour="#1e293b"))
        for j, qubit in enumerate(qubits):
            is_dot = name in ("cx", "cz") and (j == 0 or name == "cz")
            shape = "copy" if is_dot else "target" if name == "cx" else "box"
            nodes.append(Node(x, -qubit * 0.8, shape, "" if is_dot else "+" if name == "cx" else name))
    width = max(ends, default=0.0) + 1.0
    wires = [Line((0, -q * 0.8), (width, -q * 0.8)) for q in range(n)]
    nodes += [Node(-0.3, -q * 0.8, "words", f"q{q}") for q in range(n)]
    rest = f", the first {len(shown)} drawn" if len(shown) < len(operations) else ""
    nodes += [Node(width + 0.3, -q * 0.8, "words", "···") for q in range(n) if rest]
    title = f"Circuit of {n} qubits, {len(operations)} operations{rest}"
    return Diagram(tuple(nodes), (*wires, *lines)).named(title)
