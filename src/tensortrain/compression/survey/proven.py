"""Hidden units that a model really can do with fewer of: narrowed on a trial, it computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensortrain.compression.narrow import Undo, narrow_
from tensortrain.compression.survey.hidden import HiddenUnits, Run, channel_axis, find_hidden_units, some_channels
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.words import in_short
from tensortrain.nn import is_transformers_conv1d
from tensortrain.system.parking import activations_parked, let_go
from tensortrain.train.batches import map_tensors, n_examples, run, tensors_in
from tensortrain.train.modes import evaluating
from tensortrain.train.outputs import counted
from tensortrain.train.preserve import preserved

__all__ = ["Kind", "masked", "proven", "proven_units"]

Group = TypeVar("Group")

_FEW, _SHORT = 2, 32  # examples to try on, and places of a text


def proven_units(
    model: nn.Module,
    calibration: Calibration,
    choose: Callable[[list[HiddenUnits]], list[HiddenUnits]],
    notes: list[str],
) -> list[HiddenUnits]:
    """Hidden units that can be taken out of a model: found by gradients, and tried on a batch.

    A forward may name a size that gradients do not show, as ``x.view(b, 4, 64)`` does between two layers. So half of
    the units are taken out for a moment: the model has to give what it gives where their reader sees zeros.

    Args:
        model: As before afterwards.
        calibration: Its first batch is used.
        choose: Those that are worth trying, of all found; no two of them around one layer.
        notes: Takes in why nothing was found, where that was an error.

    Cost: ``find_hidden_units`` in eval and in train mode, and two forward passes, on two examples; two more for each
    group of units where some of them fail.
    """
    kind = Kind("Hidden units", find_hidden_units, _zeroed, _narrowed)
    return proven(model, calibration, kind, choose, notes)[0]


@dataclass(frozen=True)
class Kind(Generic[Group]):
    """What layers may be narrowed at together, and how that is tried.

    Attributes:
        what: They are, in a note.
        find: ``(model, run, training=) -> what may be``.
        unseen: While it is entered, nobody sees a part of what groups hold.
        narrowed: While it is entered, that part is taken out.
    """

    what: str
    find: Callable[..., list[Group]]
    unseen: Callable[[nn.Module, Sequence[Group]], AbstractContextManager[None]]
    narrowed: Callable[[nn.Module, Sequence[Group]], AbstractContextManager[None]]

    def computes_the_same(self, model: nn.Module, groups: Sequence[Group], on_batch: Run) -> bool:
        """Whether the model without a part gives what it gives where nobody sees that part."""
        try:
            with evaluating(model), torch.no_grad():
                with self.unseen(model, groups):
                    wanted = _numbers(on_batch(model))
                with self.narrowed(model, groups):
                    found = _numbers(on_batch(model))
        except Exception:  # its code names a size, or asks for more than fewer of them can give
            return False
        return len(wanted) == len(found) and all(_is_like(a, b) for a, b in zip(wanted, found, strict=True))


def proven(
    model: nn.Module,
    calibration: Calibration,
    kind: Kind[Group],
    choose: Callable[[list[Group]], list[Group]],
    notes: list[str],
) -> tuple[list[Group], list[Group]]:
    """What can be taken out together: found in eval and in train mode, chosen, and tried on a batch.

    Returns:
        tuple: Those that can be narrowed, and those that were chosen and cannot.
    """
    batch = _few(model, calibration.batches[0], with_labels=calibration.with_labels)

    def on_batch(net: nn.Module) -> Any:
        return run(net, batch, with_labels=calibration.with_labels)

    with preserved(model), activations_parked(model.parameters()):
        try:
            chosen = choose(_found(model, kind.find, on_batch))
        except Exception as error:  # a part without gradients, or one that two examples do not serve
            notes.append(f"{kind.what} were not looked for: {in_short(error)}.")
            return [], []
        if not chosen or kind.computes_the_same(model, chosen, on_batch):
            return chosen, []
        fit = [kind.computes_the_same(model, [one], on_batch) for one in chosen]
    pairs = list(zip(chosen, fit, strict=True))
    return [one for one, is_fit in pairs if is_fit], [one for one, is_fit in pairs if not is_fit]


def _found(model: nn.Module, find: Callable[..., list[Group]], on_batch: Run) -> list[Group]:
    """Those that are found in both modes: what only training reads, such as a loss beside, reads them too."""
    found = find(model, on_batch)
    try:
        trained = find(model, on_batch, training=True)
    except Exception:  # a model that only ever runs in eval mode
        return found
    return [one for one in found if one in trained]


def _few(model: nn.Module, batch: Any, *, with_labels: bool) -> Any:
    n = n_examples(batch)
    cut = map_tensors(lambda x: x[:_FEW] if x.ndim and len(x) == n else x, batch) if n > _FEW else batch
    short = _short(cut)
    if short is cut:
        return cut
    try:
        with preserved(model), evaluating(model), torch.no_grad():
            run(model, short, with_labels=with_labels)
    except Exception:  # it takes texts of one length
        return cut
    return short


def _short(batch: Any) -> Any:
    """The places of texts that are masked least, where a batch is nothing but texts of one length."""
    tensors = tensors_in(batch)
    shapes = {x.shape for x in tensors}
    if len(shapes) != 1 or any(x.ndim != 2 or x.is_floating_point() for x in tensors):
        return batch
    length = tensors[0].shape[1]
    if length <= 2 * _SHORT:
        return batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    counts = torch.ones(length) if mask is None else mask.float().sum(dim=0).cpu()
    start = int(counts.unfold(0, _SHORT, 1).sum(dim=1).argmax())
    return map_tensors(lambda x: x[:, start : start + _SHORT], batch)


def _numbers(outputs: object) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _is_like(a: Tensor, b: Tensor) -> bool:
    """Where they are no masks, beside whose size nothing would show."""
    if a.shape != b.shape:
        return False
    counts = counted(a)
    if not torch.equal(counts, counted(b)):
        return False
    one, other = (torch.where(counts, x, 0).double() for x in (a, b))
    return bool((one - other).norm() <= torch.finfo(a.dtype).eps ** 0.5 * one.norm())


@contextmanager
def masked(model: nn.Module, seen: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Inside, layers read zeros in some of their channels; of each is told which it goes on seeing."""
    with ExitStack() as stack:
        for name, channels in seen:
            reader = model.get_submodule(name)
            stack.callback(reader.register_forward_pre_hook(_mask(channels, channel_axis(reader))).remove)
        yield


def _mask(seen: Tensor, axis: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args:
            return None
        x = args[0]
        shape = [1] * x.ndim
        shape[axis] = len(seen)
        return (x * seen.to(x.device).reshape(shape), *args[1:])

    return hook


def _zeroed(model: nn.Module, groups: Sequence[HiddenUnits]) -> AbstractContextManager[None]:
    cpu = torch.device("cpu")
    return masked(model, [(units.reader, some_channels(units.n_units, cpu)) for units in groups])


@contextmanager
def _narrowed(model: nn.Module, groups: Sequence[HiddenUnits]) -> Iterator[None]:
    undo: list[Undo] = []
    try:
        for units in groups:
            reader: Any = model.get_submodule(units.reader)
            kept = some_channels(units.n_units, reader.weight.device).nonzero().flatten()
            weight = reader.weight.T if is_transformers_conv1d(reader) else reader.weight
            let_go_of = [model.get_submodule(name)._parameters["weight"] for name in (*units.makers, units.reader)]
            undo.append(narrow_(model, units, kept, weight.detach()[:, kept]))
            let_go(*let_go_of)  # what is as it was takes no memory meanwhile
        yield
    finally:
        for back in reversed(undo):
            back()
