"""Save and load models with factorized layers: numbers as safetensors, what to build as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortrain.compression.opened import plain_weights
from tensortrain.compression.retie import retie
from tensortrain.errors import CheckpointError, KindError
from tensortrain.io.composites import composite_entries
from tensortrain.io.heads import head_entries
from tensortrain.io.hidden import check_no_meta
from tensortrain.io.layers import build_layer, check_counterpart, check_shapes, layer_entries
from tensortrain.io.narrowed import narrowed_entries
from tensortrain.io.restore import changes, commit
from tensortrain.io.sources import build_empty, build_from_source, describe_source
from tensortrain.nn import FactorizedLayer
from tensortrain.system.files import sync
from tensortrain.system.store.doors import doors
from tensortrain.system.store.folder import (
    RECIPE,
    TENSORS,
    fill_folder,
    finish,
    read_recipe,
    sha256_of,
    state_of,
    tensors_of,
)
from tensortrain.system.store.recipe import LayerEntry, Recipe
from tensortrain.system.store.stored import StoredTensors, read_tensors, write_tensors

__all__ = ["has_source", "load_pretrained", "save_pretrained"]


Layers = Sequence[tuple[LayerEntry, FactorizedLayer]]
_ATTEMPTS = 20  # at reading a folder that another process saves into


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a model into a folder: all parameters and buffers, and the recipe of its factorized layers.

    Shared tensors are stored once, and are shared again after loading. The files change together: after a kill at
    any moment the folder loads as the old checkpoint or the new one, and the next save clears what was left. Other
    files in the folder, and its mode, are left alone; several processes may save into one folder.

    Args:
        model: Any module; a bare factorized layer too. Of a compiled one, the module inside.
        directory: Created where it is missing.

    Returns:
        Path: ``directory``.

    Raises:
        CheckpointError: What is written would not load again: a tensor has no data (meta device), is sharded,
            quantized or sparse, or of a dtype that safetensors lacks; a layer is pruned or its cores are constrained;
            or the model keeps state outside of parameters and buffers. Nothing is written.
        DiskError: The disk is full, or the folder cannot be written (an ``OSError``, too). What was there is whole.

    Example:
        >>> save_pretrained(model, "runs/small")  # doctest: +SKIP
    """
    folder = Path(directory)
    model = _inner(model)
    stored = StoredTensors.of(model)
    recipe = _recipe_of(model, stored, folder)
    fill_folder(folder, lambda stage: _write(stored, recipe, stage))
    return folder


