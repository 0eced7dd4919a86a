"""How much each layer's output matters: gradients of the model's output with respect to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensortrain.errors import KindError

from .layers import FoundLayer
from .losses import forward
from .observer import Observer

if TYPE_CHECKING:
    from .calibrate import Calibration

__all__ = ["OutputFunction", "default_output", "sentence_embedding", "weigh_outputs"]

OutputFunction = Callable[[nn.Module, Any], Tensor]
LARGEST_FULL_GRAM = 4608  # outputs; above, only the diagonal is kept


def default_output(model: nn.Module, batch: Any) -> Tensor:
    """The tensor a model is judged by: itself, ``logits``, ``last_hidden_state``, or the first tensor."""
    output = forward(model, batch)
    for found in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(found, Tensor):
            return found
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, (tuple, list)) else list(values or []):
        if isinstance(value, Tensor):
            return value
    raise KindError(
        f"a model must give a tensor to be judged by: found {type(output).__name__}. "
        "Pass output=(model, batch) -> tensor."
    )


def sentence_embedding(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean of an encoder's last hidden states over the tokens that count, scaled to length one: ``(b, c)``.

    Args:
        model: Gives an object with ``last_hidden_state``, as the encoders of transformers do.
        batch: With an ``"attention_mask"``.

    Raises:
        KindError: The model is no such encoder, or the batch has no mask.
    """
    hidden = getattr(forward(model, batch), "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or not isinstance(batch, Mapping) or "attention_mask" not in batch:
        raise KindError(
            f"a sentence must be encoded by hidden states and a mask: {type(model).__name__} gives no "
            "last_hidden_state, or the batch no attention_mask. Pass an encoder, and batches of its tokenizer."
        )
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def weigh_outputs(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    found: Calibration,
    n_batches: int,
    output: OutputFunction | None,
    observer: Observer,
) -> None:
    """Fill ``found.output_grams`` and ``found.output_scale`` from the batches that it keeps.

    For a random direction ``v`` of the model's output ``y``, ``g = d(v y) / d(layer output)`` has the second
    moment ``E[J^T J]``: with it, the quadratic form of a change of the layer's output predicts the squared
    change of ``y`` (Gauss-Newton).
    """
    judge, batches = output or default_output, found.batches[:n_batches]
    modes = [(module, module.training) for module in model.modules()]
    n_examples, scale = 0, 0.0
    generator = torch.Generator().manual_seed(0)
    observer.on_start("gradients", len(batches))
    try:
        model.eval()
        for k, batch in enumerate(batches):
            y, gradients = _gradients(model, layers, batch, judge, generator)
            y = y.double().reshape(y.shape or (1,))
            n_examples += y.shape[0]
            scale += float((y - y.mean(dim=0)).square().sum())
            for name, gradient in gradients.items():
                found.output_grams[name] = found.output_grams.get(name, 0.0) + gradient
            observer.on_step(k + 1)
    finally:
        for module, mode in modes:
            module.training = mode
        observer.on_end()
    for name in found.output_grams:
        found.output_grams[name] = found.output_grams[name] / max(1, n_examples)
    found.output_scale = max(scale / max(1, n_examples), 1e-30)


def _gradients(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    batch: Any,
    judge: OutputFunction,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the summed second moment of the gradients at every layer's output."""
    sums: dict[str, Tensor] = {}
    tags: list[Tensor] = []

    def watch(layer: FoundLayer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            # Adding a zero that wants a gradient makes the result want one too, frozen weights or not.
            tag = result.new_zeros((), requires_grad=True)
            tags.append(tag)
            tagged = result + tag
            if not tagged.requires_grad:  # the model runs this part under no_grad
                return result
            tagged.register_hook(lambda gradient: _add(sums, layer, gradient))
            return tagged

        return hook

    handles = [layer.module.register_forward_hook(watch(layer)) for layer in layers]
    try:
        with torch.enable_grad():
            y = judge(model, batch)
            direction = torch.randn(y.shape, generator=generator).to(y)
            if y.requires_grad:  # labels picked by argmax have no gradient
                torch.autograd.grad((y * direction).sum(), tags, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return y.detach(), sums


def _add(sums: dict[str, Tensor], layer: FoundLayer, gradient: Tensor) -> None:
    if layer.weight.kind == "conv":
        spatial = len(layer.weight.kernel)
        gradient = gradient.movedim(-spatial - 1, -1)
    rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
    wide = rows.shape[1] > LARGEST_FULL_GRAM
    moment = rows.double().square().sum(dim=0) if wide else (rows.T @ rows).double()
    sums[layer.name] = sums[layer.name] + moment if layer.name in sums else moment
