"""The compression report: what was done to a model and what it gained, as frozen data with a JSON form.

No drawing happens here: ``viz.terminal`` prints a report, ``viz.html`` turns it into a page.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from tensortrain.errors import DataError, TTError
from tensortrain.formats import FactorSpec, Kind, WeightShape, get_format

__all__ = [
    "CurvePoint",
    "LatencyRow",
    "LayerReport",
    "MemoryRow",
    "Report",
    "provenance",
    "write_text_atomic",
]

_R = TypeVar("_R")


class _Record:
    """Shared manner of the rows: every list given to a field is kept as a tuple, so equality is by value."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            object.__setattr__(self, field.name, _as_tuples(getattr(self, field.name)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport(_Record):
    """One layer before and after.

    Attributes:
        name: Dotted name inside the model.
        kind: "Linear", "Conv2d" or "Embedding".
        shape: Shape of the dense weight.
        format: Name of the weight format; "dense" for a layer that was left.
        in_modes, out_modes, ranks: Of the factorization; all ``()`` for a dense layer.
        params_before, params_after: Counts, bias included on both sides.
        flops_before, flops_after: Per example; a multiply-add is two.
        rel_error: Predicted relative output error, a fraction, weighted by the calibration data.
        implementation: How the layer runs, such as "dense, cached".
        resident_bytes: Parameters, buffers and any cached dense weight.
        decision: One sentence: "compressed", or why the layer was left dense.
        spectra: Per bond, leading singular values over the largest one, at most 64.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str = "dense"
    in_modes: tuple[int, ...] = ()
    out_modes: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    params_before: int
    params_after: int
    flops_before: int | None = None
    flops_after: int | None = None
    rel_error: float | None = None
    implementation: str = ""
    resident_bytes: int | None = None
    decision: str = ""
    spectra: tuple[tuple[float, ...], ...] = ()

    @property
    def compression(self) -> float:
        """Parameters before over parameters after."""
        return self.params_before / max(self.params_after, 1)

    @functools.cached_property
    def spec(self) -> FactorSpec | None:
        """The factorization; None for a dense layer, and where this version knows no such one."""
        kind: Kind = "embedding" if self.kind.startswith("Embedding") else "linear" if len(self.shape) == 2 else "conv"
        first, second, *kernel = self.shape if len(self.shape) > 1 else (1, 1)
        if kind == "embedding":
            first, second = second, first
        groups = first // math.prod(self.out_modes) if kind == "conv" and self.out_modes else 1
        try:
            return get_format(self.format).spec(
                WeightShape(kind, first, second, tuple(kernel), groups),
                rank=self.ranks,
                out_modes=self.out_modes or None,
                in_modes=self.in_modes or None,
                clip=False,
            )
        except TTError:  # "dense", a format of the user's own, or sizes that belong to another one
            return None

    @property
    def inner_ranks(self) -> tuple[int, ...]:
        """The ranks that were chosen, without fixed boundary ones."""
        return self.ranks if self.spec is None else get_format(self.format).inner_ranks(self.spec)

    @property
    def full_ranks(self) -> tuple[int, ...]:
        """The ranks at which the format holds any weight of this shape; () where that is not known."""
        if self.spec is None:
            return ()
        fmt = get_format(self.format)
        return fmt.inner_ranks(dataclasses.replace(self.spec, ranks=fmt.rank_caps(self.spec)))


@dataclasses.dataclass(frozen=True)
class LatencyRow(_Record):
    """Time of one forward pass, milliseconds: medians and 90th percentiles.

    ``speedup_low`` and ``speedup_high`` hold the median of the paired ratios with 95 % confidence, where it was
    measured. Where 1 lies between them, no difference was seen.
    """

    batch: int
    dense_ms: float
    compressed_ms: float
    dense_p90_ms: float
    compressed_p90_ms: float
    threads: int
    dtype: str
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def speedup(self) -> float:
        """How many times faster the compressed model is; below 1 it is slower."""
        return self.dense_ms / self.compressed_ms if self.compressed_ms > 0 else math.nan


@dataclasses.dataclass(frozen=True)
class MemoryRow(_Record):
    """Bytes held by the model, and extra bytes at the peak of one forward pass."""

    batch: int
    dense_peak_bytes: int
    compressed_peak_bytes: int
    dense_resident_bytes: int
    compressed_resident_bytes: int


@dataclasses.dataclass(frozen=True)
class CurvePoint(_Record):
    """One point of metric against compression; ``metric_std`` is over ``n_seeds`` runs."""

    label: str
    method: str
    compression: float
    metric: float
    metric_std: float | None = None
    n_seeds: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(_Record):
    """Everything known about one compression of one model.

    Attributes:
        title, model, budget: As the user would say them.
        params_before, params_after: All parameters of the model, shared ones once.
        bytes_before, bytes_after: Size on disk.
        flops_before, flops_after: Per example; a multiply-add is two.
        metric_name: Such as "accuracy"; None when nothing was evaluated.
        metric_before, metric_compressed, metric_after: Dense, before healing, at the end.
        metric_noise: By how much two metrics may differ by chance, where that is known; less is no difference.
        layers, latency, memory, curve: Rows.
        healing: Mappings with ``step``, ``loss`` and perhaps ``metric``.
        notes: Sentences.
        provenance: See :func:`provenance`.

    Example:
        >>> report = Report(title="t", model="m", budget="2x", params_before=100, params_after=40)
        >>> report.compression
        2.5
        >>> Report.from_json(report.to_json()) == report
        True
    """

    title: str
    model: str
    budget: str
    params_before: int
    params_after: int
    bytes_before: int | None = None
    bytes_after: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None
    metric_name: str | None = None
    metric_before: float | None = None
    metric_compressed: float | None = None
    metric_after: float | None = None
    metric_noise: float | None = None
    layers: tuple[LayerReport, ...] = ()
    latency: tuple[LatencyRow, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    healing: tuple[dict[str, Any], ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def compression(self) -> float:
        """Parameters before over parameters after."""
        return self.params_before / max(self.params_after, 1)

    def to_json(self) -> str:
        """Return the report as JSON text; numbers that are not finite become null."""
        return json.dumps(_plain(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to ``path``; the file appears whole or not at all."""
        return write_text_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            DataError: The text is no JSON, a key is missing or unknown, or a value has the wrong type.
        """
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"a report must be JSON: the text has a fault at line {error.lineno}, column {error.colno}, "
                f"expected what Report.to_json writes ({error.msg}). Save the report again."
            ) from error
        return _decode_record(cls, value, "report")


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` beside ``path``, then rename: a reader never sees half a file.

    Returns:
        Path: ``path``, its folder created where it was missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on empty blocks
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def provenance(command: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """Collect what someone needs to repeat a result.

    Args:
        command: The command line; by default the one this process was started with.
        seed: The seed of the run.

    Returns:
        dict: ``command``, ``commit`` (None outside a checkout; ends in "-dirty" after local edits),
        ``versions``, ``platform``, ``cpu``, ``gpu``, ``threads``, ``seed``, ``date`` (UTC) and ``wall_s``,
        which is None for the caller to fill in.
    """
    import numpy

    from tensortrain._version import __version__

    return {
        "command": _command_line() if command is None else command,
        "commit": own_commit(),
        "versions": {
            "tensortrain": __version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_s": None,
    }


def _command_line() -> str:
    program, *arguments = sys.argv or [""]
    words = shlex.join([Path(program).name, *arguments])
    return words.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no text


@functools.cache
def own_commit() -> str | None:
    """The commit of this package when it was first asked for: at the end of a long run it may be another."""
    return _git_commit(Path(__file__))


def _git_commit(source: Path) -> str | None:
    # An installed copy may lie in a virtual environment inside somebody else's checkout:
    # only the repository that tracks this very file is ours.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Reduce a value to what JSON can hold."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(getattr(value, "item", None)):  # a scalar of torch or NumPy
        return _plain(value.item())
    return str(value)  # paths, dtypes, devices


def _decode_record(record: type[_R], value: Any, where: str) -> _R:
    if not isinstance(value, dict):
        raise _wrong_type(where, value, "an object")
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    known = {field.name for field in fields}
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    faults = sorted(required - value.keys()) + sorted(value.keys() - known)
    if faults:
        raise DataError(
            f"a report must have the known keys: {where} has missing or unknown {', '.join(faults)}, "
            f"expected {', '.join(field.name for field in fields)}. Write it with this tensortrain version."
        )
    hints = typing.get_type_hints(record)
    return record(**{key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Read ``value`` as the type ``hint``; ``where`` names it in the error."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None else _decode(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_record(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _wrong_type(where, value, "a list")
        return tuple(_decode(arguments[0], item, f"{where}[{k}]") for k, item in enumerate(value))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise _wrong_type(where, value, "an object")
        return value
    if hint is float:
        return _decode_float(value, where)
    if not isinstance(value, hint) or isinstance(value, bool):
        raise _wrong_type(where, value, "an integer" if hint is int else "text")
    return value


def _decode_float(value: Any, where: str) -> float:
    if value is None:  # written for a number that was not finite
        return math.nan
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _wrong_type(where, value, "a number")
    return float(value)


def _wrong_type(where: str, value: Any, expected: str) -> DataError:
    return DataError(
        f"a report must have values of the right type: {where} has {type(value).__name__}, "
        f"expected {expected}. Save the report again with Report.save."
    )
