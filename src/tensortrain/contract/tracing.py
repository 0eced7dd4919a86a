"""What a traced program needs to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["constant_when_traced"]

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """Decorator: a traced program records what the function returns, not what it does.

    The same as ``torch.compiler.assume_constant_result``, which imports the compiler at once: two seconds that an
    import of this package has no use for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
