"""What the layers see: second moments of their inputs on calibration data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.joined import join_inputs
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration, LayerMoments, n_moments
from tensortrain.compression.survey.output_weights import Judge, Spreads, weigh_outputs
from tensortrain.compression.survey.summaries import is_summarized, summarize
from tensortrain.compression.survey.tied import Spread, together
from tensortrain.errors import DataError
from tensortrain.nn import Linear
from tensortrain.system.machine import memory_bytes
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.parking import are_large
from tensortrain.system.processes import first_of, own_share
from tensortrain.train.batches import device_of, failed_on_batch, n_examples, opened, run_somehow, to_device
from tensortrain.train.modes import is_frozen_norm
from tensortrain.train.outputs import Output, judged_outputs
from tensortrain.train.preserve import preserved
from tensortrain.train.task import Task

__all__ = ["Calibration", "are_many", "are_parked", "calibrate"]

_MANY_BYTES = 2**27  # of all statistics: from here on memory is thought of
_HELD_BYTES = 2**30  # of them, that are kept in memory of a model that is not large itself, if the machine has 16 times


def calibrate(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    data: Iterable[Any],
    *,
    n_batches: int = 16,
    keep_batches: int = 2,
    n_held: int = 0,
    grams: bool = True,
    gradient_batches: int = 6,
    output: Output | None = None,
    with_labels: bool = False,
    task: Task | None = None,
    observer: Observer | None = None,
) -> Calibration:
    """Run some batches through the model and sum up what every layer is given.

    Positions that an ``attention_mask`` in the batch blanks out are not counted.

    Args:
        data: Batches as for training; labels are not used.
        n_batches: How many batches to run, at least one; of several processes together.
        n_held: How many of those after them to keep for ``found.held``, which nothing is summed up of.
        grams: Off: record shapes alone.
        gradient_batches: How many of the batches also run backward, for ``output_grams``.
        output: Which outputs the model is judged by, see ``judged_outputs``; all when None.
        with_labels: The labels go into the model.
        task: How the model is judged: in which metric changes of its outputs are measured; squares when None.

    Raises:
        DataError: The data gives no batches with an example.

    Cost: ``n_batches`` forward passes plus O(rows N^2) flops per layer with N inputs.
    """
    observer = observer or Silent()
    if n_batches < 1:
        raise DataError(
            f"calibration must see a batch: n_batches has {n_batches}, expected at least 1. Pass 16, or data=None."
        )

    def judge(batch: Any) -> dict[str, Tensor]:
        return judged_outputs(model, batch, output, with_labels=with_labels)[0]

    heads = {layer.name: _head_of(layer) for layer in layers if layer.head is not None}
    spreads = {name: Spread() for name in heads}
    layers = [*layers, *heads.values()]
    parks = are_parked(model, layers)
    found = Calibration({layer.name: LayerMoments(parks=parks) for layer in layers}, with_labels=with_labels)
    seen = _Pass(model, layers, found, judge if grams else None, Spreads(Metric(model, task)))
    kept = max(1, keep_batches, gradient_batches if grams else 0)
    with preserved(model):
        model.eval()
        with _watched(heads, spreads):
            seen.run(data, own_share(n_batches), kept, observer, n_held=own_share(n_held) if n_held else 0)
        join_inputs(found, spreads, device_of(model))
        seen.spreads.join()
        if grams and gradient_batches:
            weigh_outputs(model, layers, found, gradient_batches, judge, seen.spreads, observer)
    found.batches = first_of(found.batches[:keep_batches])
    _settle_norms(model, found)
    for layer in layers:
        moments = found.layers[layer.name]
        is_head = any(layer is head for head in heads.values())  # whose mean input nothing makes up for
        has_bias = getattr(layer.module, "bias", None) is not None and not is_head
        is_table = layer.weight.kind == "embedding"
        moments.finish(centred=has_bias or moments.norm is not None, counts=is_table)
    for name, head in heads.items():
        together(found.of(name), found.layers.pop(head.name), spreads[name].total)
    if grams:
        _note_missing([layer for layer in layers if layer.name in found.layers], found)
    return found


def are_many(layers: Sequence[FoundLayer]) -> bool:
    """Whether the statistics of some layers together are so large that formats are spared that take most memory."""
    return _n_bytes(layers) > _MANY_BYTES


def are_parked(model: nn.Module, layers: Sequence[FoundLayer]) -> bool:
    """Whether the statistics of some layers together are so large that they lie in files."""
    most = _MANY_BYTES if are_large(model.parameters()) else memory_bytes() // 16
    return _n_bytes(layers) > min(most, _HELD_BYTES)


def _n_bytes(layers: Sequence[FoundLayer]) -> int:
    return 8 * sum(n_moments(layer.weight.fan_in, layer.weight.out_features) for layer in layers)


def _head_of(layer: FoundLayer) -> FoundLayer:
    """The output layer that shares a table, as a layer of its own."""
    assert layer.head is not None
    return FoundLayer(layer.head.names, layer.head.module, Linear.weight_shape_of(layer.head.module))


@contextmanager
def _watched(heads: Mapping[str, FoundLayer], spreads: Mapping[str, Spread]) -> Iterator[None]:
    handles = [head.module.register_forward_hook(spreads[name].hook()) for name, head in heads.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Pass:
    """One pass over the data, and what its hooks share.

    Attributes:
        judge: Gives the outputs that count; None where shapes alone are recorded.
        mask: Which positions of the batch that runs are counted.
        feature_map: Shape of the last map of features that a module gave.
        last: The layer that ran last, and its output.
        looked_up: What small tables gave on the batch that runs, by where it lies in memory, and the tables.
    """

    model: nn.Module
    layers: Sequence[FoundLayer]
    found: Calibration
    judge: Judge | None
    spreads: Spreads
    mask: Tensor | None = None
    feature_map: tuple[int, ...] = ()
    last: tuple[LayerMoments, Any] | None = None
    looked_up: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, data: Iterable[Any], n_batches: int, kept: int, observer: Observer, *, n_held: int = 0) -> None:
        """Run the batches, and keep the first of them, and some that come after them.

        Raises:
            DataError: There is no batch with an example.
        """
        observer.on_start("calibrate", n_batches)
        handles: list[Any] = []
        try:
            handles += self._watch()
            with opened(data) as batches:
                for k, batch in enumerate(itertools.islice(batches, n_batches)):
                    observer.on_step(k + 1)
                    if n_examples(batch):
                        self._run_one(to_device(batch, device_of(self.model)), kept)
                        self.found.tidy()
                self.found.held = [batch for batch in itertools.islice(batches, n_held) if n_examples(batch)]
        finally:
            for handle in handles:
                handle.remove()
            self.last = None  # an output that nobody needs any more
            self.looked_up.clear()
            observer.on_end()
        if not self.found.batches:
            raise DataError(
                "data must give batches: calibration has none with an example, expected at least one. Pass a "
                "re-iterable such as a list or a DataLoader, not an iterator that is used up."
            )

    def _run_one(self, batch: Any, kept: int) -> None:
        found = self.found
        if not found.batches:
            found.n_examples = n_examples(batch)
        self.looked_up.clear()
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        try:
            if self.judge is None:
                run_somehow(self.model, batch)
            else:
                outputs = self.judge(batch)
        except Exception as error:
            raise failed_on_batch(self.model, batch, error) from error
        if self.judge is not None:
            self.spreads.add(outputs, batch)
        if len(found.batches) < kept:
            found.batches.append(batch)

    def _watch(self) -> list[Any]:
        """Hooks on the layers and what lies between them."""
        handles: list[Any] = []
        for layer in self.layers:
            register = layer.module.register_forward_pre_hook
            handles.append(register(self._recorder(layer), with_kwargs=True))
            handles.append(register(self._structure_recorder(layer)))
        modules = list(self.model.named_modules())
        handles += [module.register_forward_hook(self._note_feature_map) for _, module in modules]
        handles += [layer.module.register_forward_hook(self._leaving(layer)) for layer in self.layers]
        handles += [module.register_forward_hook(self._note_rows) for _, module in modules if _is_small_table(module)]
        norms = [(name, m) for name, m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return handles + [m.register_forward_pre_hook(self._entering(name), with_kwargs=True) for name, m in norms]

    def _recorder(self, layer: FoundLayer) -> Callable[..., None]:
        moments = self.found.layers[layer.name]

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _plain(args[0] if args else next(iter(kwargs.values()), None))
            if x is None:
                return
            moments.n_rows = moments.n_rows or 0
            if not self.found.batches:  # the first one; the last may be short
                moments.input_shape = tuple(x.shape)
                moments.calls = (moments.calls or 0) + 1
            if self.judge is not None:
                summarize(layer, x, self.mask, moments, self._table_of(x))

        return record

    def _structure_recorder(self, layer: FoundLayer) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            flattened = self.feature_map
            if layer.weight.kind == "linear" and math.prod(flattened) == layer.weight.in_features and flattened:
                self.found.layers[layer.name].structure = flattened

        return record

    def _note_feature_map(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3:
            self.feature_map = tuple(output.shape[1:])

    def _note_rows(self, module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.is_inference():
            self.looked_up[output.untyped_storage().data_ptr()] = output, output._version, module.weight

    def _table_of(self, x: Tensor) -> Tensor | None:
        """The table that an input consists of rows of, if it has not been changed since these were looked up."""
        found = None if x.is_inference() else self.looked_up.get(x.untyped_storage().data_ptr())
        return found[2] if found is not None and x._version == found[1] and x.shape[-1] == found[2].shape[1] else None

    def _leaving(self, layer: FoundLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.last = (self.found.layers[layer.name], output)

        return hook

    def _entering(self, name: str) -> Callable[..., None]:
        """A hook of a batch norm that tells the layer whose output it is given; ``""`` where there are several."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.last is not None and any(x is self.last[1] for x in (*args, *kwargs.values())):
                moments = self.last[0]
                moments.norm = name if moments.norm in (None, name) else ""

        return hook


def _settle_norms(model: nn.Module, found: Calibration) -> None:
    """Keep a norm that follows one layer alone and learns: its running mean can make up for a shift of the output."""
    taken = list(found.norms.values())
    for moments in found.layers.values():
        norm = moments.norm
        if not norm or taken.count(norm) > 1 or is_frozen_norm(model, model.get_submodule(norm)):
            moments.norm = None


def _note_missing(layers: Sequence[FoundLayer], found: Calibration) -> None:
    for layer in layers:
        moments = found.layers[layer.name]
        if moments.gram is None:
            known = is_summarized(layer) or moments.n_rows is None
            (found.unseen if known else found.unmeasured).append(layer.name)


def _is_small_table(module: Any) -> bool:
    """Whether it gives rows of a table, or sums of some, that cannot lie in all directions."""
    is_table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and getattr(module, "mode", "") != "max"
    return is_table and module.num_embeddings < module.embedding_dim


def _plain(x: Any) -> Tensor | None:
    """A layer's input as an ordinary tensor; the rows of a nested one below one another."""
    if not isinstance(x, Tensor):
        return None
    if x.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])
    return x if x.layout is torch.strided else x.to_dense()
