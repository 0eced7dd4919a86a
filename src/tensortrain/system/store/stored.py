"""The tensors of a checkpoint: collected from a model, written to safetensors, read back with suspicion."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import CheckpointError, KindError
from tensortrain.system.files import sync
from tensortrain.system.store.folder import RECIPE, identity_on_disk, sha256_of
from tensortrain.system.store.recipe import Recipe, TensorEntry, TensorKind, dtype_named
from tensortrain.system.store.storable import check_storable, check_whole

__all__ = ["StoredTensors", "identity_of", "listed", "named_tensors", "read_tensors", "write_tensors"]

_LARGEST_HEADER_BYTES = 10**8 + 8  # what safetensors reads
_PAIR = {"complex128": (2,)}  # what is stored as pairs of numbers


class StoredTensors:
    """Tensors under their first names, further names of shared ones, and an entry for each."""

    def __init__(self, tensors: dict[str, Tensor], aliases: dict[str, str], entries: Mapping[str, TensorEntry]) -> None:
        self.tensors, self.aliases, self.entries = tensors, aliases, entries
        self.names = {name: name for name in tensors} | aliases  # every name -> the one it is stored under

    @classmethod
    def of(cls, model: nn.Module) -> StoredTensors:
        """Collect what a model holds."""
        if not isinstance(model, nn.Module):
            raise KindError(
                f"a model must be a module: save_pretrained has {type(model).__name__}, expected "
                "torch.nn.Module. Pass the model itself."
            )
        check_whole(model)
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        entries: dict[str, TensorEntry] = {}
        first: dict[Any, str] = {}
        for name, tensor, kind in named_tensors(model):
            check_storable(name, tensor)
            known = first.setdefault(identity_of(tensor, kind), name)
            if known != name:
                aliases[name] = known
                continue
            tensors[name] = tensor.detach().resolve_conj().resolve_neg()
            entries[name] = TensorEntry.of(tensor, kind)
        return cls(tensors, aliases, entries)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, TensorKind]]:
    """Every parameter and buffer under every name it has."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"a model must keep its state in tensors: {prefix or 'the model'} ({type(module).__name__}) "
                "has extra state, expected parameters and buffers alone. Save it with torch.save."
            )
        lead = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield lead + name, parameter, "parameter"
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind: TensorKind = "transient" if name in module._non_persistent_buffers_set else "buffer"
                yield lead + name, buffer, kind


def identity_of(tensor: Tensor, kind: TensorKind) -> Any:
    """Equal for tensors that are one: the same object, or the same view of one storage."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.device)
    view = tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return kind == "parameter", place, view


def write_tensors(stored: StoredTensors, path: Path) -> None:
    """Write the safetensors file.

    Raises:
        OSError: The disk is full, or the like.
        CheckpointError: What safetensors refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    places: set[int] = set()
    contiguous = {name: _unshared(tensor, places) for name, tensor in stored.tensors.items()}
    try:
        # A single entry: safetensors writes several in random order, and equal models should give equal files.
        save_file(contiguous, path, metadata={"aliases": json.dumps(stored.aliases)})
    except (KeyError, ValueError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise CheckpointError(
            f"tensors must be such that safetensors takes them: {error!r}. Convert the model."
        ) from error
    sync(path)


def _unshared(tensor: Tensor, places: set[int]) -> Tensor:
    """On the CPU, in C order, in a storage of its own, which is what safetensors takes."""
    plain = _as_pairs(tensor.cpu().contiguous())
    place = plain.untyped_storage().data_ptr()
    if plain.untyped_storage().nbytes() != plain.nbytes or (place in places and plain.numel()):
        return plain.clone(memory_format=torch.contiguous_format)
    places.add(place)
    return plain


def _as_pairs(tensor: Tensor) -> Tensor:
    """Double complex numbers, which safetensors lacks, as pairs of real ones."""
    return torch.view_as_real(tensor) if tensor.dtype == torch.complex128 else tensor


def read_tensors(path: Path, recipe: Recipe) -> StoredTensors:
    """Read the tensors, after checksum, header and recipe agree."""
    from safetensors import SafetensorError, safe_open

    before = identity_on_disk(path)
    try:
        _check_size(path, recipe)
        found = sha256_of(path)
        if found != recipe.sha256:
            raise _changed(path, f"sha256 {found[:12]}..", f"{recipe.sha256[:12]}..")
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_header(file, recipe, path)
            aliases = _aliases(file.metadata() or {}, recipe, path)
            tensors = {name: _laid_out(file.get_tensor(name), entry) for name, entry in recipe.tensors.items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"a checkpoint must be a safetensors file: {path} has {error}. Save the model again."
        ) from error
    except (OSError, RuntimeError) as error:  # torch's own opening of the file raises the latter
        raise CheckpointError(f"a checkpoint must be readable: {path} has {error!s:.400}. Check the file.") from error
    if identity_on_disk(path) != before:
        raise _changed(path, "another file now", "the one whose checksum was taken")
    return StoredTensors(tensors, aliases, recipe.tensors)


def _check_size(path: Path, recipe: Recipe) -> None:
    """A file far too large is refused before its checksum is taken, which could last for ever."""
    found = path.stat().st_size
    most = _LARGEST_HEADER_BYTES + sum(
        math.prod(entry.shape) * dtype_named(entry.dtype).itemsize for entry in recipe.tensors.values()
    )
    if found > most:
        raise _changed(path, f"{found:,} bytes", f"at most {most:,}")


def _changed(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint must be unchanged since it was saved: {path} has {found}, expected {expected}. It is "
        "truncated, edited, or of another save; save the model again."
    )


def _check_header(file: Any, recipe: Recipe, path: Path) -> None:
    """Compare the recipe's list of tensors with the file's, before any is read."""
    names = set(file.keys())
    if names != recipe.tensors.keys():
        odd = sorted(names ^ recipe.tensors.keys())
        raise _disagree(path, f"{listed(odd)} in only one of them")
    for name, entry in recipe.tensors.items():
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        if shape != entry.shape + _PAIR.get(entry.dtype, ()):
            raise _disagree(path, f"{name} of shape {shape} and {entry.shape}")
        if part.get_dtype() != _safetensors_dtype(entry.dtype):
            raise _disagree(path, f"{name} of dtype {part.get_dtype()} and {entry.dtype}")


def _safetensors_dtype(name: str) -> str:
    from safetensors.torch import _TYPES

    name = "float64" if name in _PAIR else name
    return next((code for code, dtype in _TYPES.items() if dtype == dtype_named(name)), name)


def _aliases(metadata: Mapping[str, str], recipe: Recipe, path: Path) -> dict[str, str]:
    try:
        aliases = json.loads(metadata.get("aliases", "{}"))
    except (ValueError, RecursionError):
        aliases = None
    fits = isinstance(aliases, dict) and all(
        isinstance(target, str) and target in recipe.tensors and name not in recipe.tensors
        for name, target in aliases.items()
    )
    if not fits:
        raise _disagree(path, "names of shared tensors that lead nowhere")
    return aliases


def _laid_out(tensor: Tensor, entry: TensorEntry) -> Tensor:
    """A copy with the strides it was saved with; the file can go while the model lives."""
    if entry.dtype in _PAIR:
        tensor = torch.view_as_complex(tensor.clone())  # in the file they lie on borders of 8 bytes, pairs want 16
    if entry.stride is None:
        return tensor.clone()
    return torch.empty_strided(entry.shape, entry.stride, dtype=tensor.dtype).copy_(tensor)


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _disagree(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"recipe and tensors of a checkpoint must agree: {path} and {RECIPE} have {what}. Save the model again."
    )
