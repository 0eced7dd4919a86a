"""Where cores stand: in a row, or in three rows by what they touch, or as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensortrain.viz.draw.notation import Diagram, Line, Node

__all__ = ["chain", "in_rows", "places", "tree"]

_LONGEST = 14  # cores of a row that are all drawn
_KEPT = 5  # at either end of a longer one
_LEG = 0.75

Legs = Sequence[int | str | None]


def places(d: int) -> list[int | None]:
    """Numbers of the cores that are drawn, with None for the dots between."""
    if d <= _LONGEST:
        return list(range(d))
    return [*range(_KEPT), None, *range(d - _KEPT, d)]


def chain(ranks: Sequence[int], *, up: Legs = (), down: Legs = (), shapes: Sequence[str] = ()) -> Diagram:
    """Cores in a row, joined by their ranks.

    Args:
        ranks: ``d + 1`` with the ends, of which those above 1 get a line with a free end.
        up, down: Sizes of the modes, None where a core has none; empty where no core has one.
        shapes: Of the nodes.
    """
    d = len(ranks) - 1
    nodes, lines, shown = [], [], places(d)
    for x, k in enumerate(shown):
        if k is None:
            nodes.append(Node(x, 0, "words", "···"))
            lines.append(Line((x, 0), (x + 1, 0), str(ranks[d - _KEPT])))
            continue
        nodes.append(Node(x, 0, shapes[k] if shapes else "core"))
        if k + 1 < d:
            lines.append(Line((x, 0), (x + 1, 0), str(ranks[k + 1])))
        for sizes, way in ((up, 1), (down, -1)):
            if sizes and sizes[k] is not None:
                lines.append(Line((x, 0), (x, way * _LEG), str(sizes[k]), is_open=True))
    ends = ((ranks[0], 0, -1), (ranks[-1], len(shown) - 1, 1))
    lines += [Line((x, 0), (x + way * _LEG, 0), str(size), is_open=True) for size, x, way in ends if size > 1]
    return Diagram(tuple(nodes), tuple(lines))


def in_rows(
    cores: Sequence[Sequence[str]], out_legs: Sequence[str], in_legs: Sequence[str], sizes: dict[str, int]
) -> Diagram:
    """A network by the names of its legs: what has outputs alone above, inputs alone below, all else between.

    A leg that more than two cores share, or two and the outside, gets a small dot, from which its lines go.
    """
    owners: dict[str, list[int]] = {}
    for k, core in enumerate(cores):
        for leg in core:
            owners.setdefault(leg, []).append(k)
    bonds = {leg for leg, mine in owners.items() if len(mine) == 2 and leg not in (*out_legs, *in_legs)}
    rows = [_row(core, bonds, out_legs, in_legs) for core in cores]
    at = _spread(rows)
    nodes = [Node(*place) for place in at]
    lines: list[Line] = []
    met: dict[tuple[int, ...], int] = {}
    for leg, mine in owners.items():
        way = 1 if leg in out_legs else -1 if leg in in_legs else 0
        if len(mine) == 1:
            continue
        if leg in bonds:
            n_before = met[tuple(mine)] = met.get(tuple(mine), -1) + 1
            lines.append(_bond(at[mine[0]], at[mine[1]], n_before, str(sizes[leg])))
            continue
        dot = _dot([at[k] for k in mine], way, rows)
        nodes.append(Node(*dot, "copy"))
        nearest = min(mine, key=lambda k: abs(at[k][1] - dot[1]))
        lines += [Line(dot, at[k], str(sizes[leg]) if k == nearest and not way else "") for k in mine]
        if way:
            lines.append(Line(dot, (dot[0], dot[1] + way * 0.5), str(sizes[leg]), is_open=True))
    for k, core in enumerate(cores):
        for way, outside in ((1, out_legs), (-1, in_legs)):
            alone = [leg for leg in core if leg in outside and len(owners[leg]) == 1]
            lines += _fan(at[k], way, [str(sizes[leg]) for leg in alone])
    return Diagram(tuple(nodes), tuple(lines))


def _row(core: Sequence[str], bonds: set[str], out_legs: Sequence[str], in_legs: Sequence[str]) -> int:
    """1 above, -1 below; what joins two others stands between."""
    touches_out, touches_in = any(leg in out_legs for leg in core), any(leg in in_legs for leg in core)
    return 0 if len(bonds.intersection(core)) > 1 else int(touches_out) - int(touches_in)


def _spread(rows: Sequence[int]) -> list[tuple[float, float]]:
    """Places of nodes, each row centred."""
    seen = dict.fromkeys((-1, 0, 1), 0)
    out = []
    for row in rows:
        out.append((seen[row] * 1.25 - (rows.count(row) - 1) * 0.625, row * 1.15))
        seen[row] += 1
    return out


def _bond(a: tuple[float, float], b: tuple[float, float], n_before: int, size: str) -> Line:
    is_far = a[1] == b[1] and abs(a[0] - b[0]) > 1.3
    bend = 1.35 if is_far else 0.0  # above the sizes of the modes
    a, b = sorted((a, b), key=lambda place: abs(place[1]))  # sizes are written nearer to the middle
    return Line(a, b, size, bend=bend + 0.45 * n_before)


def _dot(owners: Sequence[tuple[float, float]], way: int, rows: Sequence[int]) -> tuple[float, float]:
    x = sum(place[0] for place in owners) / len(owners)
    if way:
        return x, way * 0.75
    n_between = rows.count(0)
    return (x, 0.0) if not n_between else (n_between * 0.625 + 0.9, 0.0)


def _fan(at: tuple[float, float], way: int, sizes: Sequence[str]) -> list[Line]:
    """Lines with free ends, side by side."""
    x, y = at
    first = -0.45 * (len(sizes) - 1) / 2
    return [Line(at, (x + first + 0.45 * j, y + way * _LEG), size, is_open=True) for j, size in enumerate(sizes)]


def tree(root: tuple[Any, ...]) -> Diagram:
    """A tree of nested tuples: a node is (bond to its parent, child, ..), a leaf (size, number of its site)."""
    drawn, (x, y), _ = _grown(root, 0)
    size = str(root[0])
    above = Line((x, y), (x, y + _LEG), size, is_open=True)
    return drawn + Diagram((), (above,) if size != "1" else ())


def _grown(node: tuple[Any, ...], n_leaves: int) -> tuple[Diagram, tuple[float, float], int]:
    """A node with all below it, its place, and how many leaves there are by then."""
    if not isinstance(node[1], tuple):
        return Diagram(), (n_leaves * 0.9, 0.0), n_leaves + 1
    drawn, ends = Diagram(), []
    for child in node[1:]:
        part, end, n_leaves = _grown(child, n_leaves)
        drawn = drawn + part
        ends.append(end)
    x, y = sum(end[0] for end in ends) / len(ends), max(end[1] for end in ends) + 1.0
    lines = []
    for child, (u, v) in zip(node[1:], ends, strict=True):
        is_leaf = not isinstance(child[1], tuple)
        lines.append(Line((x, y), (u, y - _LEG if is_leaf else v), str(child[0]), is_open=is_leaf))
    return drawn + Diagram((Node(x, y),), tuple(lines)), (x, y), n_leaves
