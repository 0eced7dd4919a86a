"""The one reading of a batch."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from tensortrain.errors import DataError
from tensortrain.train.batches import map_tensors, n_examples, opened, read_batch, run, some_of, take

X, A, B, Y = torch.ones(3, 4), torch.ones(3, 5), torch.ones(3, 6), torch.arange(3)


class One(nn.Module):
    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return x


class Two(nn.Module):
    def forward(self, a: Any, b: Any) -> Any:
        return a, b


class WithTargets(nn.Module):
    def forward(self, idx: Any, targets: Any = None) -> Any:
        return idx, targets


class WithMask(nn.Module):
    def forward(self, x: Any, mask: Any = None, labels: Any = None) -> Any:
        return x


class Keywords(nn.Module):
    def forward(self, input_ids: Any, y: Any, labels: Any = None) -> Any:
        return input_ids


Pair = namedtuple("Pair", "image label")


@dataclass(frozen=True)
class Sample:
    x: Tensor
    target: Tensor


@pytest.mark.parametrize(
    "model, batch, args, labels",
    [
        (One(), X, (X,), None),
        (One(), (X,), (X,), None),
        (One(), [X, Y], (X,), Y),
        (nn.Linear(4, 2), (X, Y, torch.arange(3)), (X,), Y),
        (WithMask(), (X, A, Y), (X, A), Y),
        (WithMask(), (X, Y), (X,), Y),
        (One(), ([X, A], Y), ([X, A],), Y),
        (Two(), (A, B), (A, B), None),
        (Two(), (A, B, Y), (A, B), Y),
        (Two(), ((A, B), Y), (A, B), Y),
        (nn.DataParallel(Two()), ((A, B), Y), (A, B), Y),
        (One(), (Pair(X, 0), Y), (Pair(X, 0),), Y),
        (One(), Pair(X, Y), (Pair(X, Y),), Y),
        (One(), Sample(X, Y), (Sample(X, Y),), Y),
        (WithTargets(), (X, Y), (X,), Y),
        (nn.Linear(4, 2), (X, Y), (X,), Y),
    ],
)
def test_positional_batches(model: nn.Module, batch: Any, args: tuple[Any, ...], labels: Any) -> None:
    parts = read_batch(model, batch)
    assert len(parts.args) == len(args)
    assert all(found is wanted or repr(found) == repr(wanted) for found, wanted in zip(parts.args, args, strict=True))
    assert parts.labels is labels
    assert not parts.kwargs


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_keywords_go_to_the_model_without_labels(kind: Any) -> None:
    parts = read_batch(Keywords(), kind({"input_ids": X, "y": A, "labels": Y}))
    assert dict(parts.kwargs) == {"input_ids": X, "y": A}
    assert parts.labels is Y
    assert read_batch(One(), {"x": X, "label": Y}).labels is Y
    assert read_batch(WithTargets(), {"idx": X, "targets": Y}).labels is Y


def test_labels_go_to_the_model_under_its_own_name_when_asked_for() -> None:
    assert read_batch(WithTargets(), (X, Y), with_labels=True).kwargs == {"targets": Y}
    assert read_batch(Keywords(), {"input_ids": X, "y": A, "labels": Y}, with_labels=True).kwargs["labels"] is Y


def test_a_named_tuple_is_unpacked_where_the_model_does_not_take_it() -> None:
    model = nn.Linear(4, 2)
    torch.testing.assert_close(run(model, Pair(X, Y)), model(X))
    assert read_batch(model, Pair(X, Y)).labels is Y
    with pytest.raises(TypeError):
        run(nn.Linear(4, 2), Pair("no", "tensor"))


def test_a_model_may_write_into_its_input() -> None:
    class Writes(nn.Module):
        def forward(self, batch: Any) -> Tensor:
            return batch["x"].mul_(2) + batch["deep"][0].add_(1)

    x, deep = torch.ones(2), torch.zeros(2)
    assert run(Writes(), ({"x": x, "deep": [deep]}, Y)).tolist() == [3.0, 3.0]
    assert x.tolist() == [1.0, 1.0]
    assert deep.tolist() == [0.0, 0.0]


def test_structures_keep_their_kind() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)], enforce_sorted=False)
    twice = map_tensors(lambda tensor: 2 * tensor, {"p": packed, "n": Pair(X, 1), "d": Sample(X, Y), "l": [X, "a"]})
    assert isinstance(twice["p"], PackedSequence)
    assert twice["p"].data.sum() == 16
    assert torch.equal(twice["p"].batch_sizes, packed.batch_sizes)
    assert type(twice["n"]) is Pair
    assert twice["n"].label == 1
    assert twice["d"].target.tolist() == [0, 2, 4]
    assert twice["l"][1] == "a"
    assert [n_examples(each) for each in (packed, X, {"a": X}, (Sample(X, Y), 3), "text", torch.ones(()))] == [
        2, 3, 3, 3, 1, 1,
    ]  # fmt: skip


def test_some_examples_are_cut_from_what_shares_an_axis() -> None:
    cut = some_of({"x": X, "y": [Y, "a"]}, 2)
    assert cut["x"].shape == (2, 4)
    assert cut["y"][0].tolist() == [0, 1]
    whole = (X, torch.ones(2, 3)), {"x": X, "scale": torch.ones(())}, X, "text"
    assert all(some_of(batch, few) is batch for batch, few in zip(whole, (2, 2, 3, 1), strict=True))


def test_an_empty_list_is_no_batch() -> None:
    with pytest.raises(DataError, match="hold something"):
        read_batch(One(), [])


@pytest.mark.parametrize("persistent", [False, True])
def test_no_worker_is_left_running(persistent: bool) -> None:
    loader = DataLoader(TensorDataset(torch.randn(64, 2)), batch_size=4, num_workers=1, persistent_workers=persistent)
    state = torch.get_rng_state()
    with opened(loader) as batches:
        next(batches)
        workers = list(batches._workers)
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)
    torch.set_rng_state(state)
    assert len(take(loader, 2)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list(loader)) == 16  # still of use
