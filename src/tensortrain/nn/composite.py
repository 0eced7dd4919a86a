"""What layers built from several factorized maps have in common: counts, plans, derived weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tensortrain.contract import Plan
from tensortrain.errors import KindError

from . import cores as core_lists
from .base import FactorizedLayer
from .derived import read_only
from .inputs import Traced
from .linear import Linear

__all__ = ["CompositeLayer", "CompositePlan", "MapPlan"]

Map = Linear | nn.Linear  # what a map is; surgery may put either one in the other's place
Self = TypeVar("Self", bound="CompositeLayer")


@dataclass(frozen=True)
class MapPlan:
    """How one map of a composite layer runs.

    Args:
        name: Of the map in its layer.
        in_features, out_features: Sizes of the map.
        rows: Rows of one call.
        calls: How often it is called in one forward pass.
        plan: Of a factorized map; None for a plain dense one.
    """

    name: str
    in_features: int
    out_features: int
    rows: int
    calls: int
    plan: Plan | None

    @property
    def dense_flops(self) -> int:
        """Two per multiply-add of the dense map, all calls together."""
        return 2 * self.calls * self.rows * self.in_features * self.out_features

    @property
    def flops(self) -> int:
        """Two per multiply-add, all calls together, for the rows that the plan was made for."""
        return self.dense_flops if self.plan is None else self.calls * self.plan.flops

    def __str__(self) -> str:
        head = f"{self.name}: {self.calls} x {self.rows} rows"
        if self.plan is None:
            return f"{head}\n{self.in_features} -> {self.out_features}, plain dense, {self.dense_flops:.2e} flops"
        return f"{head}\n{self.plan}"


@dataclass(frozen=True)
class CompositePlan:
    """The plans of all maps of a layer, in order of definition; prints them one after the other."""

    maps: tuple[MapPlan, ...]

    @property
    def flops(self) -> int:
        """Two per multiply-add, all maps together."""
        return sum(one.flops for one in self.maps)

    @property
    def dense_flops(self) -> int:
        """The same with dense maps."""
        return sum(one.dense_flops for one in self.maps)

    def __getitem__(self, name: str) -> MapPlan:
        return {one.name: one for one in self.maps}[name]

    def __str__(self) -> str:
        return "\n\n".join(str(one) for one in self.maps)


class CompositeLayer(Traced):
    """Base of the layers that hold several maps, factorized or dense, as children.

    All parameters live in the children, so whatever knows ``tensortrain.nn.Linear`` (checkpoints, surgery,
    budgets) works on a composite layer through them. Nothing about a child's ranks is kept here.
    """

    dense_type: type[nn.Module]

    def named_maps(self) -> Iterator[tuple[str, Map]]:
        """Every linear map with its name, in order of definition."""
        for name, module in self.named_modules():
            if isinstance(module, (Linear, nn.Linear)):
                yield name, module

    def _factorized(self) -> list[FactorizedLayer]:
        return [module for module in self.modules() if isinstance(module, FactorizedLayer)]

    @property
    def n_params(self) -> int:
        """Parameters of this layer, biases and dense maps included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_core_params(self) -> int:
        """Entries of the cores alone, the figure that most papers report."""
        return sum(layer.n_core_params for layer in self._factorized())

    @property
    def compression(self) -> float:
        """Parameters of torch's layer over those of this one, biases included on both sides."""
        saved = sum(layer.spec.weight.n_params - layer.n_core_params for layer in self._factorized())
        return (self.n_params + saved) / max(1, self.n_params)

    @property
    def resident_cache_bytes(self) -> int:
        """Bytes of derived weights that the maps keep at present."""
        return sum(layer.resident_cache_bytes for layer in self._factorized())

    def clear_cache(self) -> None:
        """Drop derived weights. Needed only after cores were changed behind autograd's back (``.data``)."""
        for layer in self._factorized():
            layer.clear_cache()

    def plan(self, batch: int = 1) -> CompositePlan:
        """How every map runs on this many rows: print it to see steps, flops and predicted times."""
        return CompositePlan(tuple(plan_map(name, one, batch, 1) for name, one in self.named_maps()))

    @classmethod
    def _check_dense_type(cls, dense: object) -> None:
        if not isinstance(dense, cls.dense_type):
            raise KindError(
                f"{cls.__name__}.from_dense takes a torch.nn.{cls.dense_type.__name__}: found "
                f"{type(dense).__name__}. Pass the torch layer (to_dense() of a factorized one gives it)."
            )

    def dense_weights(self) -> dict[str, Tensor]:
        """The dense weights under the names that torch's layer gives them, differentiable in the cores.

        Those made from cores are copies to read: writing to them is refused.
        """
        own = {id(parameter) for parameter in self.parameters()}
        found = self._weights()
        return {name: w if id(w) in own else read_only(w, is_shared=True) for name, w in found.items()}

    def _weights(self) -> dict[str, Tensor]:
        """The same tensors without a copy."""
        raise NotImplementedError

    def _fill(self, dense: nn.Module) -> None:
        """Give a torch layer this one's dense weights; ``requires_grad`` and mode carry over."""
        with torch.enable_grad():  # else a weight built from cores would not tell whether they are trained
            weights = self._weights()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(weights[name])
                parameter.requires_grad_(weights[name].requires_grad)
        dense.train(self.training)

    def _size_repr(self) -> str:
        return f"params={self.n_params:,} ({self.compression:.4g}x smaller), cores={self.n_core_params:,}"


def plan_map(name: str, one: Map, rows: int, calls: int) -> MapPlan:
    """The plan of a map, factorized or dense, for so many calls."""
    plan = one.plan(rows) if isinstance(one, Linear) else None
    return MapPlan(name, one.in_features, one.out_features, rows, calls, plan)


def weight_of(one: Map) -> Tensor:
    """The dense weight of a map, not to be written to."""
    return one.full_weight() if isinstance(one, Linear) else one.weight


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A torch layer with copies of these tensors, which keep their dtype, device and ``requires_grad``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _copy(weight)
    if bias is not None:
        linear.bias = _copy(bias)
    return linear


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward put on the instance, wait for the module or its cores to be called."""
    cores = module.cores if isinstance(module, FactorizedLayer) else None
    return core_lists.is_watched(module) or (cores is not None and core_lists.is_watched(cores))


def is_plain(module: nn.Module) -> bool:
    """Whether the module is torch's linear layer, parametrized perhaps, but with no forward of its own."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
