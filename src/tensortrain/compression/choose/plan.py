"""What will be done to a model: a value that prints, compares, and goes to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from tensortrain.compression.choose.candidates import NARROW
from tensortrain.compression.choose.head_widths import HeadWidths
from tensortrain.compression.choose.recurrent_widths import RecurrentWidths
from tensortrain.compression.choose.whole_head_widths import WholeHeadWidths
from tensortrain.compression.choose.widths import Width, Widths
from tensortrain.compression.survey.heads import AttentionHeads
from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.compression.survey.layers import FoundLayer, LeftAlone
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.compression.survey.whole_heads import WholeHeads
from tensortrain.errors import CheckpointError
from tensortrain.formats import FactorSpec, get_format
from tensortrain.formats.channel_order import ChannelOrder
from tensortrain.nn.base import Implementation
from tensortrain.system.records import read_record, to_plain

__all__ = [
    "CompressionPlan",
    "Group",
    "LayerPlan",
    "Narrowed",
    "NarrowedHeads",
    "NarrowedRecurrent",
    "NarrowedWholeHeads",
    "n_saved",
]

_VERSION = 7
_NARROWED = "narrowed"
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
    "narrowed",
    "heads",
    "recurrent",
    "whole_heads",
)
_NEW_OF_LAYERS = ("hot_ids", "in_order", "out_order", "head", "loss", "why")  # written where they say something
# By versions 3 to 7: maps of recurrent layers, hidden units, heads, units of recurrent layers, whole heads.
_ADDED = ("opened", "narrowed", "heads", "recurrent", "whole_heads")


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        spec: None where it stays dense.
        hot_ids: Rows of a table that stay as they are, beside the cores.
        in_order, out_order: Place k of a train holds input ``in_order[k]``, or output ``out_order[k]``; empty where the
            channels stand as they do in the layer.
        head: The output layer that shares a table.
        loss: The share of the model's output that the choice is predicted to spoil, as far as calibration data tells;
            losses of layers add up.
        why: What the next forms on the menu would have changed.
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
    hot_ids: tuple[int, ...] = ()
    in_order: tuple[int, ...] = ()
    out_order: tuple[int, ...] = ()
    head: str = ""
    loss: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a layer must have a name")
        if self.order.sides is not None and (self.spec is None or self.spec.weight.kind != "linear"):
            raise ValueError("only the channels of a linear layer that is compressed stand in an order of their own")
        if self.spec is not None:
            self.order.check(self.spec.weight)

    @classmethod
    def of(cls, layer: FoundLayer, *, flops: int | None, why: str) -> LayerPlan:
        """A layer that stays as it is."""
        n = layer.n_params
        return cls(
            layer.names,
            layer.kind,
            layer.weight.dense_shape,
            None,
            n,
            n,
            flops,
            flops,
            None,
            f"left dense: {why}",
            head=layer.head.names[0] if layer.head is not None else "",
        )

    def left_dense(self, why: str) -> LayerPlan:
        """The same layer, not compressed after all."""
        return replace(
            self,
            spec=None,
            in_order=(),
            out_order=(),
            params_after=self.params_before,
            flops_after=self.flops_before,
            rel_error=None,
            loss=None,
            why="",
            decision=f"left dense: {why}",
        )

    def compressed(self, spec: FactorSpec, *, flops: int | None = None, **more: Any) -> LayerPlan:
        """The same layer in a smaller form; ``more`` are further fields."""
        n_hot = len(more.get("hot_ids", ())) * spec.weight.out_features
        n = self.params_before - spec.weight.n_params + spec.n_params + n_hot
        return replace(self, spec=spec, params_after=n, flops_after=flops, decision="compressed", **more)

    def narrowed(self, width: Width, *, flops: int | None, loss: float | None) -> LayerPlan:
        """The same layer with fewer of the hidden units that it makes or reads."""
        fixed = self.params_before - math.prod(self.shape) if width.reads else 0  # the bias of the reader stays
        n = round(width.share * (self.params_before - fixed)) + fixed
        n = self.params_before - math.prod(self.shape) + width.n_params if width.with_bias else n
        error = math.sqrt(width.error) if width.reads or width.judges else None
        what = f"{width.n_units:,} units ({width.share:.0%})"
        said = f"{_NARROWED}: {what}"
        return replace(self, params_after=n, flops_after=flops, rel_error=error, loss=loss, decision=said)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def order(self) -> ChannelOrder:
        """Where the channels stand in a train."""
        return ChannelOrder.of(self.out_order, self.in_order)

    @property
    def format(self) -> str:
        if self.spec is not None:
            return self.spec.format
        return NARROW if self.decision.startswith(_NARROWED) else "dense"


@dataclass(frozen=True)
class Narrowed:
    """Hidden units of which some go, from all layers around them.

    Attributes:
        kept: Numbers of those that remain.
        n_between: Parameters that the layers between lose.
    """

    units: HiddenUnits
    kept: tuple[int, ...]
    n_between: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers that make and read the units."""
        return self.units.names

    @classmethod
    def of(cls, widths: Widths, n_units: int) -> Narrowed:
        """Those that are best kept at a width."""
        n = widths.group.n_units
        return cls(widths.group, widths.kept(n_units), widths.n_between * (n - n_units) // n)


@dataclass(frozen=True)
class NarrowedHeads:
    """Attention heads of which some directions go, from both layers around them.

    Attributes:
        kept: How many remain, by head of the values.
    """

    heads: AttentionHeads
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.kept) != self.heads.n_groups or not all(1 <= k <= self.heads.size for k in self.kept):
            raise ValueError("heads keep between one and all of their directions")

    @property
    def names(self) -> tuple[str, ...]:
        return self.heads.names

    @classmethod
    def of(cls, widths: HeadWidths, n_directions: int) -> NarrowedHeads:
        """What each head best keeps of so many in all."""
        return cls(widths.group, widths.kept(n_directions))


