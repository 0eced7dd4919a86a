"""The compression report: what was done to a model and what it gained, as frozen data with a JSON form.

No drawing happens here: ``viz.terminal`` prints a report, ``viz.html`` turns it into a page.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

from tensortrain.errors import DataError, TTError
from tensortrain.formats import FactorSpec, Kind, WeightShape, get_format
from tensortrain.system.files import write_text_atomic
from tensortrain.system.records import Record, RecordError, read_record, to_plain

__all__ = [
    "CurvePoint",
    "LatencyRow",
    "LayerReport",
    "MemoryRow",
    "Report",
]


_NEW_OF_LAYERS = ("predicted_loss", "measured_loss", "why")  # written where they say something


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport(Record):
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
        predicted_loss: Share of the model's output (of its mean square about its mean) that the layer was predicted
            to spoil.
        why: What the next larger and smaller forms would have changed.
        measured_loss: The same as measured on a batch, with this layer alone replaced and nothing healed.
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
    predicted_loss: float | None = None
    measured_loss: float | None = None
    why: str = ""

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
class LatencyRow(Record):
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
class MemoryRow(Record):
    """Bytes held by the model, and extra bytes at the peak of one forward pass."""

    batch: int
    dense_peak_bytes: int
    compressed_peak_bytes: int
    dense_resident_bytes: int
    compressed_resident_bytes: int


@dataclasses.dataclass(frozen=True)
class CurvePoint(Record):
    """One point of metric against compression; ``metric_std`` is over ``n_seeds`` runs."""

    label: str
    method: str
    compression: float
    metric: float
    metric_std: float | None = None
    n_seeds: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Record):
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
        provenance: See ``system.provenance``.

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
        plain = to_plain(self)
        for layer in plain["layers"]:
            for name in _NEW_OF_LAYERS:
                if layer[name] in (None, ""):
                    del layer[name]
        return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

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
        try:
            return read_record(cls, value, "report")
        except RecordError as error:
            raise DataError(
                f"a report must be as Report.save wrote it: {error}. Save it again with this tensortrain version."
            ) from error
