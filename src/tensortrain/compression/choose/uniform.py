"""The simplest plan: one rank for all layers. A baseline to compare allocations with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tensortrain.compression.choose.budget import BudgetLike, read_budget
from tensortrain.compression.choose.plan import CompressionPlan, LayerPlan
from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.survey.layers import FoundLayer, count_params, find_layers
from tensortrain.errors import BudgetError
from tensortrain.formats import FactorSpec, get_format

__all__ = ["plan_uniform"]


def plan_uniform(
    model: nn.Module,
    *,
    budget: BudgetLike,
    format: str = "low_rank",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> CompressionPlan:
    """The same rank for every layer, the largest that fits; the decomposition of the weights as they are.

    Layers that this rank would not make smaller stay dense.

    Args:
        budget: As ``plan_compression``, in parameters.
        format: One format for all layers.

    Raises:
        BudgetError: Rank one is already too large.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> [layer.spec.ranks for layer in plan_uniform(net, budget="2x").layers]
        [(1, 11, 1), (1, 8, 1)]
    """
    with opened_for_a_while(model) as opened:
        plan = _uniform(opened.model, budget, format, include, exclude)
    return plan.with_opened(opened.names, opened.left_alone(plan.left_alone))


def _uniform(
    model: nn.Module,
    budget: BudgetLike,
    format: str,
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
) -> CompressionPlan:
    layers, left = find_layers(model, include=include, exclude=exclude)
    total = count_params(model)
    limit = read_budget(budget, params=total)
    fixed = total - sum(layer.weight.n_params for layer in layers)

    def size(rank: int) -> int:
        return fixed + sum(_size(layer, _spec(layer, format, rank)) for layer in layers)

    if limit.measure != "params" or size(1) > limit.limit:
        raise BudgetError(
            f"a budget must be reachable: one rank for all layers needs at least {size(1):,} parameters, found "
            f"{limit.text}. Ask for more, or use plan_compression."
        )
    rank, dense = 1, size(10**9)
    while size(rank) < dense and size(rank + 1) <= limit.limit:
        rank += 1
    plans = tuple(_plan(layer, _spec(layer, format, rank)) for layer in layers)
    return CompressionPlan(plans, limit.text, total, size(rank), tuple(left))


def _spec(layer: FoundLayer, format: str, rank: int) -> FactorSpec | None:
    """The spec at this rank, ``None`` where it would not be smaller or the format does not serve the layer."""
    fmt = get_format(format)
    if layer.weight.kind not in fmt.kinds:
        return None
    spec = fmt.spec(layer.weight, rank=rank)
    return spec if spec.n_params < layer.weight.n_params else None


def _size(layer: FoundLayer, spec: FactorSpec | None) -> int:
    return layer.weight.n_params if spec is None else spec.n_params


def _plan(layer: FoundLayer, spec: FactorSpec | None) -> LayerPlan:
    dense = LayerPlan.of(layer, flops=None, why="no smaller at this rank")
    return dense if spec is None else dense.compressed(spec)
