"""Names for the package's own models, so that a checkpoint can say what to build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from tensortrain.errors import KindError

_MODELS: dict[str, type[nn.Module]] = {}
_LISTED: set[str] = set()  # those that build without arguments
_M = TypeVar("_M", bound=type[nn.Module])


def register(name: str, *, needs_arguments: bool = False) -> Callable[[_M], _M]:
    """Enter a model class under a name.

    The class keeps its keyword arguments in ``self.config``, a dict of JSON values, for :func:`describe`.

    Args:
        name: Not taken yet.
        needs_arguments: The class does not build without any: it loads from checkpoints, and is not among ``names``.

    Raises:
        KindError: Another class has the name.
    """

    def enter(cls: _M) -> _M:
        if _MODELS.setdefault(name, cls) is not cls:
            raise KindError(
                f"a model name must be free: {name!r} has {_MODELS[name].__name__}, expected no entry. "
                "Register the class under another name."
            )
        if not needs_arguments:
            _LISTED.add(name)
        return cls

    return enter


def names() -> tuple[str, ...]:
    """Return the registered names of models that build without arguments, in alphabetical order."""
    return tuple(sorted(_LISTED))


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a registered model.

    Args:
        name: One of :func:`names`, or of a class whose arguments are given.
        **kwargs: Passed to the class.

    Raises:
        KindError: The name or a keyword is not known.

    Example:
        >>> build("mlp", hidden=(32, 16)).config["hidden"]
        [32, 16]
    """
    if name not in _MODELS:
        raise KindError(
            f"a model must be registered: build has {name!r}, expected one of {', '.join(names())}. "
            "Choose one of these or add yours with tensortrain.networks.register."
        )
    try:
        return _MODELS[name](**kwargs)
    except TypeError as error:
        if isinstance(error, KindError):
            raise
        raise KindError(
            f"the arguments must fit the model: {name!r} has {sorted(kwargs)}, expected those of "
            f"{_MODELS[name].__name__} ({error}). Remove the argument that does not belong."
        ) from error


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return ``{"name": ..., "kwargs": ...}`` with which :func:`build` makes the model anew.

    None for a model whose class is not registered; a subclass of a registered class does not count.

    Example:
        >>> describe(build("mlp"))["name"]
        'mlp'
    """
    for name, cls in _MODELS.items():
        if type(model) is cls:
            return {"name": name, "kwargs": dict(model.config)}  # type: ignore[arg-type]
    return None
