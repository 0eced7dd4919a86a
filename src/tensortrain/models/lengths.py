"""Strings of unequal length as strings of one length: an end value fills what lies behind, and nothing follows it.

A law on strings of 0 to N values is one on N sites with a value more, the end, under the condition that behind an end
there are ends alone. The condition is a chain of rank two, so that every sum over it is exact: the sum over all strings
of all lengths is the norm of a chain of twice the ranks, and strings of one known length are a chain of the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensortrain.errors import DataError

__all__ = ["Allowed", "checked_lengths", "filled", "is_ended", "of_length", "only_ended"]


def checked_lengths(lengths: object, n_strings: int, n_sites: int) -> Tensor:
    """Lengths ``(b,)`` int64 from 0 to ``n_sites``.

    Raises:
        DataError: It is anything else.
    """
    is_whole = isinstance(lengths, Tensor) and not (lengths.is_floating_point() or lengths.is_complex())
    if not isinstance(lengths, Tensor) or not is_whole or tuple(lengths.shape) != (n_strings,):
        found = f"{lengths.dtype} of shape {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else repr(lengths)
        raise DataError(
            f"lengths must be whole numbers, one for each string: lengths has {found}, expected int64 of shape "
            f"({n_strings},). Pass torch.tensor([len(string) for string in strings])."
        )
    if lengths.numel():
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > n_sites:
            raise DataError(
                f"lengths must lie in their range: lengths has numbers from {low} to {high}, expected 0 to {n_sites}. "
                "Cut longer strings, or give the model more n_sites."
            )
    return lengths.long()


def filled(x: Tensor, lengths: Tensor, n_sites: int, end: int) -> Tensor:
    """Strings ``(b, t)`` as ``(b, n_sites)`` with ends behind their lengths, whatever stood there."""
    wide = torch.full((x.shape[0], n_sites), end, dtype=torch.int64, device=x.device)
    wide[:, : x.shape[1]] = x
    return torch.where(torch.arange(n_sites, device=x.device) < lengths.to(x.device)[:, None], wide, end)


def is_ended(x: Tensor, end: int) -> Tensor:
    """Whether no value follows an end ``(b,)``; open sites, -1, may be either."""
    behind = ((x == end).cumsum(1) > 0) & (x >= 0) & (x != end)
    return ~behind.any(1)


def only_ended(cores: Sequence[Tensor], n_ends: int) -> list[Tensor]:
    """The chain without the strings in which a value follows an end: ``(2 r, m, 2 s)``, exactly.

    A bond says whether the string goes on, in its first half, or has ended.

    Args:
        cores: ``(r, m, s)``.
        n_ends: The last so many slices are ends.
    """
    made = []
    for k, core in enumerate(cores):
        values, ends = _apart(core, n_ends)
        is_last = k == len(cores) - 1
        rows = [core if is_last else torch.cat((values, ends), dim=2)]
        if k > 0:
            rows.append(ends if is_last else torch.cat((torch.zeros_like(ends), ends), dim=2))
        made.append(torch.cat(rows, dim=0))
    return made


def of_length(cores: Sequence[Tensor], n_ends: int, length: int) -> list[Tensor]:
    """The chain with the strings of one length alone."""
    return [_apart(core, n_ends)[int(k >= length)] for k, core in enumerate(cores)]


def _apart(core: Tensor, n_ends: int) -> tuple[Tensor, Tensor]:
    """Values alone and ends alone; all other slices are zero."""
    is_end = torch.arange(core.shape[1], device=core.device)[:, None] >= core.shape[1] - n_ends
    nothing = torch.zeros_like(core)
    return torch.where(is_end, nothing, core), torch.where(is_end, core, nothing)


@dataclass(frozen=True)
class Allowed(Sequence[Tensor]):
    """For each site ``(b, n p)`` with ones for the values that a sample may have there; made when asked for.

    Attributes:
        x: ``(b, d)``, -1 where a site is open.
        n_values: ``n``.
        n_copies: ``p``, an index behind the value that is always open.
        dtype: Of the ones.
        lengths: ``(b,)``: open sites are no end before the length, and the end, ``n - 1``, from there on.
    """

    x: Tensor
    n_values: int
    n_copies: int
    dtype: torch.dtype
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: Any) -> Any:
        here, values = self.x[:, k, None], torch.arange(self.n_values, device=self.x.device)
        is_on = (here == values) | (here < 0)
        if self.lengths is not None:
            has_ended = self.lengths.to(self.x.device)[:, None] <= k
            is_on = is_on & (has_ended == (values == self.n_values - 1))
        return is_on.to(self.dtype).repeat_interleave(self.n_copies, dim=1)
