"""The list of a layer's cores: parameters, and a module that can be called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["PLAIN_LISTS", "Cores", "are_plain", "held_cores", "holding_cores", "is_watched", "list_cores"]

_NAMES = [str(k) for k in range(64)]  # of parameters in a list


class Cores(nn.ParameterList):
    """The cores of a layer: a parameter list that is called where something hangs on its call.

    Offloading, pruning, weight norm and sharding work by hooks on a module's call, or by a ``forward`` of their own
    on the instance, which a plain ``ParameterList`` never sees.
    """

    __call__: Callable[..., Any] = nn.Module.__call__

    def forward(self) -> tuple[Tensor, ...]:
        """The cores in order, whatever order they are stored in."""
        return tuple(getattr(self, str(k)) for k in range(len(self)))


PLAIN_LISTS = (Cores, nn.ParameterList)


def is_watched(cores: nn.Module) -> bool:
    """Whether something waits for the list of cores to be called."""
    state = cores.__dict__  # past attributes of modules, which take longer to look up
    if state["_forward_pre_hooks"] or state["_forward_hooks"] or "forward" in state:
        return True
    return bool(state["_backward_hooks"] or state["_backward_pre_hooks"])


def are_plain(cores: nn.Module) -> bool:
    """Whether the cores are the parameters that are stored, no more: neither constrained nor watched."""
    return type(cores) in PLAIN_LISTS and not is_watched(cores)


def list_cores(cores: Any) -> list[Tensor]:
    """The cores in order; hooks on the list run."""
    # Going through ParameterList costs more than a small product. Constrained cores are a list of another type;
    # weight norm, pruning or a replica for another device keeps some of them elsewhere or in another order.
    if type(cores) in PLAIN_LISTS:
        if not is_watched(cores):
            stored = cores._parameters
            return list(stored.values()) if list(stored) == _NAMES[: len(cores)] else list(cores)
    elif not (isinstance(cores, Cores) and is_watched(cores)):
        return list(cores)
    return list(cores()) if isinstance(cores, Cores) else list(cores)


# -- cores that are called once in a forward pass ------------------------------------------------------------


class _Held(threading.local):
    """What the calls of watched cores gave, for the time of one forward pass of one thread."""

    def __init__(self) -> None:
        self.by_layer: dict[int, list[Tensor]] = {}


_held = _Held()


def held_cores(layer: nn.Module) -> list[Tensor] | None:
    """The cores that the forward pass under way has called already."""
    return _held.by_layer.get(id(layer)) if _held.by_layer else None


@contextmanager
def holding_cores(layer: nn.Module, cores: nn.Module) -> Iterator[None]:
    """Call watched cores once for everything inside."""
    key = id(layer)
    if key in _held.by_layer:
        yield
        return
    _held.by_layer[key] = list_cores(cores)
    try:
        yield
    finally:
        del _held.by_layer[key]
