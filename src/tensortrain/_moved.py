"""Modules under the names that they had in the version before: they answer there once more, with a DeprecationWarning.

A finder at the end of Python's list is asked only for names that nothing else has. Each line of the table goes with
the next version.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "answer_old_names", "names_of_before"]

_PACKAGE = __name__.rpartition(".")[0]

MOVED = {  # old name: where its content lies now, one or several modules
    "compress": "compression",
    "compress.aliases": "system.aliases",
    "compress.allocate": "compression.choose.allocate",
    "compress.api": "compression.api",
    "compress.apply": "compression.surgery",
    "compress.batches": "train.batches",
    "compress.beyond_reach": "compression.choose.beyond_reach",
    "compress.budget": "compression.choose.budget",
    "compress.calibrate": "compression.survey.calibrate compression.survey.moments",
    "compress.candidates": "compression.choose.candidates",
    "compress.carry": "compression.carry",
    "compress.copying": "system.copying",
    "compress.cost": "compression.choose.cost",
    "compress.guard": "train.guard",
    "compress.heal": "compression.stages.heal train.batchnorm train.loop",
    "compress.held_back": "train.held_back",
    "compress.inspect": "compression.survey.inspect",
    "compress.layers": "compression.survey.layers",
    "compress.losses": "train.losses",
    "compress.masters": "train.masters",
    "compress.measure": "compression.report.measure",
    "compress.observer": "system.observer",
    "compress.output_weights": "compression.survey.output_weights",
    "compress.outputs": "train.outputs",
    "compress.plan": "compression.choose.plan compression.choose.planner",
    "compress.preserve": "train.preserve train.modes",
    "compress.proof": "compression.proof",
    "compress.reasons": "compression.survey.reasons",
    "compress.report": "compression.report.report system.files system.provenance",
    "compress.runs": "compression.survey.runs",
    "compress.storage": "system.storage",
    "compress.task": "train.task",
    "compress.training": "train.loop train.batchnorm train.evaluation train.losses train.modes train.options "
    "train.optimizers train.schedules train.state train.batches train.outputs train.preserve system.checkpoint",
    "compress.training_state": "train.state system.checkpoint",
    "compress.uniform": "compression.choose.uniform",
    "contract.chain": "contract.shape",
    "contract.kernels": "system.native contract.compiled",
    "contract.kernels.build": "system.native.build",
    "contract.kernels.compiled": "contract.compiled",
    "contract.kernels.load": "system.native.load",
    "contract.machine": "system.machine",
    "contract.tracing": "system.tracing",
    "io.folder": "system.store.folder",
    "io.recipe": "system.store.recipe",
    "io.storable": "system.store.storable",
    "io.stored": "system.store.stored",
    "manifold.autodiff": "numerics.manifold.autodiff",
    "manifold.optim": "numerics.manifold.optim",
    "manifold.parameter": "numerics.manifold.parameter",
    "manifold.point": "numerics.manifold.point",
    "manifold.projection": "numerics.manifold.projection",
    "manifold.retraction": "numerics.manifold.retraction",
    "manifold.tangent": "numerics.manifold.tangent numerics.manifold.components",
    "models.conv_fc": "networks.conv_fc",
    "models.mlp": "networks.mlp",
    "models.registry": "networks.registry",
    "nn.constraints": "nn.shaping.constraints",
    "nn.conv_plan": "nn.conv.plan",
    "nn.conv_transpose": "nn.conv.transpose",
    "nn.embedding_bag": "nn.embedding.bag",
    "nn.gram": "cores.gram",
    "nn.orthogonal": "nn.shaping.orthogonal",
    "nn.param_groups": "nn.shaping.param_groups",
    "nn.recurrent_cells": "nn.recurrent.cells",
    "nn.recurrent_maps": "nn.recurrent.maps",
    "nn.regularize": "nn.shaping.regularize",
    "nn.stand_ins": "nn.shaping.stand_ins",
    "nn.tied": "nn.embedding.tied",
    "nn.transformer": "nn.attention.transformer",
    "tensor.chain": "cores.unfold cores.algebra cores.canonical cores.scaling",
    "tensor.indexing": "cores.indexing",
    "tensor.linalg": "cores.linalg",
    "tensor.ranks": "cores.ranks",
    "tensor.regroup": "cores.regroup",
    "tensor.scales": "cores.scales",
    "tensor.scaling": "cores.scaling",
    "tensor.setting": "tensor.train cores.setting",
    "tensor.sketch": "cores.sketch",
    "tensor.streaming": "cores.streaming",
    "tensor.sweeps": "cores.unfolding",
    "tensor.tolerance": "cores.tolerance",
    "tensor.validation": "cores.validation",
    "viz._page": "viz.report.page",
    "viz.figures": "viz.report.figures",
    "viz.html": "viz.report.html",
    "viz.terminal": "viz.report.terminal",
    "viz.text": "viz.report.text",
}

_RENAMED = {  # what has another name today, by its old module and name
    "contract.plan.Kind": "PlanKind",
    "tensor.decompose.Method": "SvdMethod",
    "tensor.linalg.energy": "squared_norm",
    "tensor.tolerance.Budget": "ErrorBudget",
}


def answer_old_names() -> None:
    """Let ``import`` find the old names, for as long as this process runs."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())


