"""Shapes to plan to execution: how a TT-matrix multiplies, chosen by predicted time."""

from tensortrain.contract.cache import WeightCache
from tensortrain.contract.chain_plan import ChainPlan, ContractionPlan, Step
from tensortrain.contract.choose import plan_chain, plan_network
from tensortrain.contract.cost import CostModel, cost_model, measure_cost_model, use_cost_model
from tensortrain.contract.lookup import chain_lookup
from tensortrain.contract.merge import chain_to_dense, merge_cores
from tensortrain.contract.network import Network
from tensortrain.contract.network_plan import NetworkPlan
from tensortrain.contract.plan import Plan
from tensortrain.contract.shape import Chain, ChainShape
from tensortrain.contract.tune import fastest_plan
from tensortrain.system import native as kernels

__all__ = [
    "Chain",
    "ChainPlan",
    "ChainShape",
    "ContractionPlan",
    "CostModel",
    "Network",
    "NetworkPlan",
    "Plan",
    "Step",
    "WeightCache",
    "chain_lookup",
    "chain_to_dense",
    "cost_model",
    "fastest_plan",
    "kernels",
    "measure_cost_model",
    "merge_cores",
    "plan_chain",
    "plan_network",
    "use_cost_model",
]
