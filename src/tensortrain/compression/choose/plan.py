"""What will be done to a model: a value that prints, compares, and goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from tensortrain.compression.survey.layers import FoundLayer, LeftAlone
from tensortrain.compression.survey.moments import Calibration
from tensortrain.errors import CheckpointError
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.base import Implementation

__all__ = ["CompressionPlan", "LayerPlan"]

_VERSION = 2


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; ``spec`` is ``None`` where it stays dense."""

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
    implementation: str = "auto"
    spectra: tuple[tuple[float, ...], ...] = ()

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

    @property
    def compression(self) -> float:
        return self.params_before / max(1, self.params_after)

    def to_json(self) -> str:
        data = {
            "version": _VERSION,
            "budget": self.budget,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "left_alone": [asdict(layer) for layer in self.left_alone],
            "task": self.task,
            "outputs": list(self.outputs),
            "notes": list(self.notes),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan back.

        Raises:
            CheckpointError: The text is not a plan, or was damaged.
        """
        try:
            data = json.loads(text)
            if data["version"] == 1:  # before plans told how a model is judged
                data = {**data, "version": _VERSION, "task": "", "outputs": [], "notes": []}
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']}")
            return cls(
                layers=tuple(_layer_from_dict(layer) for layer in data["layers"]),
                budget=str(data["budget"]),
                params_before=int(data["params_before"]),
                params_after=int(data["params_after"]),
                left_alone=tuple(LeftAlone(**layer) for layer in data["left_alone"]),
                task=str(data["task"]),
                outputs=_texts(data["outputs"]),
                notes=_texts(data["notes"]),
            )
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


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of texts is none")
    return tuple(values)


def _by(modes: Sequence[int]) -> str:
    return "(" + ",".join(map(str, modes)) + ")"


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    data = {name: getattr(layer, name) for name in LayerPlan.__dataclass_fields__}
    return {**data, "spec": None if layer.spec is None else layer.spec.to_dict()}


def _layer_from_dict(data: Mapping[str, Any]) -> LayerPlan:
    spec = None if data["spec"] is None else FactorSpec.from_dict(data["spec"])
    fields = {
        **data,
        "spec": spec,
        "names": tuple(data["names"]),
        "shape": tuple(data["shape"]),
        "spectra": tuple(tuple(values) for values in data["spectra"]),
    }
    layer = LayerPlan(**fields)
    if not _is_sound(layer) or isinstance(data["names"], str):
        raise ValueError(f"layer {data['names']!r} has values of the wrong type")
    return layer


def _is_sound(layer: LayerPlan) -> bool:
    """Whether values that were read have their types; JSON does not see to that."""
    texts = (layer.kind, layer.decision, *layer.names)
    flops = (count for count in (layer.flops_before, layer.flops_after) if count is not None)
    counts = (layer.params_before, layer.params_after, *flops, *layer.shape)
    error = 0.0 if layer.rel_error is None else layer.rel_error
    numbers = (error, *(value for values in layer.spectra for value in values))
    return (
        len(layer.names) > 0
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(count, int) for count in counts)
        and all(isinstance(number, (int, float)) for number in numbers)
        and layer.implementation in get_args(Implementation)
    )
