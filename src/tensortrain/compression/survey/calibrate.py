"""What the layers see: second moments of their inputs on calibration data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.output_weights import Spreads, weigh_outputs
from tensortrain.errors import DataError, NonFiniteError
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.batches import device_of, failed_on_batch, n_examples, opened, run_somehow, to_device
from tensortrain.train.modes import is_frozen_norm
from tensortrain.train.outputs import Output, judged_outputs
from tensortrain.train.preserve import preserved

__all__ = ["Calibration", "calibrate"]

LARGEST_FULL_GRAM = 4608  # inputs: 170 MB in float64; above, only the diagonal is kept
PATCHES_PER_BATCH = 2048  # of a convolution: neighbouring patches say nearly the same
_CONSTANT = 1e-10  # of the second moment: an input that varies less is the same for all rows


@dataclass
class Calibration:
    """Input statistics by layer name, and the batches they came from.

    Attributes:
        grams: ``(N, N)`` or ``(N,)`` float64 mean second moments, about the mean where the layer can make up
            for a shifted mean (by its bias, or a batch norm that follows); an embedding's token frequencies.
        means: ``(N,)`` mean inputs of those layers.
        norms: For a layer whose output goes straight into a batch norm and nowhere else, that norm's name.
        input_shapes: Shape of the last input in the first batch (with its batch axis).
        n_examples: Size of the first batch.
        output_grams: ``(M, M)`` or ``(M,)`` second moments of the gradients of the model's output with respect to
            the layer's, summed over the rows of an example: how much a change of the layer's output matters.
        output_scale: Mean square of the model's output about its mean, per example. Where there are several outputs,
            that of the first; ``output_grams`` weigh the others as if they had the same.
        unseen: Layers that no rows, or only equal ones, came to.
        unmeasured: Layers of a kind for which input moments are not taken.
        notes: What was left out.
        with_labels: The labels went into the model.
        calls: How often a layer ran on the first batch.
        structures: For a layer behind a flattening, the (channels, height, width) that were flattened.
        batches: The batches kept for measuring sensitivities.
    """

    grams: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    output_grams: dict[str, Tensor] = field(default_factory=dict)
    output_scale: float = 1.0
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    n_examples: int = 1
    calls: dict[str, int] = field(default_factory=dict)
    structures: dict[str, tuple[int, ...]] = field(default_factory=dict)
    batches: list[Any] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    with_labels: bool = False

    def weighing(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Second moments of a layer's inputs and of its output's gradients."""
        gram = self.grams.get(name)
        return gram, self.output_grams.get(name) if gram is not None else None


def calibrate(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    data: Iterable[Any],
    *,
    n_batches: int = 16,
    keep_batches: int = 2,
    grams: bool = True,
    gradient_batches: int = 6,
    output: Output | None = None,
    with_labels: bool = False,
    observer: Observer | None = None,
) -> Calibration:
    """Run some batches through the model and sum up what every layer is given.

    Positions that an ``attention_mask`` in the batch blanks out are not counted.

    Args:
        data: Batches as for training; labels are not used.
        n_batches: How many batches to run, at least one.
        grams: Off: record shapes alone.
        gradient_batches: How many of the batches also run backward, for ``output_grams``.
        output: Which outputs the model is judged by, see ``judged_outputs``; all when None.
        with_labels: The labels go into the model.

    Raises:
        DataError: The data gives no batches with an example.

    Cost: ``n_batches`` forward passes plus O(rows N^2) flops per layer with N inputs.
    """
    observer = observer or Silent()
    if n_batches < 1:
        raise DataError(
            f"calibration must see a batch: n_batches has {n_batches}, expected at least 1. Pass 16, or data=None."
        )
    found, counts = Calibration(with_labels=with_labels), dict[str, int]()
    mask: list[Tensor | None] = [None]
    handles = _watch(model, layers, found, counts, mask, grams)
    kept = max(keep_batches, gradient_batches if grams else 0)
    spreads = Spreads()

    def judge(batch: Any) -> dict[str, Tensor]:
        return judged_outputs(model, batch, output if grams else None, with_labels=with_labels)[0]

    observer.on_start("calibrate", n_batches)
    with preserved(model):
        try:
            model.eval()
            _run_batches(model, data, n_batches, judge if grams else None, found, spreads, mask, kept, observer)
        finally:
            for handle in handles:
                handle.remove()
            observer.on_end()
        if not found.batches:
            raise DataError(
                "data must give batches: calibration has none with an example, expected at least one. Pass a "
                "re-iterable such as a list or a DataLoader, not an iterator that is used up."
            )
        if grams and gradient_batches:
            weigh_outputs(model, layers, found, gradient_batches, judge, spreads, observer)
    del found.batches[keep_batches:]
    found.norms = {
        k: v for k, v in _one_to_one(found.norms).items() if not is_frozen_norm(model, model.get_submodule(v))
    }
    centred = {layer.name for layer in layers if getattr(layer.module, "bias", None) is not None} | set(found.norms)
    for name in list(found.grams):
        _finish(found, name, counts.get(name, 0), name in centred)
    if grams:
        known = [layer.name for layer in layers if _is_summarized(layer) or layer.name not in counts]
        found.unseen = [name for name in known if name not in found.grams]
        found.unmeasured = [n for n in (layer.name for layer in layers) if n not in known and n not in found.grams]
    return found


