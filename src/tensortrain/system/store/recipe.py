"""The recipe beside the numbers: what to build before the tensors of a checkpoint have a place to go.

A recipe is plain JSON. Reading it checks every field's type; nothing in it is imported or called.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from tensortrain.errors import CheckpointError
from tensortrain.system.records import typed

__all__ = [
    "LayerEntry",
    "Recipe",
    "TensorEntry",
    "as_json",
    "c_strides",
    "dtype_named",
    "dtype_names",
    "is_dense_layout",
    "same_json",
]

TensorKind = Literal["parameter", "buffer", "transient"]

_FORMAT = "tensortrain-pretrained"
_VERSION = 1
_KINDS = ("parameter", "buffer", "transient")
_LONGEST_NAME, _MOST_AXES = 4096, 64  # torch has no more axes
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64),
    )
}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor.

    Attributes:
        shape: Sizes.
        dtype: Name without ``torch.``.
        kind: ``"parameter"``, ``"buffer"``, or ``"transient"`` for a buffer outside the state dict.
        requires_grad: Of a parameter.
        stride: Where it differs from C order, as for channels-last kernels; None otherwise.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: TensorKind
    requires_grad: bool = False
    stride: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor, kind: TensorKind) -> TensorEntry:
        """Describe a tensor that will be stored."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        plain = stride == c_strides(shape) or not is_dense_layout(shape, stride)
        dtype = str(tensor.dtype).removeprefix("torch.")
        trains = kind == "parameter" and tensor.requires_grad
        return cls(shape, dtype, kind, trains, None if plain else stride)


@dataclass(frozen=True)
class LayerEntry:
    """One layer of ``tensortrain.nn``: all its names, its class, what tells it from others of its class.

    That is all constructor arguments of a factorized layer; of a composite one, whose factorized maps are layers
    of their own, the torch arguments.
    """

    names: tuple[str, ...]
    kind: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Everything in a checkpoint but the numbers.

    Attributes:
        source: ``{"registry": name, "kwargs": {..}}``, ``{"transformers": class, "config": {..}}`` or None.
        layers: The factorized layers.
        tensors: Name -> entry; further names of a shared tensor stand in the safetensors file's metadata.
        sha256: Of the safetensors file.
        composites: Layers made of several maps, outer ones first.
        narrowed: Dense layers of which hidden units were taken, with their sizes; written where there are some.
        heads: Output layers that share a factorized table, with its name; written where there are some.
    """

    source: dict[str, Any] | None
    layers: tuple[LayerEntry, ...]
    tensors: dict[str, TensorEntry]
    sha256: str
    composites: tuple[LayerEntry, ...] = ()
    narrowed: tuple[LayerEntry, ...] = ()
    heads: tuple[LayerEntry, ...] = ()

    def to_json(self) -> str:
        """Return the recipe as JSON text.

        Raises:
            CheckpointError: The source or a layer's arguments hold what JSON cannot.
        """
        kept = {name: value for name, value in asdict(self).items() if value or name not in ("narrowed", "heads")}
        try:
            text = _dumps({"format": _FORMAT, "version": _VERSION, **kept}, indent=1)
        except (TypeError, ValueError, RecursionError) as error:
            raise _not_plain(error) from error
        return text + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Recipe:
        """Read a recipe back.

        Raises:
            CheckpointError: The text is no recipe of this version.
        """
        try:
            data = json.loads(text, object_pairs_hook=_once_each, parse_constant=_infinite)
        except (ValueError, RecursionError) as error:
            raise _unreadable(where, f"no JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise _unreadable(where, "no mark of the format")
        if data.get("version") != _VERSION or isinstance(data["version"], (bool, float)):
            raise CheckpointError(
                f"a recipe must be of a known version: {where} has version {data.get('version')!r:.40}, expected "
                f"{_VERSION}. Load it with the tensortrain release that wrote it."
            )
        try:
            return cls(
                source=_optional(data["source"], dict),
                layers=_layers(data["layers"]),
                tensors={_name(name): _tensor(entry) for name, entry in typed(data["tensors"], dict).items()},
                sha256=typed(data["sha256"], str),
                composites=_layers(data.get("composites", []), bare=True),
                narrowed=_layers(data.get("narrowed", [])),
                heads=_layers(data.get("heads", [])),
            )
        except KeyError as error:
            raise _unreadable(where, f"no entry {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise _unreadable(where, f"an entry of the wrong form ({error})") from error


def as_json(value: Any) -> Any:
    """The value as it reads after a way through JSON: tuples as lists.

    Raises:
        CheckpointError: It holds what JSON cannot.
    """
    try:
        return json.loads(_dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise _not_plain(error) from error


def _dumps(value: Any, **options: Any) -> str:
    text = json.dumps(value, default=_plain_number, **options)
    json.loads(text, parse_constant=_infinite)
    return text


def _plain_number(value: Any) -> Any:
    """A number of numpy's, say, as Python's own."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"a {type(value).__name__}")


