"""Save and load models with factorized layers: numbers as safetensors, what to build as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from tensortrain.errors import CheckpointError, KindError
from tensortrain.io.folder import RECIPE, TENSORS, fill_folder, read_recipe, sha256_of, sync
from tensortrain.io.recipe import LayerEntry, Recipe, as_json
from tensortrain.io.restore import LAYERS, build_layer, changes, check_counterpart, commit, device_of
from tensortrain.io.sources import build_empty, describe_source, source_factory
from tensortrain.io.stored import StoredTensors, read_tensors, write_tensors
from tensortrain.nn import FactorizedLayer
from tensortrain.nn.cores import Cores

__all__ = ["has_source", "load_pretrained", "save_pretrained"]


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a model into a folder: all parameters and buffers, and the recipe of its factorized layers.

    Shared tensors are stored once, and are shared again after loading. The files appear together: a kill
    leaves the old checkpoint or the new one. Other files in the folder are left alone.

    Args:
        model: Any module; a bare factorized layer too.
        directory: Created where it is missing.

    Returns:
        Path: ``directory``.

    Raises:
        CheckpointError: A tensor has no data (meta device) or a dtype that safetensors lacks, or the model
            keeps state outside of parameters and buffers.

    Example:
        >>> save_pretrained(model, "runs/small")  # doctest: +SKIP
    """
    folder = Path(directory)
    stored = StoredTensors.of(model)
    fill_folder(folder, lambda new: _write(model, stored, new))
    return folder


def load_pretrained(
    directory: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Load what :func:`save_pretrained` wrote, in eval mode; no dense weight of a factorized layer is built.

    Tensors take the values, dtypes and memory layout of the checkpoint, and stay on the device of what they
    replace (the CPU for a model on the meta device).

    Args:
        directory: The folder.
        model: A module of the original's class, dense or factorized, on any device; it is changed in place,
            unless it is a bare layer. Or a function that builds one, called on the meta device. None for
            models that this package or transformers can name.

    Returns:
        Module: The model; where ``model`` is a bare layer, the new layer.

    Raises:
        CheckpointError: A file is missing, truncated or edited, or does not fit; nothing is changed.

    Example:
        >>> model = load_pretrained("runs/small")  # doctest: +SKIP
        >>> model = load_pretrained("runs/small", model=MyNet)  # doctest: +SKIP
    """
    folder = Path(directory)
    recipe = Recipe.from_json(read_recipe(folder), where=str(folder / RECIPE))
    stored = read_tensors(folder / TENSORS, recipe)
    layers = [(entry, build_layer(entry, stored, folder)) for entry in recipe.layers]
    if len(layers) == 1 and layers[0][0].names == ("",):
        return _load_bare(model, *layers[0], stored, folder)
    skeleton = _skeleton(model, recipe, folder)
    commit(changes(skeleton, layers, stored, folder))
    return skeleton.eval()


def has_source(directory: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint can name its model, so that it loads without ``model=``.

    Raises:
        CheckpointError: The folder has no readable recipe.
    """
    folder = Path(directory)
    recipe = Recipe.from_json(read_recipe(folder), where=str(folder / RECIPE))
    return recipe.source is not None or any(entry.names == ("",) for entry in recipe.layers)


def _write(model: nn.Module, stored: StoredTensors, folder: Path) -> None:
    path = folder / TENSORS
    write_tensors(stored, path)
    recipe = Recipe(describe_source(model), _layer_entries(model), dict(stored.entries), sha256_of(path))
    (folder / RECIPE).write_text(recipe.to_json(), encoding="utf-8")
    sync(folder / RECIPE)


def _layer_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    names: dict[int, list[str]] = {}
    layers: dict[int, FactorizedLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorizedLayer):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    return tuple(_layer_entry(tuple(names[key]), layer) for key, layer in layers.items())


def _layer_entry(names: tuple[str, ...], layer: FactorizedLayer) -> LayerEntry:
    if LAYERS.get(type(layer).__name__) is not type(layer):
        raise CheckpointError(
            f"a factorized layer must be of tensortrain.nn: {names[0]} is a {type(layer).__name__}, expected "
            "one "
            f"of {', '.join(LAYERS)}. Save the dense model after to_dense_()."
        )
    if type(layer.cores) not in (Cores, nn.ParameterList):
        raise CheckpointError(
            f"the cores of a layer that is saved must be plain parameters: those of {names[0]!r} are constrained by "
            "tensortrain.nn.orthogonal. Save its state_dict(), or tensortrain.nn.Linear.from_dense(layer.to_dense(), "
            "rank=layer.ranks, in_modes=.., out_modes=..)."
        )
    return LayerEntry(names, type(layer).__name__, as_json(layer.config()))


def _load_bare(
    model: nn.Module | Callable[[], nn.Module] | None,
    entry: LayerEntry,
    layer: FactorizedLayer,
    stored: StoredTensors,
    folder: Path,
) -> FactorizedLayer:
    """A checkpoint of one layer names itself; a model that is given must be that layer."""
    device = None
    if model is not None:
        given = model if isinstance(model, nn.Module) else build_empty(model, where=str(folder))
        check_counterpart("", given, entry, layer, folder)
        device = device_of(given)
    commit(changes(layer, [], stored, folder, device=device))
    return layer.eval()


def _skeleton(model: nn.Module | Callable[[], nn.Module] | None, recipe: Recipe, folder: Path) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if model is not None and not callable(model):
        raise KindError(
            "a model must be a module or a function that builds one: load_pretrained has "
            f"{type(model).__name__}. "
            "Pass the module, its class, or nothing."
        )
    where = str(folder / RECIPE)
    return build_empty(model or source_factory(recipe.source, where=where), where=where)
