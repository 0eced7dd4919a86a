"""Which numbers in memory tensors stand on: what shares memory is one and the same, under however many objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Span", "count_bytes", "count_numbers", "overlaps", "repeats", "span_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """The bytes from the first to the last number of a tensor; ``memory`` tells apart devices."""

    memory: tuple[str, int]
    start: int
    stop: int
    tensor: Tensor

    @property
    def n_places(self) -> int:
        return (self.stop - self.start) // self.tensor.element_size()

    @property
    def has_gaps(self) -> bool:
        return self.n_places > self.tensor.numel()


def span_of(tensor: Tensor) -> Span | None:
    """Where a tensor lies; ``None`` for one without numbers or memory of the ordinary kind (sparse, wrapped, lazy)."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    try:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
    if tensor.numel() == 0 or (address == 0 and not tensor.is_meta):
        return None
    size = tensor.element_size()
    start = address + int(tensor.storage_offset()) * size
    last = sum(int(n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    # What lies on the meta device has no address, so that its storage tells what it shares.
    memory = ("meta", storage._cdata) if tensor.is_meta else (str(tensor.device), 0)
    return Span(memory, start, start + (last + 1) * size, tensor)


def count_numbers(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors hold together; what shares memory counts once."""
    unique = {id(t): t for t in tensors if not is_lazy(t)}
    spans = {key: span_of(t) for key, t in unique.items()}
    apart = sum(t.numel() for key, t in unique.items() if spans[key] is None)
    return apart + sum(_in_cluster(cluster) for cluster in _clusters([s for s in spans.values() if s is not None]))


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers that tensors hold together; what shares memory counts once."""
    unique = {id(t): t for t in tensors if not is_lazy(t)}
    spans = {key: span_of(t) for key, t in unique.items()}
    apart = sum(t.numel() * t.element_size() for key, t in unique.items() if spans[key] is None)
    clusters = _clusters([span for span in spans.values() if span is not None])
    return apart + sum(_in_cluster(one) * min(span.tensor.element_size() for span in one) for one in clusters)


def overlaps(owned: Sequence[tuple[T, Tensor]]) -> Iterator[tuple[T, T]]:
    """All pairs of owners whose tensors share numbers, in both orders."""
    spans = [(owner, span) for owner, tensor in owned if (span := span_of(tensor)) is not None]
    owners: dict[int, list[T]] = {}
    for owner, span in spans:
        owners.setdefault(id(span), []).append(owner)
    for cluster in _clusters([span for _, span in spans]):
        for k, first in enumerate(cluster):
            # A cluster is sorted by start, so the first that begins behind the end is the last to look at.
            for second in itertools.takewhile(lambda s, stop=first.stop: s.start < stop, cluster[k + 1 :]):  # type: ignore[misc]
                if _share(first, second):
                    yield from itertools.product(owners[id(first)], owners[id(second)])
                    yield from itertools.product(owners[id(second)], owners[id(first)])


def repeats(tensor: Tensor) -> bool:
    """Whether a tensor has more numbers than places in memory, as an expanded one has."""
    span = span_of(tensor)
    return span is not None and span.n_places < tensor.numel()


def _clusters(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Groups of spans that hang together, each sorted by start."""
    cluster: list[Span] = []
    stop = 0
    for span in sorted(spans, key=lambda s: (s.memory, s.start)):
        if cluster and (span.memory != cluster[0].memory or span.start >= stop):
            yield cluster
            cluster = []
        stop = max(stop, span.stop) if cluster else span.stop
        cluster.append(span)
    if cluster:
        yield cluster


def _in_cluster(cluster: Sequence[Span]) -> int:
    if len(cluster) == 1:
        return min(cluster[0].tensor.numel(), cluster[0].n_places)  # an expanded tensor has fewer places
    size = min(span.tensor.element_size() for span in cluster)
    if not any(span.has_gaps for span in cluster):
        return (max(span.stop for span in cluster) - cluster[0].start) // size
    return int(torch.cat([_places(span, cluster[0].start, size) for span in cluster]).unique().numel())


def _share(a: Span, b: Span) -> bool:
    """Whether two tensors have a number in common; slices that lie between each other have not."""
    if not (a.has_gaps or b.has_gaps):
        return True
    start, size = min(a.start, b.start), min(a.tensor.element_size(), b.tensor.element_size())
    return bool(torch.isin(_places(a, start, size), _places(b, start, size)).any())


def _places(span: Span, start: int, size: int) -> Tensor:
    """The places of a tensor's numbers, counted from ``start`` in steps of ``size`` bytes."""
    tensor, width = span.tensor, span.tensor.element_size() // size
    flat = torch.arange(span.n_places, device="cpu").as_strided(tuple(tensor.shape), tensor.stride(), 0).reshape(-1)
    steps = torch.arange(width, device="cpu")
    return (flat[:, None] * width + steps + (span.start - start) // size).reshape(-1)
