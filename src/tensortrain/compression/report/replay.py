"""A model run again with some layers changed, from the first of these layers on.

What runs before them gives what it gave: so modules that had ended by then answer with their outputs of the first run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Replay"]

_MOST_BYTES = 2**25  # of outputs that are held: those of the modules that lie deepest go first
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

Result = TypeVar("Result")


@dataclass
class _Call:
    """The only call of a module.

    Attributes:
        began, ended: Its place among the beginnings and ends of all calls.
        given: Its inputs, with how often each had been written to; while it runs.
        output: What it gave, None where that cannot be given again.
        versions: How often the tensors of the output had been written to.
    """

    module: nn.Module
    depth: int
    began: int
    given: list[tuple[Tensor, int]] | None
    ended: int | None = None
    output: Any = None
    versions: tuple[int, ...] = ()

    def end(self, place: int, output: Any) -> None:
        """Take in the output, unless the module does more than to compute it from its inputs."""
        tensors, given = _tensors(output), self.given
        self.ended, self.given = place, None
        writes = given is None or any(x._version != version for x, version in given)
        if tensors and not writes:
            self.output, self.versions = output, tuple(x._version for x in tensors)

    def is_kept(self) -> bool:
        """Whether the output is there as it was given: nobody has written to it since."""
        return self.output is not None and self.versions == tuple(x._version for x in _tensors(self.output) or ())


class Replay:
    """What the modules of a model gave on one run, to be given again.

    Changes have to be tried in the order of ``sorted(.., key=replay.place_of, reverse=True)``: what a module leaves
    behind beside its output is then that of the first run whenever it is not run.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.ones(3, 4)
        >>> with torch.no_grad():
        ...     replay, y = Replay.of(net, lambda: net(x))
        ...     with replay.up_to([net[2]]):  # neither the first layer nor the ReLU runs
        ...         again = net(x)
        >>> torch.equal(again, y)
        True
    """

    def __init__(self) -> None:
        self._calls: dict[nn.Module, _Call | None] = {}  # None of modules that run more than once
        self._began: dict[nn.Module, int] = {}
        self._places = 0
        self._held: dict[int, list[_Call]] = {}  # by depth
        self._n_bytes = 0

    @classmethod
    def of(cls, net: nn.Module, run: Callable[[], Result]) -> tuple[Replay, Result]:
        """Watch a run of a model; what the run gives comes back, too."""
        replay = cls()
        handles: list[Any] = []
        try:
            for name, module in net.named_modules():
                if module is net:  # which ends last
                    continue
                depth = name.count(".")
                handles.append(module.register_forward_pre_hook(replay._enter(depth), with_kwargs=True))
                handles.append(module.register_forward_hook(replay._leave, with_kwargs=True))
            return replay, run()
        finally:
            for handle in handles:
                handle.remove()

    def place_of(self, layers: Iterable[nn.Module]) -> int:
        """When the first of some layers began; 0 where that is not known of all."""
        return min((self._began.get(layer, 0) for layer in layers), default=0)

    @contextlib.contextmanager
    def up_to(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, modules that had ended when the first of some layers began give what they gave, and do not run."""
        begins = self.place_of(layers)
        calls = [call for some in self._held.values() for call in some if call.ended is not None]
        done = [call for call in calls if call.ended is not None and call.ended < begins and call.is_kept()]
        kept = [(call.module, vars(call.module).get("forward")) for call in done]
        for call in done:
            vars(call.module)["forward"] = _giver(call.output)
        try:
            yield
        finally:
            for module, own in kept:
                del vars(module)["forward"]
                if own is not None:
                    vars(module)["forward"] = own

    def _next_place(self) -> int:
        self._places += 1
        return self._places

    def _enter(self, depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = self._next_place()
            self._began.setdefault(module, place)
            if module in self._calls:
                self._drop(self._calls[module])
                self._calls[module] = None
                return
            tensors = None if isinstance(module, torch.jit.ScriptModule) else _tensors((args, *kwargs.values()))
            given = None if tensors is None else [(x, x._version) for x in tensors]
            self._calls[module] = _Call(module, depth, place, given)

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._calls.get(module)
        if call is None:
            return
        call.end(self._next_place(), output)
        if call.output is not None:
            self._held.setdefault(call.depth, []).append(call)
            self._n_bytes += _n_bytes(call.output)
        while self._n_bytes > _MOST_BYTES:
            for each in self._held.pop(max(self._held)):
                self._n_bytes -= _n_bytes(each.output)
                each.output = None

    def _drop(self, call: _Call | None) -> None:
        if call is not None and call.output is not None:
            self._held[call.depth].remove(call)
            self._n_bytes -= _n_bytes(call.output)
            call.output = None


def _giver(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _tensors(value: Any) -> list[Tensor] | None:
    """The tensors of an input or an output; None where it holds something else that a module may write to."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else [value]
    if isinstance(value, _PLAIN):
        return []
    if type(value) not in (tuple, torch.Size):
        return None
    parts = [_tensors(each) for each in value]
    return None if any(part is None for part in parts) else [x for part in parts for x in part or ()]


def _n_bytes(output: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(output) or ())
