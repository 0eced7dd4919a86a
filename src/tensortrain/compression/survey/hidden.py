"""Hidden units of a model: channels that some layers make, that one layer reads, and that nothing else sees.

Found by running the model once with gradients instead of by names, so that any model will do: if channel j of the
reader's input depends on channel j of the makers' outputs alone, and nothing else in the model depends on these
outputs, then channels can be taken out of all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensortrain.nn import is_transformers_conv1d
from tensortrain.train.modes import modes_kept

__all__ = ["HiddenUnits", "Run", "Trace", "channel_axis", "find_hidden_units", "some_channels", "traced"]

Run = Callable[[nn.Module], object]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)


@dataclass(frozen=True)
class HiddenUnits:
    """Channels that can be taken out of several layers together.

    Attributes:
        makers: Names of the layers whose outputs they are; of a gated unit there are two.
        between: Names of layers that hold numbers for each channel: batch norms, depthwise convolutions, ..
        reader: Name of the layer that reads them.
        n_units: How many there are.
    """

    makers: tuple[str, ...]
    between: tuple[str, ...]
    reader: str
    n_units: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers that make and read the units."""
        return (*self.makers, self.reader)


def channel_axis(module: nn.Module) -> int:
    """The axis of a layer's input and output that holds its channels."""
    return 1 if isinstance(module, (*_CONVS, *_CHANNELWISE)) else -1


def find_hidden_units(model: nn.Module, run: Run, *, training: bool = False) -> list[HiddenUnits]:
    """The hidden units of a model, in the order in which their readers run.

    Args:
        model: Its parameters and modes are as before afterwards.
        run: ``run(model)`` calls the model on one batch and gives its outputs.
        training: In train mode, where a model may read them elsewhere too. Wrap it in ``preserved`` then.

    Cost: one forward pass with gradients; for each layer two backward passes to the layers before it, and two more to
    all inputs where it reads hidden units.
    """
    with traced(model, run, training=training) as trace:
        found = [trace.units_of(name) for name in trace.order]
    return [one for one in found if one is not None]