@dataclass(frozen=True)
class NarrowedRecurrent:
    """Recurrent layers of which hidden units go, equally many of every cell.

    Attributes:
        kept: Numbers of the units that remain, by cell.
    """

    units: RecurrentUnits
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        sizes = {len(some) for some in self.kept}
        n_cells = self.units.n_layers * self.units.n_directions
        known = all(0 <= unit < self.units.n_units for some in self.kept for unit in some)
        if len(self.kept) != n_cells or len(sizes) != 1 or sizes == {0} or not known:
            raise ValueError("all cells of a recurrent layer keep equally many of their units")

    @property
    def names(self) -> tuple[str, ...]:
        return self.units.names

    @classmethod
    def of(cls, widths: RecurrentWidths, n_units: int) -> NarrowedRecurrent:
        """Those that are best kept at a width."""
        return cls(widths.group, widths.kept(n_units))


@dataclass(frozen=True)
class NarrowedWholeHeads:
    """Attention that does without some of its heads.

    Attributes:
        kept: Numbers of the groups of heads that remain.
    """

    heads: WholeHeads
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.kept or sorted({*self.kept}) != [*self.kept] or not set(self.kept) <= {*range(self.heads.n_groups)}:
            raise ValueError("attention keeps between one and all of its heads, named once each and in order")

    @property
    def names(self) -> tuple[str, ...]:
        return self.heads.names

    @classmethod
    def of(cls, widths: WholeHeadWidths, n_groups: int) -> NarrowedWholeHeads:
        """Those that are best kept of so many."""
        return cls(widths.group, widths.kept(n_groups))


Group: TypeAlias = (
    Narrowed | NarrowedHeads | NarrowedRecurrent | NarrowedWholeHeads
)  # layers that are narrowed together


def n_saved(layers: Sequence[LayerPlan], narrowed: Sequence[Narrowed]) -> int:
    """Parameters that a plan takes away."""
    return sum(one.params_before - one.params_after for one in layers) + sum(one.n_between for one in narrowed)


