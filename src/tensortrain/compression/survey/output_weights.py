"""How much each layer's output matters: gradients of the model's output with respect to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.joined import join_gradients
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration, LayerMoments, n_moments
from tensortrain.errors import KindError
from tensortrain.system.observer import Observer
from tensortrain.system.offloading import let_go_of_weights
from tensortrain.system.parking import activations_parked
from tensortrain.system.processes import gathered, n_processes, own_rank, own_share
from tensortrain.train.batches import device_of, run
from tensortrain.train.outputs import CONSTANT, OutputFunction

__all__ = [
    "Judge",
    "OutputFunction",
    "Spreads",
    "along_random_directions",
    "frozen",
    "go_backward",
    "sentence_embedding",
    "weigh_outputs",
]

_AT_ONCE = 2**20  # gradients that are made doubles of

Judge = Callable[[Any], dict[str, Tensor]]  # batch -> the outputs that count, by name
Sizes = tuple[tuple[int, ...], ...]
Take = Callable[[Tensor], None]
Taken = Callable[[FoundLayer, Any, Tensor], Take | None]  # (layer, input, output) -> what the gradients are handed to
# (outputs, batch) -> what of them counts, and a random direction for each
Along = Callable[[Mapping[str, Tensor], Any], tuple[list[Tensor], list[Tensor]]]


class Spreads:
    """How strongly each output varies from example to example, in its metric, summed over batches."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.sums: dict[str, tuple[float, float]] = {}
        self.n_examples = 0
        self.drawn: list[list[dict[str, Sizes]]] = [[]]  # by process and batch, what random directions draw

    def add(self, outputs: Mapping[str, Tensor], batch: Any) -> None:
        """Take in the outputs of one batch."""
        self.n_examples += max((y.shape[0] if y.ndim else 1 for y in outputs.values()), default=0)
        self.drawn[0].append({name: self.metric.drawn_sizes(name, y, batch) for name, y in outputs.items()})
        for name, y in outputs.items():
            about, square = self.metric.spread(name, y, batch)
            known = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (known[0] + float(about), known[1] + float(square))

    def join(self) -> None:
        """Add up those of several processes."""
        parts = gathered((self.sums, self.n_examples, self.drawn[0]))
        if len(parts) == 1:
            return
        self.n_examples = sum(n for _, n, _ in parts)
        self.drawn = [drawn for _, _, drawn in parts]
        for name in self.sums:
            pairs = [sums[name] for sums, _, _ in parts if name in sums]
            self.sums[name] = (sum(about for about, _ in pairs), sum(square for _, square in pairs))

    def pass_over(self, k: int, processes: Iterable[int], names: Collection[str], generator: torch.Generator) -> None:
        """Draw what other processes draw for their batch of that number, so that all draw as one would."""
        for process in processes:
            batches = self.drawn[process]
            for name, sizes in batches[k].items() if k < len(batches) else ():
                for size in sizes if name in names else ():
                    torch.randn(size, generator=generator)

    def scales(self) -> dict[str, float]:
        """Mean square about the mean per example; the mean square where an output hardly varies. None is 0."""
        found = {name: about if about > CONSTANT * square else square for name, (about, square) in self.sums.items()}
        return {name: value / self.n_examples for name, value in found.items() if 0 < value < math.inf}


