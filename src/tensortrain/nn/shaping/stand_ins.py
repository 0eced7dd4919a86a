"""What stands in for a layer's cores during one forward pass, such as cores made from other numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tensortrain.errors import KindError
from tensortrain.nn.base import FactorizedLayer

__all__ = ["Handle", "check_has_factorized", "distinct_layers", "make_cores_once", "transform_cores", "transforms_of"]

Transform = Callable[[FactorizedLayer, list[Tensor]], list[Tensor]]


class Handle:
    """Takes back what was registered: ``remove()``, or the end of a ``with`` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    @classmethod
    def join(cls, handles: Iterable[Handle]) -> Handle:
        """One handle for all."""
        return cls([one for handle in handles for one in handle._handles])

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def transform_cores(layer: FactorizedLayer, transform: Transform) -> Handle:
    """Let every forward pass of a layer use ``transform(layer, cores)`` instead of its cores."""
    before = layer.register_forward_pre_hook(_Replace(transform))
    return Handle([before, layer.register_forward_hook(_restore, always_call=True)])


def transforms_of(layer: FactorizedLayer) -> list[Transform]:
    """What ``transform_cores`` has put on a layer, first applied first."""
    return [hook.transform for hook in layer._forward_pre_hooks.values() if isinstance(hook, _Replace)]


def make_cores_once(layer: FactorizedLayer) -> None:
    """Let a forward pass make constrained cores once, however often it asks for them."""
    if not any(hook is _hold for hook in layer._forward_pre_hooks.values()):
        layer.register_forward_pre_hook(_hold)
        layer.register_forward_hook(_restore, always_call=True)


class _Replace:
    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, layer: FactorizedLayer, args: Any) -> None:
        layer.stand_ins = self.transform(layer, layer.core_list())


def _hold(layer: FactorizedLayer, args: Any) -> None:
    if layer.stand_ins is None and not torch.compiler.is_compiling():  # a compiler sees equal terms by itself
        layer.stand_ins = list(layer.cores)


def _restore(layer: FactorizedLayer, args: Any, output: Any) -> None:
    layer.stand_ins = None


def distinct_layers(model: nn.Module) -> Iterator[FactorizedLayer]:
    """The factorized layers of a model, those that share all their cores only once."""
    seen: set[tuple[int, ...]] = set()
    for module in model.modules():
        if isinstance(module, FactorizedLayer):
            key = tuple(id(parameter) for parameter in module.cores.parameters())
            if key not in seen:
                seen.add(key)
                yield module


def check_has_factorized(model: nn.Module, what: str) -> None:
    """Raise ``KindError`` for a model without factorized layers."""
    if not any(isinstance(module, FactorizedLayer) for module in model.modules()):
        raise KindError(
            f"{what} needs a factorized layer: found none in {type(model).__name__}. Make one with "
            "tensortrain.nn.Linear.from_dense, or pass a part of the model that has some."
        )
