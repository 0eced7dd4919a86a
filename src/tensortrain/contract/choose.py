"""Choose the plan of least predicted time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch

from tensortrain.contract.chain_plan import ChainPlan
from tensortrain.contract.cost import CostModel, given_or_measured, is_measured
from tensortrain.contract.network import Network
from tensortrain.contract.network_plan import NetworkPlan
from tensortrain.contract.plan import Plan, Shape
from tensortrain.contract.price_chain import ChainPricer
from tensortrain.contract.price_network import NetworkPricer
from tensortrain.contract.shape import ChainShape
from tensortrain.errors import KindError
from tensortrain.system.native import library

__all__ = ["candidates", "chain_candidates", "network_candidates", "plan_chain", "plan_network"]

Force = Literal["left-to-right", "right-to-left", "merged", "dense", "factorized"]
NetworkForce = Literal["factorized", "dense"]

_PRICERS: dict[type, Any] = {ChainShape: ChainPricer, Network: NetworkPricer}


def plan_chain(
    chain: ChainShape,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    training: bool = False,
    allow_dense: bool = True,
    force: Force | None = None,
    cost_model: CostModel | None = None,
) -> ChainPlan:
    """Return the plan with the least predicted time.

    The candidates are both sweeps, each with every merge of neighbouring cores, the dense weight, and on the CPU the
    dense weight built slice by slice within the call. A merge that would hold more than half as many entries as the
    dense weight is left out.

    Args:
        chain: The shapes.
        batch: Rows of the input, all leading dimensions together.
        dtype: Of input and cores.
        device: Where they are.
        training: Cost forward and backward, and the merges of every call.
        allow_dense: Whether the dense weight may be chosen.
        force: Only plans of this kind: a sweep without merges, "merged" (at least one merge; where
            the chain has none to offer, the best sweep), "dense", or "factorized" (all but dense).
        cost_model: Constants; the device's own by default.

    Raises:
        KindError: ``force`` names no kind of plan.

    Cost: O(d^2) predictions, remembered for equal arguments.

    Example:
        >>> chain = ChainShape((4,) * 6, (2, 7, 8, 8, 7, 4), (1, 4, 4, 4, 4, 4, 1))
        >>> plan_chain(chain, batch=1, cost_model=CostModel.reference("cpu")).kind
        'merged'
    """
    plan: ChainPlan = candidates(
        chain,
        batch=batch,
        dtype=dtype,
        device=device,
        training=training,
        allow_dense=allow_dense,
        force=force,
        cost_model=cost_model,
    )[0]
    return plan


def plan_network(
    network: Network,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    training: bool = False,
    allow_dense: bool = True,
    force: NetworkForce | None = None,
    cost_model: CostModel | None = None,
) -> NetworkPlan:
    """Return the plan with the least predicted time.

    The candidates are opt_einsum's orders for this batch and for a single row, the cores one after the
    other from either end, and the dense weight. An order that merges cores into something more than half
    as large as the dense weight is left out.

    Args:
        network: The legs.
        batch, dtype, device, training, allow_dense, cost_model: As for ``plan_chain``.
        force: ``"factorized"`` or ``"dense"``.

    Raises:
        KindError: ``force`` names no kind of plan.

    Cost: four path searches, remembered for equal arguments.
    """
    plan: NetworkPlan = candidates(
        network,
        batch=batch,
        dtype=dtype,
        device=device,
        training=training,
        allow_dense=allow_dense,
        force=force,
        cost_model=cost_model,
    )[0]
    return plan


def candidates(
    shape: Shape,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    training: bool = False,
    allow_dense: bool = True,
    force: str | None = None,
    cost_model: CostModel | None = None,
) -> tuple[Any, ...]:
    """The plans that ``plan_chain`` or ``plan_network`` chooses from, shortest predicted time first.

    Of all ways to merge a chain into so many groups, in either direction, the best one; or all orders of a network;
    and the dense weight. Arguments and errors are those of ``plan_chain``.
    """
    forces = _PRICERS[type(shape)].forces
    if force is not None and force not in forces:
        raise KindError(
            f"a plan is forced by the name of its kind: force has {force!r}, expected one of {forces}. "
            "Leave it out to get the fastest plan."
        )
    device = torch.device(device)
    model = given_or_measured(cost_model, device)
    may_slice = cost_model is None and is_measured() and device.type == "cpu"
    by_kernels = may_slice and library() is not None
    asked = (training, allow_dense, force, model, by_kernels, may_slice)
    return _candidates(shape, max(int(batch), 1), dtype, device.type, *asked)


chain_candidates = network_candidates = candidates  # under the names of before


@lru_cache(maxsize=8192)
def _candidates(
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    device_type: str,
    training: bool,
    allow_dense: bool,
    force: str | None,
    model: CostModel,
    by_kernels: bool,
    may_slice: bool,
) -> tuple[Plan, ...]:
    pricer = _PRICERS[type(shape)](shape, batch, dtype, device_type, training, model, by_kernels)
    if force == "dense":
        return (pricer.dense(),)
    plans = list(pricer.factorized(force))
    if may_slice and force in (None, "factorized"):
        plans.extend(pricer.sliced())
    if force is None and allow_dense:
        plans.append(pricer.dense())
    return tuple(sorted(plans, key=lambda plan: plan.predicted_s))