def sentence_embedding(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean of an encoder's last hidden states over the tokens that count, scaled to length one: ``(b, c)``.

    Args:
        model: Gives an object with ``last_hidden_state``, as the encoders of transformers do.
        batch: With an ``"attention_mask"``.

    Raises:
        KindError: The model is no such encoder, or the batch has no mask.
    """
    hidden = getattr(run(model, batch), "last_hidden_state", None)
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
    judge: Judge,
    spreads: Spreads,
    observer: Observer,
) -> None:
    """Fill ``found.output_grams`` and ``found.output_scale`` from the batches that it keeps.

    For a random direction ``v`` of the model's output ``y``, ``g = d(v y) / d(layer output)`` has the second
    moment ``E[J^T J]``: with it, the quadratic form of a change of the layer's output predicts the squared
    change of ``y`` (Gauss-Newton); of class probabilities, twice their divergence in nats (Fisher), since directions
    are drawn in the metric of each output. Several outputs count alike: each is scaled to the spread of the first.
    """
    scales, batches = spreads.scales(), found.batches[: own_share(n_batches)]
    if not scales:
        found.notes.append("The outputs are zero or not finite on all of the data: layers are weighed by inputs alone.")
        return
    found.output_scale = next(iter(scales.values()))
    found.in_nats = spreads.metric.in_nats(next(iter(scales)))
    shares = found.output_shares = {name: math.sqrt(found.output_scale / scale) for name, scale in scales.items()}
    count, failed, generator = 0, "", torch.Generator().manual_seed(0)

    def along(outputs: Mapping[str, Tensor], batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        drawn = along_random_directions(spreads.metric, shares, generator, outputs, batch)
        found.tidy()
        return drawn

    def taken(layer: FoundLayer, x: Any, result: Tensor) -> Take:
        return lambda gradient: _add(found.layers[layer.name], layer, gradient)

    observer.on_start("gradients", len(batches))
    try:
        for k, batch in enumerate(batches):
            try:
                with frozen(model), activations_parked(model.parameters()):
                    spreads.pass_over(k, range(own_rank()), shares, generator)
                    count += go_backward(layers, batch, judge, along, taken)
                    spreads.pass_over(k, range(own_rank() + 1, n_processes()), shares, generator)
            except Exception as error:  # a part without a backward: inputs alone have to do
                reason = " ".join(str(error).split())
                failed = f"Layers are weighed by inputs alone: no gradients ({type(error).__name__}: {reason:.120})."
                break
            found.tidy()
            observer.on_step(k + 1)
    finally:
        observer.on_end()
    parts = gathered((count, failed))
    failures = [failed for _, failed in parts if failed]
    if failures:
        for moments in found.layers.values():
            moments.output_gram = None
        found.notes.append(failures[0])
        return
    join_gradients(found, device_of(model))
    count = sum(n for n, _ in parts)
    for moments in found.layers.values():
        moments.finish_gradients(max(1, count))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter with gradients inside: backward does not need what comes to the layers then."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def go_backward(
    layers: Sequence[FoundLayer], batch: Any, judge: Judge, along: Along, taken: Taken, *, times: int = 1
) -> int:
    """Go backward from a random direction of the outputs, and hand on what comes to every layer's output.

    Args:
        along: Draws the direction.
        taken: Told of every call of a layer, gives what its gradients are handed to.
        times: How many directions are drawn.

    Returns:
        The number of examples.
    """
    tags: list[Tensor] = []
    last: list[nn.Module] = []  # that backward has come to, whose weights it needs no more

    def take_in(module: nn.Module, take: Take, gradient: Tensor) -> None:
        for one in last:
            let_go_of_weights(one)
        last[:] = [module]
        take(gradient)

    def watch(layer: FoundLayer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            if not isinstance(result, Tensor) or result.is_nested or not result.is_floating_point():
                return result
            # Adding a zero that wants a gradient makes the result want one too, frozen weights or not.
            tag = result.new_zeros((), requires_grad=True)
            tags.append(tag)
            tagged = result + tag
            if not tagged.requires_grad:  # the model runs this part under no_grad
                return result
            take = taken(layer, args[0] if args else next(iter(kwargs.values()), None), result.detach())
            if take is not None:
                tagged.register_hook(partial(take_in, layer.module, take))
            return tagged

        return hook

    handles = [layer.module.register_forward_hook(watch(layer), with_kwargs=True) for layer in layers]
    try:
        # cuDNN has no backward for recurrent layers in eval mode
        with torch.inference_mode(False), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            outputs = judge(batch)
            count = max((y.shape[0] if y.ndim else 1 for y in outputs.values()), default=0)
            for k in range(times):
                values, directions = along(outputs, batch)
                is_last = k + 1 == times
                if is_last:
                    del outputs
                if values:  # labels picked by argmax have no gradient
                    torch.autograd.grad(values, tags, directions, allow_unused=True, retain_graph=not is_last)
                    for module in last:
                        let_go_of_weights(module)
    finally:
        for handle in handles:
            handle.remove()
    return count


def along_random_directions(
    metric: Metric, shares: Mapping[str, float], generator: torch.Generator, outputs: Mapping[str, Tensor], batch: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """What counts of the outputs that have a gradient, and a random direction for each, times their shares."""
    pairs = []
    for name, y in outputs.items():
        if y.requires_grad and name in shares:
            values, direction = metric.along(name, y, batch, generator)
            pairs.append((values, direction.mul_(shares[name])))
    return [values for values, _ in pairs], [direction for _, direction in pairs]


def _add(moments: LayerMoments, layer: FoundLayer, gradient: Tensor) -> None:
    """Take in the gradients of one call; of many outputs, whose squares alone count, some at a time."""
    if layer.weight.kind == "conv":
        gradient = gradient.movedim(-len(layer.weight.kernel) - 1, -1)
    rows = gradient.detach().reshape(-1, gradient.shape[-1])
    parts = rows.split(max(1, len(rows) if n_moments(rows.shape[1]) > rows.shape[1] else _AT_ONCE // rows.shape[1]))
    for some in parts:
        moments.add_gradients(some.float().nan_to_num(0.0, 0.0, 0.0))