def load_pretrained(
    directory: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Load what :func:`save_pretrained` wrote, in eval mode; no dense weight of a factorized layer is built.

    Tensors take the values, dtypes and memory layout of the checkpoint, and stay on the device of what they
    replace (the CPU for a model on the meta device).

    Args:
        directory: The folder.
        model: A module of the original's class, dense or factorized, on any device; it is changed in place. Layers
            and parameters that have the right form keep their objects, hooks and ``requires_grad``, so that an
            optimizer goes on with them; a layer of another form becomes one of the checkpoint's. Or a class or
            function that builds one, called on the meta device where that is enough. None for models that this
            package or transformers can name.

    Returns:
        Module: The model.

    Raises:
        CheckpointError: A file is missing, truncated or edited, or does not fit; nothing is changed.

    Example:
        >>> model = load_pretrained("runs/small")  # doctest: +SKIP
        >>> model = load_pretrained("runs/small", model=MyNet)  # doctest: +SKIP
    """
    folder = Path(directory)
    recipe, stored = _read(folder)
    layers = [(entry, build_layer(entry, stored, folder)) for entry in recipe.layers]
    given = isinstance(model, nn.Module)
    with torch.random.fork_rng(devices=[]):  # a fresh model draws its first weights
        skeleton = model if isinstance(model, nn.Module) else _skeleton(model, recipe, stored, layers, folder)
    inner = _inner(skeleton)
    if given:
        check_no_meta(inner, str(folder))
    changed = [name for entry in (*recipe.layers, *recipe.composites, *recipe.narrowed) for name in entry.names]
    plain = plain_weights(inner, changed)  # a new layer has numbers where weight norm or pruning computes them
    try:
        commit(changes(inner, recipe, layers, stored, folder, adopt=not given), inner)
    except BaseException:
        plain.close()
        raise
    retie(inner)
    return skeleton.eval()


def has_source(directory: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint can name its model, so that it loads without ``model=``.

    Raises:
        CheckpointError: The folder has no readable recipe.
    """
    folder = Path(directory)
    recipe = Recipe.from_json(read_recipe(folder), where=str(folder / RECIPE))
    return recipe.source is not None or any(entry.names == ("",) for entry in recipe.layers)


def _inner(model: Any) -> Any:
    """The module inside a compiled one, whose names are those that it has without."""
    compiled = getattr(model, "_orig_mod", None)
    return compiled if isinstance(compiled, nn.Module) and type(model).__name__ == "OptimizedModule" else model


def _recipe_of(model: nn.Module, stored: StoredTensors, folder: Path) -> Recipe:
    """The recipe without checksum, after a look whether it will be read and its layers built."""
    layers, composites = layer_entries(model), composite_entries(model)
    more = {"composites": composites, "narrowed": narrowed_entries(model), "heads": head_entries(model)}
    recipe = Recipe(describe_source(model), layers, dict(stored.entries), "", **more)
    read = Recipe.from_json(recipe.to_json(), where=str(folder / RECIPE))
    for entry in read.layers:
        layer = build_layer(entry, stored, folder)
        check_counterpart(entry.names[0], model.get_submodule(entry.names[0]), entry, layer, folder)
        check_shapes(entry, layer, stored, folder)
    return recipe


def _write(stored: StoredTensors, recipe: Recipe, stage: Path) -> str:
    tensors, path = stage / TENSORS, stage / RECIPE
    write_tensors(stored, tensors)
    checksum = sha256_of(tensors)
    path.write_text(replace(recipe, sha256=checksum).to_json(), encoding="utf-8")
    sync(path)
    tensors.chmod(path.stat().st_mode & 0o777)  # safetensors makes files for their owner alone
    return checksum


def _read(folder: Path) -> tuple[Recipe, StoredTensors]:
    """The two files of one save, also while another process saves into the folder, or after it was killed."""
    for attempt in range(_ATTEMPTS):
        before = state_of(folder)
        try:
            recipe = Recipe.from_json(read_recipe(folder), where=str(folder / RECIPE))
            path = tensors_of(folder, recipe.sha256)
            stored = read_tensors(path, recipe)
        except CheckpointError:
            if before == state_of(folder) or attempt == _ATTEMPTS - 1:
                raise
            continue
        if path.parent != folder:
            finish(folder)
        return recipe, stored
    raise AssertionError("the last attempt returns or raises")


def _skeleton(
    model: Callable[[], nn.Module] | None, recipe: Recipe, stored: StoredTensors, layers: Layers, folder: Path
) -> nn.Module:
    """A model to fill in, built by what was given or by what the recipe names."""
    where = str(folder / RECIPE)
    if model is None and len(layers) == 1 and layers[0][0].names == ("",):
        return layers[0][1]  # a layer names itself
    if model is not None and not callable(model):
        raise KindError(
            "a model must be a module or a function that builds one: load_pretrained has "
            f"{type(model).__name__}. Pass the module, its class, or nothing."
        )
    if model is not None:
        return build_empty(model, where=where)
    n_bytes = sum(tensor.nbytes for tensor in stored.tensors.values())
    return build_from_source(recipe.source, where=where, n_tensors=len(stored.names), n_bytes=n_bytes)


doors.save, doors.load = save_pretrained, load_pretrained
