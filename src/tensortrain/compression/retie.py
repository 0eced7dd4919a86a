"""Models that name their tied weights, as those of transformers do, get the names that these have by now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tensortrain.compression.survey.layers import part_of
from tensortrain.nn import TiedHead

__all__ = ["retie"]

_WEIGHT = ".weight"


def retie(model: nn.Module) -> None:
    """Put right what a model says of the weights that it ties (``_tied_weights_keys``, ``all_tied_weights_keys``).

    Without that its ``save_pretrained`` and ``tie_weights`` look for the weight of a table that is made of cores.
    """
    for module in model.modules():
        declared = getattr(type(module), "_tied_weights_keys", None)
        if isinstance(declared, dict):
            _retie_one(module, declared)


def _retie_one(module: nn.Module, declared: dict[str, str]) -> None:
    names = dict(pair for target, source in declared.items() for pair in _by_now(module, target, source))
    own: Any = vars(module)
    if names != declared:
        own["_tied_weights_keys"] = names
    else:
        own.pop("_tied_weights_keys", None)
    known = own.get("all_tied_weights_keys")
    if isinstance(known, dict):
        there: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
        there |= dict(module.named_buffers(remove_duplicate=False))
        kept = {target: source for target, source in known.items() if target in there and source in there}
        tied = {t: s for t, s in names.items() if t in there and s in there and there[t] is there[s]}
        own["all_tied_weights_keys"] = kept | tied


def _by_now(module: nn.Module, target: str, source: str) -> Iterator[tuple[str, str]]:
    """The parameters that two layers share, by their names in each."""
    head = part_of(module, target.removesuffix(_WEIGHT)) if target.endswith(_WEIGHT) else None
    table = part_of(module, source.removesuffix(_WEIGHT)) if source.endswith(_WEIGHT) else None
    if isinstance(head, TiedHead) and head.embedding is table and not isinstance(table, nn.Embedding):
        for name in table.state_dict():
            yield f"{target.removesuffix(_WEIGHT)}.embedding.{name}", f"{source.removesuffix(_WEIGHT)}.{name}"
    else:
        yield target, source
