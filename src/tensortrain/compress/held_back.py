"""Healing may not hurt: the model is looked at on batches that it is not trained on, and its best state is kept."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from .batches import length_of, map_tensors, n_examples, take, tensors_in, to_device
from .preserve import preserved

__all__ = ["Guard", "hold_back"]

Distance = Callable[[nn.Module, Any], "Tensor | None"]

_MOST, _SHARE = 8, 8  # batches held back: one in eight, at most eight
_ENOUGH = 64  # examples to measure on; of small data up to a quarter
_LOOKS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the run after which the model is looked at
_RISES = 3  # looks in a row, from the start, each farther off than the one before
_EARLIEST = 10  # steps: before, nothing can be said
_LOST = 1.0  # distance of outputs that tell nothing about the original's
_FAR = 1.2  # times the distance at the start: less is no reason to give up


def hold_back(data: Iterable[Any], n_steps: int | None) -> tuple[Iterable[Any], list[Any], bool]:
    """Set a share of the data aside, one in eight, at most eight batches.

    Lists give up batches, short lists some rows of each; loaders over a data set that they pass through in order or at
    random give up examples. Of anything else the first batches are taken, which are trained on too.

    Args:
        n_steps: Length of the run to come, which decides how many batches are worth their time.

    Returns:
        The data to train on, the batches set aside, and whether they really are.
    """
    length = length_of(data)
    few = max(1, min(_MOST, min(length or n_steps or 1, n_steps or length or 1) // _SHARE))
    if length is not None and isinstance(data, Sequence) and not isinstance(data, str):
        return _split_list(data, few) if length >= _SHARE else _split_rows(data)
    split = getattr(data, "split_off", None)
    if callable(split) and (length or 0) > 1:
        rest, held = split(_SHARE, few)
        return rest, take(held, few), True
    if isinstance(data, DataLoader) and _is_plain(data):
        return *_split_loader(data, few), True
    return data, take(data, few), False


def _split_list(data: Sequence[Any], few: int) -> tuple[list[Any], list[Any], bool]:
    enough = -(-_ENOUGH // max(1, n_examples(data[0])))
    few = max(few, min(enough, len(data) // 4))
    places = {int((k + 0.5) * len(data) / few) for k in range(few)}
    return [data[k] for k in range(len(data)) if k not in places], [data[k] for k in sorted(places)], True


def _split_rows(data: Sequence[Any]) -> tuple[Sequence[Any], list[Any], bool]:
    """Some rows of every batch, where all tensors of a batch have their rows along the first axis."""
    if not all(_has_rows(batch) for batch in data):
        return data, list(data), False
    counts = [max(1, n_examples(batch) // _SHARE) for batch in data]
    rest = [map_tensors(partial(_rows, start=n), batch) for batch, n in zip(data, counts, strict=True)]
    held = [map_tensors(partial(_rows, stop=n), batch) for batch, n in zip(data, counts, strict=True)]
    return rest, held, True


def _rows(tensor: Tensor, *, start: int | None = None, stop: int | None = None) -> Tensor:
    return tensor[start:stop] if tensor.ndim else tensor


def _has_rows(batch: Any) -> bool:
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


class Guard:
    """Watches a healing as ``fit``'s monitor.

    Args:
        model: As it was cut.
        batches: To measure on.
        distance: ``(model, batch) -> how far the outputs are from the original's``; None where nothing counts.
        held: The batches are not trained on.

    Attributes:
        start, best, last: Mean distance of the cut model, the least seen, the last seen.
        notes: Sentences for the report.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], distance: Distance, *, held: bool) -> None:
        self.distance, self.held = distance, held
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.batches = [to_device(batch, device) for batch in batches]
        self.seen: list[float] = []
        self.notes: list[str] = []
        self.start = self.best = self.last = self.measure(model)
        self.first_state = self.best_state = _state_of(model)
        self.best_step = 0
        # Means of n squares are good to about 1/sqrt(n): a state that is better by less is better by chance.
        self.noise = min(0.25, 1 / math.sqrt(max(1, sum(map(n_examples, self.batches)))))

    def begin(self, model: nn.Module) -> None:
        """The batch norms have new statistics: the better ones are the start."""
        self.last = self.measure(model)
        if not self._better(self.last):
            _put_back(model, self.first_state)
        else:
            self.start = self.best = self.last
            self.first_state = self.best_state = _state_of(model)

    @property
    def useful(self) -> bool:
        """Whether there is anything to measure."""
        return math.isfinite(self.start)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Mean distance over the batches, by their examples; infinite where the model gives no numbers."""
        total, count = 0.0, 0
        with preserved(model):
            model.eval()
            for batch in self.batches:
                torch.manual_seed(0)  # models that draw noise draw the same
                value = self.distance(model, batch)
                n = n_examples(batch)
                if value is not None and n:
                    total, count = total + n * float(value), count + n
        return total / count if count and math.isfinite(total) else math.inf

    def _better(self, value: float) -> bool:
        """Nearer than at the start by more than the noise of the measurement."""
        return value < self.start * (1 - self.noise)

    def _measured(self, model: nn.Module) -> float:
        """At the end: a measure that fails by now, for whatever reason, decides for what was measured before."""
        try:
            return self.measure(model)
        except Exception:
            return math.inf

    def due(self, step: int, total: int) -> bool:
        return step in {max(1, round(share * total)) for share in _LOOKS}

    def look(self, model: nn.Module, step: int) -> bool:
        self.last = self.measure(model)
        self.seen.append(self.last)
        if self.last < self.best:
            self.best, self.best_state, self.best_step = self.last, _state_of(model), step
        if not self._rises_from_the_start(step):
            return False
        self.notes.append(
            f"Healing stopped after {step} steps: the outputs went away from the original's from the start "
            f"({self.start:.3g}, then {', '.join(f'{value:.3g}' for value in self.seen)}). Lower lr."
        )
        return True

    def _rises_from_the_start(self, step: int) -> bool:
        if step < _EARLIEST:
            return False
        rises = all(later > earlier for earlier, later in itertools.pairwise([self.start, *self.seen]))
        lost = all(value > max(_LOST, 10 * self.start) for value in self.seen)
        return lost or (len(self.seen) >= _RISES and rises and self.last > _FAR * self.start)

    def failed(self, error: BaseException, step: int) -> None:
        reason = " ".join(str(error).split())
        how = "by Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {reason:.200}"
        self.notes.append(f"Healing ended early, after {step} steps ({how}). The best state so far is kept.")

    def unsaved(self, error: Exception, step: int) -> None:
        reason = " ".join(str(error).split())
        self.notes.append(f"The checkpoint could not be written at step {step} ({reason:.200}); healing went on.")

    def finish(self, model: nn.Module) -> None:
        """Put the best state back where the last one is not it; called with the weights in their own dtype."""
        if not self.useful:
            return
        now = self._measured(model)
        if now <= self.best * (1 + self.noise) and self._better(now):
            return
        _put_back(model, self.best_state)
        if self._better(self.best) and self._better(self._measured(model)):  # rounding to a low dtype may cost all
            return
        _put_back(model, self.first_state)
        where = "held-back batches" if self.held else "the first batches"
        self.notes.append(
            f"Healing brought the outputs no nearer to the original's on {where} ({self.start:.3g} as it was cut, "
            f"{now:.3g} after, noise {self.noise:.0%}): the model stays as it was cut."
        )

    def state(self) -> dict[str, Any]:
        names = ("seen", "notes", "start", "best", "last", "best_step", "best_state", "first_state")
        return {name: copy.copy(getattr(self, name)) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state()) or state["first_state"].keys() != self.first_state.keys():
            raise KeyError("monitor")
        for name, value in state.items():
            setattr(self, name, value)


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: trainable parameters and buffers."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.copy_(state[name])
