"""Put modules of a model in the place of others: all of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tensortrain.system.aliases import Undo, replace_aliases

__all__ = ["Built", "swap"]

Built = tuple[tuple[str, ...], nn.Module, Any]  # names, old layer, new layer


def swap(model: nn.Module, built: Sequence[Built]) -> nn.Module:
    """Put every new layer wherever the model holds the one it replaces; undo all if one assignment fails.

    Returns:
        Module: The model, or the new layer where the model itself is replaced.
    """
    if not built:
        return model
    replaced = {id(old): (old, new) for _, old, new in built}
    root: nn.Module = replaced[id(model)][1] if id(model) in replaced else model
    # Parents first: a layer may have others hung on it, which its successor has by then.
    todo = sorted(((name, new) for names, _, new in built for name in names), key=lambda pair: pair[0].count("."))
    undo: Undo = []
    try:
        for name, new in todo:
            if name:
                parent, _, child = name.rpartition(".")
                owner = root.get_submodule(parent)
                old = owner._modules[child]
                undo.append(lambda owner=owner, child=child, old=old: _assign(owner, child, old))  # type: ignore[misc]
                _assign(owner, child, new)
        replace_aliases(root, replaced, undo)
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise
    return root


def _assign(owner: nn.Module, child: str, module: nn.Module | None) -> None:
    owner._modules[child] = module  # Sequential and ModuleList have no attribute of that name to set
