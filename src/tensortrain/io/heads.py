"""Output layers that share a factorized table: which table is theirs stands in the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortrain.errors import CheckpointError
from tensortrain.nn import Embedding, TiedHead
from tensortrain.system.store.recipe import LayerEntry

__all__ = ["head_entries", "tied_to"]


def head_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    """The tied heads of a model whose tables stand in it by themselves."""
    names: dict[int, list[str]] = {}
    tables: dict[int, str] = {}
    heads: dict[int, TiedHead] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is TiedHead and name:
            names.setdefault(id(module), []).append(name)
            heads[id(module)] = module
    inside = tuple(f"{name}." for listed in names.values() for name in listed)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Embedding) and not name.startswith(inside):
            tables.setdefault(id(module), name)
    return tuple(
        LayerEntry(tuple(names[key]), "TiedHead", {"table": tables[id(head.embedding)], "bias": head.bias is not None})
        for key, head in heads.items()
        if id(head.embedding) in tables
    )


def tied_to(old: Any, entry: LayerEntry, modules: Mapping[str, nn.Module], folder: Path) -> nn.Module | None:
    """The head of a recipe on the table that the model will have, without memory; ``None`` where it is there already.

    Raises:
        CheckpointError: The model has another layer there, or no such table.
    """
    table = modules.get(str(entry.config.get("table")))
    if type(old) is TiedHead and old.embedding is table:
        return None
    sizes = (table.embedding_dim, table.num_embeddings) if isinstance(table, Embedding) else None
    if type(old) not in (nn.Linear, TiedHead) or sizes is None or (old.in_features, old.out_features) != sizes:
        raise CheckpointError(
            f"a tied head must stand where its model has an output layer: {entry.names[0]!r:.80} in {folder} reads a "
            f"table of {sizes}, and the model has a {type(old).__name__} there. Pass the model that was saved."
        )
    assert isinstance(table, Embedding)
    head = TiedHead(table)
    head.made_from = "Linear" if type(old) is nn.Linear else old.made_from
    if entry.config.get("bias"):
        head.bias = nn.Parameter(torch.zeros(sizes[1], device="meta", dtype=next(table.parameters()).dtype))
    return head
