"""Compression of trained models: inspect, plan, apply, heal, report."""

from tensortrain.compression.api import CompressionResult, compress
from tensortrain.compression.choose.budget import Budget, read_budget
from tensortrain.compression.choose.plan import CompressionPlan, LayerPlan
from tensortrain.compression.choose.planner import plan_compression
from tensortrain.compression.choose.uniform import plan_uniform
from tensortrain.compression.curve import Pareto, ParetoRow, pareto
from tensortrain.compression.report.report import (
    CurvePoint,
    LatencyRow,
    LayerReport,
    MemoryRow,
    Report,
)
from tensortrain.compression.stages.heal import Heal, heal_
from tensortrain.compression.surgery import apply_plan_, to_dense_
from tensortrain.compression.survey.calibrate import Calibration, calibrate
from tensortrain.compression.survey.inspect import Inspection, inspect
from tensortrain.compression.survey.layers import FoundLayer, count_params, find_layers
from tensortrain.compression.survey.output_weights import sentence_embedding
from tensortrain.system.files import write_text_atomic
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.processes import alone
from tensortrain.system.provenance import provenance
from tensortrain.train.batchnorm import reestimate_batchnorm_
from tensortrain.train.evaluation import evaluate_accuracy
from tensortrain.train.loop import FitResult, fit
from tensortrain.train.losses import cross_entropy_loss, distillation_loss, feature_loss

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
    "Pareto",
    "ParetoRow",
    "Report",
    "Silent",
    "alone",
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
    "pareto",
    "plan_compression",
    "plan_uniform",
    "provenance",
    "read_budget",
    "reestimate_batchnorm_",
    "sentence_embedding",
    "to_dense_",
    "write_text_atomic",
]
