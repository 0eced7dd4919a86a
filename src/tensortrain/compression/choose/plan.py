"""What will be done to a model: a value that prints, compares, and goes to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensortrain.compression.survey.layers import FoundLayer, LeftAlone
from tensortrain.compression.survey.moments import Calibration
from tensortrain.errors import CheckpointError
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.base import Implementation
from tensortrain.system.records import read_record, to_plain

__all__ = ["CompressionPlan", "LayerPlan"]

_VERSION = 3
_KEPT = (
    "budget",
    "params_before",
    "params_after",
    "layers",
    "left_alone",
    "task",
    "outputs",
    "notes",
    "opened",
)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; ``spec`` is ``None`` where it stays dense.

    ``loss`` is the share of the model's output that the choice is predicted to spoil, as far as calibration data tells;
    losses of layers add up. ``why`` says what the next forms on the menu would have changed.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    spec: FactorSpec | None
    params_before: int
    params_after: int
    flops_before: int | None
    flops_after: int | None
    rel_error: float | None
    decision: str
    implementation: Implementation = "auto"
    spectra: tuple[tuple[float, ...], ...] = ()
    loss: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a layer must have a name")

    @classmethod
    def of(cls, layer: FoundLayer, *, flops: int | None, why: str) -> LayerPlan:
        """A layer that stays as it is."""
        n = layer.n_params
        return cls(
            layer.names, layer.kind, layer.weight.dense_shape, None, n, n, flops, flops, None, f"left dense: {why}"
        )

    def left_dense(self, why: str) -> LayerPlan:
        """The same layer, not compressed after all."""
        return replace(
            self,
            spec=None,
            params_after=self.params_before,
            flops_after=self.flops_before,
            rel_error=None,
            loss=None,
            why="",
            decision=f"left dense: {why}",
        )

    def compressed(self, spec: FactorSpec, *, flops: int | None = None, **more: Any) -> LayerPlan:
        """The same layer in a smaller form; ``more`` are further fields."""
        n = self.params_before - spec.weight.n_params + spec.n_params
        return replace(self, spec=spec, params_after=n, flops_after=flops, decision="compressed", **more)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def format(self) -> str:
        return "dense" if self.spec is None else self.spec.format


@dataclass(frozen=True)
class CompressionPlan:
    """Formats, modes and ranks for a whole model. Prints as a table; ``to_json`` gives it as text.

    Attributes:
        layers: One entry a layer that can be factorized.
        budget, params_before, params_after: Of the whole model.
        left_alone: What is not touched, and why.
        task, outputs: How the model is judged, in words, and the names of its outputs that count.
        notes: Sentences on what could not be done as asked.
        opened: Layers of several maps (recurrent ones, attention) whose maps are changed one by one.
        calibration: The input statistics it was made with; not part of the text.
    """

    layers: tuple[LayerPlan, ...]
    budget: str
    params_before: int
    params_after: int
    left_alone: tuple[LeftAlone, ...] = ()
    calibration: Calibration | None = field(default=None, compare=False, repr=False)
    task: str = ""
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        return self.params_before / max(1, self.params_after)

    @property
    def loss(self) -> float | None:
        """What all choices together are predicted to spoil; ``None`` where that is not known of those that change."""
        losses = [layer.loss for layer in self.layers if layer.spec is not None]
        return None if None in losses else math.fsum(loss for loss in losses if loss is not None)

    def with_opened(self, names: Sequence[str], left_alone: Sequence[LeftAlone]) -> CompressionPlan:
        """The plan of a model that was planned with some layers taken apart.

        Args:
            names: Of these layers; those of which no map is changed are left as they are.
            left_alone: What is left alone, layers that could not be taken apart among them.
        """
        changed = [layer.name for layer in self.layers if layer.spec is not None]
        reached = tuple(n for n in names if any(name.startswith(f"{n}." if n else "") for name in changed))
        return replace(self, opened=reached, left_alone=tuple(left_alone))

    def to_json(self) -> str:
        kept = {name: to_plain(getattr(self, name)) for name in _KEPT}
        if not self.opened:  # as before plans reached the maps of recurrent layers, for those who read no later version
            del kept["opened"]
            return json.dumps({"version": 2, **kept}, indent=1)
        return json.dumps({"version": _VERSION, **kept}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan back.

        Raises:
            CheckpointError: The text is not a plan, or was damaged.
        """
        try:
            data = json.loads(text)
            if data["version"] == 1:  # before plans told how a model is judged
                data = {**data, "version": 2, "task": "", "outputs": [], "notes": []}
            if data["version"] == 2:  # before plans reached the maps of recurrent layers
                data = {**data, "version": _VERSION, "opened": []}
            if data.pop("version") != _VERSION or data.keys() != set(_KEPT):
                raise ValueError("keys or a version that are not known")
            return read_record(cls, data, "plan")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"a plan must be the text that to_json() wrote: {error!r}. Make it again with plan_compression()."
            ) from error

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        head = f"{'layer':<{width}}  {'format':<9} {'modes out x in':<28} {'ranks':<22} {'params':>23} {'error':>7}"
        rows = [head, "-" * len(head)] + [_row(layer, width) for layer in self.layers]
        rows.append(
            f"budget {self.budget}: {self.params_before:,} -> {self.params_after:,} parameters "
            f"({self.compression:.4g}x fewer)"
        )
        rows += [self.task] if self.task else []
        rows += [f"left alone: {layer}" for layer in self.left_alone]
        rows += [f"note: {note}" for note in self.notes]
        return "\n".join(rows)


def _row(layer: LayerPlan, width: int) -> str:
    spec = layer.spec
    modes = "" if spec is None else f"{_by(spec.out_modes)} x {_by(spec.in_modes)}"
    ranks = "" if spec is None else ",".join(map(str, get_format(spec.format).inner_ranks(spec)))
    error = "" if layer.rel_error is None else f"{layer.rel_error:.3f}"
    params = f"{layer.params_before:,} -> {layer.params_after:,}"
    return f"{layer.name:<{width}}  {layer.format:<9} {modes:<28} {ranks:<22} {params:>23} {error:>7}"


def _by(modes: Sequence[int]) -> str:
    return "(" + ",".join(map(str, modes)) + ")"