@dataclass(frozen=True)
class CompressionPlan:
    """Formats, modes and ranks for a whole model. Prints as a table; ``to_json`` gives it as text.

    Attributes:
        layers: One entry a layer that can be factorized.
        budget, params_before, params_after: Of the whole model.
        left_alone: What is not touched, and why.
        task, outputs: How the model is judged, in words, and the names of its outputs that count.
        notes: Sentences on what could not be done as asked.
        opened: Layers of several maps (recurrent ones, attention) whose maps are changed one by one, and layers whose
            weight is computed at every call (weight norm, pruning) and plain from then on.
        narrowed: Hidden units of which some go.
        heads: Attention heads of which some directions go.
        recurrent: Recurrent layers of which hidden units go.
        whole_heads: Attention of which whole heads go.
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
    narrowed: tuple[Narrowed, ...] = ()
    heads: tuple[NarrowedHeads, ...] = ()
    recurrent: tuple[NarrowedRecurrent, ...] = ()
    whole_heads: tuple[NarrowedWholeHeads, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """All layers that are narrowed together, of every kind."""
        return (*self.narrowed, *self.heads, *self.recurrent, *self.whole_heads)

    def with_groups(self, groups: Sequence[Group]) -> CompressionPlan:
        """The same plan with these layers narrowed together."""
        return replace(
            self,
            narrowed=tuple(one for one in groups if isinstance(one, Narrowed)),
            heads=tuple(one for one in groups if isinstance(one, NarrowedHeads)),
            recurrent=tuple(one for one in groups if isinstance(one, NarrowedRecurrent)),
            whole_heads=tuple(one for one in groups if isinstance(one, NarrowedWholeHeads)),
        )

    @property
    def compression(self) -> float:
        return self.params_before / max(1, self.params_after)

    @property
    def loss(self) -> float | None:
        """What all choices together are predicted to spoil; ``None`` where that is not known of those that change."""
        losses = [layer.loss for layer in self.layers if layer.spec is not None or layer.loss is not None]
        return None if None in losses else math.fsum(loss for loss in losses if loss is not None)

    def with_opened(
        self, names: Sequence[str], left_alone: Sequence[LeftAlone], beside: Mapping[str, int] | None = None
    ) -> CompressionPlan:
        """The plan of a model that was planned with some layers taken apart.

        Args:
            names: Of these layers; those of which nothing is changed are left as they are.
            left_alone: What is left alone, layers that could not be taken apart among them.
            beside: Parameters from which weights were computed; those of layers with maps of their own still count.
        """
        changed = [layer.name for layer in self.layers if layer.spec is not None]
        changed += [name for one in self.narrowed for name in (*one.names, *one.units.between)]
        changed += [name for one in self.recurrent for name in one.names]
        changed += [name for one in self.whole_heads for name in one.names]
        reached = tuple(n for n in names if any(name == n or name.startswith(f"{n}." if n else "") for name in changed))
        own = {layer.name for layer in self.layers}
        gone = sum(n for name, n in (beside or {}).items() if name in reached and name not in own)
        return replace(self, opened=reached, left_alone=tuple(left_alone), params_after=self.params_after - gone)

    def to_json(self) -> str:
        kept = {name: to_plain(getattr(self, name)) for name in _KEPT}
        for layer in kept["layers"]:
            for name in _NEW_OF_LAYERS:
                if layer[name] in (None, "", []):
                    del layer[name]
        version = _VERSION
        for name in reversed(_ADDED):  # as before plans knew of these, for those who read no later version
            if kept[name]:
                break
            del kept[name]
            version -= 1
        return json.dumps({"version": version, **kept}, indent=1)

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
            for k, name in enumerate(_ADDED):
                if data["version"] == 2 + k:
                    data = {**data, "version": 3 + k, name: []}
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
    ranks += f" + {len(layer.hot_ids):,} rows" if layer.hot_ids else ""
    ranks += f" ordered {layer.order.sides}" if layer.order.sides else ""
    error = "" if layer.rel_error is None else f"{layer.rel_error:.3f}"
    params = f"{layer.params_before:,} -> {layer.params_after:,}"
    return f"{layer.name:<{width}}  {layer.format:<9} {modes:<28} {ranks:<22} {params:>23} {error:>7}"


def _by(modes: Sequence[int]) -> str:
    return "(" + ",".join(map(str, modes)) + ")"
