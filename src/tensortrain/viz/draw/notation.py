"""Nodes and lines with words on them, and how they are painted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensortrain.viz.report.figures import COMPRESSED, DENSE, INK, MARK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Diagram", "Line", "Node", "paint", "sizes_text", "stacked"]

Point = tuple[float, float]

_INCHES = 0.72  # of one unit, the distance of neighbours
_WIDEST = 200.0  # units
_FONT = 9.0
# Marker, size, face and edge of each shape; those that are words have none.
_SHAPES: dict[str, tuple[str, float, str, str]] = {
    "core": ("o", 13, COMPRESSED, COMPRESSED),
    "center": ("o", 13, INK, INK),
    "left": (">", 12, COMPRESSED, COMPRESSED),  # orthonormal: the norm lies where it points
    "right": ("<", 12, COMPRESSED, COMPRESSED),
    "label": ("o", 13, MARK, MARK),
    "data": ("s", 10, PAPER, MUTED),
    "copy": ("o", 4.5, INK, INK),
    "target": ("o", 12, PAPER, INK),
}


@dataclass(frozen=True)
class Node:
    """Something at a place; ``shape`` is one of the markers, ``"box"`` (around words), ``"words"`` or ``"title"``."""

    x: float
    y: float
    shape: str = "core"
    words: str = ""


@dataclass(frozen=True)
class Line:
    """An index: between two nodes, or from one to a free end, where its size is then written."""

    start: Point
    end: Point
    size: str = ""
    is_open: bool = False
    bend: float = 0.0
    colour: str = DENSE


@dataclass(frozen=True)
class Diagram:
    """What is to be painted."""

    nodes: tuple[Node, ...] = ()
    lines: tuple[Line, ...] = ()

    def __add__(self, other: Diagram) -> Diagram:
        return Diagram(self.nodes + other.nodes, self.lines + other.lines)

    def moved(self, dx: float, dy: float) -> Diagram:
        nodes = tuple(replace(node, x=node.x + dx, y=node.y + dy) for node in self.nodes)
        lines = tuple(
            replace(line, start=(line.start[0] + dx, line.start[1] + dy), end=(line.end[0] + dx, line.end[1] + dy))
            for line in self.lines
        )
        return Diagram(nodes, lines)

    def named(self, title: str) -> Diagram:
        """With a title above its left end."""
        left, _, _, top = self.extent()
        return self + Diagram((Node(left - 0.3, top + 0.62, "title", title),))

    def extent(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top."""
        points = [(node.x, node.y) for node in self.nodes]
        for line in self.lines:
            middle = ((line.start[0] + line.end[0]) / 2, (line.start[1] + line.end[1]) / 2 + line.bend)
            points += [line.start, line.end, middle]
        xs, ys = zip(*points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def stacked(diagrams: Sequence[Diagram]) -> Diagram:
    """One below the other, with equal left ends."""
    out, floor = Diagram(), 0.0
    for diagram in diagrams:
        left, bottom, _, top = diagram.extent()
        out = out + diagram.moved(-left, floor - top)
        floor -= top - bottom + 0.9
    return out


def paint(diagram: Diagram) -> Figure:
    """A figure of the size that the diagram needs; no pyplot, no global state."""
    from matplotlib.figure import Figure

    left, bottom, right, top = diagram.extent()
    titles = [node.x + 0.11 * len(node.words) for node in diagram.nodes if node.shape == "title"]
    right = max(right, *titles) if titles else right
    left, bottom, right, top = left - 0.5, bottom - 0.5, min(right, left + _WIDEST) + 0.5, top + 0.5
    figure = Figure(figsize=(_INCHES * (right - left), _INCHES * (top - bottom)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    for line in diagram.lines:
        _draw_line(axes, line)
    for node in diagram.nodes:
        _draw_node(axes, node)
    return figure


def _draw_line(axes: Axes, line: Line) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x, y), (u, v) = line.start, line.end
    middle = ((x + u) / 2, (y + v) / 2)
    if line.bend:
        control = (middle[0], middle[1] + 2 * line.bend)
        curve = Path([line.start, control, line.end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
        axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=line.colour, linewidth=1.8, zorder=1))
        middle = (middle[0], middle[1] + line.bend)
    else:
        axes.plot([x, u], [y, v], color=line.colour, linewidth=1.8, zorder=1, solid_capstyle="round")
    if not line.size:
        return
    words: dict[str, Any] = {"color": INK, "fontsize": _FONT, "ha": "center", "va": "center", "zorder": 4}
    if line.is_open:
        length = max(((u - x) ** 2 + (v - y) ** 2) ** 0.5, 1e-9)
        axes.text(u + 0.2 * (u - x) / length, v + 0.2 * (v - y) / length, line.size, **words)
    elif line.bend or abs(u - x) > abs(v - y):
        axes.text(middle[0], middle[1] + 0.16, line.size, **words)
    else:
        around: dict[str, Any] = {"boxstyle": "round,pad=0.12", "facecolor": PAPER, "edgecolor": "none"}
        axes.text(x + 0.4 * (u - x), y + 0.4 * (v - y), line.size, bbox=around, **words)


def _draw_node(axes: Axes, node: Node) -> None:
    if node.shape in _SHAPES:
        marker, size, face, edge = _SHAPES[node.shape]
        style: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": edge, "markeredgewidth": 1.4}
        axes.plot([node.x], [node.y], marker=marker, markersize=size, linestyle="", zorder=3, **style)
        if node.words:
            axes.text(node.x, node.y, node.words, color=INK, fontsize=_FONT, ha="center", va="center", zorder=4)
    elif node.shape == "title":
        axes.text(node.x, node.y, _plain(node.words), color=MUTED, fontsize=_FONT, ha="left", va="center")
    else:
        around: dict[str, Any] = {
            "boxstyle": "round,pad=0.3",
            "facecolor": PAPER,
            "edgecolor": INK if node.shape == "box" else PAPER,
        }
        words: dict[str, Any] = {"color": INK, "fontsize": _FONT, "ha": "center", "va": "center", "zorder": 3}
        axes.text(node.x, node.y, _plain(node.words), bbox=around, **words)


def _plain(words: str) -> str:
    return words.replace("$", r"\$")  # a pair of dollars would read as TeX


def sizes_text(sizes: Iterable[int], most: int = 8) -> str:
    """``4·5·6``, long lists cut in the middle."""
    words = [str(n) for n in sizes]
    if len(words) > most:
        words = [*words[: most // 2], "…", *words[-(most // 2) :]]
    return "·".join(words)
