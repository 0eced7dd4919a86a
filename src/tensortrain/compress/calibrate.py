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

from tensortrain.errors import DataError

from .layers import FoundLayer
from .losses import forward
from .observer import Observer, Silent
from .output_weights import OutputFunction, weigh_outputs

__all__ = ["Calibration", "calibrate"]

LARGEST_FULL_GRAM = 4608  # inputs: 170 MB in float64; above, only the diagonal is kept
PATCHES_PER_BATCH = 2048  # of a convolution: neighbouring patches say nearly the same


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
        output_scale: Mean square of the model's output about its mean, per example.
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
    output: OutputFunction | None = None,
    observer: Observer | None = None,
) -> Calibration:
    """Run some batches through the model and sum up what every layer is given.

    Positions that an ``attention_mask`` in the batch blanks out are not counted.

    Args:
        data: Batches as for training; labels are not used.
        n_batches: How many batches to run, at least one.
        grams: Off: record shapes alone.
        gradient_batches: How many of the batches also run backward, for ``output_grams``.
        output: ``(model, batch) -> tensor`` the model is judged by.

    Raises:
        DataError: The data gives no batches.

    Cost: ``n_batches`` forward passes plus O(rows N^2) flops per layer with N inputs.
    """
    observer = observer or Silent()
    if n_batches < 1:
        raise DataError(
            f"calibration must see a batch: n_batches has {n_batches}, expected at least 1. Pass 16, or data=None."
        )
    found, counts = Calibration(), dict[str, int]()
    mask: list[Tensor | None] = [None]
    handles = _watch(model, layers, found, counts, mask, grams)
    training = [(module, module.training) for module in model.modules()]
    kept = max(keep_batches, gradient_batches if grams else 0)
    observer.on_start("calibrate", n_batches)
    try:
        model.eval()
        _run_batches(model, itertools.islice(data, n_batches), found, mask, kept, observer)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
        observer.on_end()
    if not found.input_shapes and not found.batches:
        raise DataError(
            "data must give batches: calibration has none, expected at least one. Pass a re-iterable such as a list "
            "or a DataLoader, not an iterator that is used up."
        )
    if grams and gradient_batches:
        weigh_outputs(model, layers, found, gradient_batches, output, observer)
        del found.batches[keep_batches:]
    found.norms = _one_to_one(found.norms)
    centred = {layer.name for layer in layers if getattr(layer.module, "bias", None) is not None} | set(found.norms)
    for name, count in counts.items():
        if count:
            _finish(found, name, count, name in centred)
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
        handles.append(register(_recorder(layer, found, counts, mask, grams)))
        handles.append(register(_structure_recorder(layer, found, feature_map)))
    handles += [module.register_forward_hook(_feature_map_recorder(feature_map)) for module in model.modules()]
    return handles + _norm_watchers(model, layers, found.norms)


@torch.no_grad()
def _run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    found: Calibration,
    mask: list[Tensor | None],
    kept: int,
    observer: Observer,
) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for k, batch in enumerate(batches):
        batch = _moved(batch, device)
        if k == 0:
            found.n_examples = max(1, _n_examples(batch))
        mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        forward(model, batch)
        if k < kept:
            found.batches.append(batch)
        observer.on_step(k + 1)


def _finish(found: Calibration, name: str, count: int, centred: bool) -> None:
    """Sums to means; about the mean where a shift of the layer's mean output does no harm."""
    gram = found.grams[name] / count
    mean = found.means.pop(name, None)
    if mean is not None and centred:
        mean = mean / count
        gram = gram - (mean.square() if gram.ndim == 1 else torch.outer(mean, mean))
        found.means[name] = mean
    found.grams[name] = gram


def _norm_watchers(model: nn.Module, layers: Sequence[FoundLayer], norms: dict[str, str]) -> list[Any]:
    """Hooks that note which batch norm a layer's output goes straight into; ``""`` where there are several."""
    last: list[tuple[str, Tensor]] = []

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            last[:] = [(name, output)]

        return hook

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if last and args and args[0] is last[0][1]:
                layer = last[0][0]
                norms[layer] = name if norms.get(layer, name) == name else ""

        return hook

    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [layer.module.register_forward_hook(leave(layer.name)) for layer in layers] + [
        norm.register_forward_pre_hook(enter(name)) for name, norm in found.items()
    ]


def _one_to_one(norms: dict[str, str]) -> dict[str, str]:
    """Layers with one norm that follows no other layer: its running mean can make up for a shift of the output."""
    taken = list(norms.values())
    return {layer: norm for layer, norm in norms.items() if norm and taken.count(norm) == 1}


def _recorder(
    layer: FoundLayer, found: Calibration, counts: dict[str, int], mask: list[Tensor | None], grams: bool
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    summarize = _SUMMARIES.get(layer.weight.kind)

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
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
    return _second_moment(rows), rows.double().sum(dim=0), rows.shape[0]


def _embedding_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary:
    ids = x[mask.bool()] if mask is not None and mask.shape == x.shape else x.reshape(-1)
    counts = torch.bincount(ids.reshape(-1).long(), minlength=layer.weight.in_features)
    return counts.double(), None, int(ids.numel())


def _conv_summary(layer: FoundLayer, x: Tensor, mask: Tensor | None) -> Summary | None:
    conv = layer.module
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1 or x.ndim != 4:
        return None
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        x = F.pad(x, conv._reversed_padding_repeated_twice)  # zeros at the border change the moments little
        padding: Any = 0
    else:
        padding = conv.padding
    few = max(1, math.ceil(x.shape[0] / 8))  # unfolding multiplies memory by the kernel's size
    patches = F.unfold(x[:: max(1, x.shape[0] // few)], conv.kernel_size, conv.dilation, padding, conv.stride)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    stride = max(1, rows.shape[0] // PATCHES_PER_BATCH)
    rows = rows[::stride]
    return _second_moment(rows), rows.double().sum(dim=0), rows.shape[0]


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


def _n_examples(batch: Any) -> int:
    """Size of the first axis of the first tensor in a batch."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((_n_examples(value) for value in values if isinstance(value, (Tensor, tuple, list, Mapping))), 1)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_moved(value, device) for value in batch)
    return batch