def names_of_before(module: str, *homes: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that stayed, for names of it that lie in others now: pickles hold them too."""

    def look(name: str) -> Any:
        new = _name_today(module, name)
        for home in homes if not name.startswith("__") else ():
            if f"{_PACKAGE}.{home}" == module and new == name:
                continue  # it would ask itself for ever
            found = importlib.import_module(f"{_PACKAGE}.{home}")
            if hasattr(found, new):
                warnings.warn(f"{name} has moved to {found.__name__}.{new}.", DeprecationWarning, 2)
                return getattr(found, new)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look


def _name_today(module: str, name: str) -> str:
    return _RENAMED.get(f"{module}.{name}".removeprefix(f"{_PACKAGE}."), name)


class _OldNames:
    """Finds and makes modules that pass every question on to the new ones."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        old = name.removeprefix(f"{_PACKAGE}.")
        if old == name or old not in MOVED:
            return None
        is_folder = any(other.startswith(f"{old}.") for other in MOVED)
        return ModuleSpec(name, self, is_package=is_folder)  # type: ignore[arg-type]  # asked for its methods only

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        homes = MOVED[spec.name.removeprefix(f"{_PACKAGE}.")].split()
        return _OldModule(spec.name, [f"{_PACKAGE}.{home}" for home in homes])

    def exec_module(self, module: ModuleType) -> None:
        new = " and ".join(getattr(module, "homes"))  # noqa: B009  # mypy knows a ModuleType
        warnings.warn(f"{module.__name__} has moved to {new}: import it from there.", DeprecationWarning, stacklevel=2)


class _OldModule(ModuleType):
    """A module whose names are those of others."""

    def __init__(self, name: str, homes: Sequence[str]) -> None:
        super().__init__(name, f"The old name of {', '.join(homes)}.")
        self.homes = tuple(homes)

    def __getattr__(self, name: str) -> Any:
        if name == "homes" or (name.startswith("__") and name not in ("__all__", "__wrapped__")):
            raise AttributeError(name)
        found = [importlib.import_module(home) for home in self.homes]
        if name == "__all__":
            return [public for home in found for public in getattr(home, "__all__", ())]
        wanted = self.__name__.rpartition(".")[2] if name == "__wrapped__" else _name_today(self.__name__, name)
        for home in found:
            if hasattr(home, wanted):
                return getattr(home, wanted)
        raise AttributeError(f"{self.__name__} has no {name!r}, and neither have {', '.join(self.homes)}.")

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """By name: ``tensortrain.compress`` goes to other processes, whatever was imported by its old name."""
        return importlib.import_module, (self.__name__,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Some modules had the name of a function that their folder has too: an import must not take it away."""
        return self.__wrapped__(*args, **kwargs)
