"""Whether what comes to a layer lives in few directions, and how much of it calls bring that none before them had.

A map behind a table of 29 rows is given 29 vectors, whatever the data: errors elsewhere cost nothing. Behind 29 samples
of anything it looks the same, but the next sample lies elsewhere. What tells both apart is how much of the later calls
the earlier ones explain.

Source of the idea: Good, "The population frequencies of species", Biometrika 40, 1953; what came up late in a sample
tells how much has not come up yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.system.parking import let_go, park

__all__ = ["Span"]

_MOST = 1024  # directions that are kept track of
_SAME = 1e-8  # of a row's square: less outside of a span is rounding
_WORTH_PARKING = 2**17  # numbers


class Span:
    """The directions that rows were seen in, as long as they are at most half of all.

    Args:
        parks: Many of them lie in a file: those of all layers of a model would be larger than it.

    Example:
        >>> span = Span(6)
        >>> for _ in range(3):
        ...     span.add(torch.eye(6)[:2])
        >>> span.rank, span.unexplained()
        (2, 0.0)
    """

    def __init__(self, n_features: int, *, parks: bool = False) -> None:
        self.parks = parks
        self.most = min(n_features // 2, _MOST)
        self._none = torch.zeros(0, n_features, dtype=torch.float64)
        self.basis: Tensor | None = self._none
        self._tables: dict[int, Tensor] | None = {}  # that all rows were taken from, by id; None where some were not
        self._shares: list[tuple[float, float]] = []  # of every call: its square outside of the calls before, and all

    @property
    def is_small(self) -> bool:
        """Whether it is still kept track of: rows were seen in at most half of all directions."""
        return self.basis is not None

    @property
    def rank(self) -> int | None:
        """How many directions; None where there are more than half of all."""
        return None if self.basis is None else len(self.basis)

    def unexplained(self) -> float:
        """Share of the square of the later half of the calls that lay outside of the calls before; 1 of one call."""
        later = self._shares[(len(self._shares) + 1) // 2 :]
        whole = sum(square for _, square in later)
        return sum(outside for outside, _ in later) / whole if whole > 0 else 1.0

    @torch.no_grad()
    def of_tables(self) -> Tensor | None:
        """The directions of all tables that the rows were taken from, ``(r, N)``; None where some came from elsewhere.

        Whatever rows are still to come, they lie in these.
        """
        rows = list(self._tables.values()) if self._tables else []
        if not rows or sum(map(len, rows)) >= rows[0].shape[1]:
            return None
        return _fresh(torch.cat([one.detach().double() for one in rows]), self._none.to(rows[0].device))

    def add(self, rows: Tensor, table: Tensor | None = None) -> None:
        """Take in the rows of one call, ``(n, N)``.

        Args:
            table: ``(m, N)`` that they are rows of, or sums of such.
        """
        self.add_all([(rows, table)])

    @torch.no_grad()
    def add_all(self, calls: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """The same of several calls. If together they leave the span, that takes less than one after another."""
        for _, table in calls:
            if table is None:
                self._tables = None
            elif self._tables is not None:
                self._tables[id(table)] = table
        if self._is_left_by([rows for rows, _ in calls]):
            self.basis = None  # most layers end here
        for rows, _ in calls:
            if self.basis is not None and len(rows):
                self._add(rows, self.basis)

    def _is_left_by(self, calls: Sequence[Tensor]) -> bool:
        """Whether some of the rows, as many as tell it, lie in more directions than are kept track of."""
        n_rows, most = sum(map(len, calls)), self.most
        if self.basis is None or len(self.basis) or n_rows <= most:
            return False
        step = max(1, n_rows // (most + 1))
        some = torch.cat([rows[::step].double() for rows in calls])[: most + 1]
        return len(some) > most and int(_adds(some).sum()) > most

    def _add(self, rows: Tensor, basis: Tensor) -> None:
        known = basis.to(rows.device)
        wide = rows.double()
        outside, squares = _outside(wide, known).square().sum(dim=1), wide.square().sum(dim=1)
        self._shares.append((float(outside.sum()), float(squares.sum())))
        new = wide[outside > _SAME * squares]
        if not len(new):
            let_go(self.basis)
            return
        for part in new.split(self.most + 1):
            known = torch.cat([known, _fresh(part, known)])
            if len(known) > self.most:
                self.basis = None
                return
        self.basis = self._kept(known)

    def _kept(self, basis: Tensor) -> Tensor:
        is_parked = self.parks and basis.numel() >= _WORTH_PARKING and basis.device.type == "cpu"
        return park(basis) if is_parked else basis


def _outside(rows: Tensor, basis: Tensor) -> Tensor:
    """What of some rows is orthogonal to a basis."""
    return rows - (rows @ basis.T) @ basis


def _fresh(rows: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what rows add to one, ``(k, N)``."""
    rest = _outside(rows, basis)
    rest = rest[_adds(rest, rows.square().sum(dim=1))]
    return torch.linalg.qr(_outside(rest, basis).T).Q.T


def _adds(rows: Tensor, size: Tensor | None = None) -> Tensor:
    """Which of some rows have something outside of the rows before them, ``(n,)``.

    Args:
        size: Of each, squared, with what was taken away of it before.
    """
    gram = rows @ rows.T
    size = gram.diagonal().clone() if size is None else size
    gram.diagonal().add_(_SAME**2 * size + torch.finfo(gram.dtype).tiny)
    # Squares on the diagonal are what each row has outside of the rows before it.
    factor, failed = torch.linalg.cholesky_ex(gram)
    own = factor.diagonal().square() if not bool(failed) else torch.linalg.qr(rows.T).R.diagonal().square()
    return (own > _SAME * size) & (size > 0)
