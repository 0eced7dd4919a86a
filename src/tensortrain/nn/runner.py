"""How a layer runs: its plans by size, the weights kept for them, and the short way through the kernels.

A layer is parameters and a spec; its runner knows what was found out about running it. A runner holds no layer: every
method takes the one that asks, so that copies and replicas of a layer may share it.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract import ChainShape, CostModel, Network, Plan, WeightCache, fastest_plan
from tensortrain.contract.choose import candidates
from tensortrain.contract.compiled import compiled
from tensortrain.contract.plan import Shape
from tensortrain.system.machine import memory_bytes
from tensortrain.system.native import library
from tensortrain.system.tracing import constant_when_traced, is_traced, static_power_of_two

from .cores import PLAIN_LISTS, are_plain, held_cores, is_watched
from .inputs import is_plain_input

if TYPE_CHECKING:
    from .base import FactorizedLayer

__all__ = [
    "DENSE_LIMIT_BYTES",
    "FEW_WHEN_TRACED",
    "SMALL_WEIGHT_BYTES",
    "Runner",
    "device_type_of",
    "may_be_dense",
    "power_of_two",
    "trains",
]

FEW_WHEN_TRACED = 32  # rows that a traced program is planned for where it takes any number
SMALL_WEIGHT_BYTES = 16 * 2**20
DENSE_LIMIT_BYTES = max(SMALL_WEIGHT_BYTES, memory_bytes() // 64)
_keep_large: weakref.WeakSet[Runner] = weakref.WeakSet()  # those that keep a larger weight than this
_FORCE: dict[str, Any] = {"auto": None, "dense": "dense", "factorized": "factorized"}


# -- what is asked of a layer -------------------------------------------------------------------------


def trains(layer: FactorizedLayer) -> bool:
    """Whether gradients to the cores are being recorded."""
    return torch.is_grad_enabled() and any(core.requires_grad for core in layer.core_list())


def may_be_dense(layer: FactorizedLayer) -> bool:
    """Whether the layer may build its dense weight."""
    return layer.implementation != "factorized" and _dense_bytes(layer) <= layer.kept_limit_bytes


def _dense_bytes(layer: FactorizedLayer) -> int:
    return layer.spec.weight.n_params * layer.cores[0].element_size()


def _may_keep_dense(layer: FactorizedLayer) -> bool:
    """Whether the layer may keep its dense weight too: large ones share a part of the machine's memory."""
    more = _dense_bytes(layer)
    if not may_be_dense(layer):
        return False
    if more <= SMALL_WEIGHT_BYTES or layer.cores[0].is_cuda:
        return True
    kept = sum(runner.cache.nbytes for runner in _keep_large if runner is not layer.runner)
    return kept + more <= memory_bytes() // 8


def device_type_of(layer: FactorizedLayer) -> str:
    """What the layer is planned for; one without memory for the CPU."""
    return "cuda" if layer.cores[0].is_cuda else "cpu"


def power_of_two(rows: int) -> int:
    """So many rows or up to twice as many: sizes are rounded up so that few plans are made."""
    return 1 << max(0, rows - 1).bit_length()


def _options(layer: FactorizedLayer) -> tuple[Any, ...]:
    """What a user may set on a layer at any time, and what plans depend on."""
    return layer.implementation, layer.dense_limit_bytes, layer.may_time_plans


class PlanKey(NamedTuple):
    """What tells the plans of one layer apart."""

    rows: int
    training: bool
    force: Any
    implementation: str
    dense_limit_bytes: int
    may_time: bool

    @classmethod
    def of(cls, layer: FactorizedLayer, rows: int, training: bool, force: Any = None) -> PlanKey:
        may_time = layer.may_time_plans and not torch.are_deterministic_algorithms_enabled()
        return cls(power_of_two(rows), training, force, layer.implementation, layer.dense_limit_bytes, may_time)