def _watch(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    found: Calibration,
    counts: dict[str, int],
    mask: list[Tensor | None],
    grams: bool,
) -> list[Any]:
    """Hooks on the layers and what lies between them; the caller removes them."""
    feature_map: list[tuple[int, ...]] = [()]
    handles: list[Any] = []
    for layer in layers:
        register = layer.module.register_forward_pre_hook
        handles.append(register(_recorder(layer, found, counts, mask, grams), with_kwargs=True))
        handles.append(register(_structure_recorder(layer, found, feature_map)))
    handles += [module.register_forward_hook(_feature_map_recorder(feature_map)) for module in model.modules()]
    return handles + _norm_watchers(model, layers, found.norms)


@torch.no_grad()
def _run_batches(
    model: nn.Module,
    data: Iterable[Any],
    n_batches: int,
    judge: Callable[[Any], dict[str, Tensor]] | None,
    found: Calibration,
    spreads: Spreads,
    mask: list[Tensor | None],
    kept: int,
    observer: Observer,
) -> None:
    device = device_of(model)
    with opened(data) as batches:
        for k, batch in enumerate(itertools.islice(batches, n_batches)):
            observer.on_step(k + 1)
            if not n_examples(batch):
                continue
            batch = to_device(batch, device)
            if not found.batches:
                found.n_examples = n_examples(batch)
            mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            try:
                outputs = judge(batch) if judge is not None else run_somehow(model, batch)
            except Exception as error:
                raise failed_on_batch(model, batch, error) from error
            if judge is not None:
                spreads.add(outputs)
            if len(found.batches) < max(1, kept):
                found.batches.append(batch)


def _finish(found: Calibration, name: str, count: int, centred: bool) -> None:
    """Sums to means; about the mean where a shift of the layer's mean output does no harm.

    Statistics of no rows, of NaN, or of inputs that never change say nothing about a layer: they are dropped.
    """
    gram, mean = found.grams.pop(name), found.means.pop(name, None)
    second = _trace(gram)
    if not count or not math.isfinite(second) or second <= 0:
        return
    gram = gram / count
    if mean is not None and centred:
        mean = mean / count
        gram = gram - (mean.square() if gram.ndim == 1 else torch.outer(mean, mean))
        if _trace(gram) <= _CONSTANT * second / count:
            return
        found.means[name] = mean
    found.grams[name] = gram


def _trace(gram: Tensor) -> float:
    return float((gram if gram.ndim == 1 else gram.diagonal()).sum())


def _norm_watchers(model: nn.Module, layers: Sequence[FoundLayer], norms: dict[str, str]) -> list[Any]:
    """Hooks that note which batch norm a layer's output goes straight into; ``""`` where there are several."""
    last: list[tuple[str, Tensor]] = []

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            last[:] = [(name, output)]

        return hook

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if last and any(x is last[0][1] for x in (*args, *kwargs.values())):
                layer = last[0][0]
                norms[layer] = name if norms.get(layer, name) == name else ""

        return hook

    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [layer.module.register_forward_hook(leave(layer.name)) for layer in layers] + [
        norm.register_forward_pre_hook(enter(name), with_kwargs=True) for name, norm in found.items()
    ]


def _one_to_one(norms: dict[str, str]) -> dict[str, str]:
    """Layers with one norm that follows no other layer: its running mean can make up for a shift of the output."""
    taken = list(norms.values())
    return {layer: norm for layer, norm in norms.items() if norm and taken.count(norm) == 1}