def _infinite(name: str) -> float:
    """Norms may be infinite; NaN equals nothing, itself included, so that no check could pass it."""
    if name == "NaN":
        raise ValueError("a NaN")
    return float(name)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an entry that is there twice")
    return found


def same_json(a: Any, b: Any) -> bool:
    """Equal to the letter: True is not 1, and 16.0 not 16."""
    return a == b and json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def dtype_names() -> dict[torch.dtype, str]:
    """The dtypes that a checkpoint can hold, and their names in a recipe."""
    return {dtype: name for name, dtype in _DTYPES.items()}


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in a recipe that was read."""
    return _DTYPES[name]


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(max(1, n) for n in shape[k + 1 :]) for k in range(len(shape)))


def is_dense_layout(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether strides only reorder the axes: every element has a place of its own, without gaps."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if step < 1 or size < 1 or (size > 1 and step != expected):
            return False
        expected *= size
    return True


def _layers(value: Any, *, bare: bool = False) -> tuple[LayerEntry, ...]:
    layers = tuple(_layer(entry) for entry in typed(value, list))
    names = [name for layer in layers for name in layer.names]
    if len(set(names)) < len(names) or ("" in names and len(names) > 1 and not bare):
        raise ValueError("two layers of one name")
    return layers


def _layer(entry: Any) -> LayerEntry:
    names = tuple(_name(name) for name in typed(entry["names"], list))
    if not names:
        raise ValueError("a layer without a name")
    return LayerEntry(names, typed(entry["kind"], str), typed(entry["config"], dict))


def _name(value: Any) -> str:
    name: str = typed(value, str)
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name of {len(name):,} letters")
    return name


def _tensor(entry: Mapping[str, Any]) -> TensorEntry:
    read = TensorEntry(
        shape=_sizes(entry["shape"]),
        dtype=typed(entry["dtype"], str),
        kind=entry["kind"],
        requires_grad=typed(entry["requires_grad"], bool),
        stride=None if entry["stride"] is None else _sizes(entry["stride"]),
    )
    if read.kind not in _KINDS:
        raise ValueError(f"kind {read.kind!r:.60}, expected one of {', '.join(_KINDS)}")
    if read.dtype not in _DTYPES:
        raise ValueError(f"dtype {read.dtype!r:.60}")
    if read.requires_grad and not (dtype_named(read.dtype).is_floating_point or "complex" in read.dtype):
        raise ValueError(f"a gradient for dtype {read.dtype}")
    if read.stride is not None and not (
        len(read.stride) == len(read.shape) and is_dense_layout(read.shape, read.stride)
    ):
        raise ValueError(f"strides {read.stride!r:.80} for shape {read.shape!r:.80}")
    return read


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(typed(size, int) for size in typed(value, list))
    if len(sizes) > _MOST_AXES or any(not 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"a negative size, or one too large, in {sizes!r:.80}")
    return sizes


def _optional(value: Any, kind: type) -> Any:
    return None if value is None else typed(value, kind)


def _not_plain(error: Exception) -> CheckpointError:
    return CheckpointError(
        f"a recipe must be plain data: it has a value that JSON cannot hold ({error}). "
        "Build the model with numbers, texts and lists as arguments."
    )


def _unreadable(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"a recipe must be as save_pretrained wrote it: {where} has {what}. Save the model again.")