class Runner:
    """Runs one layer.

    Args:
        shape: What carries the layer's product; None for a layer that has no plan.
        sizes: ``(in_features, out_features)`` of the layer, where the shape may exceed them.
        may_time: Whether plans may be run to find the fastest, where the layer allows it too.

    Attributes:
        plans: Those of ``shape`` found so far.
        layer_plans: Of a layer that does more than one product with ``shape``: its own, under keys of its own.
        cache: Weights that follow from the cores, kept while these do not change.
        way: A shorter way for inputs of sizes met before, ``way(layer, x)``; it gives ``None`` where there is none.
        quick_calls: Of a convolution: by the shape of the input, what an earlier one left ready.
    """

    way: Any = None

    def __init__(self, shape: Shape | None, sizes: tuple[int, int] | None = None, *, may_time: bool = True) -> None:
        self.shape, self.sizes, self.may_time = shape, sizes, may_time
        # As plain values, which a compiler can look into.
        self._told = ("", ()) if shape is None else _told(shape)
        self.forget()

    def forget(self) -> None:
        """Drop plans and weights."""
        self.cache = WeightCache()
        self.plans: dict[PlanKey, Plan] = {}
        self.layer_plans: dict[Any, Any] = {}
        self.way = None
        self.quick_calls: dict[Any, Any] = _Uncopied()
        self._way_options: tuple[Any, ...] = ()

    # -- running -------------------------------------------------------------------------------------

    def run(self, layer: FactorizedLayer, x: Tensor) -> Tensor:
        """The product with a plain input of any size, which leaves a shorter way to the next of its size."""
        y, plan = self.product(layer, x, layer.bias)
        if plan is not None:
            self._keep_way(layer, plan, x)
        return y

    def product(self, layer: FactorizedLayer, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Plan | None]:
        """The product that the cores make, and by which plan; by none that is kept in a traced program."""
        if is_traced():  # the same program whether or not gradients are wanted
            plan = self.plan_when_traced(layer, math.prod(x.shape[:-1]))
            return plan.execute(x, layer.plan_cores(), bias=bias), None
        plan = self.plan(layer, _n_rows(x))
        if trains(layer):
            self.cache.clear()  # the cores are about to change
            return plan.execute(x, layer.plan_cores(), bias=bias), plan
        return plan.execute(x, (), self.prepared(layer, plan), bias), plan

    def _keep_way(self, layer: FactorizedLayer, plan: Plan, x: Tensor) -> None:
        """Let the kernels take inputs of this size next time, where they are built and the layer is an ordinary one."""
        kernels = library()
        if kernels is None:
            self.way = by_kept_weight
            return
        if x.device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
            return
        if layer.stand_ins is not None or not are_plain(layer.cores):
            return
        way, training, cores = self.current_way(kernels.ShortWay, _options(layer)), trains(layer), layer.core_list()
        sweep = compiled(plan, ready=not training)
        if sweep is None:
            return
        if training:
            if all(map(_is, layer.plan_cores(), cores)):  # the kernels are given the parameters
                way.keep_training(_n_rows(x), sweep)
            return
        found = self.cache.peek(cores, plan.prepared_key)
        if found is not None:
            way.keep_inference(_n_rows(x), sweep, [found] if plan.uses_dense else list(found), cores)

    def current_way(self, kind: Any, options: tuple[Any, ...]) -> Any:
        """The kernels' short way of this kind, a new one where settings of the layer have changed."""
        way = self.way
        if not isinstance(way, kind) or self._way_options != options:
            library().know_core_lists(*PLAIN_LISTS)  # type: ignore[union-attr]
            way = kind(list(options))
            self.way, self._way_options, self.cache.holder = way, options, way
        return way

    def multiplies_by_kept_weight(self, layer: FactorizedLayer, x: Tensor) -> bool:
        """Whether an input like this one meets the dense weight, kept from call to call."""
        return not is_traced() and not trains(layer) and self.plan(layer, _n_rows(x)).uses_dense

    # -- plans ---------------------------------------------------------------------------------------

    def plan(self, layer: FactorizedLayer, rows: int, *, force: Any = None) -> Plan:
        """The plan for about so many rows; ``force`` asks for another one than the layer's ``implementation`` does."""
        key = PlanKey.of(layer, rows, trains(layer), force)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self._found(layer, key)
        return plan

    def _found(self, layer: FactorizedLayer, key: PlanKey) -> Plan:
        core = layer.cores[0]
        assert self.shape is not None
        plan = fastest_plan(
            self.shape,
            batch=key.rows,
            dtype=core.dtype,
            device=core.device if core.is_cuda else "cpu",
            training=key.training,
            allow_dense=may_be_dense(layer) if key.training else _may_keep_dense(layer),
            force=key.force or _FORCE[layer.implementation],
            may_time=self.may_time and key.may_time and core.device.type in ("cpu", "cuda"),
        )
        return plan if self.sizes is None else plan.fit(*self.sizes)

    def plan_when_traced(self, layer: FactorizedLayer, rows: int | None, *, force: Any = None) -> Plan:
        """The plan of a traced program: for its number of rows, where that is fixed in it."""
        bucket = (None if rows is None else static_power_of_two(rows)) or FEW_WHEN_TRACED
        told, core, asked = self._told, layer.cores[0], force or _FORCE[layer.implementation]
        place = core.dtype, device_type_of(layer)
        name = _name_of_plan(told[0], told[1], self.sizes, bucket, *place, may_be_dense(layer), asked)
        plan: Plan = getattr(_traced_plans, name)
        return plan

    def words(self) -> list[str]:
        """How each plan made for inference so far runs."""
        plans = self.layer_plans or self.plans  # those of the layer stand on the others
        return list(dict.fromkeys(plan.words for key, plan in plans.items() if not key.training))

    # -- derived weights -----------------------------------------------------------------------------

    def cached(self, layer: FactorizedLayer, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` makes of the layer's cores, kept while they do not change."""
        if held_cores(layer) is not None:  # cores that a hook makes or loads for this call alone must not outlive it
            return build()
        return self.cache.get(layer.core_list(), build, tag=key)

    def dense_weight(self, layer: FactorizedLayer) -> Tensor:
        """The dense weight that the cores make, in torch's layout; not to be written to, since it may be kept."""
        weight: Tensor = self.cached(layer, "dense", layer.build_weight)
        if weight.nbytes > SMALL_WEIGHT_BYTES:
            _keep_large.add(self)
        return weight

    def prepared(self, layer: FactorizedLayer, plan: Plan) -> tuple[Tensor, ...]:
        """The weights of a plan: the cores merged and laid out, or the dense weight."""
        if plan.uses_dense:
            return (self.dense_weight(layer),)
        weights: tuple[Tensor, ...] = self.cached(layer, plan.prepared_key, lambda: plan.prepare(layer.plan_cores()))
        return weights


def by_kept_weight(layer: FactorizedLayer, x: Tensor) -> Tensor | None:
    """Without kernels: the product by the dense weight, where it runs at this many rows and is kept."""
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or not is_plain_input(x) or is_traced():
        return None
    if x.ndim == 0 or is_watched(layer.cores):
        return None
    runner = layer.runner
    plan = runner.plans.get(PlanKey.of(layer, _n_rows(x), training=False))
    if plan is None or not plan.uses_dense or plan.flips or x.shape[-1] != plan.in_features:
        return None
    weight = runner.cache.peek(layer.core_list(), plan.prepared_key)
    return None if weight is None else F.linear(x, weight, layer.bias)


class _Uncopied(dict[Any, Any]):
    """A dictionary whose copies, pickled ones too, are empty."""

    def __reduce__(self) -> tuple[type[_Uncopied], tuple[()]]:
        return _Uncopied, ()


def _told(shape: Shape) -> tuple[str, tuple[Any, ...]]:
    return type(shape).__name__, tuple(getattr(shape, field.name) for field in fields(shape))


def _n_rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


# -- plans of traced programs -------------------------------------------------------------------------


class _Plans:
    """The plans that traced programs have asked for, as attributes: what a compiler can look up by name."""


_traced_plans = _Plans()
_SHAPES: dict[str, Any] = {kind.__name__: kind for kind in (ChainShape, Network)}


@constant_when_traced  # plain arguments and a plain answer, as a compiler wants them
def _name_of_plan(
    kind: str,
    shape: tuple[Any, ...],
    sizes: Sequence[int] | None,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    allow_dense: bool,
    force: Any,
) -> str:
    """Make the plan for a program that keeps nothing between its calls: as in training, every call merges its cores."""
    asked = repr((kind, shape, sizes, rows, dtype, device_type, allow_dense, force))
    name = f"plan_{hashlib.sha256(asked.encode()).hexdigest()[:24]}"
    if not hasattr(_traced_plans, name):
        options: dict[str, Any] = {"batch": rows, "dtype": dtype, "training": True, "allow_dense": allow_dense}
        options |= {"force": force, "cost_model": CostModel.reference(device_type)}
        plan = candidates(_SHAPES[kind](*shape), **options)[0]
        setattr(_traced_plans, name, plan if sizes is None else plan.fit(*sizes))
    return name
