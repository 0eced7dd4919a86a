"""Dataclasses go through JSON and back; what does not fit its field is named."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tensortrain.system.records import Record, RecordError, read_record, to_plain, typed


class Named:
    """A class with a form of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Named:
        return cls(**data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and other.name == self.name

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Row(Record):
    label: str
    sizes: tuple[int, ...] = ()
    half: tuple[float, float] = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Table(Record):
    count: int
    share: float | None = None
    exact: bool = False
    kind: Literal["tt", "cp"] = "tt"
    rows: tuple[Row, ...] = ()
    owner: Named | None = None
    more: dict[str, Any] = field(default_factory=dict)


FULL = Table(count=3, share=0.5, exact=True, kind="cp", rows=[Row("a", [1, 2])], owner=Named("b"), more={"x": 1})


@pytest.mark.parametrize("table", [FULL, Table(count=0)])
def test_there_and_back(table: Table) -> None:
    assert read_record(Table, json.loads(json.dumps(to_plain(table))), "table") == table


def test_lists_are_kept_as_tuples() -> None:
    assert Row("a", [1, [2, 3]]).sizes == (1, (2, 3))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"count": "3"}, "table.count has str, expected an integer"),
        ({"count": True}, "table.count has bool, expected an integer"),
        ({"count": 3.0}, "table.count has float"),
        ({"share": "x"}, "table.share has str, expected a number"),
        ({"exact": 1}, "table.exact has int, expected true or false"),
        ({"kind": "svd"}, "table.kind has 'svd', expected one of tt, cp"),
        ({"rows": {}}, "table.rows has dict, expected a list"),
        ({"rows": [{"label": 3}]}, r"table.rows\[0\].label has int, expected text"),
        ({"rows": [{"label": "a", "half": [1.0]}]}, r"table.rows\[0\].half has 1 entries, expected 2"),
        ({"more": []}, "table.more has list, expected an object"),
        ({"owner": 3}, "table.owner has int, expected an object"),
        ({"odd": 1}, "missing or unknown odd, expected count, share"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError, match=says):
        read_record(Table, {**to_plain(FULL), **change}, "table")


def test_missing_fields_and_other_kinds() -> None:
    with pytest.raises(RecordError, match="missing or unknown count"):
        read_record(Table, {}, "table")
    with pytest.raises(RecordError, match="table has list, expected an object"):
        read_record(Table, [], "table")
    assert typed("a", str) == "a"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite(number: float) -> None:
    plain = to_plain({"a": number, "b": Row("r", half=(number, 1.0))})
    assert plain == {"a": None, "b": {"label": "r", "sizes": [], "half": [None, 1.0]}}
    assert math.isnan(read_record(Row, plain["b"], "row").half[0])


def test_scalars_and_names_of_other_libraries() -> None:
    assert to_plain([torch.tensor(2), np.float32(0.5), torch.float32]) == [2, 0.5, "torch.float32"]
