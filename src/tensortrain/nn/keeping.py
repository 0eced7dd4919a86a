"""What operations of compiled programs share: whether there are any, and when what they keep of cores ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

from tensortrain.system.native import library
from tensortrain.system.tracing import constant_when_traced, is_transformed

__all__ = ["EndsWithCore", "can_keep", "makes_known"]

Register = TypeVar("Register", bound=Callable[[Any], None])
_MAKE_KNOWN: list[Callable[[Any], None]] = []


def makes_known(register: Register) -> Register:
    """Decorator of what tells the kernels and torch of operations; called once, before a program first has one."""
    _MAKE_KNOWN.append(register)
    return register


@constant_when_traced  # no arguments and a plain answer
def can_keep() -> bool:
    """Whether the operations are there, and the program that is traced need not be transformed."""
    kernels = library()
    if kernels is None or is_transformed():
        return False
    _make_known(kernels)
    return True


@cache
def _make_known(kernels: Any) -> None:
    for register in _MAKE_KNOWN:
        register(kernels)


class EndsWithCore:
    """Lets go of what is kept of cores when the first of them goes, or before.

    Args:
        end: Lets go of what is kept under the address of a core.
    """

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end
        self._ends: dict[int, Any] = {}  # by address of the first core

    def __len__(self) -> int:
        return len(self._ends)

    def begin(self, core: Tensor) -> bool:
        """Whether nothing was kept of this core until now."""
        address = core._cdata
        if address in self._ends:
            return False
        self._ends[address] = weakref.finalize(core, self._let_go, address)
        self._ends[address].atexit = False
        return True

    def forget(self, cores: Sequence[Tensor]) -> None:
        """Let go of what is kept of these cores; nothing holds the first weakly any more."""
        end = self._ends.get(cores[0]._cdata) if self._ends and len(cores) else None
        if end is not None:
            end()

    def _let_go(self, address: int) -> None:
        self._ends.pop(address, None)
        self._end(address)
