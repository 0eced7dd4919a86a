"""What a traced program needs to be told, and whether one is being traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["can_look", "constant_when_traced", "is_traced", "is_transformed", "sizes_of", "static_power_of_two"]

_LARGEST_BITS = 24
Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """Decorator: a traced program records what the function returns, not what it does.

    The same as ``torch.compiler.assume_constant_result``, which imports the compiler at once: two seconds that an
    import of this package has no use for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced() -> bool:
    """Whether a program is being recorded: by the compiler, ``torch.export``, ``torch.jit.trace`` or ``make_fx``.

    Such a program must not depend on the numbers at hand, nor on what lies in a cache.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and _has_recording_mode()


def _has_recording_mode() -> bool:
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE, keys.FUNCTIONAL))


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` looks on, which must see every operation: ``vmap``, ``grad``, ``jvp``."""
    return torch._C._functorch.maybe_current_level() is not None


def can_look(tensor: Tensor) -> bool:
    """Whether a decision may rest on the numbers of a tensor: not while they are traced, transformed or captured."""
    if is_traced() or is_transformed() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def sizes_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as plain numbers, under ``torch.jit.trace`` too, where sizes are tensors that the trace follows.

    For checks, and for sizes that belong to the layer and not to the input.
    """
    if torch.compiler.is_compiling():
        return tuple(tensor.shape)
    state = torch._C._get_tracing_state()
    if state is None:
        return tuple(tensor.shape)
    resume: Any = getattr(torch._C, "_set_tracing_state")  # noqa: B009  # the stubs leave it out
    resume(None)
    try:
        return tuple(tensor.shape)
    finally:
        resume(state)


def static_power_of_two(n: int) -> int | None:
    """The power of two at or above a number that is fixed in the traced program; ``None`` where it may vary."""
    if torch._C._get_tracing_state() is not None:
        return None
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and seldom needed

    for k in range(_LARGEST_BITS):
        if statically_known_true(n <= 1 << k):
            return 1 << k
    return None
