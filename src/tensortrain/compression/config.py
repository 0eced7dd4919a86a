"""The ``config`` of a transformers model after narrowing: it says the new sizes where it has names for them.

A config has one number for all layers. Where they all got the same, a model built from the changed config has the sizes
of the narrowed one, which is tried, and transformers' own ``from_pretrained`` loads what its ``save_pretrained`` wrote.
Where layers differ, the config lists their sizes beside (``narrowed_sizes``), for people to read; transformers cannot
build from these.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensortrain.compression.choose.plan import Group, Narrowed, NarrowedWholeHeads
from tensortrain.compression.narrow import SIZES, Undo
from tensortrain.compression.narrow_whole_heads import HEAD_SIZES
from tensortrain.nn import PartialLinear

__all__ = ["config_notes", "tell_configs_"]

_LISTED = "narrowed_sizes"
_OF_UNITS = re.compile(r"inter|ffn|inner|d_ff|mlp|feed_?forward")
_OF_HEADS = re.compile(r"^(n|num)_.*heads?$|_heads$")
_OF_GROUPS = re.compile(r"(key_value|kv)_heads$")
_DERIVED = {"n_inner"}  # None stands for a multiple of another size


def tell_configs_(model: nn.Module, groups: Sequence[Group]) -> Undo:
    """Let the config of every transformers model inside say the sizes that its layers have now.

    The config is another object afterwards: others may share the old one.

    Args:
        model: Narrowed already.
        groups: What was narrowed together.

    Returns:
        A function that puts the old configs back.
    """
    undo: list[Undo] = []
    for part in _models_of_transformers(model):
        narrowed = _sizes_of(part)
        if narrowed:
            undo.append(_put_config(part, _new_config(part, groups, narrowed)))

    def back() -> None:
        for one in undo:
            one()

    return back


def config_notes(model: nn.Module) -> list[str]:
    """A word on configs that cannot say the sizes of their model."""
    parts = [part for part in _models_of_transformers(model) if hasattr(part.config, _LISTED)]
    return [
        f"The config of {type(part).__name__} has one size for all layers, and the narrowed ones differ (or it has no "
        f"name for them): it lists them as {_LISTED}. Save with tensortrain.save_pretrained and load with "
        "load_pretrained; transformers' from_pretrained would refuse the sizes."
        for part in parts
    ]


def _models_of_transformers(model: nn.Module) -> Iterator[Any]:
    """The outermost ones."""
    transformers = sys.modules.get("transformers")  # a model of theirs cannot exist before the import
    if transformers is None:
        return
    outer: list[str] = []
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{one}." if one else "") for one in outer)
        if not inside and isinstance(part, transformers.PreTrainedModel):
            outer.append(name)
            yield part


def _sizes_of(part: nn.Module) -> dict[str, dict[str, int]]:
    """Of all narrowed layers, and of the attention around them."""
    found = {}
    for name, module in part.named_modules():
        sizes = vars(module).get("narrowed_from", {})
        if isinstance(module, PartialLinear):
            found[name] = dict(zip(("n_made", "n_read"), module.weight.shape, strict=True))
        elif sizes:
            found[name] = {size: int(getattr(module, size)) for size in sizes}
    return found


def _new_config(part: Any, groups: Sequence[Group], narrowed: dict[str, dict[str, int]]) -> Any:
    """The config with the sizes under its own names, or with a list of them where it cannot say them."""
    config = copy.deepcopy(part.config)
    if hasattr(config, _LISTED):
        delattr(config, _LISTED)
    for name, value in _changes(config, groups).items():
        setattr(config, name, value)
    if _says_sizes(part, config):
        return config
    config = copy.deepcopy(part.config)
    setattr(config, _LISTED, narrowed)
    return config


def _changes(config: Any, groups: Sequence[Group]) -> dict[str, int]:
    """What a config would have to say, as far as its names and numbers tell; of several sizes, any."""
    found: dict[str, int] = {}
    for one in groups:
        if isinstance(one, Narrowed):
            found |= _renamed(config, _OF_UNITS, one.units.n_units, len(one.kept))
        elif isinstance(one, NarrowedWholeHeads):
            heads, k = one.heads, len(one.kept)
            found |= _renamed(config, _OF_HEADS, heads.n_groups * heads.per_group, k * heads.per_group)
            found |= _renamed(config, _OF_GROUPS, heads.n_groups, k)
    return found


def _renamed(config: Any, names: re.Pattern[str], before: int, now: int) -> dict[str, int]:
    known = vars(config).items()
    return {
        name: now
        for name, value in known
        if names.search(name) and ((type(value) is int and value == before) or (value is None and name in _DERIVED))
    }


def _says_sizes(part: Any, config: Any) -> bool:
    """Whether a model built from a config has the sizes of this one; built without memory."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            twin = type(part)(copy.deepcopy(config))
    except Exception:  # sizes that do not go together, or a constructor with more arguments
        return False
    theirs = dict(twin.named_modules())
    return all(name in theirs and _has_sizes_of(module, theirs[name]) for name, module in part.named_modules())


def _has_sizes_of(module: nn.Module, twin: nn.Module) -> bool:
    if isinstance(module, PartialLinear):
        return False
    pairs = [(getattr(module, size, None), getattr(twin, size, None)) for size in (*SIZES, *HEAD_SIZES)]
    if any(own != other for own, other in pairs if type(own) is int and type(other) is int):  # not methods
        return False
    if type(module) is not type(twin):  # factorized
        return True
    own, other = module._parameters, twin._parameters
    return all(p is None or p.shape == getattr(other.get(name), "shape", None) for name, p in own.items())


def _put_config(part: Any, config: Any) -> Undo:
    """Another config wherever the model holds the one it has."""
    old = part.config
    holders = [module for module in part.modules() if vars(module).get("config") is old]
    for module in holders:
        module.config = config

    def back() -> None:
        for module in holders:
            module.config = old

    return back
