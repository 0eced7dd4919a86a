"""Ids of a table are counted on more batches than are run, where the table looks up a field of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import find_layers
from tensortrain.compression.survey.moments import expected_shares

N = 20


class Reader(nn.Module):
    """A mean over looked-up rows."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda ids: ids) -> None:
        super().__init__()
        self.table, self.head, self.change = nn.Embedding(N, 8), nn.Linear(8, 3), change

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.table(self.change(input_ids)).mean(1))


def ids_of(k: int) -> Tensor:
    return torch.randint(N, (4, 6), generator=torch.Generator().manual_seed(k))


def found_shares(model: nn.Module, data: Any, n_batches: int = 2) -> Tensor:
    found = calibrate(model, find_layers(model)[0], data, n_batches=n_batches)
    return found.layers["table"].gram


def shares(batches: list[Tensor]) -> Tensor:
    return expected_shares(torch.bincount(torch.cat([b.flatten() for b in batches]), minlength=N).double())


AS_BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda ids: ids,
    "tuple": lambda ids: (ids, torch.zeros(len(ids))),
    "mapping": lambda ids: {"input_ids": ids},
}


@pytest.mark.parametrize("form", AS_BATCHES)
def test_batches_beyond_those_that_are_run_are_counted(form: str) -> None:
    ids, ran = [ids_of(k) for k in range(6)], []
    model = Reader()
    model.head.register_forward_hook(lambda *_: ran.append(1))
    found = found_shares(model, [AS_BATCHES[form](x) for x in ids])
    assert torch.equal(found, shares(ids))
    plain: list[int] = []
    other = Reader()
    other.head.register_forward_hook(lambda *_: plain.append(1))
    found_shares(other, [AS_BATCHES[form](x) for x in ids[:2]])
    assert ran == plain


def test_not_more_than_a_multiple_of_what_is_run() -> None:
    ids = [ids_of(k) for k in range(40)]
    assert torch.equal(found_shares(Reader(), ids), shares(ids[:16]))


def test_masked_places_are_not_counted() -> None:
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 3:] = 0
    ids = [ids_of(k) for k in range(5)]
    found = found_shares(Reader(), [{"input_ids": x, "attention_mask": mask} for x in ids])
    assert torch.equal(found, shares([x[:, :3] for x in ids]))


def test_a_table_that_looks_up_something_else_is_left_at_what_was_run() -> None:
    ids = [ids_of(k) for k in range(5)]
    found = found_shares(Reader(lambda x: (x + 1) % N), ids)
    assert torch.equal(found, shares([(x + 1) % N for x in ids[:2]]))


def test_data_that_can_be_read_only_once_are_left_to_others() -> None:
    ids = [ids_of(k) for k in range(5)]
    rest = iter(ids)
    assert torch.equal(found_shares(Reader(), rest), shares(ids[:2]))
    assert len(list(rest)) == 3


class Failing:
    """Data that break off after some batches."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        raise OSError("the disk is gone")


def test_data_that_fail_later_do_not_stop_the_planning() -> None:
    ids = [ids_of(k) for k in range(4)]
    assert torch.equal(found_shares(Reader(), Failing(ids)), shares(ids))


def test_ids_outside_of_the_table_are_passed_over() -> None:
    ids = [ids_of(k) for k in range(4)]
    strange = [*ids, torch.full((4, 6), N)]
    assert torch.equal(found_shares(Reader(), strange), shares(ids))
