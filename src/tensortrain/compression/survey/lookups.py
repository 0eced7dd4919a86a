"""How often ids come up, counted on more data than the model is run on.

What a table looks up often is a field of the batch itself. Then further batches tell how often each id comes without
being run: a sixth of the words of a text do not occur in ten thousand others, and each of them counts like the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.compression.survey.summaries import summarize

__all__ = ["Lookups"]

_MORE = 7  # times as many batches as are run: reading them is cheap beside running

_Place = tuple[str, Any]  # of a field in a batch


@dataclass
class Lookups:
    """Which tables look up a field of the batch, as far as the batches that were run tell.

    Attributes:
        places: By the name of a table, the fields that it was given in every call so far.
    """

    places: dict[str, list[_Place]] = field(default_factory=dict)

    def note(self, name: str, ids: Tensor, batch: Any) -> None:
        """Take in a call of a table."""
        same = [place for place, value in _fields(batch) if value.shape == ids.shape and torch.equal(value, ids)]
        self.places[name] = [place for place in self.places.get(name, same) if place in same]

    def count(
        self, batches: Iterator[Any], n_run: int, tables: Sequence[FoundLayer], into: Mapping[str, LayerMoments]
    ) -> None:
        """Add what further batches say; one that cannot be read, or has no such field, ends it."""
        known = [(table, self.places[table.name][0]) for table in tables if self.places.get(table.name)]
        if not known:
            return
        try:
            for batch in itertools.islice(batches, _MORE * n_run):
                self._add(dict(_fields(batch)), _mask_of(batch), known, into)
        except Exception:  # the data have served their purpose: the model was run on what it was asked to be
            return

    def _add(
        self,
        fields: Mapping[_Place, Tensor],
        mask: Tensor | None,
        known: Sequence[tuple[FoundLayer, _Place]],
        into: Mapping[str, LayerMoments],
    ) -> None:
        for table, place in known:
            ids, moments = fields[place], into[table.name]
            n = table.weight.in_features
            if ids.numel() and moments.gram is not None and int(ids.min()) >= 0 and int(ids.max()) < n:
                summary = summarize(table, ids, mask)
                assert summary is not None
                moments.add(summary[0].to(moments.gram.device), None, summary[2])


def _fields(batch: Any) -> list[tuple[_Place, Tensor]]:
    """Whole numbers in a batch, by where they stand."""
    if isinstance(batch, Tensor):
        pairs: list[tuple[_Place, Any]] = [(("all", None), batch)]
    elif isinstance(batch, Mapping):
        pairs = [(("key", key), value) for key, value in batch.items()]
    else:
        pairs = [(("part", k), value) for k, value in enumerate(batch)] if isinstance(batch, (tuple, list)) else []
    return [(place, x) for place, x in pairs if isinstance(x, Tensor) and not x.is_floating_point() and not x.is_nested]


def _mask_of(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
