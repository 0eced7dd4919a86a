"""Setting a share of the data aside, to measure on what a model is not trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from tensortrain.train.batches import length_of, map_tensors, n_examples, opened, take, tensors_in

__all__ = ["has_rows", "hold_back", "rows_of"]

_MOST, _SHARE = 8, 8  # batches held back: one in eight, at most eight
_ENOUGH = 64  # examples to measure on; of small data up to a quarter


def hold_back(data: Iterable[Any], n_steps: int | None) -> tuple[Iterable[Any], list[Any], bool]:
    """Set a share of the data aside, one in eight, at most eight batches.

    Lists give up batches, short lists some rows of each, streams their first batches; loaders over a data set that they
    pass through in order or at random give up examples. Of anything else the first batches are taken, which are trained
    on too.

    Args:
        n_steps: Length of the run to come, which decides how many batches are worth their time.

    Returns:
        The data to train on, the batches set aside, and whether they really are.
    """
    length = length_of(data)
    few = max(1, min(_MOST, min(length or n_steps or 1, n_steps or length or 1) // _SHARE))
    if length is not None and isinstance(data, Sequence) and not isinstance(data, str):
        return _split_list(data, few) if length >= _SHARE else _split_rows(data)
    if length is None:
        return _split_stream(data, few)
    split = getattr(data, "split_off", None)
    if callable(split) and (length or 0) > 1:
        rest, held = split(_SHARE, few)
        return rest, take(held, few), True
    if isinstance(data, DataLoader) and _is_plain(data) and len(data.dataset) > 1:  # type: ignore[arg-type]
        return *_split_loader(data, few), True
    return data, take(data, few), False


class _Rest:
    """A stream without its first batches; all else of it is as it was."""

    def __init__(self, data: Iterable[Any], n_skipped: int) -> None:
        self._data, self._n_skipped = data, n_skipped

    def __iter__(self) -> Iterator[Any]:
        with opened(self._data) as batches:
            yield from itertools.islice(batches, self._n_skipped, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_data"], name)


def _split_stream(data: Iterable[Any], few: int) -> tuple[Iterable[Any], list[Any], bool]:
    """The first batches, which every pass then leaves out."""
    first = take(data, _MOST + 1)
    wanted = max(few, -(-_ENOUGH // max(1, n_examples(first[0]) if first else 1)))
    few = min(wanted, len(first) // 2 if len(first) <= _MOST else _MOST)
    return (_Rest(data, few), first[:few], True) if few else (data, first, False)


def _split_list(data: Sequence[Any], few: int) -> tuple[list[Any], list[Any], bool]:
    enough = -(-_ENOUGH // max(1, n_examples(data[0])))
    few = max(few, min(enough, len(data) // 4))
    places = {int((k + 0.5) * len(data) / few) for k in range(few)}
    return [data[k] for k in range(len(data)) if k not in places], [data[k] for k in sorted(places)], True


def _split_rows(data: Sequence[Any]) -> tuple[Sequence[Any], list[Any], bool]:
    """Some rows of every batch, where all tensors of a batch have their rows along the first axis."""
    if not all(has_rows(batch) for batch in data):
        return data, list(data), False
    counts = [max(1, n_examples(batch) // _SHARE) for batch in data]
    rest = [map_tensors(partial(rows_of, start=n), batch) for batch, n in zip(data, counts, strict=True)]
    held = [map_tensors(partial(rows_of, stop=n), batch) for batch, n in zip(data, counts, strict=True)]
    return rest, held, True


def rows_of(tensor: Tensor, *, start: int | None = None, stop: int | None = None) -> Tensor:
    return tensor[start:stop] if tensor.ndim else tensor


def has_rows(batch: Any) -> bool:
    tensors = [tensor for tensor in tensors_in(batch) if tensor.ndim]
    values = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    flat = all(isinstance(value, Tensor) or not tensors_in(value) for value in values)
    plain = isinstance(batch, (Tensor, Mapping)) or type(batch) in (tuple, list)
    alike = len({tensor.shape[0] for tensor in tensors}) == 1
    return plain and flat and alike and tensors[0].shape[0] >= 2 and any(t.ndim > 1 for t in tensors)


def _is_plain(loader: DataLoader[Any]) -> bool:
    sampler, n = loader.sampler, length_of(loader.dataset)
    if loader.batch_size is None or n is None or type(loader) is not DataLoader:
        return False
    if type(loader.batch_sampler) is not torch.utils.data.BatchSampler:
        return False
    in_order = type(sampler) is SequentialSampler
    shuffled = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == n
    return in_order or shuffled


def _split_loader(loader: DataLoader[Any], few: int) -> tuple[DataLoader[Any], list[Any]]:
    """The same loader over the other examples, and batches of those that a fixed draw picked."""
    n, size = len(loader.dataset), loader.batch_size or 1  # type: ignore[arg-type]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    count = min(few * size, max(1, n // _SHARE))
    held, kept = sorted(order[:count]), sorted(order[count:])
    options = {
        "batch_size": loader.batch_size,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    shuffle = type(loader.sampler) is RandomSampler
    rest: DataLoader[Any] = DataLoader(
        Subset(loader.dataset, kept),
        shuffle=shuffle,
        generator=loader.generator,
        drop_last=loader.drop_last and len(kept) >= size,
        **options,
    )
    aside = take(
        DataLoader(
            Subset(loader.dataset, held),
            **{**options, "num_workers": 0, "prefetch_factor": None, "timeout": 0, "multiprocessing_context": None},
        ),
        None,
    )
    return rest, aside