@contextmanager
def traced(model: nn.Module, run: Run, *, training: bool = False) -> Iterator[Trace]:
    """One pass of a model with gradients, see ``Trace``; arguments as ``find_hidden_units``."""
    parts = _parts(model)
    with modes_kept(model), _all_trained(model), torch.enable_grad(), ExitStack() as stack:
        model.train(training)
        trace = Trace(model, parts, stack)
        outputs = run(model)
        trace.ends.extend(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
        yield trace


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that make or read channels, by name."""
    return {name: one for name, one in model.named_modules() if _is_layer(one)}


def _is_layer(module: nn.Module) -> bool:
    if "weight" not in module._parameters:  # as under weight norm, which computes it from others
        return False
    if type(module) is nn.Linear or is_transformers_conv1d(module):
        return True
    return type(module) in _CONVS and int(module.groups) == 1  # type: ignore[arg-type]


def _is_channelwise(module: nn.Module) -> bool:
    if type(module) in _CONVS:
        return bool(module.groups == module.in_channels == module.out_channels)
    return type(module) in _CHANNELWISE and any(True for _ in module.parameters())


class Trace:
    """One forward pass where the output of every layer is a leaf, so that every dependence ends at the next layer."""

    def __init__(self, model: nn.Module, parts: dict[str, nn.Module], stack: ExitStack) -> None:
        self.model, self.parts = model, parts
        self.order: list[str] = []  # in which layers ran
        self.inputs: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.twice: set[str] = set()
        self.ends: list[Tensor] = []
        self.channelwise = {name: one for name, one in model.named_modules() if _is_channelwise(one)}
        for name, part in parts.items():
            handle = part.register_forward_hook(self._cut(name), with_kwargs=True)
            stack.callback(handle.remove)

    def _cut(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = (*args, *kwargs.values())
            if name in self.inputs or len(given) != 1 or not isinstance(output, Tensor):
                self.twice.add(name)
                self.ends.extend(x for x in given if isinstance(x, Tensor))
                return output.detach().clone()
            self.order.append(name)
            self.inputs[name] = given[0]
            self.leaves[name] = output.detach().requires_grad_()
            return self.leaves[name].clone()  # the next layer may write to it

        return hook

    def units_of(self, reader: str) -> HiddenUnits | None:
        """The units that a layer reads, if nothing else does and channels stay apart on their way."""
        x = self.inputs[reader]
        if reader in self.twice or not x.requires_grad:
            return None
        n, axis = x.shape[channel_axis(self.parts[reader])], channel_axis(self.parts[reader])
        makers = self._makers(x, axis)
        if not makers or any(m in self.twice or self._n_made(m) != n for m in makers):
            return None
        between = self.between(x)
        if between is None or not self._seen_by_reader_alone(makers, reader):
            return None
        return HiddenUnits(tuple(makers), tuple(between), reader, n)

    def _n_made(self, maker: str) -> int:
        return self.leaves[maker].shape[channel_axis(self.parts[maker])]

    def _makers(self, x: Tensor, axis: int) -> list[str]:
        """The layers whose outputs a tensor depends on, if every channel of it on the same channel of theirs alone."""
        some = some_channels(x.shape[axis], x.device)
        first = self._reached(x, axis, some)
        second = None if first is None else self._reached(x, axis, ~some)
        if first is None or second is None:
            return []
        return [name for name in self.leaves if name in first or name in second]

    def _reached(self, x: Tensor, axis: int, some: Tensor) -> set[str] | None:
        """The layers on which some channels of a tensor depend; ``None`` if on other channels of theirs."""
        shape = [1] * x.ndim
        shape[axis] = -1
        grads = _gradients([x], [_weights(x) * some.reshape(shape)], list(self.leaves.values()))
        found = set()
        for name, grad in zip(self.leaves, grads, strict=True):
            if grad is None:
                continue
            own = grad.movedim(channel_axis(self.parts[name]), 0).flatten(1).abs().amax(dim=1) != 0
            if len(own) != len(some) or bool((own & ~some).any()):
                return None
            if bool(own.any()):
                found.add(name)
        return found

    def between(self, x: Tensor) -> list[str] | None:
        """Layers with numbers of channels on the way; ``None`` if other parameters take part."""
        known = {id(p): name for name, one in self.channelwise.items() for p in one.parameters(recurse=False)}
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(x.sum(), parameters, allow_unused=True, retain_graph=True)
        used = [p for p, grad in zip(parameters, grads, strict=True) if grad is not None]
        if any(id(p) not in known for p in used):
            return None
        return list(dict.fromkeys(known[id(p)] for p in used))

    def _seen_by_reader_alone(self, makers: Sequence[str], reader: str) -> bool:
        others = [x for name, x in self.inputs.items() if name != reader] + self.ends
        ends = [x for x in others if x.requires_grad and x.is_floating_point()]
        if not ends:
            return True
        grads = _gradients(ends, [_weights(x) for x in ends], [self.leaves[m] for m in makers])
        return all(grad is None or not bool((grad != 0).any()) for grad in grads)


def _weights(x: Tensor) -> Tensor:
    """Random weights of the entries of a tensor, none of them small: what depends on it shows in their sum."""
    return torch.rand_like(x).add_(0.5)


def _gradients(
    ends: Sequence[Tensor], weights: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Of the weighted sum of some tensors; the sum itself is not made, which would save copies of all of them."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        list(ends), list(leaves), list(weights), allow_unused=True, retain_graph=True
    )
    return found


def some_channels(n: int, device: torch.device) -> Tensor:
    """Half of the channels, at random but the same each time."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    some = torch.zeros(n, dtype=torch.bool)
    some[order[: math.ceil(n / 2)]] = True
    return some.to(device)


@contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """Every parameter with gradients inside, so that the graph tells who takes part."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
