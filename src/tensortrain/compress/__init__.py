"""Compression of trained models: inspect, plan, apply, heal, report."""

from .api import CompressionResult, compress
from .apply import apply_plan_, to_dense_
from .budget import Budget, read_budget
from .calibrate import Calibration, calibrate
from .heal import Heal, heal_
from .inspect import Inspection, inspect
from .layers import FoundLayer, count_params, find_layers
from .losses import cross_entropy_loss, distillation_loss, feature_loss
from .observer import Observer, Silent
from .output_weights import sentence_embedding
from .plan import CompressionPlan, LayerPlan, plan_compression
from .report import CurvePoint, LatencyRow, LayerReport, MemoryRow, Report, provenance, write_text_atomic
from .training import FitResult, evaluate_accuracy, fit, reestimate_batchnorm_
from .uniform import plan_uniform

__all__ = [
    "Budget",
    "Calibration",
    "CompressionPlan",
    "CompressionResult",
    "CurvePoint",
    "FitResult",
    "FoundLayer",
    "Heal",
    "Inspection",
    "LatencyRow",
    "LayerPlan",
    "LayerReport",
    "MemoryRow",
    "Observer",
    "Report",
    "Silent",
    "apply_plan_",
    "calibrate",
    "compress",
    "count_params",
    "cross_entropy_loss",
    "distillation_loss",
    "evaluate_accuracy",
    "feature_loss",
    "find_layers",
    "fit",
    "heal_",
    "inspect",
    "plan_compression",
    "plan_uniform",
    "provenance",
    "read_budget",
    "reestimate_batchnorm_",
    "sentence_embedding",
    "to_dense_",
    "write_text_atomic",
]
