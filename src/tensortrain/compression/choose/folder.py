"""What a planning has found, piece by piece in a folder: a killed one goes on from there.

Statistics of the layers, and what their menus are made of, take long; what is chosen from them does not, and depends on
the budget. So one folder serves all budgets of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tensortrain.compression.choose.candidates import Family
from tensortrain.compression.choose.head_widths import HeadWidths
from tensortrain.compression.choose.recurrent_widths import RecurrentWidths
from tensortrain.compression.choose.whole_head_widths import WholeHeadWidths
from tensortrain.compression.choose.widths import JointWidths, Width, Widths
from tensortrain.compression.survey.heads import AttentionHeads
from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.compression.survey.whole_heads import Rows, WholeHeads
from tensortrain.errors import CheckpointError, ShapeError
from tensortrain.formats import FactorSpec
from tensortrain.formats.channel_order import ChannelOrder
from tensortrain.formats.head_narrowing import HeadSteps
from tensortrain.formats.narrowing import Narrowing
from tensortrain.system.checkpoint import RunFile
from tensortrain.system.observer import Observer
from tensortrain.system.processes import first_of, gathered, own_rank

__all__ = ["Folder"]

T = TypeVar("T")
W = TypeVar("W", bound=JointWidths[Any, Any])

_GROUPS = (HiddenUnits, AttentionHeads, RecurrentUnits, WholeHeads, Rows)
_ORDERS = (Narrowing, HeadSteps, ChannelOrder)
_RECORDS = (Calibration, LayerMoments, Family, JointWidths, Width, *_GROUPS, *_ORDERS)
_NOT_KEPT = ("parks", "layers", "batches", "held", "span", "waiting", "task")


@dataclass(frozen=True)
class Folder:
    """The folder of one planning; nothing is kept where there is no path.

    Attributes:
        settings: What decides the result, as text.
        start: Signature of the model's numbers.
    """

    path: Path | None
    settings: Mapping[str, Any]
    start: Tensor
    observer: Observer

    def begin(self) -> None:
        """Say so where the folder holds what cannot be used, and remove that."""
        if self.path is not None and own_rank() == 0:
            self._tidy(self.path)
        first_of(None)  # the others wait

    def _tidy(self, folder: Path) -> None:
        file = self._file(folder, "planning")
        if file.path.exists():
            try:
                file.read()
                return
            except CheckpointError as error:
                self.observer.message(f"Planning starts over: {error}")
        for piece in [*folder.glob("moments-*.safetensors"), *folder.glob("menu-*.safetensors")]:
            piece.unlink()
        self._file(folder, "calibration").path.unlink(missing_ok=True)
        file.write({})

    def calibration(self, make: Callable[[], Calibration], *, parks: bool) -> Calibration:
        """The statistics, kept in one file for every layer."""
        if self.path is None:
            return make()
        found = self._read("calibration", lambda tree: self._calibration_from(tree, parks))
        if not all(gathered(found is not None)):
            found = make()
            if not all(map(_is_plain, (*found.batches, *found.held))):
                self.observer.message("Statistics are not kept: only batches of tensors, lists, tuples and dicts are.")
                return found
            for k, moments in enumerate(found.layers.values()):
                self._write(f"moments-{k}", moments)
                moments.set_aside()
            self._write(
                "calibration",
                {**_as_tree(found), "batches": found.batches, "held": found.held, "names": list(found.layers)},
            )
        assert found is not None
        return found

    def families(self, k: int, make: Callable[[], list[Family]]) -> list[Family]:
        """What the menu of the layer of that number is made of."""
        return self._once(f"menu-{k}", make, lambda tree: [_family_from(one) for one in tree])

    def widths(self, name: str, kind: type[W], group: Any, make: Callable[[], W]) -> W:
        """What every width of some layers that are narrowed together costs.

        Args:
            name: Of what is kept, another one for each group.
            kind: Of the record that ``make`` gives.
        """
        return self._once(f"menu-of-{name}", make, lambda tree: _widths_from(kind, group, tree))

    def _calibration_from(self, tree: dict[str, Any], parks: bool) -> Calibration:
        layers = {}
        for k, name in enumerate(tree.pop("names")):
            found = self._read(f"moments-{k}", lambda one: LayerMoments(**one, parks=parks))
            if found is None:
                raise KeyError(name)
            layers[name] = found
            found.park()
        return Calibration(layers, **tree)

    def _once(self, name: str, make: Callable[[], T], read: Callable[[Any], T]) -> T:
        if self.path is None:
            return make()
        found = self._read(name, read)
        if found is None:
            found = make()
            self._write(name, found)
        return found

    def _read(self, name: str, read: Callable[[Any], T]) -> T | None:
        """What was kept, None where it was not or cannot be used."""
        assert self.path is not None
        file = self._file(self.path, name)
        if not file.path.exists():
            return None
        try:
            return read(file.read()["found"])
        except (CheckpointError, ShapeError, KeyError, TypeError, ValueError):
            return None

    def _write(self, name: str, found: Any) -> None:
        assert self.path is not None
        if own_rank() > 0:  # the first process writes for all
            return
        try:
            self._file(self.path, name).write({"found": _as_tree(found)})
        except (CheckpointError, OSError) as error:
            self.observer.message(f"What was found cannot be kept: {error}")

    def _file(self, folder: Path, name: str) -> RunFile:
        return RunFile(folder / f"{name}.safetensors", 0.0, self.settings, self.start)


def _as_tree(value: Any) -> Any:
    """Records as dicts of their fields."""
    if isinstance(value, FactorSpec):
        return value.to_dict()
    if isinstance(value, _RECORDS):
        names = [one.name for one in dataclasses.fields(value) if one.name not in _NOT_KEPT]
        return {name: _as_tree(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: _as_tree(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_as_tree(item) for item in value)
    return value


def _is_plain(batch: Any) -> bool:
    """Whether a batch is the same after it was kept."""
    if isinstance(batch, Mapping):
        return all(map(_is_plain, batch.values()))
    if type(batch) in (list, tuple):
        return all(map(_is_plain, batch))
    return batch is None or type(batch) in (Tensor, bool, int, float, str)


def _family_from(tree: Mapping[str, Any]) -> Family:
    order = ChannelOrder.of(**tree["order"])
    return Family(**{**tree, "spec": FactorSpec.from_dict(tree["spec"]), "order": order})


def _widths_from(kind: type[W], group: Any, tree: Mapping[str, Any]) -> W:
    if _as_tree(group) != tree["group"]:
        raise KeyError(group.reader)
    menus = {name: tuple(Width(**one) for one in widths) for name, widths in tree["menus"].items()}
    return kind(**{**tree, "group": group, "order": _ORDERS_FROM[kind](tree["order"]), "menus": menus})


_ORDERS_FROM: Mapping[type, Callable[[Any], Any]] = {
    Widths: lambda tree: Narrowing(**tree),
    HeadWidths: lambda tree: HeadSteps(**tree),
    RecurrentWidths: lambda trees: tuple(Narrowing(**one) for one in trees),
    WholeHeadWidths: lambda tree: Narrowing(**tree),
}