def _recorder(
    layer: FoundLayer, found: Calibration, counts: dict[str, int], mask: list[Tensor | None], grams: bool
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    summarize = _SUMMARIES.get(layer.weight.kind)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _plain(args[0] if args else next(iter(kwargs.values()), None))
        if x is None:
            return
        counts.setdefault(layer.name, 0)
        if not found.batches:  # the first one; the last may be short
            found.input_shapes[layer.name] = tuple(x.shape)
            found.calls[layer.name] = found.calls.get(layer.name, 0) + 1
        if not grams or summarize is None:
            return
        summary = summarize(layer, x, mask[0])
        if summary is None:
            return
        gram, mean, count = summary
        _add(found.grams, layer.name, gram)
        if mean is not None:
            _add(found.means, layer.name, mean)
        counts[layer.name] = counts.get(layer.name, 0) + count

    return record


def _plain(x: Any) -> Tensor | None:
    """A layer's input as an ordinary tensor; the rows of a nested one below one another."""
    if not isinstance(x, Tensor):
        return None
    if x.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])
    return x if x.layout is torch.strided else x.to_dense()


def _feature_map_recorder(feature_map: list[tuple[int, ...]]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3:
            feature_map[0] = tuple(output.shape[1:])

    return record


def _structure_recorder(
    layer: FoundLayer, found: Calibration, feature_map: list[tuple[int, ...]]
) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        flattened = feature_map[0]
        if layer.weight.kind == "linear" and math.prod(flattened) == layer.weight.in_features and flattened:
            found.structures[layer.name] = flattened

    return record


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


# Sums over the rows of a batch: second moment, first moment (if there is one), number of rows.
Summary = tuple[Tensor, Tensor | None, int]


def _linear_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary:
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.shape == x.shape[:-1]:
        rows = rows[mask.reshape(-1).bool()]
    rows = _finite(layer, rows)
    return _second_moment(rows), rows.double().sum(dim=0), rows.shape[0]


def _embedding_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary:
    ids = x[mask.bool()] if mask is not None and mask.shape == x.shape else x.reshape(-1)
    counts = torch.bincount(ids.reshape(-1).long(), minlength=layer.weight.in_features)
    return counts.double(), None, int(ids.numel())


def _conv_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary | None:
    conv = layer.module
    if not _is_summarized(layer) or x.ndim != len(layer.weight.kernel) + 2:
        return None
    assert isinstance(conv, _ConvNd)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        x = F.pad(x, conv._reversed_padding_repeated_twice)  # zeros at the border change the moments little
        padding: Any = 0
    else:
        padding = conv.padding
    few = max(1, math.ceil(x.shape[0] / 8))  # unfolding multiplies memory by the kernel's size
    patches = _patches(conv, x[:: max(1, x.shape[0] // few)], padding)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    stride = max(1, rows.shape[0] // PATCHES_PER_BATCH)
    rows = _finite(layer, rows[::stride])
    return _second_moment(rows), rows.double().sum(dim=0), rows.shape[0]


def _patches(conv: _ConvNd, x: Tensor, padding: Any) -> Tensor:
    """What the kernel is laid over: (b, channels times kernel size, places)."""
    if x.ndim == 4:
        return F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    size, stride, spread = ((1, *each) for each in (conv.kernel_size, conv.stride, conv.dilation))
    around = (0, *(padding if isinstance(padding, tuple) else (padding,)))
    return F.unfold(x.unsqueeze(2), size, spread, around, stride)


def _is_summarized(layer: FoundLayer) -> bool:
    """Whether there are statistics of this kind of layer."""
    plain = not isinstance(layer.module, _ConvNd) or (
        type(layer.module) in (nn.Conv1d, nn.Conv2d) and layer.module.groups == 1
    )
    return layer.weight.kind in _SUMMARIES and plain


def _finite(layer: FoundLayer, rows: Tensor) -> Tensor:
    """Rows without NaN or Inf, which half precision gives now and then.

    Raises:
        NonFiniteError: There is none.
    """
    good = torch.isfinite(rows).all(dim=1)
    if bool(good.all()):  # one host sync per layer and batch
        return rows
    if not bool(good.any()):
        raise NonFiniteError(
            f"calibration data must give finite numbers: all rows that come to layer {layer.name!r} hold NaN or Inf. "
            "Check the calibration data, and the model's outputs on it."
        )
    return rows[good]


def _second_moment(rows: Tensor) -> Tensor:
    if rows.shape[1] > LARGEST_FULL_GRAM:
        return rows.double().square().sum(dim=0)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return (rows.T @ rows).double()


_SUMMARIES: dict[str, Callable[[FoundLayer, Tensor, Tensor | None], Summary | None]] = {
    "linear": _linear_summary,
    "conv": _conv_summary,
    "embedding": _embedding_summary,
}
